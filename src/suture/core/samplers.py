"""Samplers: the points of a search space, one after another, each with the scores of those before it.

A sampler is a generator of points, knob → value, that is sent each point's score (larger is better). It is determined
by its arguments and these scores, so a search resumes by sending the scores again.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch

from suture.errors import ConfigError

Kind = Literal["grid", "sobol", "cma_es"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Point = dict[str, float]
Sampler = Generator[Point, float, None]


@dataclass(frozen=True)
class Interval:
    """All numbers from `least` to `most`."""

    least: float
    most: float

    def at(self, share: float) -> float:
        """The number at a share in [0, 1] of the interval."""
        return self.least + share * (self.most - self.least)


Space = Mapping[str, Sequence[float] | Interval]


def sampler(space: Space, kind: Kind | None = None, trials: int = 32, seed: int = 0) -> Sampler:
    """The points of a search of at most `trials`; raises `ConfigError` for a space that the kind cannot search.

    - `grid`, the default for lists of values: every combination of them, in order.
    - `sobol`, the default for intervals: a scrambled Sobol sequence, which fills the space evenly.
    - `cma_es`: covariance matrix adaptation (https://arxiv.org/abs/1604.00772), which learns where scores are high.

    >>> [point["alpha"] for point in sampler({"alpha": [0.5, 1.0]})]
    [0.5, 1.0]
    """
    intervals = {name: values for name, values in space.items() if isinstance(values, Interval)}
    kind = kind or ("sobol" if intervals else "grid")
    if not space:
        raise ConfigError("There is nothing to search over. Remedy: give a knob several values, or an interval.")
    if kind == "grid":
        if intervals:
            name = next(iter(intervals))
            raise ConfigError(
                f"{name} is an interval, which a grid cannot cover. Remedy: list values, or sampler=sobol."
            )
        return _grid({name: list(values) for name, values in space.items() if not isinstance(values, Interval)})
    if lists := [name for name in space if name not in intervals]:
        raise ConfigError(f"{lists[0]} is a list of values; sampler={kind} wants an interval. Remedy: {lists[0]}=A..B.")
    if trials < 1:
        raise ConfigError(f"trials={trials}: wanted 1 or more.")
    return (_sobol if kind == "sobol" else _cma_es)(intervals, trials, seed)


def number_of_points(space: Space, trials: int) -> int:
    """The number of points that a search visits."""
    count = 1
    for values in space.values():
        if isinstance(values, Interval):
            return trials
        count *= len(values)
    return count


def _grid(space: Mapping[str, Sequence[float]]) -> Sampler:
    for values in product(*space.values()):
        yield dict(zip(space, values, strict=True))


def _sobol(space: Mapping[str, Interval], trials: int, seed: int) -> Sampler:
    engine = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed)
    for _ in range(trials):
        yield _scaled(space, engine.draw(1, dtype=torch.float64)[0].tolist())


def _cma_es(space: Mapping[str, Interval], trials: int, seed: int) -> Sampler:
    """In the unit cube, from its centre with a step of a quarter of each interval."""
    cmaes, np = _libraries()
    dimensions = max(2, len(space))  # the library wants two: the second of a single knob has no effect
    centre, bounds = np.full(dimensions, 0.5), np.tile([0.0, 1.0], (dimensions, 1))
    optimizer = cmaes.CMA(mean=centre, sigma=0.25, bounds=bounds, seed=seed % 2**32)
    generation = []
    for _ in range(trials):
        position = optimizer.ask()
        score = yield _scaled(space, position[: len(space)].tolist())
        generation.append((position, -score))
        if len(generation) == optimizer.population_size:
            optimizer.tell(generation)
            generation = []


def _scaled(space: Mapping[str, Interval], shares: Sequence[float]) -> Point:
    return {name: interval.at(share) for (name, interval), share in zip(space.items(), shares, strict=True)}


def _libraries():
    try:
        import cmaes
        import numpy as np
    except ImportError:
        raise ConfigError("sampler=cma_es needs cmaes. Remedy: pip install 'suture[search]'.") from None
    return cmaes, np
