"""`surgery=…` after a merge, on the command line: rows, files, kills, sweeps, and bad input."""

import json

import pytest
import torch
import yaml
from desk import Desk, refused, struck_and_resumed

import suture
from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.errors import ConfigError
from suture.families.clip import Clip
from suture.repairs import SurgeryModel

QUICK = ["surgery.steps=5", "surgery.batch_size=4", "surgery.rank=3"]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def rows_of(folder):
    return [row["name"] for row in report_of(folder)["rows"]]


def weights(path):
    return {name: tensor.clone() for name, tensor in open_checkpoint(path).items()}


@pytest.mark.parametrize("kind", ["final", "deep"])
def test_a_repair_leaves_its_modules_rows_and_figures(desk, kind):
    looks = ["surgery.eval_iterations=2"] if kind == "final" else []
    assert main(desk.words(f"surgery={kind}", *QUICK, *looks, method="task_arithmetic")) == 0
    out = desk.folder / "out"
    name = f"task_arithmetic + {kind}"
    assert rows_of(out) == ["pretrained", "experts", "task_arithmetic", name, f"{name}, routed"]
    repair = report_of(out)["repairs"][name]
    assert repair["steps"] == 5
    assert list(repair["scores"]) == (["2", "4"] if kind == "final" else [])
    after = repair["representation"]["after"]["l1"]["first"]
    assert {"vision_model.encoder.layers.1", "(features)"} <= set(after)
    assert repair["added_parameters"] == 2 * 2 * 3 * (8 if kind == "final" else 8 + 2 * 16)
    drawn = {path.stem for path in (out / "figures").glob("*.png")}
    assert {f"l1_by_layer_task_arithmetic_{kind}", f"representation_task_arithmetic_{kind}"} <= drawn
    assert not list(out.glob(".encodings*"))
    encoder = Clip(out / "model").encoder()
    loaded = SurgeryModel.load(out / "surgery.safetensors", encoder)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert loaded(pixels, "first").shape == loaded(pixels).shape == (2, 8)


def test_final_surgery_encodes_each_input_once_and_evaluates_from_what_it_keeps(desk):
    assert main(desk.words("surgery=final", *QUICK, "surgery.eval_iterations=1", "surgery.compare=0")) == 0
    encoded = report_of(desk.folder / "out")["repairs"]["ties_merging + final"]["inputs_encoded"]
    assert encoded == {"merged": 24, "experts": 24}


def test_the_router_never_beats_the_task_id(desk):
    for router in ("linear", "centroids"):
        words = desk.words("surgery=final", *QUICK, f"surgery.router={router}", "overwrite=true")
        assert main(words) == 0
        named, routed = report_of(desk.folder / "out")["rows"][-2:]
        assert all(routed["accuracies"][task] <= named["accuracies"][task] for task in ("first", "second"))
    assert main(desk.words("surgery=final", *QUICK, "surgery.router=none", "overwrite=true")) == 0
    assert rows_of(desk.folder / "out")[-1] == "ties_merging + final"


def test_online_surgery_reports_shares_of_the_stream_and_the_prequential_accuracy(desk):
    assert main(desk.words("surgery=online", "surgery.rank=3", "surgery.fractions=[0.5,1.0]")) == 0
    names = [f"ties_merging + online {part}" for part in ("50%", "100%", "prequential")]
    assert rows_of(desk.folder / "out")[3:] == names
    repair = report_of(desk.folder / "out")["repairs"]["ties_merging + online"]
    assert repair["steps"] == 12
    assert (desk.folder / "out" / "surgery.safetensors").is_file()


def test_a_blend_says_what_it_costs(desk):
    assert main(desk.words("surgery=blend", "surgery.steps=5", "surgery.batch_size=4")) == 0
    repair = report_of(desk.folder / "out")["repairs"]["ties_merging + blend"]
    assert repair["encoders_at_inference"] == 3
    assert "runs 3 encoders for every input" in repair["warnings"][0]


def test_adamerging_with_surgery_gives_both_results(desk):
    words = ["method.max_steps=3", "method.batch_size=4", "method.surgery_steps=4", "method.eval_iterations=2"]
    assert main(desk.words(*words, method="surgery/adamerging_surgery")) == 0
    out = desk.folder / "out"
    assert rows_of(out)[2:] == ["adamerging", "surgery", "surgery, routed"]
    assert (out / "merging_weights.pt").is_file()
    assert (out / "surgery.safetensors").is_file()
    assert list(report_of(out)["repairs"]["adamerging + final"]["scores"]) == ["2", "4"]


