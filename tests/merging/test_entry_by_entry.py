"""MagMax, PCB, Consensus and Localize-and-Stitch: parity, cases by hand, and statistics of whole models in files."""

import numpy as np
import pytest
import torch
from second_family import INDEX, inputs, names, part

from suture import get_method, merge, merge_files, open_checkpoint
from suture.errors import ConfigError
from suture.file_merge.workspace import WorkingFolder
from suture.merging import order_statistic
from suture.merging.methods.pcb import pcb_statistic
from suture.merging.order_statistic import order_statistics
from suture.merging.streams import OneTensor
from suture.merging.task_vectors import RowStream

KNOBS = {"scale": "scaling_factor", "ratio": "density", "lam": "mask_threshold"}
CASES = names("weights", "magmax", "pcb", "consensus")
GLOBAL = ["pcb", "localize_and_stitch"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_equals_the_reference(name, dtype):
    case, given, expected = INDEX[name], inputs(name), part(name, "merged")
    knobs = {KNOBS.get(knob, knob): value for knob, value in case["knobs"].items()}
    base = {key: tensor.to(dtype) for key, tensor in given.base.items()}
    models = {label: {k: t.to(dtype) for k, t in model.items()} for label, model in given.models.items()}
    merged = merge(base, models, case["method"], **knobs)
    for key, tensor in expected.items():
        limit = 1e-12 if dtype == torch.float64 else 1e-6 * tensor.abs().max().item()
        torch.testing.assert_close(merged[key].double(), tensor, rtol=0, atol=limit)


def test_magmax_gives_equal_magnitudes_to_the_later_task():
    deltas = torch.tensor([[2.0, 1.0, -3.0], [-2.0, 0.5, 3.0], [1.0, -1.0, 3.0]])
    magmax = get_method("magmax").function
    assert magmax(torch.zeros(3), deltas, scaling_factor=1.0).tolist() == [-2, -1, 3]
    assert magmax(torch.zeros(3), deltas.flip(0), scaling_factor=1.0).tolist() == [2, 1, -3]


def test_consensus_by_hand():
    deltas = torch.tensor([[1.0, 4.0, 1.0, 0.0], [1.0, -1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    function = get_method("consensus").function
    assert function(torch.zeros(4), deltas, mask_threshold=0.5, scaling_factor=1.0).tolist() == [0, 0, 2, 0]
    assert function(torch.zeros(4), deltas, mask_threshold=0.4, scaling_factor=1.0).tolist() == [3, 0, 2, 0]
    one = function(torch.zeros(4), deltas, mask_threshold=[0.5, 0.5, 0.4], agree=1, scaling_factor=1.0)
    assert one.tolist() == [3, 3, 2, 0]


def test_a_consensus_of_one_model_is_refused():
    with pytest.raises(ConfigError, match=r"consensus merges 2 or more fine-tuned models beside the base; found 1\."):
        merge({"w": torch.ones(2)}, [{"w": torch.ones(2)}], "consensus")


def test_localize_and_stitch_averages_where_regions_overlap():
    deltas = torch.tensor([[5.0, 4.0, 1.0, 0.0], [0.0, 2.0, -3.0, 0.0]])
    function = get_method("localize_and_stitch").function
    assert function(torch.zeros(4), deltas, density=0.5).tolist() == [5, 3, -3, 0]
    assert function(torch.zeros(4), deltas, density=[0.25, 0.5]).tolist() == [5, 2, -3, 0]


def test_entries_that_a_task_did_not_change_are_never_in_its_region():
    deltas = torch.tensor([[5.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.0, 1.0]])
    merged = get_method("localize_and_stitch").function(torch.zeros(4), deltas, density=1.0)
    assert merged.tolist() == [4, 2, 1, 1]


@pytest.mark.parametrize("density", [0.05, 0.6, 1.0])
def test_regions_of_the_whole_model_hold_the_largest_entries_of_all_tensors(generator, density):
    base = {name: torch.zeros(50) for name in "ab"}
    model = {"a": torch.randn(50, generator=generator), "b": 100 * torch.randn(50, generator=generator)}
    whole = merge(base, [model], "localize_and_stitch", density=density)
    magnitudes = torch.cat(list(model.values())).abs()
    kept = magnitudes.topk(int(100 * density)).values.min()
    for name in base:
        assert torch.equal(whole[name], model[name] * (model[name].abs() >= kept))
    each = merge(base, [model], "localize_and_stitch", density=density, scope="tensor")
    assert [int(each[name].count_nonzero()) for name in base] == [int(50 * density)] * 2


class Sampled(OneTensor):
    """The sample is not the whole, so order statistics have to be searched for."""

    def sample(self, num_entries):
        return torch.cat([self.rows, self.rows], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_order_statistics_are_those_of_a_sort(generator, dtype):
    rows = torch.randn(3, 5000, generator=generator, dtype=dtype)
    ordered = rows.abs().sort(1).values
    found = order_statistics(Sampled(rows), [1, 51, 4950, 5000])
    assert torch.equal(found, ordered[:, [0, 50, 4949, 4999]].T)


@pytest.mark.parametrize("inter", ["value", "pairs", "sum"])
@pytest.mark.parametrize("opposed", [False, True], ids=["mixed", "opposed"])
def test_the_balance_found_out_of_core_is_that_of_a_sort(generator, inter, opposed):
    rows = torch.randn(3, 4000, generator=generator)
    if opposed:  # the first task's balance is negative almost everywhere
        rows[1], rows[2] = -3 * rows[0], -4 * rows[0]
    one, two = (pcb_statistic(stream(rows), inter=inter) for stream in (OneTensor, Sampled))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not opposed or inter == "pairs" or one.floor[0] < 0


def test_many_tasks_do_not_overflow_float32(generator):
    base = torch.zeros(1000)
    deltas = torch.randn(150, 1000, generator=generator)
    merged = get_method("pcb").function(base, deltas)
    exact = get_method("pcb").function(base.double(), deltas.double())
    assert merged.isfinite().all()
    torch.testing.assert_close(merged.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.fixture
def files(generator, tmp_path):
    base = {f"layers.{i}.w": torch.randn(200, 100, generator=generator) for i in range(8)}
    noisy = lambda t: t + 0.1 * torch.randn(t.shape, generator=generator)
    return base, [{name: noisy(t) for name, t in base.items()} for _ in range(3)]


class Stopped(Exception):
    pass


def merged_until_the_third_tensor(files, method, out):
    """Merge files, and stop like a kill when two tensors are recorded."""
    record, count = WorkingFolder.record, iter(range(2))

    def stop(self, line):
        if next(count, None) is None:
            raise Stopped
        record(self, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkingFolder, "record", stop)
        with pytest.raises(Stopped):
            merge_files(*files, method, out, threads=1)


def same(out, expected):
    with open_checkpoint(out) as found:
        return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["magmax", "consensus", *GLOBAL])
def test_files_are_merged_to_the_same_bits(files, tmp_path, method, monkeypatch):
    monkeypatch.setattr(order_statistic, "_SMALLEST_SAMPLE", 2000)
    expected = merge(*files, method)
    for i, options in enumerate([{"threads": 3}, {"memory": "80MB", "shard_size": "300KB"}]):
        assert same(merge_files(*files, method, tmp_path / str(i), **options), expected)


@pytest.mark.parametrize("method", GLOBAL)
def test_a_statistic_of_the_whole_model_is_gathered_once_and_saved(files, tmp_path, method, monkeypatch):
    monkeypatch.setattr(order_statistic, "_SMALLEST_SAMPLE", 2000)
    expected = merge(*files, method)
    merged_until_the_third_tensor(files, method, tmp_path / "out")
    assert (tmp_path / ".out.merging" / "statistic.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(RowStream, "each", lambda self, function: pytest.fail("gathered again"))
        merge_files(*files, method, tmp_path / "out", threads=1)
    assert same(tmp_path / "out", expected)


@pytest.mark.parametrize("content", [b"[]", b'{"low": 1}', b'{"low":{},"high":{},"floor":{},"ceiling":{}}'])
def test_a_damaged_statistic_is_gathered_anew(files, tmp_path, content):
    expected = merge(*files, "pcb")
    merged_until_the_third_tensor(files, "pcb", tmp_path / "out")
    (tmp_path / ".out.merging" / "statistic.json").write_bytes(content)
    assert same(merge_files(*files, "pcb", tmp_path / "out", threads=1), expected)


@pytest.mark.parametrize("method", GLOBAL)
def test_shares_count_each_block_once_and_give_the_same_bits(files, tmp_path, method, monkeypatch):
    monkeypatch.setattr(order_statistic, "_SMALLEST_SAMPLE", 2000)
    expected, counted, save = merge(*files, method), [], np.savez_compressed
    monkeypatch.setattr(np, "savez_compressed", lambda file, *arrays: (counted.append(1), save(file, *arrays)))
    merge_files(*files, method, tmp_path / "out", shard="1/2", threads=1)
    passes = len(counted) // 16
    assert passes >= (2 if method == "pcb" else 1)
    merge_files(*files, method, tmp_path / "out", shard="2/2", threads=1)
    assert len(counted) == 16 * passes
    assert same(tmp_path / "out", expected)


def test_a_knob_of_the_whole_model_cannot_differ_from_tensor_to_tensor(files, tmp_path):
    rules = [{"filter": "layers.1.", "value": 0.1}, {"value": 0.2}]
    with pytest.raises(ConfigError, match=r"method.density differs between tensors.*Remedy: give one value"):
        merge_files(*files, "pcb", tmp_path / "out", density=rules)
    merge_files(*files, "pcb", tmp_path / "out", density=rules, scope="tensor")
