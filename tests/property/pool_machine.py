"""The pool against a model of a few sets: who is where, who is held, who was used last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm_core.errors import IllegalTransition
from kvbm_core.eviction import Lru
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, BlockId, Tier
from tests.property.checks import check_conserved, ready_blocks

KEYS = [BlockHash(bytes([i])) for i in range(7)]
SOME = st.lists(st.sampled_from(KEYS), max_size=5, unique=True)
PICKS = st.integers(0, 7)


class PoolMachine(RuleBasedStateMachine):
    """`make_pool` is replaced by a subclass that plants a fault."""

    make_pool: Callable[..., BlockPool] = BlockPool

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks: int) -> None:
        self.pool = type(self).make_pool(Tier.HOST, num_blocks, Lru())
        self.reserved: dict[BlockHash, BlockId] = {}
        self.ready: dict[BlockHash, BlockId] = {}  # least recently used first
        self.pins: list[list[BlockId]] = []
        self.batches: list[list[BlockHash]] = []
        self.unkeyed: list[BlockId] = []

    @property
    def held(self) -> Counter[BlockId]:
        return Counter(block_id for ids in self.pins for block_id in ids)

    @rule(keys=SOME, keep=SOME)
    def reserve(self, keys: list[BlockHash], keep: list[BlockHash]) -> None:
        keys = [key for key in keys if key not in self.pool]
        evictable = [k for k, i in self.ready.items() if i not in self.held and k not in keep]
        num_free = self.pool.num_free
        ids, evicted = self.pool.reserve(keys, keep.__contains__)
        assert evicted == evictable[: max(0, len(keys) - num_free)]
        assert len(ids) == min(len(keys), num_free + len(evicted))
        for key in evicted:
            del self.ready[key]
        self._expect_new(ids)
        self.reserved.update(zip(keys, ids, strict=False))
        if ids:
            self.batches.append(keys[: len(ids)])

    @precondition(lambda self: self.batches)
    @rule(pick=PICKS)
    def commit(self, pick: int) -> None:
        keys = self.batches.pop(pick % len(self.batches))
        self.pool.commit(keys)
        self.ready.update((key, self.reserved.pop(key)) for key in reversed(keys))

    @precondition(lambda self: self.batches)
    @rule(pick=PICKS)
    def abort(self, pick: int) -> None:
        keys = self.batches.pop(pick % len(self.batches))
        self.pool.abort(keys)
        for key in keys:
            del self.reserved[key]

    @rule(count=st.integers(0, 7))
    def reserve_unkeyed(self, count: int) -> None:
        evictable = [key for key, i in self.ready.items() if i not in self.held]
        num_free = self.pool.num_free
        assert self.pool.num_available == num_free + len(evictable)
        ids, evicted = self.pool.reserve_unkeyed(count)
        if count > num_free + len(evictable):
            assert (ids, evicted) == ([], [])
            return
        assert len(ids) == count
        assert evicted == evictable[: max(0, count - num_free)]
        for key in evicted:
            del self.ready[key]
        self._expect_new(ids)
        self.unkeyed += ids

    @rule(keys=SOME)
    def commit_unkeyed(self, keys: list[BlockHash]) -> None:
        """Also tries keys that are there already: then nothing may move."""
        entries = list(zip(keys, self.unkeyed, strict=False))
        if any(key in self.pool for key, _ in entries):
            with pytest.raises(IllegalTransition):
                self.pool.commit_unkeyed(entries)
            return
        self.pool.commit_unkeyed(entries)
        del self.unkeyed[: len(entries)]
        self.ready.update(reversed(entries))

    @precondition(lambda self: self.batches)
    @rule(pick=PICKS)
    def orphan(self, pick: int) -> None:
        keys = self.batches.pop(pick % len(self.batches))
        self.pool.orphan(keys)
        self.unkeyed += [self.reserved.pop(key) for key in keys]

    @rule(count=st.integers(0, 3))
    def free_unkeyed(self, count: int) -> None:
        self.pool.free_unkeyed(self.unkeyed[:count])
        del self.unkeyed[:count]

    @rule(keys=SOME)
    def pin(self, keys: list[BlockHash]) -> None:
        keys = [key for key in keys if key in self.ready]
        ids = self.pool.pin(keys)
        assert ids == [self.ready[key] for key in keys]
        self.pins.append(ids)
        self._use(keys)

    @precondition(lambda self: self.pins)
    @rule(pick=PICKS)
    def unpin(self, pick: int) -> None:
        self.pool.unpin(self.pins.pop(pick % len(self.pins)))

    @rule(keys=SOME)
    def drop(self, keys: list[BlockHash]) -> None:
        assert self.pool.drop(keys) == sum(key in self.ready for key in keys)
        for key in keys:
            self.ready.pop(key, None)

    @rule(keys=SOME)
    def touch(self, keys: list[BlockHash]) -> None:
        self.pool.touch(keys)
        self._use([key for key in keys if key in self.ready])

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=20), start=st.integers(0, 4))
    def match(self, keys: list[BlockHash], start: int) -> None:
        expected = 0
        while start + expected < len(keys) and keys[start + expected] in self.ready:
            expected += 1
        assert self.pool.match(keys, start) == expected

    def _expect_new(self, ids: list[BlockId]) -> None:
        busy = {*self.reserved.values(), *self.ready.values(), *self.held, *self.unkeyed}
        assert len(set(ids)) == len(ids)
        assert not busy & set(ids), "an id was given out that somebody has"

    def _use(self, keys: list[BlockHash]) -> None:
        for key in reversed(keys):
            self.ready[key] = self.ready.pop(key)

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        check_conserved(pool)
        assert ready_blocks(pool) == self.ready
        assert pool.num_reserved == len(self.reserved) + len(self.unkeyed)
        assert pool.num_pinned == len(self.held)
        assert [k for k in KEYS if k in pool] == [
            k for k in KEYS if k in self.ready or k in self.reserved
        ]
        assert not any(pool.match([key], 0) for key in self.reserved)

    def teardown(self) -> None:
        """Give everything back: every block is FREE again."""
        if not hasattr(self, "pool"):
            return
        for ids in self.pins:
            self.pool.unpin(ids)
        for keys in self.batches:
            self.pool.abort(keys)
        self.pool.free_unkeyed(self.unkeyed)
        self.pool.drop(self.pool.ready_keys())
        assert self.pool.num_free == self.pool.num_blocks
