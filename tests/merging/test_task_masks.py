"""Masks for tasks: parity, laws, one case by hand, and files that are damaged, hostile, or of another base."""

import json
import pickle

import pytest
import torch
from second_family import INDEX, inputs, names, part, tensors

from suture import TaskMasks, emr_masks, merge, open_checkpoint, save_checkpoint, tall_masks
from suture.errors import CheckpointError, ConfigError, IncompatibleModels, SutureError

MAKE = {"tall": tall_masks, "emr": emr_masks}
both = pytest.mark.parametrize("make", [tall_masks, emr_masks])
SIZES = {"a": (40, 30), "b": (13,), "c": ()}


def in_dtype(model, dtype):
    return {name: tensor.to(dtype) for name, tensor in model.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", names("masks"))
def test_masks_and_weights_equal_the_reference(name, dtype):
    case, given = INDEX[name], inputs(name)
    base, models = in_dtype(given.base, dtype), {label: in_dtype(m, dtype) for label, m in given.models.items()}
    knobs = {"mask_threshold": case["knobs"]["lam"]} if case["method"] == "tall" else {}
    masks = MAKE[case["method"]](base, models, **knobs)
    limit = 1e-12 if dtype == torch.float64 else 1e-6
    scales = tensors(name).get("scales", torch.ones(len(models), dtype=torch.float64))
    torch.testing.assert_close(masks.scales, scales, rtol=0, atol=limit)
    for i, task in enumerate(models):
        weights = masks.for_task(task)
        for key, expected in part(name, f"mask_{i}").items():
            assert torch.equal(masks.mask(task, key), expected.bool())
            update = part(name, "unified").get(key)
            if update is None:
                update = sum(model[key] - given.base[key] for model in given.models.values())
            merged = given.base[key] + scales[i] * expected * update
            torch.testing.assert_close(weights[key].double(), merged, rtol=0, atol=limit * merged.abs().max().item())


@pytest.fixture
def models(generator):
    base = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    base["steps"] = torch.tensor(7)
    changed = lambda t: t + 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + 1
    return base, {task: {name: changed(t) for name, t in base.items()} for task in ("one", "two", "three")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tall_masks_over_the_ties_sum(models):
    base, tuned = models
    floating = {name for name, t in base.items() if t.is_floating_point()}
    merged = merge(base, tuned, "ties_merging", scaling_factor=1.0)
    masks = tall_masks(base, tuned, mask_threshold=0.5, over="ties")
    for name in floating:
        total = merged[name] - base[name]
        torch.testing.assert_close(masks.update[name], total, rtol=0, atol=1e-6)
        for task, model in tuned.items():
            own = model[name] - base[name]
            sure = (own.abs() - 0.5 * (total - own).abs()).abs() > 1e-6
            expected = own.abs() > 0.5 * (total - own).abs()
            assert torch.equal(masks.mask(task, name)[sure], expected[sure])


def test_tall_masks_by_hand():
    base, deltas = torch.ones(4), {"one": [1.0, 4.0, 0.0, 1.0], "two": [1.0, -1.0, 0.0, -2.0]}
    masks = tall_masks({"w": base}, {task: {"w": base + torch.tensor(d)} for task, d in deltas.items()})
    assert masks.update["w"].tolist() == [2, 3, 0, -1]
    assert masks.mask("one", "w").tolist() == [True, True, False, True]
    assert masks.mask("two", "w").tolist() == [True, False, False, True]
    assert masks.for_task("one")["w"].tolist() == [3, 4, 1, 0]
    assert masks.average()["w"].tolist() == [3, 2.5, 1, 0]
    strict = tall_masks({"w": base}, {t: {"w": base + torch.tensor(d)} for t, d in deltas.items()}, mask_threshold=1.0)
    assert strict.mask("one", "w").tolist() == [False, True, False, False]


def test_emr_by_hand():
    deltas = {"one": [1.0, -2.0, 3.0], "two": [-1.0, -4.0, -1.0]}
    masks = emr_masks({"w": torch.zeros(3)}, {task: {"w": torch.tensor(d)} for task, d in deltas.items()})
    assert masks.update["w"].tolist() == [-1, -4, 3]  # a sum of 0 elects −1
    assert masks.mask("one", "w").tolist() == [False, True, True]
    assert masks.mask("two", "w").tolist() == [True, True, False]
    assert masks.scales.tolist() == pytest.approx([6 / 7, 6 / 5])
    torch.testing.assert_close(masks.for_task("two")["w"], torch.tensor([-1.2, -4.8, 0.0]))


@both
def test_the_order_of_the_tasks_is_irrelevant(make, models):
    base, tuned = models
    forwards, backwards = make(base, tuned), make(base, dict(reversed(tuned.items())))
    for task in tuned:
        for name, tensor in forwards.for_task(task).items():
            torch.testing.assert_close(backwards.for_task(task)[name], tensor, rtol=0, atol=1e-6)


@both
def test_one_task_is_given_back(make, models):
    base, tuned = models
    weights = make(base, {"one": tuned["one"]}).for_task("one")
    for name in SIZES:
        torch.testing.assert_close(weights[name], tuned["one"][name])


@both
def test_tasks_that_changed_nothing_are_the_base(make, models):
    base, tuned = models
    masks = make(base, {"still": base, **tuned})
    assert same(masks.for_task("still"), base)
    assert same(make(base, {"still": base, "stiller": base}).average(), base)


@both
def test_the_inputs_are_unchanged_and_the_results_are_new_tensors(make, models):
    base, tuned = models
    before = {name: tensor.clone() for name, tensor in base.items()}
    weights = make(base, tuned).for_task("one")
    weights["steps"].zero_()
    weights["a"].zero_()
    assert same(base, before)


@both
def test_slices_threads_and_files_do_not_change_a_bit(make, models, tmp_path, monkeypatch):
    base, tuned = models
    whole = make(base, tuned)
    monkeypatch.setattr("suture.merging.task_vectors._CHUNK", 99)
    for threads in (1, 3):
        sliced = make(base, tuned, threads=threads)
        assert same(sliced.update, whole.update)
        assert same(sliced.bits, whole.bits)
    filed = make(base, tuned, path=tmp_path / "masks.safetensors")
    assert same({**filed.update, "scales": filed.scales}, {**sliced.update, "scales": sliced.scales})
    assert same(filed.for_task("two"), sliced.for_task("two"))


@both
def test_frozen_tensors_and_integers_are_the_base_s_and_tied_names_share_a_tensor(make, models):
    base, tuned = models
    tie = lambda model: {**model, "z": model["a"]}
    masks = make(tie(base), {task: tie(model) for task, model in tuned.items()}, frozen=["b"])
    weights = masks.for_task("two")
    assert weights["z"] is weights["a"]
    assert torch.equal(weights["b"], base["b"])
    assert weights["steps"].item() == 7
    assert sorted(masks.update) == ["a", "c"]


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(make, models, dtype):
    base, tuned = models
    half = lambda model: {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.items()}
    wide = lambda model: {name: t.float() if t.is_floating_point() else t for name, t in model.items()}
    small, tasks = half(base), {task: half(model) for task, model in tuned.items()}
    masks, exact = make(small, tasks), make(wide(small), {task: wide(model) for task, model in tasks.items()})
    assert masks.update["a"].dtype == masks.for_task("one")["a"].dtype == dtype
    assert same(masks.bits, exact.bits)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(masks.for_task("one")["a"].float(), exact.for_task("one")["a"], rtol=step, atol=step / 8)


def test_the_bytes_are_those_of_one_update_and_a_bit_a_weight_and_task(models, tmp_path):
    base, tuned = models
    masks = tall_masks(base, tuned)
    entries = 1200 + 13 + 1
    assert masks.entries == entries
    assert masks.bytes_stored == 4 * entries + 3 * (150 + 2 + 1) + 3 * 8
    assert masks.bytes_of_models == 3 * 4 * entries
    masks.save(tmp_path / "masks.safetensors")
    assert 0 < (tmp_path / "masks.safetensors").stat().st_size - masks.bytes_stored < 1500


@both
def test_a_file_comes_back_as_it_was_saved(make, models, tmp_path):
    base, tuned = models
    masks = make(base, tuned)
    masks.save(tmp_path / "masks.safetensors", beside={"more": torch.ones(2)}, metadata={"about": "text"})
    loaded = TaskMasks.load(tmp_path / "masks.safetensors", base)
    assert (loaded.kind, loaded.tasks) == (masks.kind, masks.tasks)
    assert all(same(loaded.for_task(task), masks.for_task(task)) for task in tuned)
    assert same(loaded.average(), masks.average())


def test_weights_are_written_into_tensors_that_are_given(models):
    base, tuned = models
    masks, out = tall_masks(base, tuned), {"a": torch.empty(SIZES["a"])}
    assert masks.for_task("one", out)["a"] is out["a"]
    assert torch.equal(out["a"], masks.for_task("one")["a"])


def test_names_can_be_those_of_another_file(models, tmp_path):
    base, tuned = models
    other = {f"model.{name}": tensor for name, tensor in base.items()}
    renamed = tall_masks(base, tuned).renamed({name: f"model.{name}" for name in SIZES}, other)
    renamed.save(tmp_path / "masks.safetensors")
    weights = TaskMasks.load(tmp_path / "masks.safetensors", other).for_task("two")
    assert torch.equal(weights["model.a"], tall_masks(base, tuned).for_task("two")["a"])


def one_line(caught):
    assert "\n" not in str(caught.value)
    assert "Remedy" in str(caught.value)


def test_an_unknown_task_is_answered_with_the_nearest_names(models):
    with pytest.raises(ConfigError, match=r"Unknown task 'on'\. Did you mean 'one'"):
        tall_masks(*models).for_task("on")


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), [0.4, 0.4], [0.4, -1.0, 0.4]])
def test_a_threshold_out_of_range_is_refused(models, threshold):
    with pytest.raises(ConfigError, match="mask_threshold"):
        tall_masks(*models, mask_threshold=threshold)


