"""What a worker asks of whoever copies blocks.

Invariant: every op that was submitted gets exactly one result, also when it fails, and `poll`
hands it out once. Between `submit` and that result the engine may read the op's source and write
its destination at any time, and never before or after.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from kvbm_core.types import OpId, OpResult, TransferOp


class TransferEngine(Protocol):
    """Copies blocks between tiers; called from one thread."""

    def submit(self, op: TransferOp) -> None:
        """Queue an op; onboards go before offloads. Never waits, never raises for a bad op."""

    def poll(self) -> list[OpResult]:
        """Results since the last poll, in the order in which the ops ended."""

    def wait(self, op_ids: Collection[OpId]) -> None:
        """Return when none of these ops, which touch the device, is in flight (their results wait
        for `poll`)."""

    def wait_any(self, timeout_seconds: float) -> None:
        """Return when a result waits for `poll`, nothing is in flight, or after the time-out."""

    def close(self) -> None:
        """Let copies that have begun end, fail the others, free what `open` took."""
