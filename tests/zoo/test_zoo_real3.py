"""real3: three experts for real images, from a small Fashion-MNIST made on the spot."""

import hashlib
from pathlib import Path

import pytest
import torch

from suture import tasks, zoo
from suture.cli.main import main
from suture.errors import ConfigError, DataError, OutputError
from suture.pipeline import config
from suture.pipeline.pools import TaskPool
from tools.zoo import __main__ as workshop
from tools.zoo import alphabets, buildable
from tools.zoo import build as build_zoo
from tools.zoo.builders import real3
from tools.zoo.idx import save_split
from tools.zoo.recipe import Recipe

HOW_TO_BUILD = "Remedy: python -m tools.zoo build real3 in a checkout of suture's repository."
TINY = Recipe(finetuning_steps=2, finetuning_batch=8, train_images=64, test_images=32)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """IDX files of the shape of Fashion-MNIST, 80 and 40 images of noise."""
    folder = tmp_path_factory.mktemp("clothes")
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 80), ("t10k", 40)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator).to(torch.uint8)
        save_split(folder, prefix, images, torch.arange(count) % 10)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command line builds a miniature, into a cache of the test's own."""
    monkeypatch.setattr(real3, "RECIPE", TINY)
    monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(capsys, *words: str, by=main) -> str:
    assert by(list(words)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(("suture: ", "tools.zoo: "))
    assert "\n" not in error
    return error


def no_build(capsys, *words: str) -> str:
    return refusal(capsys, "build", *words, by=workshop.main)


def test_two_builds_are_the_same_bit_for_bit(clothes: Path, tmp_path: Path):
    first, second = (build_zoo("real3", tmp_path / name, recipe=TINY, data=clothes) for name in ("one", "two"))
    assert digests(first) == digests(second)
    assert sorted(path.name for path in first.iterdir()) == ["data", "experts"]


def test_once_built_the_pool_finds_it_without_editing(clothes: Path, tiny: Path, capsys):
    assert workshop.main(["build", "real3", "--data", str(clothes)]) == 0
    assert zoo.resolve("zoo:real3/experts") == tiny / "cache" / "zoo" / "real3" / "experts"
    assert main(["check", "method=task_arithmetic", "modelpool=real3", "taskpool=real3"]) == 0
    assert "everything fits" in capsys.readouterr().out
    assert main(["zoo"]) == 0
    assert "real3  built in" in capsys.readouterr().out
    assert "exists" in no_build(capsys, "real3", "--data", str(clothes))


def test_before_it_is_built_every_command_says_how_to_build_it(tiny: Path, capsys):
    words = "modelpool=real3", "taskpool=real3"
    assert refusal(capsys, "method=task_arithmetic", *words).endswith(HOW_TO_BUILD)
    assert refusal(capsys, "evaluate", *words).endswith(HOW_TO_BUILD)
    assert main(["zoo"]) == 0
    assert "real3  not built" in capsys.readouterr().out


def test_missing_data_are_answered_with_the_package_to_install(tiny: Path, capsys, monkeypatch):
    monkeypatch.setattr(real3, "FASHION_MNIST", tiny / "nothing")
    assert "apt-get install dataset-fashion-mnist" in no_build(capsys, "real3")
    assert "'nowhere' does not exist" in no_build(capsys, "real3", "--data", "nowhere")
    assert list(tiny.rglob("*real3*")) == []


def test_a_missing_package_is_answered_with_what_to_install(tiny: Path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert "needs scikit-image" in no_build(capsys, "real3")


def test_words_that_do_not_fit_are_refused(tiny: Path, capsys):
    assert "Unknown option of glyphs8 'data'" in no_build(capsys, "glyphs8", "--output", "out", "--data", "x")
    assert "--output DIR" in no_build(capsys, "glyphs8")
    assert "Known: glyphs8, manuals, real3" in no_build(capsys, "real4")
    assert "python -m tools.zoo build NAME" in refusal(capsys, "zoo", "build", "real3")


def test_the_zoos_that_can_be_built_are_those_that_suture_knows():
    assert sorted(zoo.inventory()) == buildable()


def test_an_image_folder_of_the_class_names_serves_as_well(tmp_path: Path):
    from PIL import Image

    for split in ("train", "test"):
        for grey, name in enumerate(real3.CLOTHING):
            place = tmp_path / split / name.replace(" ", "_")
            place.mkdir(parents=True)
            Image.linear_gradient("L").rotate(36 * grey).save(place / "one.png")
    task = real3._clothing(tmp_path, TINY, 0)
    assert task.train[0].shape == (10, 16, 16)
    assert sorted(task.train[1].tolist()) == list(range(10))


def test_a_set_of_other_classes_is_refused(tmp_path: Path):
    for prefix in ("train", "t10k"):
        save_split(tmp_path, prefix, torch.zeros(3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="labels that end at 2 but there are 10 class names"):
        build_zoo("real3", tmp_path / "out", data=tmp_path)


def test_no_pixel_of_a_photograph_is_in_both_splits(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(real3, "_patches", lambda pages, *_: seen.append(pages) or (torch.zeros(1), torch.zeros(1)))
    real3._photographs(TINY, 0)
    for left, right in zip(*seen, strict=True):
        assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        assert right.storage_offset() == left.shape[1]
        assert left.stride(0) == left.shape[1] + right.shape[1]
        assert min(*left.shape, *right.shape) >= real3.PATCH


def test_patches_are_of_their_own_photograph_and_of_every_class():
    pages = [torch.zeros(70, 90), torch.eye(90)[:70]]
    images, labels = real3._patches(pages, 10, torch.Generator().manual_seed(0))
    assert images.shape == (10, 16, 16)
    assert labels.bincount().tolist() == [5, 5]
    assert all((image.float().std() > 1) == bool(label) for image, label in zip(images, labels, strict=True))


def test_the_taskpool_has_the_words_that_the_experts_learned_with(clothes: Path):
    composed = config.compose(["method=simple_average", "modelpool=real3", "taskpool=real3"])
    pool = {task.name: task for task in TaskPool.from_config(composed["taskpool"]).tasks}
    assert list(pool) == [name for name in composed["modelpool"]["models"] if name != "_pretrained_"]
    assert pool["clothing"].classnames == real3.CLOTHING
    assert pool["photographs"].classnames == tuple(real3.PHOTOGRAPHS)
    assert pool["digits"].classnames == alphabets.DIGIT_CLASSNAMES
    assert pool["clothing"].templates == pool["photographs"].templates == real3.TEMPLATES
    assert pool["digits"].templates == alphabets.TASK_TEMPLATES


def test_a_zoo_that_ships_is_not_built_over(tmp_path: Path):
    with pytest.raises(ConfigError, match="glyphs8 is installed"):
        build_zoo("glyphs8")
    with pytest.raises(OutputError, match="exists"):
        build_zoo("real3", tmp_path)


def test_stored_images_can_be_read_as_a_task(clothes: Path, tmp_path: Path):
    built = build_zoo("real3", tmp_path / "zoo", recipe=TINY, data=clothes)
    task = tasks.Task("photographs", str(built / "data" / "photographs"), tuple(real3.PHOTOGRAPHS), ("{}",))
    images = tasks.load(task, "test")
    assert images.pixels.shape == (32, 16, 16)
