"""Hundreds of bad data sets: each is read, or refused in one line with a remedy, within bounds, leaving nothing."""

import csv
import gzip
import io
import json
import math
import os
import random
import shutil
import struct
import zlib

import data_layouts as made
import numpy as np
import pytest
from hostile import VALUES, assert_one_line, cases, damaged, listing, mutated, tried, watched
from PIL import Image

from suture import tasks
from suture.errors import ConfigError, DataError
from suture.tasks import Task

datasets = pytest.importorskip("datasets")
pytest.importorskip("scipy")
pytest.importorskip("h5py")

NAMES = ("cat", "dog", "grey owl")
LABELS = [0, 1, 2, 1]


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def tried_task(task: Task, folder) -> tuple[list[str], str | None]:
    """What `check` says, and the line with which `load` or a picture is refused; a task in order must load."""
    before = listing(folder)
    with watched():
        problems = tasks.check(task, "test")
    assert listing(folder) == before
    for problem in problems:
        assert_one_line(problem) if "more class names" not in problem else None
    line = tried(lambda: contents(task), folder)
    assert not problems or line is not None
    return problems, line


def contents(task: Task) -> None:
    """Read all of a task's test split."""
    found = tasks.load(task, "test")
    if task.text_columns is None:
        found.pictures(0, len(found))
    else:
        found.rows(0, len(found))


