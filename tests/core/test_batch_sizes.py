"""Batch sizes that follow the memory of a device; the CPU stands in for one that is full from some batch on."""

import pytest
import torch
from torch import nn

from suture.core import batch_sizes
from suture.core.batch_sizes import AutoSize, Halving
from suture.errors import ConfigError
from suture.evaluation import TaskInputs, evaluate
from suture.repairs import repair

pytestmark = pytest.mark.device
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Small(nn.Module):
    """A network on a device with room for so many inputs."""

    def __init__(self, room, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.room, self.seen = nn.Linear(3, 4), room, []
        self.to(DEVICE)

    def forward(self, inputs):
        if len(inputs) > self.room:
            raise torch.cuda.OutOfMemoryError(f"{len(inputs)} inputs")
        self.seen.append(len(inputs))
        return self.linear(inputs)


def task(count=600):
    torch.manual_seed(1)
    return TaskInputs("parity", torch.randn(count, 3), torch.arange(count) % 4)


@pytest.fixture
def memory(monkeypatch):
    """A device with so many free bytes, on which a pass takes a fixed number of them and more for each input."""

    def use(free, fixed=0, each=1):
        calls = [1, 1, 2] * 20

        def taken(function, device):
            function()
            return fixed + each * calls.pop(0)

        monkeypatch.setattr(batch_sizes, "free_memory", lambda device: free)
        monkeypatch.setattr(batch_sizes, "memory_of", taken)

    return use


@pytest.mark.parametrize("room", [1, 7, 100, 599, 600])
def test_batches_that_do_not_fit_are_halved_and_scores_stay(room, memory):
    memory(10**9)
    small, large = Small(room), Small(10**6)
    accuracy = evaluate(small, task(), batch_size="auto")
    assert accuracy == evaluate(large, task(), batch_size=64)
    assert max(small.seen) <= room
    assert sum(small.seen) >= 600


def test_encodings_of_halved_batches_are_in_the_order_of_the_inputs(memory):
    memory(10**9)
    inputs = {"a": torch.randn(50, 3), "b": torch.randn(70, 3)}
    experts = {name: Small(10**6, seed) for seed, name in enumerate(inputs, 1)}
    options = {"steps": 5, "variant": "standard", "rank": 2}
    halved = repair(Small(9), experts, inputs, encode_batch="auto", **options)
    plain = repair(Small(10**6), experts, inputs, encode_batch=9, **options)
    torch.testing.assert_close(halved.losses, plain.losses)


@pytest.mark.parametrize(
    ("free", "fixed", "each", "wanted"),
    [(10**6, 0, 64, 4096), (10**6, 10**5, 1000, 578), (10**6, 10**6, 10, 1)],
)
def test_the_size_is_found_from_what_one_and_two_inputs_take(free, fixed, each, wanted, memory):
    memory(free, fixed, each)
    module = Small(10**6)
    found, _ = AutoSize().fitting("scored", lambda module, x: module(x), module, task().inputs, DEVICE)
    assert found == wanted  # (0.7 · free − the first) / (each + three inputs of 12 bytes)
    assert module.seen == [1, 1, 2]


def test_a_device_with_no_room_for_two_inputs_takes_one_at_a_time(memory):
    memory(10**9)
    small = Small(1)
    evaluate(small, task(20), batch_size="auto")
    assert set(small.seen) == {1}


def test_an_input_that_does_not_fit_alone_is_the_device_s_error(memory):
    memory(10**9)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        evaluate(Small(0), task(20), batch_size="auto")


@pytest.mark.skipif(ON_GPU, reason="a GPU says how much memory is free")
def test_a_cpu_takes_256_at_a_time():
    module = Small(10**6)
    evaluate(module, task(), batch_size="auto")
    assert module.seen == [256, 256, 88]


def test_the_sizes_that_were_used_are_reported():
    auto, inputs = AutoSize(), task().inputs
    assert auto.notes == []
    _, forward = auto.fitting("encoded", lambda module, x: module(x), Small(100), inputs, torch.device("cpu"))
    assert auto.notes == ["batch_size=auto, inputs at once: encoded 256."]
    forward(Small(100), inputs[:256].to(DEVICE))
    assert auto.notes == ["batch_size=auto, inputs at once: encoded 64."]
    auto.fitting("encoded", forward, Small(100), inputs, torch.device("cpu"))
    auto.fitting("scored", forward, Small(100), inputs, torch.device("cpu"))
    assert auto.notes == ["batch_size=auto, inputs at once: encoded 64 to 256, scored 256."]


def test_a_size_that_was_halved_stays_so():
    network = Small(10)
    halving = Halving(lambda module, batch: module(batch))
    inputs = torch.randn(32, 3, device=DEVICE)
    halving(network, inputs)
    assert network.seen == [8, 8, 8, 8]
    halving(network, inputs[:12])
    assert network.seen[4:] == [8, 4]


@pytest.mark.parametrize("wrong", [0, -1, "many", 2.5, True])
def test_a_size_that_is_neither_a_number_nor_auto_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"batch_size=.*wanted 1 or more, or auto"):
        evaluate(Small(10), task(), batch_size=wrong)
