"""Interleaved timing, and a thread that stands in for a busy engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Timed = Callable[[], float]
"""Does a thing once; returns the seconds of the part that counts."""

wall_clock = time.perf_counter
cpu_clock = time.thread_time
"""For what one thread computes without waiting: leaves out the time that others had the core."""


def whole(action: Callable[[], object], clock: Callable[[], float] = wall_clock) -> Timed:
    """Time all of `action`."""

    def once() -> float:
        start = clock()
        action()
        return clock() - start

    return once


def interleaved(cases: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, run in turn `rounds` times after one unmeasured round.

    Every other round goes backwards, so that no case always follows the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for index in range(rounds + 1):
        for name in names if index % 2 else reversed(names):
            taken = cases[name]()
            if index:
                seconds[name].append(taken)
    return seconds


@contextmanager
def busy_thread(is_wanted: bool) -> Iterator[None]:
    """While open, a second Python thread holds the GIL whenever it can, if `is_wanted`."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin, name="busy", daemon=True)
    if is_wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if is_wanted:
            thread.join()