def png(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG with the header of a picture of any size."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content or zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def idx_folder(folder) -> None:
    made.idx(folder / "t10k-images-idx3-ubyte", made.greys(6)[..., 0])
    made.idx(folder / "t10k-labels-idx1-ubyte", np.array(LABELS))


def image_folder(folder) -> None:
    for number, label in enumerate(LABELS):
        made.picture(folder / "test" / NAMES[label] / f"{number}.png", number)


def damage_one(dice: random.Random, folder) -> None:
    """Damage one of the files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = dice.choice(files)
    file.write_bytes(damaged(dice, file.read_bytes()))


@pytest.mark.parametrize("number", cases(30, 250))
@pytest.mark.parametrize("build", [idx_folder, image_folder])
def test_pictures_in_files(build, number, tmp_path):
    dice = random.Random(f"{build.__name__} {number}")
    build(tmp_path)
    damage_one(dice, tmp_path)
    if build is idx_folder and dice.random() < 0.5:
        file = dice.choice(sorted(tmp_path.iterdir()))
        content = gzip.compress(file.read_bytes())
        file.with_name(file.name + ".gz").write_bytes(damaged(dice, content) if dice.random() < 0.5 else content)
        file.unlink()
    tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)


LAYOUTS = {
    "svhn": made.svhn,
    "stanford-cars": made.cars,
    "cifar10": made.cifar10,
    "stl10": made.stl10,
    "oxford_flowers102": made.flowers,
    "oxford-iiit-pet": made.pets,
    "pcam": made.pcam,
    "fer2013": made.fer2013_csv,
    "gtsrb": made.gtsrb_test,
    "dtd": made.dtd_torchvision,
    "food101": made.food101,
}


@pytest.mark.parametrize("number", cases(3, 30))
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(name, number, tmp_path):
    dice = random.Random(f"{name} {number}")
    words = {key: value for key, value in tasks.known(name).items() if key not in ("folders", "test_samples")}
    names = tuple(map(str, words["classnames"][:3])) if name != "pcam" else ("one", "two", "three")
    LAYOUTS[name](tmp_path, "test", names)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    labels = words.get("labels") and tuple(map(str, words["labels"][:3]))
    damage_one(dice, folder)
    tried_task(Task(name, **words | {"source": str(folder), "classnames": names, "labels": labels}), tmp_path)


def row(dice: random.Random) -> dict:
    """A row of a table of texts, of whatever kinds."""
    return {"text": dice.choice(("good", "bad", *VALUES)), "label": dice.choice((0, 1, 2, *VALUES))}


def table_file(dice: random.Random, folder) -> None:
    """A csv, tsv or jsonl file of texts with rows of which some are not what they should be."""
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(LABELS)]
    if dice.random() < 0.8:
        rows[dice.randrange(4)] = row(dice)
    kind = dice.choice(("csv", "tsv", "jsonl", "jsonl"))
    file = folder / f"test.{kind}"
    if kind == "jsonl":
        lines = [json.dumps(mutated(dice, each) if dice.random() < 0.2 else each) for each in rows]
        file.write_text("\n".join(lines) + "\n")
    else:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
        writer.writerows([["text", "label"], *([each["text"], each["label"]] for each in rows)])
        file.write_text(stream.getvalue().encode("utf-8", "replace").decode())
    if dice.random() < 0.3:
        file.write_bytes(damaged(dice, file.read_bytes()))


@pytest.mark.parametrize("number", cases(15, 250))
def test_tables_of_texts(number, tmp_path):
    dice = random.Random(f"table {number}")
    table_file(dice, tmp_path)
    tried_task(Task("pets", str(tmp_path), NAMES, text_columns=("text",)), tmp_path)


@pytest.mark.parametrize("number", cases(6, 80))
def test_stored_data_sets(number, tmp_path):
    dice = random.Random(f"stored {number}")
    pictures = [Image.fromarray(np.full((6, 5, 3), 10 * i, np.uint8)) for i in range(4)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "grey_owl"])}
    )
    table = datasets.Dataset.from_dict({"image": pictures, "label": LABELS}, features=features)
    if dice.random() < 0.5:
        table.to_parquet(tmp_path / "test.parquet")
    else:
        datasets.DatasetDict(test=table).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "saved" if (tmp_path / "saved").is_dir() else tmp_path
    damage_one(dice, folder)
    if dice.random() < 0.2:
        content = (
            "---\nconfigs: "
            + json.dumps(mutated(dice, [{"config_name": "default", "data_files": "*.parquet"}]))
            + "\n---\n"
        )
        (folder / "README.md").write_bytes(content.encode("utf-8", "replace"))
    tried_task(Task("pets", str(folder), NAMES), tmp_path)


LABEL_COLUMNS = {
    "fractions": [0.0, 0.7, 1.0, 2.0],
    "missing": [0, 1, None, 2],
    "not a number": [0.0, math.nan, 1.0, 2.0],
    "infinite": [0.0, math.inf, 1.0, 2.0],
    "lists": [[0], [1], [2], [1]],
    "dates": [__import__("datetime").date(2026, 1, i) for i in (1, 2, 3, 4)],
    "beyond 64 bits": np.array([0, 1, 2, 2**64 - 1], np.uint64),
    "negative": [0, 1, 2, -1],
    "too many": [0, 1, 2, 3],
    "texts": ["cat", "dog", "fox", "grey owl"],
    "bytes": [b"cat", b"dog", b"cat", b"dog"],
    "structs": [{"a": 1}] * 4,
}


@pytest.mark.parametrize("kind", LABEL_COLUMNS)
def test_labels_that_are_no_classes(kind, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": list("abcd"), "label": LABEL_COLUMNS[kind]}), tmp_path / "test.parquet")
    problems, line = tried_task(Task("pets", str(tmp_path), NAMES, text_columns=("text",)), tmp_path)
    assert len(problems) == 1
    assert line == problems[0]


@pytest.mark.parametrize("first", ["5", "[1]", "null", '"text"', "{}", "{", "\ufeff{}", "[" * 100_000, "9" * 5000])
def test_first_lines_of_texts(first, tmp_path):
    (tmp_path / "test.jsonl").write_text(first + '\n{"text": "a", "label": 0}\n')
    problems, line = tried_task(Task("pets", str(tmp_path), NAMES, text_columns=("text",)), tmp_path)
    assert problems
    assert line == problems[0]


def test_pictures_without_the_hubs_remarks_are_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (7, 7, 7)).save(stream, "png")
    bytes_and_path = [{"bytes": stream.getvalue(), "path": None}] * 4
    for name, column in (("struct", bytes_and_path), ("bytes", [stream.getvalue()] * 4)):
        (tmp_path / name).mkdir()
        parquet.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / name / "test.parquet")
        task = Task("pets", str(tmp_path / name), NAMES)
        assert tasks.check(task, "test") == []
        assert tasks.load(task, "test").pictures(0, 1)[0].getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("column", [["a.png"] * 4, [1] * 4, [[0]] * 4, [None] * 4, [{"bytes": None, "path": None}] * 4])
def test_columns_that_are_no_pictures(column, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / "test.parquet")
    assert tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)[1] is not None


def test_rows_that_lead_to_the_network_or_elsewhere_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for path in ("https://example.org/x.png", "zip://x.png::https://example.org/x.zip", "/etc/passwd", "/dev/zero"):
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        table = pa.table({"image": [{"bytes": None, "path": path}] * 4, "label": LABELS})
        parquet.write_table(table.cast(features.arrow_schema), tmp_path / "test.parquet")
        assert "Remedy: " in (tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)[1] or "")


def awkward(path, kind: str) -> None:
    """In place of a picture: a pipe, a link to itself or to nowhere, a folder, a bomb, a program."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nowhere.png")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        path.write_bytes(png(13_300, 13_300))
    elif kind == "larger bomb":
        path.write_bytes(png(2**31 - 1, 2**31 - 1))
    elif kind == "a program":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(it ran) print\n%%EOF\n")
    else:
        path.write_bytes(b"")


