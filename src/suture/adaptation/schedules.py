"""Schedules of the learning rate: constant as published, or fast, in a fifth of the steps.

Adam moves a coefficient by at most about the learning rate a step, whatever the size of its gradient: 1,000 steps of
1e-3 reach no further than 1. Fast sets the reach of 200 steps to 1.2 by taking large ones, and settles on small ones.
"""

import math
from collections.abc import Callable
from typing import Literal

from suture.errors import ConfigError, unknown_name

Schedule = Literal["constant", "fast"]

_PEAK = 12.0  # times lr
_WARM_UP = 0.1  # of the steps


def constant(step: int, max_steps: int) -> float:
    """The same rate throughout, as published."""
    return 1.0


def fast(step: int, max_steps: int) -> float:
    """Up to 12 times the rate in a tenth of the steps, and down to nothing along a half cosine.

    >>> [round(fast(step, 20), 1) for step in (0, 1, 2, 11, 19)]
    [6.0, 12.0, 12.0, 6.0, 0.1]
    """
    rising = max(1, round(_WARM_UP * max_steps))
    if step < rising:
        return _PEAK * (step + 1) / rising
    return _PEAK * (1 + math.cos(math.pi * (step - rising) / max(1, max_steps - rising))) / 2


SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": constant, "fast": fast}
STEPS = {"constant": 1000, "fast": 200}


def get_schedule(schedule: str, max_steps: int | None = None) -> tuple[Callable[[int, int], float], int]:
    """The factor of the learning rate as a function of (step, max_steps), and how many steps are taken.

    `max_steps` is the length of the whole schedule, which fast stretches over it; by default 1,000, or 200 for fast.
    Raises `ConfigError` for an unknown schedule.

    >>> get_schedule("fast")[1], get_schedule("fast", 50)[1]
    (200, 50)
    """
    if schedule not in SCHEDULES:
        raise ConfigError(unknown_name("schedule", schedule, SCHEDULES))
    return SCHEDULES[schedule], STEPS[schedule] if max_steps is None else max_steps
