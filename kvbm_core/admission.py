"""What may go down a tier: one policy for blocks on their way to disk, one for leaving the device.

Lives here: the two ports, the built-in policies and their tables. Does not live here: pools, ops,
clocks (the caller says what time it is).
Invariant: a policy only ever says no; it knows keys and priorities, never bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvbm_core.types import BlockHash

DECAY_SECONDS = 600.0
MAX_FREQUENCY = 64
MAX_KEYS = 2**20  # beyond, blocks that were never hit are not noted: a hit counts from 1 anyway
_SWEEP_KEYS = 512


class AdmissionFilter(Protocol):
    """Says which blocks of host are worth a write to disk; called from the leader's thread."""

    def stored(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        """Keys came to host; returns those admitted."""

    def hit(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        """Keys were used from host; returns those admitted."""

    def tick(self, now_seconds: float) -> None:
        """Let time pass; called once a step, monotonic."""


class AdmitAll:
    """Every block is worth it: write-through."""

    def stored(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        return list(keys)

    def hit(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        return list(keys)

    def tick(self, now_seconds: float) -> None:
        """Nothing fades."""


class FrequencyFilter:
    """Admits blocks whose frequency is at least 2: those that were used again while in host.

    A frequency starts at 1, doubles with each hit (up to 64), loses 1 every 600 s, and is forgotten
    at 0: KVBM's rule to spare SSDs. Kept as the decay step in which it reaches 0, so that time
    costs nothing until somebody asks.
    """

    def __init__(self) -> None:
        self._expiry: dict[BlockHash, int] = {}
        self._step = 0
        self._step_began_seconds: float | None = None
        self._to_sweep: list[BlockHash] = []

    def frequency(self, key: BlockHash) -> int:
        return max(0, self._expiry.get(key, 0) - self._step)

    def stored(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        admitted = []
        for key in keys:
            frequency = self.frequency(key)
            if frequency >= 2:
                admitted.append(key)
            elif not frequency and len(self._expiry) < MAX_KEYS:
                self._expiry[key] = self._step + 1
        return admitted

    def hit(self, keys: Iterable[BlockHash]) -> list[BlockHash]:
        keys = list(keys)
        for key in keys:
            doubled = 2 * max(1, self.frequency(key))
            self._expiry[key] = self._step + min(doubled, MAX_FREQUENCY)
        return keys

    def tick(self, now_seconds: float) -> None:
        if self._step_began_seconds is None:
            self._step_began_seconds = now_seconds
        num_steps = int((now_seconds - self._step_began_seconds) // DECAY_SECONDS)
        if num_steps > 0:
            self._step += num_steps
            self._step_began_seconds += num_steps * DECAY_SECONDS
            self._to_sweep = list(self._expiry)
        for key in self._to_sweep[-_SWEEP_KEYS:]:
            if self._expiry[key] <= self._step:
                del self._expiry[key]
        del self._to_sweep[-_SWEEP_KEYS:]


class OffloadFilter(Protocol):
    """Says how much of a request's prefix may leave the device at all."""

    def num_admitted(self, priorities: Sequence[int], start: int, end: int) -> int:
        """Blocks from `start` on to offload, at most `end - start`. Block i of the request has
        `priorities[i]`; beyond the last one, that of the last; without any, every block may."""


class MinPriority:
    """The prefix up to the first block below `minimum`: what follows a gap can't be matched."""

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum

    def num_admitted(self, priorities: Sequence[int], start: int, end: int) -> int:
        for block in range(start, end) if priorities else ():
            if priorities[min(block, len(priorities) - 1)] < self._minimum:
                return block - start
        return end - start


ADMISSION_FILTERS: dict[str, Callable[[], AdmissionFilter]] = {
    "frequency": FrequencyFilter,
    "all": AdmitAll,
}
OFFLOAD_FILTERS: dict[str, Callable[[int], OffloadFilter]] = {"min_priority": MinPriority}
