"""The peaks of memory of a process and of one of its stages."""

import sys

import numpy as np
import pytest

from suture.core.machine import Meter, peak_memory

MEGABYTE = 10**6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux begins its peak anew")
def test_a_meter_has_the_peak_since_it_was_made_and_the_process_keeps_the_highest():
    np.ones(800 * MEGABYTE // 8)
    highest = peak_memory()["process"]
    meter = Meter()
    before = meter.memory
    assert before is not None
    assert before < highest - 600 * MEGABYTE
    np.ones(300 * MEGABYTE // 8)
    after = meter.memory
    assert after is not None
    assert 200 * MEGABYTE < after - before < 350 * MEGABYTE  # the system may take back pages meanwhile
    assert peak_memory()["process"] == highest


def test_a_system_that_cannot_begin_it_anew_gives_no_memory(monkeypatch):
    monkeypatch.setattr("suture.core.machine._restart_peak", lambda: False)
    meter = Meter()
    assert meter.memory is None
    assert meter.seconds >= 0
