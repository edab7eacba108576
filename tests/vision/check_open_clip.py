"""The family open_clip against the real library: layouts, the authors' pickles, and a whole run."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from clip_layouts import to_open_clip, to_transformers
from desk import CLASSES, write_idx
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from tiny_clip import save_tiny_clip

from suture.checkpoints import open_checkpoint, save_checkpoint
from suture.cli.main import main
from suture.families.open_clip import OpenClip
from suture.families.testing import check_family
from suture.tasks import Task

VISION = {"layers": 2, "width": 64, "head_width": 64, "patch_size": 4, "image_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def clip(seed=0):
    torch.manual_seed(seed)
    return CLIP(32, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=True).eval()


def hugging_face():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    vision = {**tower, "image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=32)).eval()


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_weights_of_open_clip_give_the_same_outputs_in_transformers(pixels):
    theirs, ours = clip(), hugging_face()
    ours.load_state_dict(to_transformers(theirs.state_dict()), strict=False)
    tokens = torch.randint(0, 400, (3, 77), generator=torch.Generator().manual_seed(2))
    tokens[:, -1] = 49407
    with torch.no_grad():
        image, text = theirs.encode_image(pixels), theirs.encode_text(tokens)
        output = ours(input_ids=tokens, pixel_values=pixels)
        scaled = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    torch.testing.assert_close(output.logits_per_image, ours.logit_scale.exp() * scaled, atol=1e-4, rtol=1e-4)


def test_the_two_layouts_are_each_other_s_inverse():
    state = clip().state_dict()
    back = to_open_clip(to_transformers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_encoder_is_open_clip_s_own(pixels):
    model = clip()
    encoder = OpenClip(None, model.state_dict()).encoder()
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.encode_image(pixels))


def test_heads_come_from_the_text_tower():
    model, names = clip(), ["cat", "dog"]
    family = OpenClip(None, model.state_dict())
    from open_clip import SimpleTokenizer

    with torch.no_grad():
        text = model.encode_text(SimpleTokenizer(context_length=77)(["a cat.", "a dog."]))
    torch.testing.assert_close(family.directions(names, ["a {}."]), torch.nn.functional.normalize(text, dim=-1))


_MODELING = """
import torch, open_clip
class ImageEncoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        delattr(self.model, "transformer")
class ClassificationHead(torch.nn.Linear):
    def __init__(self, weights):
        super().__init__(weights.shape[1], weights.shape[0])
        self.weight = torch.nn.Parameter(weights)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.bias))
"""
_SAVE = """
import sys; sys.path[:0] = [{tests!r}, {vision!r}]
import vision_libraries; vision_libraries.enable()
import torch
from check_open_clip import clip
from modeling import ImageEncoder, ClassificationHead
base = ImageEncoder(clip())
torch.save(base, "zeroshot.pt")
for seed, name in enumerate(["first", "second"]):
    tuned = ImageEncoder(clip())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.model.visual.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    torch.save(tuned, f"{{name}}.pt")
    head = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator), dim=-1)
    torch.save(ClassificationHead(100 * head), f"head_{{name}}.pt")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Pickled encoders and heads, saved by another process with classes that are then gone."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "modeling.py").write_text(_MODELING)
    here = os.path.dirname(__file__)
    program = textwrap.dedent(_SAVE).format(tests=os.path.join(os.path.dirname(here), "support"), vision=here)
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    (folder / "modeling.py").unlink()
    for name in ("first", "second"):
        write_idx(folder / "data" / name, torch.Generator().manual_seed(3))
    return folder


@pytest.fixture
def words(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"_pretrained_": "zeroshot.pt", "first": "first.pt", "second": "second.pt"}
    heads = {name: f"head_{name}.pt" for name in ("first", "second")}
    pool = {"family": "open_clip", "root": str(published), "models": models, "heads": heads}
    tasks = {
        name: {"source": str(published / "data" / name), "classnames": CLASSES, "templates": ["a {}."]}
        for name in ("first", "second")
    }
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return ["modelpool=pool.yaml", "taskpool=tasks.yaml", "output=out"]


def test_the_authors_pickles_are_merged_and_scored(words, published):
    assert main(["method=ties_merging", *words]) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["samples"] == {"first": 12, "second": 12}
    merged, base = open_checkpoint("out/model"), open_checkpoint(published / "zeroshot.pt")
    assert merged.keys() == base.keys()
    assert torch.equal(merged["model.token_embedding.weight"], base["model.token_embedding.weight"])
    assert not torch.equal(merged["model.visual.proj"], base["model.visual.proj"])


@pytest.mark.parametrize("method", ["lw_adamerging", "tw_adamergingpp"])
def test_the_authors_pickles_are_adapted_and_repaired(words, method):
    assert main([f"method={method}", "surgery=deep", "fast_dev_run=true", *words]) == 0
    assert len(json.loads(Path("out/report.json").read_text())["rows"]) >= 4


def test_unmoved_entries_of_a_pickle_count_when_ties_trims(published):
    names = OpenClip.canonical_names(open_checkpoint(published / "zeroshot.pt"))
    assert "token_embedding.weight" in names


def test_a_head_of_another_number_of_classes_is_refused(words, published, capsys):
    import suture

    family = suture.families.open_clip.OpenClip(
        None, open_checkpoint(published / "zeroshot.pt"), {"heads": {"first": str(published / "head_first.pt")}}
    )
    with pytest.raises(suture.SutureError, match="has 3 classes but 'first' has 2"):
        family.head(suture.Task("first", "", ("a", "b"), ("{}",)))


def test_a_merged_clip_gives_equal_logits_in_transformers_and_open_clip(tmp_path, monkeypatch, pixels):
    """Pool → merge → save → load in either library."""
    from transformers import CLIPModel

    monkeypatch.chdir(tmp_path)
    base = save_tiny_clip(tmp_path / "base", width=64)
    tensors = dict(open_checkpoint(base))
    tower = {n: t * 1.1 for n, t in tensors.items() if n.startswith("vision_model.") and t.is_floating_point()}
    save_checkpoint(tower, tmp_path / "tuned.safetensors")
    pool = {"models": {"_pretrained_": str(base), "tuned": str(tmp_path / "tuned.safetensors")}}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    assert main(["method=task_arithmetic", "modelpool=pool.yaml", "output=out"]) == 0
    merged = CLIPModel.from_pretrained("out/model").eval()
    sizes = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 4, "image_size": 16, "mlp_ratio": 0.5}
    theirs = CLIP(8, CLIPVisionCfg(**sizes), CLIPTextCfg(24, 60, 64, 2, 2, mlp_ratio=0.5), quick_gelu=True).eval()
    converted = to_open_clip(merged.state_dict())
    theirs.visual.load_state_dict({n[7:]: t for n, t in converted.items() if n.startswith("visual.")})
    with torch.no_grad():
        expected = merged.visual_projection(merged.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(theirs.encode_image(pixels), expected, atol=1e-5, rtol=1e-5)


def test_the_family_keeps_the_laws_of_families(tmp_path):
    write_idx(tmp_path / "data", torch.Generator().manual_seed(0))
    save_checkpoint(clip().state_dict(), tmp_path / "base.pt")
    task = Task("digits", str(tmp_path / "data"), tuple(CLASSES), ("a {}.",))
    check_family(OpenClip(None, open_checkpoint(tmp_path / "base.pt")), [task], tmp_path / "model")