KINDS = ("pipe", "loop", "dangling", "device", "folder", "bomb", "larger bomb", "a program", "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_for_a_picture(kind, tmp_path):
    image_folder(tmp_path)
    awkward(tmp_path / "test/dog/1.png", kind)
    problems, line = tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)
    assert line is not None
    assert bool(problems) == (kind in ("pipe", "loop", "dangling", "device", "folder"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_for_a_listed_picture(kind, tmp_path):
    made.pets(tmp_path, "test", NAMES)
    awkward(next((tmp_path / "oxford-iiit-pet/images").iterdir()), kind)
    words = {
        key: value for key, value in tasks.known("oxford-iiit-pet").items() if key not in ("folders", "test_samples")
    }
    task = Task("pets", **words | {"source": str(tmp_path / "oxford-iiit-pet"), "classnames": NAMES, "labels": None})
    assert tried_task(task, tmp_path)[1] is not None


def test_a_packed_file_that_announces_gigabytes(tmp_path):
    idx_folder(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    head = struct.pack(">HBB3I", 0, 8, 3, 300_000, 90, 90)
    with gzip.open(f"{file}.gz", "wb", compresslevel=1) as stream:
        stream.write(head + bytes(50_000_000))
    file.unlink()
    problems, _ = tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)
    assert "300000 × 90 × 90 values, too many to unpack" in problems[0]
    assert "Remedy: unpack it with gunzip" in problems[0]


def test_a_packed_file_that_holds_more_than_it_announces(tmp_path):
    idx_folder(tmp_path)
    file = tmp_path / "t10k-images-idx3-ubyte"
    size = file.stat().st_size
    packed = gzip.compress(file.read_bytes() + bytes(100_000_000), 1)
    file.with_name(file.name + ".gz").write_bytes(packed[:-4] + struct.pack("<I", size))
    file.unlink()
    assert tried_task(Task("pets", str(tmp_path), NAMES), tmp_path)[1] is not None


@pytest.mark.parametrize(
    "source", ["a" * 5000, "/" + "a" * 5000, "a\0b", "~nobody-of-that-name", "", "zoo:", os.fsdecode(b"\xff")]
)
def test_sources(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems, line = tried_task(Task("pets", source, NAMES), tmp_path)
    assert problems
    assert line is not None


@pytest.mark.parametrize("method", ["iterdir", "open", "stat"])
@pytest.mark.parametrize("build", [idx_folder, image_folder])
def test_what_may_not_be_read(build, method, tmp_path, monkeypatch):
    build(tmp_path)
    error = PermissionError(13, "Permission denied", str(tmp_path))

    def refuse(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(f"pathlib.Path.{method}", refuse)
        problems = tasks.check(Task("pets", str(tmp_path), NAMES), "test")
        with pytest.raises(DataError) if problems else patched.context():
            tasks.load(Task("pets", str(tmp_path), NAMES), "test")
    for problem in problems:
        assert_one_line(problem)


def test_a_folder_that_is_removed_between_check_and_load(tmp_path, monkeypatch):
    image_folder(tmp_path / "set")
    task = Task("pets", str(tmp_path / "set"), NAMES)
    check = tasks.check

    def and_remove(*arguments):
        problems = check(*arguments)
        shutil.rmtree(tmp_path / "set" / "test" / "dog")
        return problems

    monkeypatch.setattr(tasks, "check", and_remove)
    assert tried(lambda: tasks.load(task, "test"), tmp_path / "set" / "train") is not None


@pytest.mark.parametrize("name", ["test.csv", "test.jsonl", "test.parquet", "test-0.tar", "test.arrow", "README.md"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "dangling", "device", "folder", "empty"])
def test_what_stands_for_a_table(name, kind, tmp_path):
    if name == "README.md":
        (tmp_path / "test.csv").write_text("text,label\na,0\n")
    (tmp_path / name).write_bytes(b"")
    awkward(tmp_path / name, kind)
    _, line = tried_task(Task("pets", str(tmp_path), NAMES, text_columns=("text",)), tmp_path)
    assert name == "README.md" or line is not None


@pytest.mark.parametrize(
    "field",
    ["classnames", "templates", "labels", "text_columns", "test_samples", "layouts", "splits", "subset", "source"],
)
@pytest.mark.parametrize("value", [0.7, 5, True, {"a": 1}, [[1]], [0.7], object()])
def test_tasks_made_of_something_else(field, value, tmp_path):
    idx_folder(tmp_path)

    def task() -> Task:
        return Task("pets", **{"source": str(tmp_path), "classnames": NAMES, field: value})

    with watched():
        try:
            problems = tasks.check(task(), "test")
        except ConfigError as error:
            problems = [str(error)]
    for problem in problems:
        assert_one_line(problem)
