"""TIES: parity with the published implementations, cases by hand, and the exact threshold."""

import golden_cases as golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suture.merging import order_statistic
from suture.merging.methods.ties_merging import settle, ties_merging, ties_rows, trim_thresholds
from suture.merging.streams import OneTensor


def flattened(tensors):
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def whole_model(name):
    case, base, models, tensors = golden.load(name)
    base = flattened(base)
    return case, base, torch.stack([flattened(model) for model in models.values()]) - base, tensors


def part(tensors, prefix):
    return flattened({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


@pytest.mark.parametrize("name", golden.names("ties_global"))
def test_scope_model_equals_the_published_implementation(name):
    case, base, deltas, tensors = whole_model(name)
    knobs = {key: case[key] for key in ("threshold", "merge_func", "scaling_factor")}
    torch.testing.assert_close(ties_merging(base, deltas, **knobs), part(tensors, "merged/"), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", golden.names("ties_rows"))
def test_the_rows_equal_the_published_implementation(name):
    case, base, deltas, tensors = whole_model(name)
    statistic = trim_thresholds(OneTensor(deltas), threshold=case["threshold"])
    rows = ties_rows(deltas, statistic)
    for i, row in enumerate(rows):
        assert torch.equal(row, part(tensors, f"row_{i}/"))
    merged = ties_merging(base, deltas, threshold=case["threshold"], scaling_factor=1.0)
    torch.testing.assert_close(base + rows.sum(0), merged)


@pytest.mark.parametrize("name", golden.names("tensor_ties"))
def test_scope_tensor_equals_mergekit(name):
    case, base, models, tensors = golden.load(name)
    parameters = case["parameters"]
    knobs = {
        "scope": "tensor",
        "threshold": parameters["density"],
        "merge_func": "mean" if parameters["normalize"] else "sum",
        "scaling_factor": 1.0,
        "weights": [parameters["weight"]] * case["n"],
    }
    for key, tensor in base.items():
        deltas = torch.stack([model[key] for model in models.values()]) - tensor
        torch.testing.assert_close(ties_merging(tensor, deltas, **knobs), tensors[f"merged/{key}"], rtol=0, atol=1e-6)


def test_by_hand():
    base = torch.zeros(4)
    deltas = torch.tensor([[4.0, 1.0, -3.0, 0.0], [2.0, -5.0, 2.0, 1.0]])
    # Half of four entries: the authors keep |τ| ≥ the 2nd smallest, so 3 of 4 with distinct magnitudes.
    assert ties_merging(base, deltas, threshold=50, scaling_factor=1.0).tolist() == [6.0, -5.0, -3.0, 0.0]
    assert ties_merging(base, deltas, threshold=50, scaling_factor=1.0, merge_func="mean").tolist() == [
        3.0,
        -5.0,
        -3.0,
        0.0,
    ]
    assert ties_merging(base, deltas, threshold=50, scaling_factor=1.0, merge_func="max").tolist() == [
        4.0,
        -5.0,
        -3.0,
        0.0,
    ]


def test_the_whole_of_it_may_be_kept():
    base, deltas = torch.zeros(3), torch.tensor([[1.0, -2.0, 3.0], [1.0, 1.0, 1.0]])
    for everything in (100, 1.0):
        assert ties_merging(base, deltas, threshold=everything, scaling_factor=1.0).tolist() == [
            2.0,
            -2.0,
            4.0,
        ]


@pytest.mark.parametrize(("votes", "expected"), [(5, 2.0), (-5, -2.0), (0, -2.0)])
def test_a_cancelled_column_follows_the_majority_of_the_whole_model(votes, expected):
    statistic = settle(trim_thresholds(OneTensor(torch.tensor([[2.0], [-2.0]])), threshold=100), votes)
    merged = ties_merging(torch.zeros(1), torch.tensor([[2.0], [-2.0]]), statistic, scaling_factor=1.0)
    assert merged.item() == expected


def test_a_cancelled_column_is_zero_for_max_without_a_majority():
    statistic = settle(trim_thresholds(OneTensor(torch.tensor([[2.0], [-2.0]])), threshold=100), 0)
    assert ties_merging(torch.zeros(1), torch.tensor([[2.0], [-2.0]]), statistic, merge_func="max").item() == 0


class Sampled(OneTensor):
    """The sample is not the whole, so the threshold has to be searched for."""

    def sample(self, num_entries):
        return torch.cat([self.rows, self.rows], dim=1)


magnitudes = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_subnormal=True) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]),
    min_size=1,
    max_size=300,
)


@settings(max_examples=150, deadline=None)
@given(magnitudes, st.data())
def test_the_threshold_is_the_one_a_sort_gives(values, data):
    row = torch.tensor(values, dtype=torch.float32)
    rank = data.draw(st.integers(1, len(values)))
    for stream in (OneTensor(row[None]), Sampled(row[None])):
        found = order_statistic.kth_magnitudes(stream, rank)
        assert found.item() == row.abs().sort().values[rank - 1].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_threshold_is_exact_when_the_sample_misleads(generator, dtype):
    row = torch.randn(50_000, generator=generator, dtype=dtype)

    class Misleading(OneTensor):
        def sample(self, num_entries):
            return 1e3 + self.rows[:, :2000].abs()

    for rank in (1, 100, 25_000, 40_000, 50_000):
        found = order_statistic.kth_magnitudes(Misleading(row[None]), rank)
        assert found.item() == row.abs().kthvalue(rank).values.item()
