"""Processes that share the work of repairs and scores over gloo: the results of one process."""

import pytest
import torch
from teams import TASKS, models_and_inputs, processes, repaired
from torch import nn

from suture import evaluate, repair
from suture.core.fabric import Team, launch
from suture.errors import ConfigError, DataError
from suture.evaluation import Scorer, TaskInputs

NUMBERS = [2, pytest.param(4, marks=pytest.mark.slow)]
STRATEGIES = ["ddp_fork", "fsdp"]

CASES = [
    ("final", {"steps": 5}),
    ("final", {"steps": 5, "variant": "centred"}),
    ("prob_surgery", {"steps": 5}),
    ("affine", {}),
    ("deep", {"steps": 5}),
    ("deep", {"steps": 5, "batch_size": 3, "concatenate": False}),
    ("deep", {"steps": 6, "optimizer": "shared_adam_pairs"}),
    ("deep", {"steps": 4, "fit": "layerwise"}),
    ("calibrate", {}),
    ("calibrate", {"num_passes": 2}),
    ("distil", {"steps": 5}),
    ("distil", {"steps": 5, "layers": "blocks", "batch_size": 3, "concatenate": False}),
    ("distil", {"steps": 5, "held_out": 0.2, "mixed": 1}),
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("kind", "knobs", "strategy"),
    [(*case, strategy) for case in CASES for strategy in STRATEGIES if (case[0], strategy) != ("distil", "fsdp")],
)
def test_processes_repair_as_one_does(kind, knobs, strategy, number):
    one = repaired(kind, knobs)
    several = launch(processes(number, strategy), lambda fabric: repaired(kind, knobs, fabric))
    torch.testing.assert_close(several[0], one[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(several[1], one[1], rtol=0, atol=1e-11)
    assert several[2:] == one[2:]
    before = models_and_inputs()[0](torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).double())
    assert (one[1] - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "knobs"), [("calibrate", {}), ("distil", {"steps": 5, "statistics": "updated", "seed": 1})]
)
def test_batch_statistics_are_those_of_all_inputs(kind, knobs):
    one = repaired(kind, knobs, norm=nn.BatchNorm1d)
    several = launch(processes(2), lambda fabric: repaired(kind, knobs, fabric, norm=nn.BatchNorm1d))
    torch.testing.assert_close(several[0], one[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(several[1], one[1], rtol=0, atol=1e-11)


def test_every_process_has_the_result_and_its_share_of_the_work():
    def seen(fabric):
        merged, experts, inputs = models_and_inputs()
        count = [0]
        for module in (merged, *experts.values()):
            module.feature.register_forward_hook(lambda m, a, output: count.__setitem__(0, count[0] + len(output)))
        result = repair(merged, experts, inputs, "final", encode_batch=4, steps=40, fabric=fabric)
        return Team(fabric).gather((result.losses, count[0]))

    losses, counts = zip(*launch(processes(2), seen), strict=True)
    assert torch.equal(*losses)
    everything = 2 * sum(21 + i for i in range(TASKS))
    assert max(counts) <= 0.6 * everything


def test_encodings_that_every_process_finds_in_the_cache_are_not_made_again(tmp_path):
    knobs = {"steps": 5}
    one = repaired("final", knobs)
    again = [launch(processes(2), lambda f: repaired("final", knobs, f, cache=tmp_path)) for _ in range(2)]
    assert [passes for *_, passes in again] == [one[3], (0, 0)]
    assert all(torch.equal(each[0], again[0][0]) and torch.equal(each[1], again[0][1]) for each in again)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 * TASKS


def test_only_the_first_process_writes_states_and_tells_of_steps(tmp_path):
    from suture.storage.resume import Resume

    def stopped(fabric, stop):
        steps = []

        def on_step(step, losses, modules):
            steps.append(step)
            if step == stop:
                raise DataError("stopped")

        resume = Resume(tmp_path / "state.pt", {"w": 1}, every=0)
        found = repaired("deep", {"steps": 6}, fabric, resume=resume, on_step=on_step)
        return found[:2], Team(fabric).gather(steps)

    with pytest.raises(DataError, match=r"^stopped$"):
        launch(processes(2), lambda fabric: stopped(fabric, 2))
    (losses, features), steps = launch(processes(2), lambda fabric: stopped(fabric, None))
    assert steps == [[3, 4, 5], []]
    one = repaired("deep", {"steps": 6})
    torch.testing.assert_close(losses, one[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(features, one[1], rtol=0, atol=1e-11)


def tasks():
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, count in (("a", 23), ("b", 4)):
        inputs = torch.randn(count, 6, generator=generator).double()
        made[name] = TaskInputs(name, inputs, torch.randint(0, 4, (count,), generator=generator))
    return made


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_score_as_one_does(strategy, number):
    module = models_and_inputs()[0]
    logits = lambda fabric: Scorer(5, fabric=fabric).each_batch(module, tasks()["a"], lambda logits, labels: logits)
    one, several = logits(None), launch(processes(number, strategy), logits)
    torch.testing.assert_close(several, one, rtol=0, atol=1e-14)
    row = evaluate(module, tasks(), batch_size=5)
    assert launch(processes(number, strategy), lambda f: evaluate(module, tasks(), batch_size=5, fabric=f)) == row
    assert 0 < row.accuracies["a"] < 1


def test_what_a_process_refuses_is_one_line_in_the_command():
    with pytest.raises(ConfigError, match=r"^Unknown repair 'finale'\."):
        launch(processes(2), lambda fabric: repaired("finale", {}, fabric))

    def last(fabric):
        if fabric.global_rank:
            raise DataError("the inputs of one process")
        return Team(fabric).gather(1)

    with pytest.raises(DataError, match=r"^the inputs of one process$"):
        launch(processes(2), last)


def test_processes_take_items_in_turn_and_all_have_the_results():
    def work(fabric):
        team = Team(fabric)
        results = list(team.each(lambda item: (team.rank, item), "abcde"))
        shares = [team.share(count) for count in (5, 1)]
        total = torch.tensor([1.0, team.rank])
        team.add([total])
        return team.gather((results, shares, total.tolist()))

    first, second = launch(processes(2), work)
    assert first[0] == second[0] == [(0, "a"), (1, "b"), (0, "c"), (1, "d"), (0, "e")]
    assert first[1] == [(slice(0, None, 2), 0.6), (slice(0, None, 2), 1.0)]
    assert second[1] == [(slice(1, None, 2), 0.4), (slice(0, 1), 0.0)]
    assert first[2] == second[2] == [2.0, 1.0]
