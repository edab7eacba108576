"""Atomic writing: what appears is whole, what is replaced is suture's own, and nothing is left over."""

import json
import os

import pytest

from suture.errors import OutputError
from suture.storage.atomic import (
    check_replaceable,
    new_directory,
    new_file,
    new_folder,
    set_aside,
    write_bytes,
    write_text,
)

REPORT = json.dumps({"title": "t", "rows": [], "tasks": []})


def write_result(path, text, **options):
    with new_directory(path, **options) as folder:
        (folder / "report.json").write_text(REPORT)
        (folder / "text").write_text(text)


def listed(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a" / "x.json", "one")
    write_bytes(tmp_path / "a" / "x.json", b"")
    assert (tmp_path / "a" / "x.json").read_bytes() == b""
    write_text(tmp_path / "a" / "x.json", "zwölf")
    assert (tmp_path / "a" / "x.json").read_text("utf-8") == "zwölf"
    assert listed(tmp_path / "a") == ["x.json"]


def test_two_new_folders_of_one_second_are_not_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(new_folder("demo"))
        folders[-1].mkdir(parents=True)
    assert len(set(folders)) == 3
    assert {folder.parent.as_posix() for folder in folders} == {"outputs/demo"}


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), new_file(tmp_path / "x", 3):
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert listed(tmp_path) == ["x"]


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="is a directory, not a file"):
        write_text(tmp_path / "x", "text")


def test_a_new_directory_gets_its_name_when_it_is_complete(tmp_path):
    with new_directory(tmp_path / "runs" / "one") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "report.json").write_text("{}")
        assert not (tmp_path / "runs" / "one").exists()
    assert (tmp_path / "runs" / "one" / "sub" / "report.json").read_text() == "{}"
    assert listed(tmp_path / "runs") == ["one"]


def test_a_new_directory_is_removed_with_its_parents_on_error(tmp_path):
    with pytest.raises(IsADirectoryError), new_directory(tmp_path / "runs" / "one") as folder:
        folder.write_text("a folder cannot be written to")
    assert listed(tmp_path) == []


def test_a_directory_with_something_in_it_is_refused_unless_overwriting_is_allowed(tmp_path):
    (tmp_path / "run").mkdir()
    write_result(tmp_path / "run", "first")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        write_result(tmp_path / "run", "second")
    assert (tmp_path / "run" / "text").read_text() == "first"
    write_result(tmp_path / "run", "third", overwrite=True)
    assert (tmp_path / "run" / "text").read_text() == "third"
    assert listed(tmp_path) == ["run"]


def test_overwriting_works_where_directories_cannot_be_swapped_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "other")
    write_result(tmp_path / "run", "first")
    write_result(tmp_path / "run", "second", overwrite=True)
    assert (tmp_path / "run" / "text").read_text() == "second"
    assert listed(tmp_path) == ["run"]


def test_an_error_while_overwriting_leaves_the_old_directory(tmp_path):
    write_result(tmp_path / "run", "old")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "run", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "run" / "text").read_text() == "old"
    assert listed(tmp_path) == ["run"]


def test_the_folder_of_a_killed_run_is_removed_by_the_next_one_of_its_name(tmp_path):
    leftover = tmp_path / f".run[1].{2**22 + 1}-0123abcd.partial"
    for folder in (leftover, tmp_path / ".run1.7-0123abcd.partial"):
        (folder / "model").mkdir(parents=True)
    with new_directory(tmp_path / "run[1]") as folder:
        assert not leftover.exists()
        with new_directory(tmp_path / "run[1]"):
            assert folder.exists(), "somebody works on it"
        (folder / "x").write_text("")
        (tmp_path / "run[1]").rmdir()
    assert listed(tmp_path) == [".run1.7-0123abcd.partial", "run[1]"]


@pytest.mark.parametrize(
    "record",
    ["{}", "[]", "", "null", "\x00", '{"title": "of another program"}', "[" * 100_000],
    ids=["empty", "list", "nothing", "null", "zero", "other", "deep"],
)
@pytest.mark.parametrize("name", ["report.json", "suture_merge.json", "thesis.tex"])
def test_overwriting_replaces_only_what_suture_wrote(tmp_path, name, record):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text(record)
    with pytest.raises(OutputError, match="holds files that suture did not write"):
        write_result(tmp_path / "home", "new", overwrite=True)
    assert (tmp_path / "home" / name).read_text() == record
    assert listed(tmp_path) == ["home"]


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize(("output", "relation"), [("pool", "holds"), ("pool/m0", "is"), ("pool/m0/result", "lies in")])
def test_an_input_and_what_is_around_it_is_never_replaced(tmp_path, output, relation, through_a_link):
    (tmp_path / "pool" / "m0" / "result").mkdir(parents=True)
    for folder in ("pool", "pool/m0", "pool/m0/result"):
        (tmp_path / folder / "report.json").write_text(REPORT)
    source = tmp_path / "pool" / "m0"
    if through_a_link:
        (tmp_path / "link").symlink_to(source)
        source = tmp_path / "link"
    with pytest.raises(OutputError, match=f"{relation} an input"):
        check_replaceable(tmp_path / output, True, inputs=[source])


@pytest.mark.parametrize("path", ["/", ".", "a\0b", "x" * 5000, "file", "file/x", "link", "dangling", "loop", "loop/x"])
def test_a_path_for_which_there_can_be_no_folder_is_refused_in_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, target in (("link", "folder"), ("dangling", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    before = listed(tmp_path)
    with pytest.raises(OutputError) as refusal:
        write_result(tmp_path / path if path not in ("/", ".") else path, "new", overwrite=True)
    assert "\n" not in str(refusal.value)
    assert "Remedy" in str(refusal.value)
    assert listed(tmp_path) == before


def test_what_is_set_aside_keeps_its_content(tmp_path):
    (tmp_path / "state").write_bytes(b"torn")
    assert set_aside(tmp_path / "state").read_bytes() == b"torn"
    assert listed(tmp_path) == ["state.unreadable"]
