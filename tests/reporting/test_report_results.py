"""`suture.report` on results of Python: scored rows, what was learned and repaired, and one page of it."""

import json

import pytest
import torch
from torch import nn

import suture
from suture.errors import ConfigError, OutputError

TASKS = ("one", "two")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A base, two experts, inputs and labels of one's own; the experts are always right."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    states = {n: {k: v + 0.3 * torch.randn_like(v) for k, v in module.state_dict().items()} for n in TASKS}
    inputs = {name: torch.randn(24, 4) for name in TASKS}
    tasks = {}
    for name, state in states.items():
        labels = torch.func.functional_call(module, state, inputs[name]).argmax(1)
        tasks[name] = suture.TaskInputs(name, inputs[name], labels)
    return module, states, inputs, tasks


def told(page):
    return json.loads((page.parent / "report.json").read_text())


def test_everything_that_can_come_back_is_reported(own, tmp_path):
    module, states, inputs, tasks = own
    suture.save_checkpoint(states["one"], "one.safetensors")
    experts = {"one": "one.safetensors", "two": states["two"]}
    merged = suture.merge(module, experts, "ties_merging")
    adapted = suture.adapt(module, module, experts, {n: [x] for n, x in inputs.items()}, max_steps=2)
    modules = {name: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for name in TASKS}
    for name, expert in modules.items():
        expert.load_state_dict(states[name])
    repaired = {kind: suture.repair(module, modules, inputs, kind, steps=3) for kind in ("final", "blend")}
    row = suture.evaluate_row("another name", module, tasks)
    results = {
        "merged": merged,
        "adapted": adapted,
        **repaired,
        "module": module,
        "row": row,
        "call": lambda x: module(x),
    }
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    page = suture.report(results, "mine", tasks=tasks, module=module, pretrained=module, experts=experts)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    found = told(page)
    rows = {row["name"]: row["accuracies"] for row in found["rows"]}
    assert list(rows) == ["pretrained", "experts", *results]
    assert rows["experts"] == {"one": 1.0, "two": 1.0}
    assert rows["row"] == rows["module"] == rows["call"] == rows["pretrained"] == dict(row.accuracies)
    assert list(found["learning"]) == ["adapted"]
    assert found["learning"]["adapted"]["steps"] == 2
    assert [found["repairs"][kind]["kind"] for kind in repaired] == ["final", "blend"]
    assert set(found["repairs"]["final"]["representation"]["before"]["l1"]) == set(TASKS)
    assert list(found["provenance"]["inputs"]) == ["_pretrained_", *TASKS]
    assert page == page.parent / "report.html"
    assert "merged" in page.read_text()
    assert (page.parent / "figures" / "accuracy.png").exists()


def test_reports_of_results_are_compared_like_runs(own):
    module, states, _, tasks = own
    pages = [suture.report({name: state}, name, tasks=tasks, module=module) for name, state in states.items()]
    compared = suture.report([page.parent for page in pages])
    assert "2 runs compared" in compared.read_text()


def test_a_report_needs_neither_experts_nor_a_place(own):
    module, _, _, tasks = own
    page = suture.report({"base": module}, tasks=tasks, title="mine", interactive=False)
    assert page.parts[:2] == ("outputs", "report")
    assert told(page)["title"] == "mine"
    assert [row["gap_closed"] for row in told(page)["rows"]] == [None]


def test_what_cannot_be_reported_is_refused_before_anything_is_written(own, tmp_path):
    module, states, _, tasks = own
    with pytest.raises(ConfigError, match="no module to load them into"):
        suture.report({"merged": states["one"]}, "mine", tasks=tasks)
    with pytest.raises(ConfigError, match="nothing to score"):
        suture.report({"base": module}, "mine")
    with pytest.raises(ConfigError, match="experts lacks 'two'"):
        suture.report({"base": module}, "mine", tasks=tasks, experts={"one": module})
    with pytest.raises(ConfigError, match="nothing to report"):
        suture.report({}, "mine", tasks=tasks)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            suture.report({"base": module}, "mine", tasks=tasks, overwrite=overwrite)
    assert (tmp_path / "mine" / "precious").read_text() == "mine"


def test_a_report_replaces_only_a_report(own, tmp_path):
    module, _, _, tasks = own
    page = suture.report({"base": module}, "mine", tasks=tasks)
    page.with_name("notes.txt").write_text("of the first report")
    with pytest.raises(OutputError):
        suture.report({"base": module}, "mine", tasks=tasks)
    assert suture.report({"base": module}, "mine", tasks=tasks, overwrite=True) == page
    assert not page.with_name("notes.txt").exists()
