"""`repair=distil` on the command line: its model, its row, kills, chains, frozen tensors, lower precision."""

import json

import pytest
import torch
import yaml
from desk import refused, struck_and_resumed

from suture.checkpoints import open_checkpoint
from suture.cli.main import main
from suture.families.clip import Clip

QUICK = ["repair.steps=6", "repair.batch_size=4", "repair.lr=0.01"]
PIXELS = torch.arange(2 * 3 * 16 * 16).remainder(256).view(2, 3, 16, 16).to(torch.uint8)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def weights(path):
    return {name: tensor.clone() for name, tensor in open_checkpoint(path).items()}


def test_a_run_leaves_a_distilled_model_that_its_library_loads_and_a_row(desk):
    from transformers import CLIPModel

    slow = ["repair.steps=40", "repair.batch_size=8", "repair.lr=0.003"]
    words = desk.words("repair=distil", *slow, "repair.split=train", method="task_arithmetic")
    assert main([*words, "repair.num_inputs=8"]) == 0
    out = desk.folder / "out"
    row = report_of(out)["rows"][-1]
    assert (row["name"], row["needs_task"]) == ("task_arithmetic + distil", False)
    assert row["learned"] == "weights, 40 steps on 8 train inputs a task"
    repair = report_of(out)["repairs"]["task_arithmetic + distil"]
    assert repair["added_parameters"] == 0
    assert sum(repair["last_loss"].values()) < sum(repair["first_loss"].values())
    before, after = weights(out / "model"), weights(out / "model_distil")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("vision_model.")}
    standard = Clip(out / "model").reader.standardise()(PIXELS)
    library = CLIPModel.from_pretrained(out / "model_distil").eval()
    with torch.no_grad():
        wanted = library.get_image_features(pixel_values=standard)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    torch.testing.assert_close(Clip(out / "model_distil").encoder()(PIXELS), wanted, rtol=0, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(desk, monkeypatch):
    from suture.repairs.training import Training

    words = desk.words("repair=distil", *QUICK, method="task_arithmetic")
    struck_and_resumed(desk, monkeypatch, words, Training, 4)
    one, two = (weights(desk.folder / folder / "model_distil") for folder in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_frozen_tensors_of_the_pool_stay_at_the_pretrained_ones(desk):
    frozen = ["vision_model.embeddings.class_embedding", "vision_model.post_layernorm.weight"]
    words = desk.words("repair=distil", *QUICK, method="task_arithmetic")
    pool = yaml.safe_load((desk.folder / "pool.yaml").read_text())
    (desk.folder / "pool.yaml").write_text(yaml.safe_dump({**pool, "frozen": frozen}))
    assert main(words) == 0
    base, after = desk.tensors("_pretrained_"), weights(desk.folder / "out" / "model_distil")
    assert all(torch.equal(base[name], after[name]) for name in frozen)
    assert not torch.equal(base["vision_model.pre_layrnorm.weight"], after["vision_model.pre_layrnorm.weight"])


def test_surgery_can_follow_a_distillation(desk):
    more = [word.replace("repair.", "repair.distil.") for word in QUICK]
    words = desk.words("repair=distil+final", *more, "repair.final.steps=3", method="task_arithmetic")
    assert main(words) == 0
    names = [row["name"] for row in report_of(desk.folder / "out")["rows"]]
    assert names[-3:-1] == ["task_arithmetic + distil", "task_arithmetic + distil + final"]


def test_forward_passes_can_be_in_a_lower_precision(desk):
    words = desk.words("repair=distil", *QUICK, "repair.parameters=lora", method="task_arithmetic")
    assert main([*words, "fabric.precision=bf16-mixed"]) == 0
    assert main([*words, "output=full"]) == 0
    lower, full = (weights(desk.folder / folder / "model_distil") for folder in ("out", "full"))
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(lower[name], full[name])
    torch.testing.assert_close(lower[name], full[name], rtol=0, atol=0.02)
    assert lower[name].dtype == torch.float32


def test_held_out_inputs_are_named_in_the_report(desk):
    assert main(desk.words("repair=distil", *QUICK, "repair.held_out=0.25", method="task_arithmetic")) == 0
    notes = report_of(desk.folder / "out")["notes"]
    assert any("their distance on 6 held-out inputs was the smallest" in note for note in notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["repair.held_out=1.0"], "repair.held_out=1.0 does not fit repair=distil"),
        (["repair.parameters=some"], "repair.parameters='some'"),
        (["repair.step=3"], "Did you mean 'repair.steps'"),
        (["repair.eval_iterations=2"], "only repair=final is scored on the way, not distil"),
    ],
)
def test_knobs_that_cannot_be_are_refused_before_any_work(desk, capsys, words, message):
    assert message in refused(capsys, desk.words("repair=distil", *words))
