import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from suture import tasks
from suture.errors import ConfigError, DataError
from suture.tasks import Task

NAMES = ("cat", "dog", "grey owl")
LABELS = [0, 1, 2, 1]


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def pixels(count=4, side=6):
    return np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)


@pytest.fixture
def idx(tmp_path):
    """A task whose source is a folder of plain IDX files, both splits."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(LABELS)))
    return Task("pets", str(folder), NAMES, ("a photo of a {}.",))


@pytest.fixture
def pictures(tmp_path):
    """A task whose source is an image folder; the folders sort in another order than the class names."""
    names = ("dog", "cat", "grey owl")
    for split in ("train", "test"):
        for index, folder in enumerate(("dog", "cat", "grey_owl")):
            path = tmp_path / "pictures" / split / folder
            path.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (6 + index, 6), (index, number, 0)).save(path / f"{number}.png")
    return Task("pets", str(tmp_path / "pictures"), names, ("a photo of a {}.",))


def file(task, name):
    return tasks._folder(task) / name


def only_problem(task, split="test"):
    problems = tasks.check(task, split)
    assert len(problems) == 1, problems
    assert problems[0].startswith("Task 'pets': ")
    assert "\n" not in problems[0]
    with pytest.raises(DataError) as refusal:
        tasks.load(task, split)
    assert str(refusal.value) == problems[0]
    return problems[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_files_come_back_as_they_were_written(idx, split):
    images = tasks.load(idx, split)
    assert tasks.check(idx, split) == []
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == LABELS
    np.testing.assert_array_equal(images.pixels, pixels())


def test_plain_idx_images_are_memory_mapped(idx):
    assert isinstance(tasks.load(idx, "test").pixels, np.memmap)


def test_compressed_idx_files_read_like_plain_ones(idx):
    for path in tasks._folder(idx).iterdir():
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert tasks.check(idx, "test") == []
    np.testing.assert_array_equal(tasks.load(idx, "test").pixels, pixels())


def test_idx_images_may_have_colours(idx):
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    file(idx, "t10k-images-idx3-ubyte").write_bytes(idx_bytes(colours))
    images = tasks.load(idx, "test")
    np.testing.assert_array_equal(np.asarray(images.pictures(2, 3)[0]), colours[2])


def test_grey_images_become_rgb_pictures(idx):
    picture = tasks.load(idx, "test").pictures(1, 2)[0]
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture)[..., 2], pixels()[1])


def test_folder_labels_follow_the_class_names_and_not_the_alphabet(pictures):
    images = tasks.load(pictures, "train")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.classnames == ("dog", "cat", "grey_owl")
    assert [picture.getpixel((0, 0))[:2] for picture in images.pictures(0, 6)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip


def test_a_val_folder_serves_as_the_test_split(pictures):
    file(pictures, "test").rename(file(pictures, "val"))
    assert len(tasks.load(pictures, "test")) == 6


def test_pictures_are_decoded_on_access(pictures):
    file(pictures, "test/cat/1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    images = tasks.load(pictures, "test")
    assert len(images.pictures(0, 3)) == 3
    with pytest.raises(DataError, match=r"cat/1\.png' cannot be decoded"):
        images.pictures(3, 4)


def test_a_missing_folder_is_named_with_the_nearest_one(idx):
    problem = only_problem(replace(idx, source=idx.source + "s"))
    assert "does not exist" in problem
    assert f"Did you mean '{idx.source}'?" in problem


def test_a_folder_of_no_known_kind_says_what_was_found_and_wanted(idx, tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "readme.md").touch()
    problem = only_problem(replace(idx, source=str(folder)))
    assert "holds readme.md; wanted IDX files" in problem
    assert "or an image folder" in problem


def test_a_missing_split_is_reported(idx, pictures):
    file(idx, "t10k-labels-idx1-ubyte").unlink()
    assert "no labels of the test split; wanted 't10k-labels-idx1-ubyte'" in only_problem(idx)
    (file(pictures, "test")).rename(file(pictures, "tests"))
    assert "no folder 'test' or 'val'" in only_problem(pictures)


def test_an_idx_file_cut_short_is_told_from_its_header(idx):
    path = file(idx, "t10k-images-idx3-ubyte")
    path.write_bytes(path.read_bytes()[:-1])
    assert "announces 4 × 6 × 6 values (160 bytes) but holds 159 bytes; it is cut short" in only_problem(idx)


def test_a_compressed_idx_file_cut_short_is_refused(idx):
    path = file(idx, "t10k-images-idx3-ubyte")
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()
    assert "t10k-images-idx3-ubyte.gz" in only_problem(idx)


def test_a_file_that_is_not_idx_is_refused(idx):
    file(idx, "t10k-labels-idx1-ubyte").write_bytes(b"<html>not found</html>")
    assert "starts with 3c 68 74 6d, wanted 00 00 08" in only_problem(idx)
    file(idx, "t10k-labels-idx1-ubyte").write_bytes(b"")
    assert "starts with nothing" in only_problem(idx)


def test_a_file_that_ends_inside_its_header_is_refused(idx):
    file(idx, "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    assert "ends inside its header" in only_problem(idx)


def test_something_else_than_gzip_under_its_name_is_refused(idx):
    path = file(idx, "t10k-labels-idx1-ubyte")
    path.rename(path.with_name(path.name + ".gz"))
    assert "cannot be read (Not a gzipped file" in only_problem(idx)


def test_an_empty_data_set_is_refused(idx, pictures):
    file(idx, "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pixels(0)))
    file(idx, "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(0)))
    assert "is empty: it announces shape (0, 6, 6)" in only_problem(idx)
    for path in file(pictures, "test/cat").iterdir():
        path.rename(path.with_suffix(".tif"))
    assert "cat' holds no image (.bmp" in only_problem(pictures)


def test_images_and_labels_must_be_as_many(idx):
    file(idx, "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 2])))
    assert "has 4 images but 't10k-labels-idx1-ubyte' has 3 labels" in only_problem(idx)


def test_images_of_a_wrong_shape_are_refused(idx):
    file(idx, "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((4, 36))))
    assert "has shape (4, 36), wanted (N, H, W)" in only_problem(idx)


def test_labels_outside_of_the_class_names_are_refused(idx):
    problem = only_problem(replace(idx, classnames=NAMES[:2]))
    assert "has labels up to 2 but there are 2 class names (labels 0 to 1)" in problem


def test_class_names_without_a_label_are_refused(idx):
    problem = only_problem(replace(idx, classnames=(*NAMES, "fox")))
    assert "has labels that end at 2 but there are 4 class names" in problem


def test_a_split_may_lack_a_class_that_the_other_split_has(idx):
    file(idx, "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 1, 0])))
    assert tasks.check(idx, "test") == []


def test_a_class_without_a_folder_and_a_folder_without_a_class_name_each_other(pictures):
    problems = tasks.check(replace(pictures, classnames=("dog", "cats", "grey owl")), "test")
    assert len(problems) == 2
    assert "class 'cats' has no folder in" in problems[0]
    assert "(nearest: 'cat')" in problems[0]
    assert "folder 'cat' in" in problems[1]
    assert "(nearest: 'cats')" in problems[1]


def test_many_folders_that_do_not_fit_are_not_all_listed(pictures):
    names = ("dog", "cat", "grey owl", *(f"class {i}" for i in range(100)))
    problems = tasks.check(replace(pictures, classnames=names), "test")
    assert len(problems) == 6
    assert problems[-1].endswith("and 95 more class names that do not fit.")


def test_a_template_without_a_place_for_the_name_is_refused(idx):
    assert "template 'a photo' has no {}" in only_problem(replace(idx, templates=("a {}", "a photo")))


def test_a_class_name_listed_twice_is_refused(idx):
    problem = only_problem(replace(idx, classnames=("cat", "dog", "cat")))
    assert "class name 'cat' is listed 2 times" in problem


def test_a_class_name_that_is_not_text_is_refused(idx):
    assert "class name False is of type bool, wanted text" in only_problem(
        replace(idx, classnames=("yes", False, "maybe"))
    )


def test_a_task_without_names_is_refused(idx):
    problems = tasks.check(replace(idx, classnames=()), "test")
    assert any("has no class names" in problem for problem in problems)


def test_an_unknown_split_is_refused(idx):
    with pytest.raises(ConfigError, match=r"Unknown split 'valid'\. Known: train, test"):
        tasks.check(idx, "valid")


def test_an_unknown_zoo_is_a_problem_of_the_task(idx):
    assert "'zoo:glyphs9/data/latin'" in only_problem(replace(idx, source="zoo:glyphs9/data/latin"))
