"""The leader's counters in the log: now and then, and only where they changed."""

from __future__ import annotations

import logging
import time

from kvbm_core.metrics import Counters

SUMMARY_SECONDS = 60.0


class SummaryLog:
    """Of one leader. An engine may be killed before it gets to say goodbye, hence now and then."""

    def __init__(self, logger: logging.Logger, counters: Counters) -> None:
        self._logger = logger
        self._counters = counters
        self._last = counters.summary()
        self._due_seconds = time.monotonic() + SUMMARY_SECONDS

    def write_if_due(self, num_hook_errors: int) -> None:
        if time.monotonic() >= self._due_seconds:
            self.write(num_hook_errors)

    def write(self, num_hook_errors: int) -> None:
        self._counters.num_hook_errors = num_hook_errors
        summary = self._counters.summary()
        if summary != self._last:
            self._logger.info("kvbm summary: %s", summary)
        self._last = summary
        self._due_seconds = time.monotonic() + SUMMARY_SECONDS
