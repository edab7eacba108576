"""Methods on whole matrices: the reference vectors, the laws that hold for all of them, and cases by hand."""

import pytest
import torch

from suture import merge, merge_files, methods, open_checkpoint
from suture.merging import spectra
from suture.merging.registry import get_method
from suture.merging.spectra import leading, polar, polar_and_mean
from tests.support import second_family

METHODS = sorted(name for name, method in methods().items() if method.matrices)
CASES = [case for case in second_family.names("weights") if second_family.INDEX[case]["method"] in METHODS]
SHAPES = [(8, 12), (12, 8), (70, 90), (90, 70)]  # the larger ones through their Gram matrices
QUICK = {"wudi": {"steps": 20}}
every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def knobs_of(case):
    """The knobs of a reference case, with its tensors in the roles that it gives them."""
    given, roles = second_family.INDEX[case], second_family.inputs(case).roles
    named = lambda *kinds: [name for name, role in roles.items() if role in kinds]
    knobs = {**given["knobs"], "as_vector": named("vector"), "as_matrix": named("matrix", "conv", "stack", "fused3")}
    knobs["split"] = dict.fromkeys(named("fused3"), 3)
    return knobs | ({"lr_scale": "absolute"} if given["method"] == "wudi" else {})


def random_deltas(shape, tasks=3, seed=0):
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(method, deltas, **knobs):
    return get_method(method).function(deltas, **QUICK.get(method, {}), **knobs)


def orthogonal(size):
    return torch.linalg.qr(random_deltas((size, size), 1, seed=7)[0]).Q


