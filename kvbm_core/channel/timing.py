"""How often both sides speak, and how long they listen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """beat_seconds: between two signs of life. timeout_seconds: without one, the other side is
    gone; long, since a busy interpreter may stand still for seconds. resend_seconds: until what
    is not acknowledged is sent again."""

    beat_seconds: float = 1.0
    timeout_seconds: float = 15.0
    resend_seconds: float = 1.0


class Stopwatch:
    """Time in which this process stood still counts for nobody: after it, messages that waited
    are read first, and who seemed silent gets that time again."""

    def __init__(self, timing: Timing) -> None:
        self._longest_seconds = 2 * timing.beat_seconds
        self._last_seconds: float | None = None

    def stood_still_seconds(self, now_seconds: float) -> float:
        """Since the last call, beyond what a turn may take."""
        last, self._last_seconds = self._last_seconds, now_seconds
        if last is None or now_seconds - last <= self._longest_seconds:
            return 0.0
        return now_seconds - last
