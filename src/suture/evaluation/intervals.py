"""95% intervals of accuracies: Wilson's of one task, of their mean over tasks, and Student's over seeds."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

Interval = tuple[float, float]
_Z = 1.959963984540054  # the 97.5% quantile of the normal distribution
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # 1 to 10 degrees


def wilson(accuracy: float, count: int) -> Interval:
    """The 95% score interval of an accuracy that was measured on `count` inputs; (0, 1) without inputs.

    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953, without continuity correction.

    >>> [round(bound, 4) for bound in wilson(0.9, 100)]
    [0.8256, 0.9448]
    """
    if count < 1:
        return 0.0, 1.0
    weight = _Z * _Z / count
    middle = (accuracy + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(max(0.0, accuracy * (1 - accuracy)) / count + weight / (4 * count))
    return max(0.0, min(accuracy, middle - half)), min(1.0, max(accuracy, middle + half))


def mean_interval(accuracies: Mapping[str, float], samples: Mapping[str, int]) -> Interval | None:
    """The 95% interval of the unweighted mean over tasks; None if the number of inputs of a task is not known.

    The tasks' Wilson intervals are combined as independent ones, each side for itself: Zou and Donner (2008), eq. 7,
    https://doi.org/10.1002/sim.3095.
    """
    if not accuracies or not all(samples.get(task) for task in accuracies):
        return None
    below = above = 0.0
    for task, accuracy in accuracies.items():
        low, high = wilson(accuracy, samples[task])
        below, above = below + (accuracy - low) ** 2, above + (high - accuracy) ** 2
    mean, count = fmean(accuracies.values()), len(accuracies)
    return max(0.0, mean - math.sqrt(below) / count), min(1.0, mean + math.sqrt(above) / count)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """The mean over seeds and the half-width of its 95% interval by Student's t; nan for a single seed.

    >>> mean, half = over_seeds([0.5, 0.6, 0.7])
    >>> round(mean, 6), round(half, 4)
    (0.6, 0.2484)
    """
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), _student(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def _student(degrees: int) -> float:
    """The 97.5% quantile of Student's t; above 10 degrees by its expansion at the normal quantile, to 4 digits."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    first = (_Z**3 + _Z) / (4 * degrees)
    second = (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)
    third = (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / (384 * degrees**3)
    return _Z + first + second + third