@pytest.mark.parametrize("case", CASES)
def test_a_method_gives_the_reference_vectors(case):
    base, models, _ = second_family.inputs(case)
    expected = second_family.part(case, "merged")
    merged = merge(base, models, second_family.INDEX[case]["method"], **knobs_of(case))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_task_vectors_in_float32_give_them_to_single_precision(case):
    base, models, _ = second_family.inputs(case)
    zero = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    deltas = {key: {n: (t - base[n]).float() for n, t in model.items()} for key, model in models.items()}
    merged = merge(zero, deltas, second_family.INDEX[case]["method"], **knobs_of(case))
    for name, tensor in second_family.part(case, "merged").items():
        expected = tensor - base[name]
        assert (merged[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@every_method
@every_shape
def test_no_movement_gives_none(method, shape):
    assert not update(method, torch.zeros(3, *shape)).any()


@every_method
@every_shape
def test_the_order_of_the_tasks_is_irrelevant(method, shape):
    deltas = random_deltas(shape)
    torch.testing.assert_close(update(method, deltas), update(method, deltas.flip(0)), rtol=0, atol=1e-9)


@every_method
@every_shape
def test_the_update_is_as_large_as_the_task_vectors(method, shape):
    deltas = random_deltas(shape)
    torch.testing.assert_close(update(method, 1e-3 * deltas), 1e-3 * update(method, deltas), rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "wudi"])
@every_shape
def test_a_rotation_of_outputs_or_inputs_rotates_the_update(method, shape):
    deltas = random_deltas(shape)
    merged, left, right = update(method, deltas), orthogonal(shape[0]), orthogonal(shape[1])
    torch.testing.assert_close(update(method, left @ deltas), left @ merged, rtol=0, atol=1e-8)
    torch.testing.assert_close(update(method, deltas @ right), merged @ right, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["tsv_m", "cart", "swudi", "aswudi"])
@every_shape
def test_one_task_gives_its_expert(method, shape):
    deltas = random_deltas(shape, tasks=1)
    torch.testing.assert_close(update(method, deltas), deltas[0], rtol=0, atol=1e-10)


@every_method
@every_shape
def test_a_zero_task_leaves_no_direction_to_rounding(method, shape):
    """With a zero task vector, one twice, and ranks below what is kept, noise of 1e-13 moves nothing."""
    factors = random_deltas((shape[0], 2)), random_deltas((2, shape[1]), seed=1)
    deltas = factors[0] @ factors[1]
    deltas = torch.cat([deltas, deltas[:1], torch.zeros_like(deltas[:1])])
    noisy = deltas + 1e-13 * random_deltas(shape, tasks=len(deltas), seed=2)
    merged = update(method, deltas)
    assert (update(method, noisy) - merged).norm() < 1e-4 * merged.norm()
    assert (update(method, noisy.float()) - merged).norm() < 1e-3 * merged.norm()


@every_method
def test_equal_experts_are_one_direction_more_often(method):
    delta = random_deltas((12, 8), 1)
    merged, one = update(method, delta.expand(3, -1, -1)), update(method, delta)
    if method == "cart":
        torch.testing.assert_close(merged, delta[0])
    if method == "tsv_m":  # each keeps a third of the directions, the same ones
        left, values, right = leading(delta[0], 2, 0.0)
        torch.testing.assert_close(merged, left * values @ right.mT)
    if method == "iso_c":
        torch.testing.assert_close(merged, 3 * one)
    assert merged.isfinite().all()


@every_method
def test_the_task_vectors_are_unchanged(method):
    deltas = random_deltas((70, 90))
    before = deltas.clone()
    update(method, deltas)
    assert torch.equal(deltas, before)


@pytest.fixture
def models(generator):
    shapes = {"layers.0.a.weight": (70, 90), "layers.0.a.bias": (70,), "layers.1.b.weight": (90, 70)}
    shapes |= {"layers.1.conv.weight": (8, 6, 3, 3), "layers.1.experts.w": (3, 10, 12), "embed.weight": (30, 5)}
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    base |= {"ids": torch.arange(3), "tied.weight": base["layers.0.a.weight"]}
    noise = lambda t: t + (0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point() else t

    def tuned():
        model = {name: noise(t) for name, t in base.items()}
        return model | {"tied.weight": model["layers.0.a.weight"]}

    return base, [tuned() for _ in range(3)]


@every_method
def test_files_threads_memory_and_shards_do_not_change_a_bit(method, models, tmp_path):
    base, tuned = models
    merged = merge(base, tuned, method, threads=1)
    assert merged["tied.weight"] is merged["layers.0.a.weight"]
    again = merge(base, tuned, method, threads=2)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    for i, options in enumerate([{}, {"memory": "9MB", "threads": 2}, {"memory": "1GB", "threads": 3}]):
        file = open_checkpoint(merge_files(base, tuned, method, tmp_path / f"{i}", shard_size="9KB", **options))
        assert all(torch.equal(merged[name], file[name]) for name in merged)
    for shard in ("1/2", "2/2"):
        out = merge_files(base, tuned, method, tmp_path / "shared", shard=shard)
    assert all(torch.equal(merged[name], open_checkpoint(out)[name]) for name in merged)


@every_method
def test_vectors_take_the_mean_times_alpha_or_stay_at_the_base(method, models):
    base, tuned = models
    name = "layers.0.a.bias"
    mean = sum(model[name].float() - base[name].float() for model in tuned) / 3
    merged = merge(base, tuned, method, alpha=0.5)
    torch.testing.assert_close(merged[name], (base[name].float() + 0.5 * mean).bfloat16())
    assert torch.equal(merge(base, tuned, method, vectors="base")[name], base[name])
    left = merge(base, tuned, method, remove_keys=["layers.1.b.weight"])
    assert torch.equal(left["layers.1.b.weight"], base["layers.1.b.weight"])


def test_the_experts_of_a_stack_are_merged_each_on_its_own(models):
    base, tuned = models
    name = "layers.1.experts.w"
    whole = merge(base, tuned, "tsv_m")[name]
    for i in range(3):
        one = merge({"w": base[name][i]}, [{"w": model[name][i]} for model in tuned], "tsv_m")["w"]
        assert torch.equal(whole[i], one)


def test_a_matrix_that_may_hold_nan_takes_the_mean(models, tmp_path):
    base, tuned = models
    tuned[0]["layers.1.b.weight"][3, 4] = torch.nan
    out = merge_files(base, tuned, "tsv_m", tmp_path / "out", allow_non_finite=["layers.1.b.weight"])
    merged = open_checkpoint(out)["layers.1.b.weight"].float()
    assert merged.isnan().sum() == 1
    mean = sum(model["layers.1.b.weight"].float() for model in tuned) / 3
    torch.testing.assert_close(merged, mean, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_tsv_m_by_hand():
    one, two = torch.diag(torch.tensor([4.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0, 3.0]))
    merged = update("tsv_m", torch.stack([one, two]))  # ⌊3/2⌋ = 1 direction of each
    torch.testing.assert_close(merged.float(), torch.diag(torch.tensor([4.0, 0.0, 3.0])))
    few = torch.randn(3, 2, 5)
    torch.testing.assert_close(update("tsv_m", few).float(), few.mean(0))  # no direction for each: the mean


def test_iso_cts_takes_its_directions_from_the_sum_and_from_what_it_leaves():
    deltas = torch.stack(
        [torch.diag(torch.tensor([5.0, 1.0, 0.0, 0.0])), torch.diag(torch.tensor([5.0, 0.0, 2.0, 0.0]))]
    )
    merged = update("iso_cts", deltas, common=0.5)  # 2 common, round(2/2)·2 = 2 of the tasks: one each
    shared = torch.diag(torch.tensor([10.0, 1.0, 2.0, 0.0]))  # its first two: 10 and 2
    assert shared.diagonal().topk(2).values.tolist() == [10, 2]
    expected = (10 + 2 + 1) / 4 * torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))  # of the second task nothing is left
    torch.testing.assert_close(merged.float(), expected)


def test_cart_by_hand():
    deltas = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0]))])
    merged = update("cart", deltas, rank_ratio=0.5, scaling_factor=2.0)  # ±diag(1, −0.5) around the mean
    torch.testing.assert_close(merged.float(), torch.diag(torch.tensor([2.0, 1.5])))


