"""report.json and figures.json from a stranger: one line, or a page in which nothing of theirs runs."""

import copy
import json
import os
from html.parser import HTMLParser

import pytest
from desk import refused
from pages import HOSTILE, a_report

from suture.cli.main import main
from suture.errors import ConfigError, OutputError
from suture.reporting import report
from suture.reporting.page import page
from suture.reporting.points import points_of
from suture.reporting.run_folder import read

TEXTS = (HOSTILE, "javascript:alert(1)", "' onclick='alert(1)", "<!--<script>", "\u2028\u2029", "url(#x)", "${1}")
WRONG = (None, True, -1, 0.5, 10**400, "text", [], {}, [{}], {"a": None}, [[]])


class Elements(HTMLParser):
    """The tags of a page and the attributes that could run something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.dangerous = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.dangerous += [(tag, k, v) for k, v in attributes if k.startswith("on") or k in ("href", "srcdoc")]


def harmless(text):
    elements = Elements(text)
    assert elements.tags.count("script") == 3
    assert not {"img", "iframe", "object", "embed", "link", "base", "form", "svg"} & set(elements.tags)
    assert elements.dangerous == []
    return True


def left(folder, data, points):
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(data if isinstance(data, str) else json.dumps(data))
    (folder / "figures.json").write_text(points if isinstance(points, str) else json.dumps(points))
    return folder


def leaves(value, path=(), kind=()):
    """(kind of place, path) of one value for each kind: of equal members of a list or table, the first."""
    yield kind, path
    members = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, member in members:
        named = isinstance(key, str) and key.isidentifier()
        yield from leaves(member, (*path, key), (*kind, key if named else "*"))


def places(value):
    return list(dict(leaves(value)).values())


def replaced(data, path, value):
    if not path:
        return value
    changed = copy.deepcopy(data)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


DATA, POINTS = json.loads(json.dumps(a_report().as_data())), points_of(a_report())


@pytest.mark.parametrize("value", [*TEXTS, *WRONG], ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("file", ["report.json", "figures.json"])
def test_any_value_anywhere_is_one_line_or_a_harmless_page(tmp_path, file, value):
    lines = []
    for path in places(DATA if file == "report.json" else POINTS):
        data = replaced(DATA, path, value) if file == "report.json" else DATA
        points = replaced(POINTS, path, value) if file == "figures.json" else POINTS
        try:
            assert harmless(page(read(left(tmp_path / "run", data, points)))), path
        except ConfigError as refusal:
            lines.append(str(refusal))
    assert lines
    for line in lines:
        assert "\n" not in line
        assert file in line
        assert "Remedy" in line


@pytest.mark.parametrize(
    ("file", "text", "key"),
    [
        ("report.json", '{"title": "", "tasks": [], "rows": [{}]}', "rows[0].name"),
        ("report.json", "[]", "dictionary"),
        ("report.json", "[" * 100_000, "not valid JSON"),
        ("report.json", "[" * 100 + "]" * 100, "deeper"),
        ("report.json", '{"title": "\\ud800", "tasks": [], "rows": []}', "Unicode"),
        ("report.json", "\xff", "JSON"),
        ("report.json", '{"title": 1, "tasks": [], "rows": []}', "title"),
        ("report.json", f'{{"title": "", "tasks": [], "rows": [], "samples": {{"a": {"1" * 5000}}}}}', "JSON"),
        ("report.json", '{"title": "", "tasks": [], "rows": [], "samples": {"latin": "<script>"}}', "samples.latin"),
        ("figures.json", "[]", "dictionary"),
        ("figures.json", '{"objective": {"a": {"steps": [1, 2], "loss": [1]}}}', "objective.a"),
        ("figures.json", '{"scatter": {"a": {"t": {}}}}', "scatter.a.t.merged"),
    ],
)
def test_the_line_names_file_and_key(tmp_path, monkeypatch, capsys, file, text, key):
    monkeypatch.chdir(tmp_path)
    left(tmp_path / "run", DATA, POINTS)
    (tmp_path / "run" / file).write_text(text, "latin-1")
    line = refused(capsys, ["report", "run"])
    assert file in line
    assert key in line


def test_what_cannot_be_read_or_written_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = left(tmp_path / "run", DATA, POINTS)
    (tmp_path / "page").mkdir()
    assert "is a directory, not a file" in refused(capsys, ["report", "run", "--output=page"])
    with pytest.raises(OutputError):
        report([run], tmp_path / "page")
    (run / "figures.json").unlink()
    os.mkfifo(run / "figures.json")
    assert "not a file" in refused(capsys, ["report", "run"])


def test_a_pipe_among_the_pictures_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = left(tmp_path / "run", DATA, POINTS)
    (run / "figures").mkdir()
    os.mkfifo(run / "figures" / "pipe.svg")
    assert main(["report", "run", "--still"]) == 0


def test_a_script_that_is_not_the_pages_does_not_run(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(read(left(tmp_path / "run", DATA, POINTS))))
    browser.get(path.as_uri())
    inject = "const s = document.createElement('script'); s.textContent = 'window.harmed = 1'; document.body.append(s)"
    browser.execute_script(inject)
    assert browser.execute_script("return window.harmed") is None
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


def test_a_picture_with_a_script_in_it_stays_a_picture(browser, tmp_path):
    run = left(tmp_path / "run", DATA, POINTS)
    (run / "figures").mkdir()
    script = "<script>top.harmed = 1; parent.harmed = 1</script>"
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="top.harmed = 1">{script}</svg>'
    (run / "figures" / "'><script>window.harmed = 1<.svg").write_text(picture)
    browser.get(report([run], tmp_path / "still.html", interactive=False).as_uri())
    assert browser.execute_script("return document.images[0].naturalWidth") == 9
    assert browser.execute_script("return window.harmed") is None
    assert len(browser.find_elements("css selector", "script")) == 2


def test_reports_of_earlier_versions_are_read(tmp_path):
    names = ("pretrained", "experts", "ties", "ties + deep", "ties + deep, routed", "other + final rank=8")
    rows = [{"name": name, "accuracies": {"one": 0.5}, "mean": 0.5} for name in names]
    repair = {**next(iter(DATA["repairs"].values())), "kind": "deep"}
    config = {"method": {"name": "ties_merging"}, "surgery": {"kind": "deep"}}
    old = {"title": "old", "tasks": ["one"], "rows": rows, "repairs": {"ties + deep": repair}, "config": config}
    data = read(left(tmp_path / "run", old, {})).data
    roles = [(row["role"], row["merge"], row["repair"], row["routed"]) for row in data["rows"]]
    assert roles == [
        ("pretrained", None, None, False),
        ("experts", None, None, False),
        ("merge", None, None, False),
        ("repair", "ties", "deep", False),
        ("repair", "ties", "deep", True),
        ("repair", "other", "final", False),
    ]
    assert data["config"] == {"method": {"name": "ties_merging"}, "repair": {"kind": "deep"}}


def test_fields_are_believed_and_names_are_not(tmp_path):
    merge = {"role": "merge", "repair": None, "merge": None, "routed": False}
    rows = [{"name": "a + b", "accuracies": {"one": 0.5}, "mean": 0.5, **merge}]
    data = read(left(tmp_path / "run", {"title": "new", "tasks": ["one"], "rows": rows}, {})).data
    assert {key: data["rows"][0][key] for key in merge} == merge
