"""The zoo: what ships loads in transformers; a zoo is built deterministically or not at all."""

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from suture import zoo
from suture.errors import CheckpointError, ConfigError, OutputError
from tools.zoo import alphabets, drawing
from tools.zoo import build as build_zoo
from tools.zoo.recipe import MINIATURE

GLYPHS8 = zoo.resolve("zoo:glyphs8")


def read_split(task: str, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = zoo.resolve(f"zoo:glyphs8/data/{task}")
    pixels = gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    shape = struct.unpack(">3I", pixels[4:16])
    images = torch.frombuffer(bytearray(pixels[16:]), dtype=torch.uint8).view(shape)
    return images, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPModel, CLIPTokenizer

    folder = GLYPHS8 / "pretrained"
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


def accuracy(model, tokenizer, task: str) -> float:
    from tools.zoo import training

    images, labels = read_split(task, "t10k")
    head = training.zero_shot_head(model, tokenizer, alphabets.classnames_of(task))
    with torch.no_grad():
        return (training.image_logits(model, images, head).argmax(1) == labels).float().mean().item()


def test_the_zoo_imports_nothing_heavy():
    heavy = "'transformers', 'matplotlib', 'sklearn', 'torch'"
    code = (
        "import sys; from suture import errors; before = set(sys.modules); "
        "import suture.zoo; suture.zoo.names(); "
        f"print([m for m in ({heavy}) if m in set(sys.modules) - before])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_glyphs8_is_installed_and_resolves_to_files():
    assert "glyphs8" in zoo.names()
    assert (zoo.resolve("zoo:glyphs8/experts/greek") / "model.safetensors").is_file()


def test_an_unknown_zoo_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match=r"no zoo 'glyphs9'\. Known: .*glyphs8"):
        zoo.resolve("zoo:glyphs9/pretrained")
    with pytest.raises(ConfigError, match=r"Unknown zoo 'glyphs9'\. Did you mean 'glyphs8'"):
        build_zoo("glyphs9", Path("nowhere"))


@pytest.mark.parametrize("path", ["experts/klingon", "experts/..", "pretrained/config.json/deeper"])
def test_an_unknown_part_of_a_zoo_is_refused_in_one_line(path: str):
    with pytest.raises(CheckpointError, match="Known: ") as caught:
        zoo.resolve(f"zoo:glyphs8/{path}")
    assert "\n" not in str(caught.value)


def test_the_shipped_files_are_smaller_than_36_megabytes():
    assert sum(path.stat().st_size for path in GLYPHS8.rglob("*") if path.is_file()) < 36_000_000


def test_shipped_experts_load_in_transformers_and_have_published_keys():
    from safetensors import safe_open
    from transformers import CLIPVisionModel

    for task in alphabets.TASK_NAMES:
        folder = GLYPHS8 / "experts" / task
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert all(name.startswith("vision_model.") for name in stored)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        loaded = CLIPVisionModel.from_pretrained(folder).state_dict()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, stored["vision_model." + name.removeprefix("vision_model.")])


def test_the_shipped_processor_and_tokenizer_load_without_torchvision(clip):
    from PIL import Image
    from transformers import CLIPProcessor

    processor = CLIPProcessor.from_pretrained(GLYPHS8 / "pretrained")
    batch = processor(text=["a glyph of digit one"], images=[Image.new("L", (16, 16), 255)], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert torch.allclose(batch["pixel_values"], torch.tensor(2.0), atol=1e-4)
    model, tokenizer = clip
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert model.text_model.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("task", alphabets.TASK_NAMES)
def test_stored_images_have_the_contrast_the_processor_expects(task: str):
    images, labels = read_split(task, "t10k")
    assert len(images) == len(labels) > 800
    assert labels.unique().tolist() == list(range(len(alphabets.classnames_of(task))))
    assert 115 < images.float().mean() < 140
    assert 48 < images.float().std() < 70


@pytest.mark.parametrize("task", ["armenian", "digits"])
def test_a_shipped_expert_beats_the_pretrained_model_on_its_task(clip, task: str):
    import copy

    from transformers import CLIPVisionModel

    model, tokenizer = clip
    expert = copy.deepcopy(model)
    tower = CLIPVisionModel.from_pretrained(GLYPHS8 / "experts" / task, dtype=torch.float32)
    state = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    expert.vision_model.load_state_dict(state)
    assert accuracy(expert, tokenizer, task) > accuracy(model, tokenizer, task) + 0.1


def test_every_font_of_a_task_has_every_glyph():
    for task in alphabets.GLYPH_TASKS:
        for font in task.fonts:
            assert drawing.covered(font, task.characters) == task.characters


@pytest.mark.parametrize("style", drawing.STYLES)
def test_a_style_of_no_strength_leaves_the_page_as_it_was(style: str):
    pages = drawing.bend(drawing.draw_glyphs("DejaVuSans", "abc"), 1.0, torch.Generator().manual_seed(0))
    spoiled = drawing.spoil(pages.clone(), style, torch.zeros(3), torch.Generator().manual_seed(0))
    assert torch.allclose(spoiled, pages, atol=1e-6)


def test_two_builds_are_the_same_bit_for_bit_and_load(tmp_path: Path):
    from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

    first = build_zoo("glyphs8", tmp_path / "first", seed=3, recipe=MINIATURE)
    torch.manual_seed(99)
    second = build_zoo("glyphs8", tmp_path / "second", seed=3, recipe=MINIATURE)
    assert digests(first) == digests(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    shipped = digests(GLYPHS8 / "pretrained")
    assert digests(first / "pretrained")["tokenizer.json"] == shipped["tokenizer.json"]
    CLIPModel.from_pretrained(first / "pretrained")
    CLIPProcessor.from_pretrained(first / "pretrained")
    CLIPVisionModel.from_pretrained(first / "experts" / "latin")


def test_building_over_something_is_refused(tmp_path: Path):
    with pytest.raises(OutputError, match="exists"):
        build_zoo("glyphs8", tmp_path, recipe=MINIATURE)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tools.zoo import training

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "pretrain", fail)
    with pytest.raises(KeyboardInterrupt):
        build_zoo("glyphs8", tmp_path / "zoo", recipe=MINIATURE)
    assert list(tmp_path.iterdir()) == []
