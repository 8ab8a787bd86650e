"""Waiting for the other side: with a deadline, and a word in the log now and then.

Lives here: the clock. Does not live here: what is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

PROGRESS_SECONDS = 10.0


class Waitable(Protocol):
    """An end of the channel."""

    def wait(self, timeout_seconds: float) -> None: ...


def wait_until(
    end: Waitable,
    is_done: Callable[[], bool],
    *,
    timeout_seconds: float,
    say: Callable[[float], None],
) -> bool:
    """Ask `is_done` whenever something may have happened; whether it said yes in time.

    say: called every 10 s with the seconds that have passed.
    """
    began_seconds = time.monotonic()
    next_word_seconds = PROGRESS_SECONDS
    while not is_done():
        passed_seconds = time.monotonic() - began_seconds
        if passed_seconds >= timeout_seconds:
            return False
        if passed_seconds >= next_word_seconds:
            next_word_seconds += PROGRESS_SECONDS
            say(passed_seconds)
        end.wait(min(timeout_seconds, next_word_seconds) - passed_seconds)
    return True
