"""Learning-rate schedules: constant, as published, or fast, in a fifth of the steps.

Adam moves a coefficient by at most about the learning rate per step, whatever the size of its gradient: 1,000 steps of
1e-3 reach at most 1. The fast schedule reaches 1.2 in 200 steps by starting with large ones, and ends with small ones.
"""

import math
from collections.abc import Callable
from typing import Literal

from suture.errors import check_known

Schedule = Literal["constant", "fast"]

_PEAK = 12.0  # times lr
_WARM_UP = 0.1  # of the steps


def constant(step: int, max_steps: int) -> float:
    """A factor of 1 at every step, as published."""
    return 1.0


def fast(step: int, max_steps: int) -> float:
    """A factor that rises to 12 over a tenth of the steps, then falls to 0 along a half cosine.

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
    """(factor, number of steps): the learning rate's factor as a function of (step, max_steps).

    `max_steps` is the length of the schedule, by default 1,000, or 200 for fast, which is scaled to it. Raises
    `ConfigError` for an unknown schedule.

    >>> get_schedule("fast")[1], get_schedule("fast", 50)[1]
    (200, 50)
    """
    check_known("schedule", [schedule], SCHEDULES)
    return SCHEDULES[schedule], STEPS[schedule] if max_steps is None else max_steps
