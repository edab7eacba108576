"""Samplers of search spaces: what they visit, that they are determined, and what they refuse."""

import pytest

from suture.core.samplers import Interval, number_of_points, sampler
from suture.errors import ConfigError


def visited(points, score):
    """All points, each answered with its score."""
    seen = [next(points)]
    while True:
        try:
            seen.append(points.send(score(seen[-1])))
        except StopIteration:
            return seen


def test_a_grid_visits_every_combination_in_order():
    points = visited(sampler({"a": [1, 2], "b": [0.5, 0.25]}), lambda point: 0.0)
    assert points == [{"a": 1, "b": 0.5}, {"a": 1, "b": 0.25}, {"a": 2, "b": 0.5}, {"a": 2, "b": 0.25}]
    assert number_of_points({"a": [1, 2], "b": [0.5, 0.25]}, 9) == 4


@pytest.mark.parametrize("kind", ["sobol", "cma_es"])
@pytest.mark.parametrize("knobs", [1, 2, 3])
def test_points_lie_in_their_intervals_and_depend_only_on_seed_and_scores(kind, knobs):
    space = {f"k{i}": Interval(-1.0, 3.0 + i) for i in range(knobs)}
    runs = [visited(sampler(space, kind, 20, seed), lambda p: -abs(p["k0"] - 2)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0]) == 20 == number_of_points(space, 20)
    assert all(space[name].least <= value <= space[name].most for point in runs[0] for name, value in point.items())


def test_cma_es_closes_in_on_the_best_point_and_sobol_fills_the_space():
    space = {"a": Interval(0.0, 1.0), "b": Interval(0.0, 1.0)}
    score = lambda p: -((p["a"] - 0.8) ** 2) - (p["b"] - 0.3) ** 2
    learned = visited(sampler(space, "cma_es", 60, 0), score)
    assert max(map(score, learned[-6:])) > -0.002
    even = visited(sampler(space, "sobol", 16, 0), score)
    assert sorted(int(4 * p["a"]) for p in even) == [i for i in range(4) for _ in range(4)]


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        ({}, None, "nothing to search over"),
        ({"a": Interval(0, 1)}, "grid", "a grid cannot cover"),
        ({"a": [1, 2]}, "sobol", "wants an interval"),
        ({"a": [1, 2], "b": Interval(0, 1)}, None, "wants an interval"),
        ({"a": Interval(0, 1)}, "cma_es", None),
    ],
)
def test_spaces_that_a_sampler_cannot_search_are_refused(space, kind, message):
    if message is None:
        assert next(sampler(space, kind, 1)) is not None
        with pytest.raises(ConfigError, match="trials=0"):
            sampler(space, kind, 0)
        return
    with pytest.raises(ConfigError, match=message):
        sampler(space, kind)
