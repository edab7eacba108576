"""Data sets of the `datasets` library: saved by it, as parquet files, in subsets, and with names out of order."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from suture import tasks
from suture.errors import DataError
from suture.tasks import Task

datasets = pytest.importorskip("datasets")

NAMES = ("cat", "dog", "grey owl")
LABELS = [0, 1, 2, 1]


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pictures():
    return [Image.fromarray(np.full((6, 5, 3), 10 * i, np.uint8)) for i in range(len(LABELS))]


def table(image="image", label="label", **more):
    names = datasets.ClassLabel(names=["cat", "dog", "grey_owl"])
    features = datasets.Features({image: datasets.Image(), label: names, **dict.fromkeys(more, names)})
    return datasets.Dataset.from_dict({image: pictures(), label: LABELS, **more}, features=features)


def parquet(folder, split="test", **columns):
    folder.mkdir(parents=True, exist_ok=True)
    table(**columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def task(folder, names=NAMES, **more):
    return Task("pets", str(folder), names, ("a photo of a {}.",), **more)


def assert_whole(found):
    assert tasks.check(found, "test") == []
    images = tasks.load(found, "test")
    assert images.labels.tolist() == LABELS
    assert [picture.getpixel((0, 0))[0] for picture in images.pictures(0, 4)] == [0, 10, 20, 30]


def test_parquet_files_are_read_with_the_names_in_their_headers(tmp_path):
    parquet(tmp_path / "set" / "data")
    assert_whole(task(tmp_path / "set"))
    assert tasks.load(task(tmp_path / "set"), "test").classnames == ("cat", "dog", "grey_owl")


def test_a_folder_that_the_library_saved_is_read(tmp_path):
    datasets.DatasetDict(train=table(), test=table()).save_to_disk(tmp_path / "saved")
    assert_whole(task(tmp_path / "saved"))


def test_a_web_data_set_is_read(tmp_path):
    with tarfile.open(tmp_path / "test-0.tar", "w") as tar:
        for i, (picture, label) in enumerate(zip(pictures(), LABELS, strict=True)):
            data = io.BytesIO()
            picture.save(data, "png")
            for suffix, content in (("png", data.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert_whole(task(tmp_path, image_column="png", label_column="cls"))


def test_a_subset_a_split_and_columns_can_be_named(tmp_path):
    parquet(tmp_path / "digits", "validation", image="img", label="fine_label", coarse_label=[0, 0, 1, 1])
    parquet(tmp_path / "letters", "validation", image="img")
    words = {"subset": "digits", "label_column": "fine_label", "splits": {"test": "validation"}}
    assert_whole(task(tmp_path, **words))
    assert "coarse_label" in tasks.check(task(tmp_path, subset="digits", label_column="label"), "test")[0]


def test_class_names_in_another_order_than_the_labels_are_refused(tmp_path):
    found = task(parquet(tmp_path), ("dog", "cat", "grey owl"))
    assert "label 0 of" in tasks.check(found, "test")[0]
    with pytest.raises(DataError, match="'cat', but the class names have 'dog' there"):
        tasks.load(found, "test")


def test_a_wrong_number_of_class_names_is_refused(tmp_path):
    assert "has 3 classes but there are 2" in tasks.check(task(parquet(tmp_path), NAMES[:2]), "test")[0]


def test_names_that_only_differ_in_wording_are_let_pass(tmp_path):
    assert tasks.check(task(parquet(tmp_path), ("tabby", "a dog", "owl")), "test") == []


def test_a_missing_split_and_a_damaged_file_are_one_line(tmp_path):
    assert "no train split (found: test)" in tasks.check(task(parquet(tmp_path / "one")), "train")[0]
    damaged = parquet(tmp_path / "two") / "test-00000-of-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    problem = tasks.check(task(tmp_path / "two"), "test")[0]
    assert "fetch it again" in problem
    assert "\n" not in problem


def test_fewer_images_than_published_are_noted(tmp_path):
    datasets.DatasetDict(test=table()).save_to_disk(tmp_path / "saved")
    found = task(tmp_path / "saved", test_samples=(10000,))
    assert tasks.notes(found, "test") == ["Task 'pets': 4 test images; published figures are for 10,000."]


def test_the_published_tasks_have_as_many_templates_as_published():
    counts = {
        "sun397": 2,
        "stanford-cars": 8,
        "resisc45": 18,
        "eurosat": 3,
        "svhn": 1,
        "gtsrb": 3,
        "mnist": 1,
        "dtd": 8,
    }
    assert {name: len(tasks.known(name)["templates"]) for name in counts} == counts


def test_every_published_task_is_a_whole_task():
    files = (tasks.files("suture.tasks") / "known").iterdir()
    names = sorted(path.name.removesuffix(".yaml") for path in files)
    assert len(names) == 27  # twenty of pictures, seven of GLUE
    for name in names:
        words = {key: value for key, value in tasks.known(name).items() if key != "folders"}
        assert tasks._wording_problems(Task(name, **words)) == []
        assert words["test_samples"]
