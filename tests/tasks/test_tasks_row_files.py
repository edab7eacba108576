"""Texts in csv, tsv and jsonl files: read as they are written, by no other library than Python's own."""

import json
import sys

import pytest

from suture import tasks
from suture.errors import DataError
from suture.tasks import Scoring, Task

NAMES = ("cat", "dog", "grey owl")
ROWS = [("it purrs", "NA", 0), ("it barks", "7", 1), ("it hoots", "no, it", 2)]


@pytest.fixture(autouse=True)
def without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)


def task(folder, **more):
    return Task("pets", str(folder), NAMES, **{"text_columns": ("one", "two"), **more})


def read(folder, split="test", **more):
    found = task(folder, **more)
    assert tasks.check(found, split) == []
    texts = tasks.load(found, split)
    return list(zip(*texts.rows(0, len(texts)), texts.labels.tolist(), strict=True))


CONTENTS = {
    "test.csv": 'one,two,label\nit purrs,NA,0\nit barks,7,1\n\nit hoots,"no, it",2\n',
    "test.tsv": "one\ttwo\tlabel\nit purrs\tNA\tcat\nit barks\t7\tDog\nit hoots\tno, it\tgrey_owl\n",
    "test.jsonl": "\n".join(json.dumps(dict(zip(("one", "two", "label"), row, strict=True))) for row in ROWS),
    "dev.csv": '\ufeffone,two,label\nit purrs,NA,0.0\nit barks,7,1.0\nit hoots,"no, it",2.0\n',
}


@pytest.mark.parametrize(("name", "content"), CONTENTS.items())
def test_every_cell_is_read_as_it_is_written(name, content, tmp_path):
    (tmp_path / name).write_text(content, "utf-8")
    assert read(tmp_path) == ROWS


def test_columns_and_splits_can_be_named(tmp_path):
    (tmp_path / "train.csv").write_text("said,kind\na,2\n")
    (tmp_path / "val.csv").write_text("said,kind\nb,1\n")
    words = {"text_columns": "said", "label_column": "kind"}
    assert read(tmp_path, "train", **words) == [("a", 2)]
    assert read(tmp_path, **words) == [("b", 1)]
    assert read(tmp_path, **words, splits={"test": "train"}) == [("a", 2)]


def test_a_text_may_be_longer_than_the_library_of_csv_allows(tmp_path):
    (tmp_path / "test.csv").write_text("one,two,label\n" + "a" * 200_000 + ",b,1\n")
    assert [len(row[0]) for row in read(tmp_path)] == [200_000]


def test_a_language_model_is_asked_what_the_row_says(tmp_path):
    (tmp_path / "test.csv").write_text("text,answer\nfive and two?,07\n")
    asked = Task("sums", str(tmp_path), score=Scoring.of("sums", "exact_match"))
    assert [(row.prompt, row.answer) for row in tasks.passages(asked, "test")] == [("five and two?", "07")]


WRONG = {
    "one,two,label\n": "has no rows",
    "one,label\na,0\n": "no column 'two' (found: one, label)",
    "one,two,label\na,,0\n": "Row 0 has no text in column 'two'",
    "one,two,label\na,b,3\n": "the label 3 in row 0 but there are 3 class names",
    "one,two,label\na,b,0.5\n": "the label '0.5' in row 0, which is no whole number",
    "one,two,label\na,b,fox\n": "the label 'fox' in row 0, which is not among the class names",
    "one,two,label\na,b,c,0\n": "line 2 has 4 cells under 3 names",
}


@pytest.mark.parametrize(("content", "line"), WRONG.items())
def test_what_does_not_fit_is_one_line_of_the_check(content, line, tmp_path):
    (tmp_path / "test.csv").write_text(content)
    assert [line in problem for problem in tasks.check(task(tmp_path), "test")] == [True]


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path):
    (tmp_path / "test.csv").write_text(CONTENTS["test.csv"])
    assert "has no train split (found: test.csv)" in tasks.check(task(tmp_path), "train")[0]


@pytest.mark.parametrize("name", ["README.md", "more.parquet", "folder/test.csv", "test-00001.csv", "val.csv dev.csv"])
def test_any_other_layout_is_left_to_the_library(name, tmp_path):
    for each in ["test.csv", *name.split()]:
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_text(CONTENTS["test.csv"])
    with pytest.raises(DataError, match=r"takes the `datasets` library. Remedy: pip install 'suture\[data\]'"):
        tasks.load(task(tmp_path), "test")
