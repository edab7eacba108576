"""Every published data set in the layouts that its archives, torchvision and the papers' scripts leave on disk."""

import pickle
import sys
from dataclasses import replace

import data_layouts as made
import numpy as np
import pytest
from data_layouts import LABELS, shade

from suture import tasks
from suture.errors import ConfigError, DataError
from suture.pipeline.pools import TaskPool
from suture.tasks.layouts import layout

pytest.importorskip("scipy")

BOTH = ("train", "test")
LAYOUTS = [
    ("svhn", made.svhn, BOTH),
    ("gtsrb", made.gtsrb_test, ("test",)),
    ("gtsrb", made.gtsrb_train, ("train",)),
    ("gtsrb", made.gtsrb_raw, ("train",)),
    ("gtsrb", made.gtsrb_kaggle, ("test",)),
    ("stanford-cars", made.cars, BOTH),
    ("resisc45", made.resisc45, BOTH),
    ("dtd", made.dtd_scripts, BOTH),
    ("dtd", made.dtd_torchvision, BOTH),
    ("eurosat", made.eurosat, BOTH),
    ("sun397", made.sun397_scripts, BOTH),
    ("sun397", made.sun397_raw, BOTH),
    ("mnist", made.mnist, BOTH),
    ("fashion_mnist", made.fashion_mnist, BOTH),
    ("kmnist", made.kmnist, BOTH),
    ("emnist_letters", made.emnist, BOTH),
    ("cifar10", made.cifar10, BOTH),
    ("cifar100", made.cifar100, BOTH),
    ("stl10", made.stl10, BOTH),
    ("oxford_flowers102", made.flowers, BOTH),
    ("oxford-iiit-pet", made.pets, BOTH),
    ("pcam", made.pcam, BOTH),
    ("fer2013", made.fer2013_csv, BOTH),
    ("fer2013", made.fer2013_folders, BOTH),
    ("food101", made.food101, BOTH),
    ("rendered-sst2", made.rendered_sst2, BOTH),
]
CASES = [
    pytest.param(name, make, split, id=f"{make.__name__}-{split}") for name, make, splits in LAYOUTS for split in splits
]
SORTED_BY_CLASS = {
    "dtd_scripts",
    "eurosat",
    "sun397_scripts",
    "fer2013_folders",
    "gtsrb_train",
    "gtsrb_raw",
    "rendered_sst2",
}


def task_in(root, name, **more):
    """The published task below a folder for all tasks, with its first three classes (or two)."""
    (task,) = TaskPool.from_config({"root": str(root), "tasks": {name: None}}).tasks
    labels = task.labels and task.labels[:3]
    return replace(task, classnames=task.classnames[:3], labels=labels, test_samples=(), **more)


def build(root, name, make, split, **more):
    if name in ("pcam", "rendered-sst2"):
        names = ("one", "two", "three") if name == "pcam" else ("negative", "positive", "neutral")
        more = {"classnames": names} | more
    else:
        names = tuple(tasks.known(name)["classnames"][:3])
    if name == "pcam":
        pytest.importorskip("h5py")
    make(root, split, names)
    task = task_in(root, name)
    return replace(task, **more)


def only_problem(task, split="test"):
    (problem,) = tasks.check(task, split)
    assert "\n" not in problem
    with pytest.raises(DataError) as refusal:
        tasks.load(task, split)
    assert str(refusal.value) == problem
    return problem


@pytest.mark.parametrize(("name", "make", "split"), CASES)
def test_a_layout_gives_its_pictures_with_their_labels(tmp_path, name, make, split):
    task = build(tmp_path, name, make, split)
    assert tasks.check(task, split) == []
    images = tasks.load(task, split)
    order = [0, 1, 3, 2] if make.__name__ in SORTED_BY_CLASS else [0, 1, 2, 3]
    assert images.labels.tolist() == [LABELS[i] for i in order]
    greys = [np.asarray(picture)[-1, 0] for picture in images.pictures(0, 4)]
    np.testing.assert_allclose(greys, [[shade(i)] * 3 for i in order], atol=1)
    folder, source = tasks._source(tasks._folder(task), split, task)
    assert source.count(folder, split, task) == len(images) == 4


@pytest.mark.parametrize("name", ["svhn", "emnist_letters", "cifar10", "stl10", "fer2013", "pcam"])
def test_stored_pictures_are_the_right_way_up(tmp_path, name):
    make = next(make for known, make, _ in LAYOUTS if known == name)
    (picture,) = tasks.load(build(tmp_path, name, make, "test"), "test").pictures(0, 1)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[0, 1] - pixels[1, 0]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (n, m)
        for n, m, splits in LAYOUTS
        if "test" in splits and n in ("cifar10", "cifar100", "stl10", "stanford-cars", "oxford-iiit-pet")
    ],
)
def test_class_names_in_another_order_than_the_files_have_are_refused(tmp_path, name, make):
    task = build(tmp_path, name, make, "test")
    first, second, third = task.classnames
    problem = only_problem(replace(task, classnames=(second, first, third)))
    assert "label 0 of" in problem
    assert "list them in the order of the labels" in problem


