"""`repair=a+b`: repairs that change weights, and repairs of the models that they leave."""

import copy
import json

import pytest
import torch
from desk import refused

from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.families.clip import Clip
from suture.repairs import Problem, RepairResult, StaticModel, repair_kind
from suture.repairs.registry import _KINDS, repair_kinds

QUICK = ["repair.final.steps=3", "repair.final.rank=2", "repair.final.batch_size=4"]


@pytest.fixture
def halfway():
    """A kind of repair that moves the merged weights half of the way back to the pretrained ones."""
    repair_kinds()

    @repair_kind(paper="none", static=True)
    def halfway(problem: Problem, *, share: float = 0.5) -> RepairResult:
        """Go back a share of the way."""
        module = copy.deepcopy(problem.module)
        with torch.no_grad():
            for name, base in problem.base.items():
                module.state_dict()[name].lerp_(base, share)
        model = StaticModel(module, problem.tasks, forward=problem.forward, kind="halfway")
        return RepairResult("halfway", model, torch.zeros(0, len(problem.tasks)))

    yield
    del _KINDS["halfway"]


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_a_static_repair_leaves_a_model_that_its_library_loads(desk, halfway):
    assert main(desk.words("repair=halfway", "repair.share=1.0", method="task_arithmetic")) == 0
    out, rows = desk.folder / "out", rows_of(desk.folder / "out")
    assert list(rows) == ["pretrained", "experts", "task_arithmetic", "task_arithmetic + halfway"]
    assert rows["task_arithmetic + halfway"]["accuracies"] == rows["pretrained"]["accuracies"]
    saved = Clip(out / "model_halfway").encoder()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    pretrained = Clip(desk.models["_pretrained_"]).encoder()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert torch.equal(saved, pretrained)
    assert set(open_checkpoint(out / "model_halfway")) == set(open_checkpoint(out / "model"))


def test_a_repair_of_a_repaired_model_starts_from_its_weights(desk, halfway):
    assert main(desk.words("repair=halfway+final", *QUICK, method="task_arithmetic")) == 0
    names = ["task_arithmetic", "task_arithmetic + halfway", "task_arithmetic + halfway + final"]
    out = desk.folder / "out"
    rows = rows_of(out)
    assert [name for name in rows if ", " not in name][2:] == names
    assert rows[names[2]]["repair"] == "halfway+final"
    assert (out / "surgery.safetensors").is_file()
    one = json.loads((out / "report.json").read_text())["repairs"][names[2]]
    assert one["kind"] == "final"
    alone = [word.replace("final.", "") for word in QUICK]
    assert main(desk.words("repair=final", *alone, "output=alone", method="task_arithmetic")) == 0
    modules = [
        open_checkpoint(folder / "surgery.safetensors")["(features)/up"] for folder in (out, desk.folder / "alone")
    ]
    assert not torch.equal(*modules)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repair=final+halfway"], "nothing can follow final, which adds modules"),
        (["repair=halfway+halfway"], "halfway stands there twice"),
        (["repair=halfway+finale"], "Unknown repair 'finale'"),
        (["repair=halfway+final", "repair.rank=3"], "rank"),
        (["repair=halfway+final", "repair.final.rank=0"], "rank"),
    ],
)
def test_chains_that_cannot_be_are_refused_before_any_work(desk, halfway, capsys, words, message):
    assert message in refused(capsys, desk.words(*words, method="task_arithmetic"))


def test_every_row_says_what_it_learned_and_whether_it_needs_the_tasks_name(desk, halfway):
    assert main(desk.words("repair=halfway+final", *QUICK, "repair.final.num_inputs=6", method="task_arithmetic")) == 0
    rows = rows_of(desk.folder / "out")
    said = {name: (row["needs_task"], row["learned"]) for name, row in rows.items()}
    modules = "modules, 3 steps on 6 test inputs a task"
    assert said == {
        "pretrained": (False, ""),
        "experts": (True, ""),
        "task_arithmetic": (False, ""),
        "task_arithmetic + halfway": (False, "weights, solved on 12 test inputs a task"),
        "task_arithmetic + halfway + final": (True, modules),
        "task_arithmetic + halfway + final, routed": (False, modules),
    }
    report = json.loads((desk.folder / "out" / "report.json").read_text())
    seconds, memory = report["seconds"], report["memory"]
    assert list(seconds) == list(memory) == list(rows)[2:]
    peak = report["circumstances"]["peak_memory"]["process"]
    assert 50 * 2**20 < memory["task_arithmetic"] <= memory["task_arithmetic + halfway"] <= peak
    merge, halfway, final, routed = seconds.values()
    assert 0 < merge < halfway < final == routed
    page = (desk.folder / "out" / "report.html").read_text()
    assert "needed" in page
    assert modules in page
    assert modules in (desk.folder / "out" / "report.md").read_text()
