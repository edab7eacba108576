"""Which task an input belongs to, without being told."""

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from suture.errors import DataError
from suture.repairs import fit_router, routing_accuracy


def clouds(seed=0, per_task=3, count=40):
    """Each task is several directions in space."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, per_task, 12, generator=generator)
    noise = torch.Generator().manual_seed(seed)
    return {
        f"t{i}": (c.repeat(count, 1) + 0.1 * torch.randn(count * per_task, 12, generator=noise))
        for i, c in enumerate(centres)
    }


@pytest.mark.parametrize("options", [{"centroids": 1}, {"centroids": 3}, {"kind": "linear"}])
def test_inputs_that_it_has_not_seen_are_sent_to_their_task(options):
    accuracy = routing_accuracy(fit_router(clouds(0), **options), clouds(1))
    assert list(accuracy) == ["t0", "t1", "t2"]
    assert all(value > 0.9 for value in accuracy.values())


def test_several_centroids_tell_apart_what_one_mean_cannot():
    ring = lambda angles: torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], 1)
    features = {"even": ring([0.0, 0.1, 3.1, 3.2] * 10), "odd": ring([1.5, 1.6, 4.7, 4.8] * 10)}
    accuracy = lambda k: sum(routing_accuracy(fit_router(features, centroids=k), features).values()) / 2
    assert accuracy(1) < 0.8
    assert accuracy(2) == 1.0


def test_one_centroid_is_the_mean_direction_and_lengths_do_not_count():
    features = clouds()
    router = fit_router(features)
    expected = normalize(normalize(features["t1"], dim=-1).mean(0), dim=-1)
    torch.testing.assert_close(router.centroids[1], expected)
    scaled = {task: rows * 7 for task, rows in features.items()}
    assert routing_accuracy(router, scaled) == routing_accuracy(router, features)


def test_the_linear_probe_is_the_least_squares_solution():
    features = clouds()
    router = fit_router(features, kind="linear", ridge=1e-12)
    rows = normalize(torch.cat(list(features.values())), dim=-1).double()
    goal = one_hot(torch.arange(3).repeat_interleave(120), 3).double()
    solved = torch.linalg.lstsq(torch.cat([rows, torch.ones(360, 1)], 1), goal).solution
    torch.testing.assert_close(router.weight, solved[:-1].T.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(router.bias, solved[-1].float(), rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_router_and_no_features_are_refused():
    one, two = (fit_router(clouds(), centroids=4, seed=3).centroids for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(DataError, match="Task 'b' has no features"):
        fit_router({"a": torch.ones(1, 2), "b": torch.ones(0, 2)})