@pytest.mark.parametrize(("name", "make"), [(n, m) for n, m, splits in LAYOUTS if "test" in splits])
def test_a_class_name_too_many_or_too_few_is_refused(tmp_path, name, make):
    task = build(tmp_path, name, make, "test")
    more = None if task.labels is None else (*task.labels, "extra")
    assert tasks.check(replace(task, classnames=(*task.classnames, "extra"), labels=more), "test")
    fewer = None if task.labels is None else task.labels[:2]
    assert tasks.check(replace(task, classnames=task.classnames[:2], labels=fewer), "test")


def test_the_ten_of_svhn_is_the_digit_zero_and_the_csv_of_fer2013_has_neutral_last(tmp_path):
    task = build(tmp_path, "svhn", made.svhn, "test")
    assert tasks.load(task, "test").labels.tolist() == [0, 1, 2, 1]
    made.fer2013_csv(tmp_path, "test", ())
    path = tmp_path / "fer2013/fer2013.csv"
    for number in (3, 4, 5, 6):  # beside angry, disgust and fear
        path.write_text(path.read_text() + f"{number},{' '.join(['0'] * 48 * 48)},PrivateTest\r\n")
    (whole,) = TaskPool.from_config({"root": str(tmp_path), "tasks": {"fer2013": None}}).tasks
    assert [whole.classnames[i] for i in tasks.load(whole, "test").labels.tolist()[-4:]] == [
        "happy",
        "sad",
        "surprised",
        "neutral",
    ]


def test_the_csv_of_later_copies_has_spaces_in_its_header(tmp_path):
    task = build(tmp_path, "fer2013", made.fer2013_csv, "test")
    old = tmp_path / "fer2013/fer2013.csv"
    rows = [line.split(",") for line in old.read_text().splitlines()]
    lines = [f"{emotion}, {usage}, {pixels}" for emotion, pixels, usage in rows]
    old.with_name("icml_face_data.csv").write_text("\n".join(lines))
    old.unlink()
    assert tasks.check(task, "test") == []
    assert tasks.load(task, "test").labels.tolist() == LABELS


def test_both_splits_of_one_csv_are_kept_apart_in_the_cache(tmp_path):
    pixels = " ".join(["0"] * 48 * 48)
    rows = [f"{label},{pixels},{usage}" for usage in ("Training", "PrivateTest") for label in (0, 1, 2)]
    made.text(tmp_path / "fer2013/fer2013.csv", ["emotion,pixels,Usage", *rows])
    task = task_in(tmp_path, "fer2013")
    assert tasks.load(task, "train").identity != tasks.load(task, "test").identity


def test_a_split_that_is_missing_is_named_with_its_file(tmp_path):
    task = build(tmp_path, "svhn", made.svhn, "train")
    assert only_problem(task).endswith("svhn' has no 'test_32x32.mat' for the test split. Remedy: put it there.")
    pets = build(tmp_path, "oxford-iiit-pet", made.pets, "train")
    assert "has no 'annotations/test.txt' for the test split" in only_problem(pets)


def test_a_folder_with_none_of_the_layouts_says_what_each_would_have(tmp_path):
    (tmp_path / "svhn").mkdir()
    problem = only_problem(task_in(tmp_path, "svhn"))
    assert "holds nothing; wanted 'test_32x32.mat' or IDX files" in problem


def test_listed_pictures_that_are_missing_are_counted(tmp_path):
    task = build(tmp_path, "resisc45", made.resisc45, "test")
    gone = sorted((tmp_path / "resisc45").rglob("*.jpg"))[1:]
    for path in gone:
        path.unlink()
    problem = only_problem(task)
    assert "(and 2 more of 4) is missing, but '" in problem
    assert "resisc45-test.txt' lists it" in problem


def test_labels_that_are_not_published_with_the_cars_are_asked_for(tmp_path):
    task = build(tmp_path, "stanford-cars", made.cars, "test")
    rows = np.array([("00001.jpg",), ("00002.jpg",)], [("fname", "O")]).reshape(1, -1)
    made.mat(tmp_path / "stanford_cars/cars_test_annos_withlabels.mat", annotations=rows)
    assert "has no 'class' (found: fname); it has no labels" in only_problem(task)


def test_a_line_of_another_form_is_shown(tmp_path):
    task = build(tmp_path, "food101", made.food101, "test")
    made.text(tmp_path / "food-101/meta/test.txt", ["<html>"])
    assert "line 1 of '" in only_problem(task)
    assert "is '<html>', which is not of its form" in only_problem(task)


