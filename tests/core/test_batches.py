"""Shuffled batches: the order, and that any step can be had at once."""

import threading

import far_tensors
import pytest
import torch

from suture.core.batches import ShuffledBatches, ahead, concatenate, joinable
from suture.errors import ConfigError, DataError


def test_every_input_comes_once_before_any_comes_again():
    batches = ShuffledBatches(torch.arange(10), 4, name="task")
    stream = torch.cat([batches[step] for step in range(10)])
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in stream.split(10))
    assert not torch.equal(stream[:10], stream[10:20])


def test_a_batch_may_be_larger_than_all_inputs():
    assert sorted(ShuffledBatches(torch.arange(3), 6)[2].tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_step_depends_on_seed_name_and_number_alone():
    inputs = {"x": torch.arange(50)}
    one, other = (ShuffledBatches(inputs, 8, seed=3, name="a") for _ in range(2))
    for _, batch in zip(range(20), other, strict=False):
        last = batch
    assert torch.equal(one[19]["x"], last["x"])
    assert not torch.equal(one[0]["x"], ShuffledBatches(inputs, 8, seed=4, name="a")[0]["x"])
    assert not torch.equal(one[0]["x"], ShuffledBatches(inputs, 8, seed=3, name="b")[0]["x"])


def test_no_inputs_and_no_batch_size_are_refused():
    with pytest.raises(DataError, match="Task 'cars' has no inputs"):
        ShuffledBatches(torch.empty(0, 3), name="cars")
    with pytest.raises(ConfigError, match="batch_size=0"):
        ShuffledBatches(torch.ones(2), 0)


def test_batches_that_do_not_fit_are_not_joinable():
    assert not joinable(torch.ones(2, 3), torch.ones(2, 4))
    assert not joinable({"a": torch.ones(1)}, {"b": torch.ones(1)})
    assert joinable({"a": torch.ones(1)}, {"a": torch.ones(2)})
    assert len(concatenate([{"a": torch.ones(1)}, {"a": torch.ones(2)}])["a"]) == 3


def read(batches, threads):
    """The batches, and in `threads` which thread took each."""
    for batch in batches:
        threads.append(threading.get_ident())
        yield batch


@pytest.fixture
def far(monkeypatch):
    """A device, which pins no memory unless it is real."""
    far_tensors.reach(monkeypatch)
    if not far_tensors.REAL:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return far_tensors.FAR


@pytest.mark.device
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_a_thread_sends_the_next_batches_to_a_device_in_order(far, count):
    batches = [{"pixels": torch.full((2, 3), float(i)), "mask": torch.ones(2)} for i in range(count)]
    threads = []
    sent = list(ahead(read(batches, threads), far))
    assert len(sent) == count
    assert threading.get_ident() not in threads
    for batch, there in zip(batches, sent, strict=True):
        assert there["pixels"].device.type == far.type
        assert torch.equal(there["pixels"].cpu(), batch["pixels"])


@pytest.mark.device
def test_two_batches_are_read_before_they_are_asked_for_and_no_more(far):
    threads = []
    stream = ahead(read([torch.tensor([i]) for i in range(9)], threads), far)
    next(stream)
    stream.close()
    assert len(threads) == 3


@pytest.mark.device
def test_a_batch_that_cannot_be_read_ends_the_stream_with_its_error(far):
    def broken():
        yield torch.ones(1)
        raise DataError("the file ends here")

    stream = ahead(broken(), far)
    assert next(stream).cpu() == 1
    with pytest.raises(DataError, match="the file ends here"):
        next(stream)


def test_the_cpu_reads_no_batch_ahead():
    threads = []
    stream = ahead(read([torch.ones(1)] * 3, threads), torch.device("cpu"))
    next(stream)
    assert threads == [threading.get_ident()]
