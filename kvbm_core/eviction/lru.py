"""Least recently used: the resident key whose last use is longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice

from kvbm_core.types import BlockHash

MAX_LOOKS = 4096
"""Beyond as many wanted keys: a tier whose old blocks all have to stay is full, and looking through
all of it at every step would cost more than the room is worth."""


class Lru:
    """EvictionPolicy over one ordered dictionary; a touch is a move to its end."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlockHash, None] = OrderedDict()

    def insert(self, keys: Iterable[BlockHash]) -> None:
        for key in keys:
            self._order[key] = None

    def touch(self, keys: Iterable[BlockHash]) -> None:
        move_to_end = self._order.move_to_end
        for key in keys:
            move_to_end(key)

    def remove(self, key: BlockHash) -> None:
        del self._order[key]

    def victims(self, count: int, keep: Callable[[BlockHash], bool]) -> list[BlockHash]:
        found: list[BlockHash] = []
        for key in islice(self._order, MAX_LOOKS + count):
            if len(found) == count:
                break
            if not keep(key):
                found.append(key)
        return found