def test_the_same_repair_goes_on_where_it_was_killed(desk, monkeypatch):
    from suture.repairs.fitting import Descent

    words = desk.words("surgery=final", *QUICK, "surgery.steps=8")
    struck_and_resumed(desk, monkeypatch, words, Descent, 5)
    one, two = (weights(desk.folder / folder / "surgery.safetensors") for folder in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_sweep_over_merges_and_repairs_is_one_table_and_is_not_run_twice(desk, capsys, monkeypatch):
    words = [word for word in desk.words(*QUICK[:1], "hydra.sweep.dir=table") if "output" not in word]
    words[0] = "method=simple_average,task_arithmetic"
    sweep = ["-m", *words, "surgery=final,deep", "surgery.batch_size=4"]
    assert main(sweep) == 0
    assert set(rows_of(desk.folder / "table")[2:]) == {
        f"{method}{repair}"
        for method in ("simple_average", "task_arithmetic")
        for repair in ("", " + final", " + final, routed", " + deep", " + deep, routed")
    }
    monkeypatch.setattr(Clip, "decode", lambda *a, **k: pytest.fail("decoded"))
    capsys.readouterr()
    assert main(sweep) == 0
    assert capsys.readouterr().out.count("already holds the result of this run") == 4


def test_a_sweep_over_pools_has_a_table_for_each(desk, capsys):
    words = [word for word in desk.words("hydra.sweep.dir=table", method="task_arithmetic") if "output" not in word]
    pool = yaml.safe_load((desk.folder / "pool.yaml").read_text())
    pool["models"]["second"] = pool["models"]["first"]
    (desk.folder / "other.yaml").write_text(yaml.safe_dump(pool))
    words = ["-m", *(word.replace("pool.yaml", "pool.yaml,other.yaml") for word in words)]
    assert main([*words, "method.scaling_factor=0.1,2.0"]) == 0
    out = capsys.readouterr().out
    found = [report_of(desk.folder / "table" / f"pools-{number}") for number in (1, 2)]
    for report, name in zip(found, ("pool", "other"), strict=True):
        assert report["title"].startswith(f"sweep of 2 runs: {name}")
        assert [row["name"] for row in report["rows"]] == [
            "pretrained",
            "experts",
            *(f"task_arithmetic scaling_factor={value}" for value in (0.1, 2.0)),
        ]
        assert report["title"] in out
    runs = [report_of(desk.folder / "table" / str(job)) for job in range(4)]
    tables = [[(row["name"].split()[0], row["accuracies"]) for row in report["rows"]] for report in found]
    assert tables[1] == [(row["name"], row["accuracies"]) for row in [*runs[2]["rows"], runs[3]["rows"][-1]]]
    assert not (desk.folder / "table" / "report.json").exists()


def test_a_sweep_over_the_number_of_inputs_draws_its_curve(desk):
    words = [word for word in desk.words("surgery=final", *QUICK, "hydra.sweep.dir=table") if "output" not in word]
    assert main(["-m", *words, "surgery.num_inputs=2,6,12"]) == 0
    curve = report_of(desk.folder / "table")["curves"]["num_inputs"]["ties_merging + final"]
    assert [value for value, _ in curve] == [2, 6, 12]
    assert (desk.folder / "table" / "figures" / "accuracy_over_num_inputs.png").is_file()


def test_a_bad_value_in_a_sweep_is_found_before_its_first_run(desk, capsys):
    words = [word for word in desk.words() if "output" not in word]
    assert "method.threshold=500" in refused(capsys, ["-m", *words, "method.threshold=20,500"])
    assert "repair.rank=0" in refused(capsys, ["-m", *words, "surgery=final", "surgery.rank=4,0"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["surgery=fnal"], "Did you mean 'final'"),
        (["surgery=final", "surgery.rank=0"], "repair.rank=0 does not fit repair=final"),
        (["repair.rank=4"], "repair.rank is given, but no repair. Remedy: name one, such as repair=final."),
        (["surgery=final", "surgery.ranks=3"], "Did you mean 'repair.rank'"),
        (["surgery=deep", "surgery.variant=normalised"], "repair.variant='normalised' does not fit repair=deep"),
        (["surgery=final", "surgery.router=nearest"], "repair.router='nearest' does not fit"),
        (["surgery=deep", "surgery.eval_iterations=2"], "only repair=final is scored on the way, not deep"),
        (["surgery=final", "method=surgery/adamerging_surgery"], "the method has a repair of its own"),
    ],
)
def test_a_repair_that_cannot_be_is_refused_in_one_line(desk, capsys, words, message):
    method = next((word.partition("=")[2] for word in words if word.startswith("method=")), "ties_merging")
    more = [word for word in words if not word.startswith("method=")]
    assert message in refused(capsys, desk.words(*more, method=method))


def test_a_repair_without_tasks_is_refused(desk, capsys):
    words = [word for word in desk.words("surgery=final") if not word.startswith("taskpool")]
    assert "repair=final needs unlabelled inputs" in refused(capsys, words)
    del desk.tasks["second"]
    assert "Model 'second' has no task of its name" in refused(capsys, desk.words("surgery=final"))


def test_adamerging_with_surgery_is_one_call_in_python(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    desk = Desk(shop, tmp_path)
    kind = suture.CLIPLayerWiseAdaMergingSurgeryAlgorithm
    found = kind(max_steps=2, batch_size=4, surgery_steps=3).run({"models": desk.models}, {"tasks": desk.tasks})
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert found["adamerging"](pixels).shape == found["surgery"](pixels, "second").shape == (2, 8)
    with pytest.raises(ConfigError, match="Did you mean 'surgery_steps'"):
        kind(surgery_step=3)