def test_wudi_goes_from_the_sum_towards_what_each_task_would_compute():
    deltas = random_deltas((8, 12))
    loss = lambda merged: sum(float(((merged - d) @ d.mT).square().sum() / d.square().sum()) for d in deltas)
    short, long = (get_method("wudi").function(deltas, steps=steps) for steps in (1, 300))
    assert loss(long) < 0.5 * loss(short) < loss(deltas.sum(0))
    still = get_method("wudi").function(deltas, lr_scale="absolute")
    assert 0 < (still - deltas.sum(0)).abs().max() < 1.1 * 300 * 1e-5


def test_the_closed_forms_are_wudi_s_minimum_in_their_directions():
    deltas = random_deltas((12, 8), 2)
    exact = update("swudi", deltas, time=1e12, share=None)
    squares = deltas.square().sum((1, 2))
    gradient = sum((exact - d) @ d.mT @ d / square for d, square in zip(deltas, squares, strict=True))
    assert gradient.abs().max() < 1e-9
    assert not torch.allclose(update("swudi", deltas, time=1e12, share=0.5), exact)


def test_aswudi_of_wide_matrices_is_that_of_their_rotation():
    """More inputs than all outputs together: the directions come from the stacked task vectors."""
    deltas, right = random_deltas((3, 40), 2), orthogonal(40)
    for method in ("swudi", "aswudi"):
        torch.testing.assert_close(update(method, deltas @ right), update(method, deltas) @ right, rtol=0, atol=1e-9)
    padded = torch.cat([deltas, torch.zeros(2, 40, 40)], 1)  # no longer wide
    torch.testing.assert_close(update("aswudi", padded)[:3], update("aswudi", deltas), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (80, 80)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5])
def test_gram_matrices_and_decompositions_agree(shape, decay, monkeypatch):
    left, values, right = torch.linalg.svd(random_deltas(shape, 1)[0], full_matrices=False)
    matrix = left * values * torch.exp(-decay * torch.arange(len(values))) @ right
    fast = polar(matrix), polar_and_mean(matrix)[1], leading(matrix, 20, 1e-9)
    monkeypatch.setattr(spectra, "_SMALL", 1000)
    slow = polar(matrix), polar_and_mean(matrix)[1], leading(matrix, 20, 1e-9)
    torch.testing.assert_close(fast[0], slow[0], rtol=0, atol=1e-8)
    assert fast[1] == pytest.approx(slow[1], rel=1e-9)
    product = lambda found: found.left * found.values @ found.right.mT
    torch.testing.assert_close(product(fast[2]), product(slow[2]), rtol=0, atol=1e-9)
    gram = fast[2].left.mT @ fast[2].left
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 500), (500, 450), (3, 192), (4, 193)], ids=str)
def test_a_gram_matrix_is_made_in_columns_of_its_lower_half(shape):
    matrix = random_deltas(shape, 1)[0]
    torch.testing.assert_close(spectra.gram(matrix), matrix.mT @ matrix, rtol=1e-13, atol=1e-11)
    torch.testing.assert_close(spectra.gram(matrix.mT), matrix @ matrix.mT, rtol=1e-13, atol=1e-11)
    values, vectors = spectra.eigenvectors(spectra.gram(matrix))
    torch.testing.assert_close(vectors * values @ vectors.mT, matrix.mT @ matrix, rtol=0, atol=1e-9)


def decomposed(matrix, count=None):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :count], values[:count], right[:count].mT


@every_shape
def test_iso_cts_is_its_definition_by_whole_decompositions(shape):
    deltas, rank = random_deltas(shape, 3), min(shape)
    each = round((rank - int(0.8 * rank)) / 3)
    found = [decomposed(deltas.sum(0), rank - 3 * each)]
    common = found[0][0]
    found += [decomposed(delta - common @ common.mT @ delta, each) for delta in deltas]
    left, values, right = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    factors = [u @ v.mT for u, _, v in map(decomposed, (left, right))]
    expected = values.sum() / rank * factors[0] @ factors[1].mT
    torch.testing.assert_close(update("iso_cts", deltas), expected, rtol=0, atol=1e-9)