def test_weights_that_cannot_be_merged_are_refused(models, tmp_path):
    base, tuned = models
    broken = {**tuned["two"], "a": torch.full(SIZES["a"], torch.nan)}
    with pytest.raises(IncompatibleModels, match="is not finite at entry 0 in 'two'"):
        tall_masks(base, {**tuned, "two": broken}, path=tmp_path / "masks.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(IncompatibleModels, match="'a'"):
        emr_masks(base, {**tuned, "two": {**tuned["two"], "a": torch.ones(2)}})


@pytest.mark.parametrize(
    "change", [{"a": torch.zeros(40, 30)}, {"a": torch.zeros(30, 40)}, {"a": None}], ids=["value", "shape", "name"]
)
def test_another_base_is_refused(models, tmp_path, change):
    base, tuned = models
    tall_masks(base, tuned).save(tmp_path / "masks.safetensors")
    other = {name: tensor for name, tensor in {**base, **change}.items() if tensor is not None}
    with pytest.raises(IncompatibleModels) as caught:
        TaskMasks.load(tmp_path / "masks.safetensors", other)
    one_line(caught)


DAMAGE = {
    "a bit too few": {"bits/a": torch.zeros(3, 149, dtype=torch.uint8)},
    "a task too few": {"bits/a": torch.zeros(2, 150, dtype=torch.uint8)},
    "wide bits": {"bits/a": torch.zeros(3, 150, dtype=torch.int32)},
    "no bits": {"bits/a": None},
    "no scales": {"scales": None},
    "a scale too few": {"scales": torch.ones(2, dtype=torch.float64)},
    "endless scales": {"scales": torch.full((3,), torch.inf, dtype=torch.float64)},
    "whole numbers": {"update/a": torch.zeros(40, 30, dtype=torch.int32)},
    "eight bits": {"update/a": torch.zeros(40, 30, dtype=torch.float8_e4m3fn)},
    "no update": {"update/a": None, "update/b": None, "update/c": None},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(models, tmp_path, damage):
    base, tuned = models
    path = tmp_path / "masks.safetensors"
    tall_masks(base, tuned).save(path)
    with open_checkpoint(path) as file:
        kept = {**{name: file[name].clone() for name in file}, **damage}
        metadata = dict(file.metadata)
    save_checkpoint({name: tensor for name, tensor in kept.items() if tensor is not None}, path, metadata)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        TaskMasks.load(path, base)
    one_line(caught)


FACTS = {
    "none": None,
    "no JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[]",
    "no tasks": json.dumps({"kind": "tall_masks", "tasks": [], "base": ""}),
    "numbers": json.dumps({"kind": "tall_masks", "tasks": [1, 2, 3], "base": ""}),
    "lists": json.dumps({"kind": "tall_masks", "tasks": [[], [], []], "base": ""}),
    "one task twice": json.dumps({"kind": "tall_masks", "tasks": ["one", "one", "two"], "base": ""}),
    "a number for a base": json.dumps({"kind": "tall_masks", "tasks": ["one", "two", "three"], "base": 3}),
}


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS)
def test_a_file_that_does_not_describe_masks_is_refused_in_one_line(models, tmp_path, facts):
    base, tuned = models
    path = tmp_path / "masks.safetensors"
    tall_masks(base, tuned).save(path)
    with open_checkpoint(path) as file:
        kept = {name: file[name].clone() for name in file}
    save_checkpoint(kept, path, None if facts is None else {"task_masks": facts})
    with pytest.raises(CheckpointError, match="holds no masks for tasks") as caught:
        TaskMasks.load(path, base)
    one_line(caught)


def test_a_truncated_file_and_a_pickle_are_refused_and_nothing_is_executed(models, tmp_path):
    base, tuned = models
    path = tmp_path / "masks.safetensors"
    tall_masks(base, tuned).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        TaskMasks.load(path, base)

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in ("masks.safetensors", "masks.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Hostile()))
        with pytest.raises(SutureError):
            TaskMasks.load(tmp_path / name, base)
    assert not (tmp_path / "executed").exists()
