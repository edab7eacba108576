"""95% intervals: Wilson's, of a mean over tasks, and over seeds."""

import math

import pytest
import torch

from suture.evaluation import Row, mean_interval, over_seeds, wilson
from suture.evaluation.intervals import _student


def test_wilsons_interval_is_that_of_its_paper():
    """Wilson's example as worked in Brown, Cai and DasGupta's tables: 0 and 5 of 10, and the ends."""
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)
    assert wilson(0.3, 0) == (0.0, 1.0)


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.5, 0.95):
        hits = (torch.rand(2000, 100, generator=generator) < share).double().mean(1).tolist()
        covered = sum(low <= share <= high for low, high in (wilson(hit, 100) for hit in hits)) / len(hits)
        assert 0.93 < covered < 0.975, share


def test_the_mean_over_tasks_is_surer_than_each_task():
    accuracies, samples = {"a": 0.5, "b": 0.9}, {"a": 100, "b": 100}
    bounds = mean_interval(accuracies, samples)
    assert bounds is not None
    low, high = bounds
    halves = [(0.5 - wilson(0.5, 100)[0], 0.9 - wilson(0.9, 100)[0])]
    assert low == pytest.approx(0.7 - math.hypot(*halves[0]) / 2)
    assert low < 0.7 < high < 0.7 + 0.06
    assert mean_interval(accuracies, {"a": 100}) is None
    assert mean_interval({}, {}) is None


def test_students_quantiles_are_those_of_the_tables():
    tables = {1: 12.7062, 5: 2.5706, 10: 2.2281, 11: 2.2010, 20: 2.0860, 100: 1.9840}
    for degrees, quantile in tables.items():
        assert _student(degrees) == pytest.approx(quantile, abs=1e-3), degrees


def test_one_seed_has_no_interval():
    mean, half = over_seeds([0.5])
    assert mean == 0.5
    assert math.isnan(half)


def test_a_row_knows_its_intervals():
    row = Row("mine", {"a": 0.5}, {"a": 10})
    assert row.interval("a") == wilson(0.5, 10)
    assert row.mean_interval == pytest.approx(wilson(0.5, 10))
    assert Row("mine", {"a": 0.5}).mean_interval is None