@pytest.mark.parametrize(
    ("name", "make", "file", "found"),
    [
        ("svhn", made.svhn, "svhn/test_32x32.mat", "cannot be read"),
        ("cifar10", made.cifar10, "cifar-10-batches-py/test_batch", "pickle"),
        ("stl10", made.stl10, "stl10_binary/test_X.bin", "no whole number of images"),
        ("emnist_letters", made.emnist, "EMNIST/raw/emnist-letters-test-labels-idx1-ubyte", "inside its header"),
        ("oxford_flowers102", made.flowers, "flowers-102/setid.mat", "cannot be read"),
        ("pcam", made.pcam, "pcam/camelyonpatch_level_2_split_test_x.h5", "cannot be read"),
    ],
)
def test_a_file_cut_short_is_one_line(tmp_path, name, make, file, found):
    task = build(tmp_path, name, make, "test")
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-1] if "no whole" in found else path.read_bytes()[: path.stat().st_size // 2])
    problem = only_problem(task)
    assert found in problem
    assert "again" in problem


def test_an_idx_file_of_images_cut_short_is_told_before_it_is_read(tmp_path):
    task = build(tmp_path, "emnist_letters", made.emnist, "test")
    path = tmp_path / "EMNIST/raw/emnist-letters-test-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert "it is cut short" in only_problem(task)


def test_images_and_labels_that_are_not_as_many_are_told(tmp_path):
    task = build(tmp_path, "stl10", made.stl10, "test")
    (tmp_path / "stl10_binary/test_y.bin").write_bytes(bytes([1, 2, 3]))
    assert "has 4 images but 'test_y.bin' has 3 labels" in only_problem(task)


class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('exploded').touch()",))


def test_a_pickle_under_the_name_of_cifar_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = build(tmp_path, "cifar10", made.cifar10, "test")
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({b"data": Bomb()}))
    problem = only_problem(task)
    assert "asks to call 'builtins.exec'; it was not run" in problem
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_array_of_objects_is_refused(tmp_path):
    task = build(tmp_path, "cifar10", made.cifar10, "test")
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps({"data": np.array([1, "a"], object), "labels": LABELS}))
    assert "cannot be read (an array of O8)" in only_problem(task)


def test_a_layout_of_ones_own_is_a_few_words_and_unknown_words_are_refused(tmp_path):
    lines = [f"{number}.png {label}" for number, label in enumerate(LABELS)]
    made.text(tmp_path / "own/test.txt", lines)
    for number in range(4):
        made.picture(tmp_path / f"own/pictures/{number}.png", number)
    words = {"kind": "listing", "index": {"test": "test.txt"}, "line": r"(?P<file>\S+) (?P<label>\d+)"}
    words |= {"picture": "pictures/{file}", "first_label": 0}
    config = {"classnames": ["a", "b", "c"], "templates": ["{}"], "source": str(tmp_path / "own"), "layouts": [words]}
    (task,) = TaskPool.from_config({"tasks": {"own": config}}).tasks
    assert tasks.load(task, "test").labels.tolist() == LABELS
    assert "Unknown key of a layout of kind listing 'frist_label'. Did you mean 'first_label'" in only_problem(
        replace(task, layouts=({**words, "frist_label": 1},))
    )
    with pytest.raises(ConfigError, match="Unknown kind of layout 'list'"):
        layout({"kind": "list"})


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    task = build(tmp_path, "svhn", made.svhn, "test")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "takes scipy" in only_problem(task)


def test_no_picture_and_no_array_is_read_for_a_look(tmp_path, monkeypatch):
    svhn = build(tmp_path, "svhn", made.svhn, "test")
    food = build(tmp_path, "food101", made.food101, "test")
    from scipy import io

    asked = []
    load = io.loadmat
    monkeypatch.setattr(
        io,
        "loadmat",
        lambda path, variable_names: asked.append(variable_names) or load(path, variable_names=variable_names),
    )
    monkeypatch.setattr("PIL.Image.open", None)
    assert tasks.check(svhn, "test") == tasks.check(food, "test") == []
    assert tasks.notes(replace(svhn, test_samples=(26032,)), "test") == [
        "Task 'svhn': 4 test images; published figures are for 26,032."
    ]
    assert asked == [["y"]]


def test_every_published_task_of_pictures_has_a_layout_of_its_own():
    files = {path.name.removesuffix(".yaml") for path in (tasks.files("suture.tasks") / "known").iterdir()}
    names = {name for name in files if not tasks.known(name).get("text_columns")}
    assert {name for name, _, _ in LAYOUTS} == names
    for name in names:
        for words in tasks.known(name).get("layouts", ()):
            layout(words)


def test_every_scene_of_sun397_is_known_by_its_folder(tmp_path):
    names = tasks.known("sun397")["classnames"]
    for number, name in enumerate(names):
        made.picture(tmp_path / f"sun397/test/{name[0]}_{name.replace(' ', '_')}/0.png", number % 5)
    (task,) = TaskPool.from_config({"root": str(tmp_path), "tasks": {"sun397": None}}).tasks
    assert tasks.check(task, "test") == []
    images = tasks.load(task, "test")
    assert sorted(images.labels.tolist()) == list(range(397))
    folders = [path.parent.name for path in images.pixels.paths]
    assert [names[label].replace(" ", "_") for label in images.labels.tolist()] == [name[2:] for name in folders]
