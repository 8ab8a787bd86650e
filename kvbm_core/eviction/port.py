"""What a tier asks of an eviction policy.

Invariant: the policy knows exactly the resident (READY) keys of its pool, pinned ones included:
taking keys out while they are pinned would erase their history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from kvbm_core.types import BlockHash


class EvictionPolicy(Protocol):
    """Orders resident keys; owned by one pool, called from one thread."""

    def insert(self, keys: Iterable[BlockHash]) -> None:
        """Keys became resident; the pool passes the tail of a prefix before its head."""

    def touch(self, keys: Iterable[BlockHash]) -> None:
        """Resident keys were used, tail before head."""

    def remove(self, key: BlockHash) -> None:
        """A resident key left."""

    def victims(self, count: int, keep: Callable[[BlockHash], bool]) -> list[BlockHash]:
        """Up to `count` keys to evict, first the one to go first; none for which `keep` holds.
        Fewer where finding them would take long."""
