"""The blocks of one tier: who holds which id, what may be matched, what may be evicted.

    FREE ──reserve──▶ RESERVED ──commit──▶ READY ──evict, drop──▶ FREE
      ▲                   └─────abort─────────────────────────────┘

Lives here: ids, keys, pins. Does not live here: bytes, requests, ops.
A RESERVED id has a key from the start (`reserve`: a copy of known tokens is on its way), or gets it
when its content is known (`reserve_unkeyed`, `commit_unkeyed`), or has lost it (`orphan`).
Invariant: every id is FREE, RESERVED or READY, exactly once. A RESERVED block never matches; a
pinned block is never evicted or freed (one dropped while pinned stops matching at once and is
freed with its last pin).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvbm_core.errors import IllegalTransition
from kvbm_core.eviction.port import EvictionPolicy
from kvbm_core.types import BlockHash, BlockId, Tier

_FIRST_LOOK = 8


def _keep_none(_: BlockHash) -> bool:
    return False


class BlockPool:
    """Book-keeping of one tier; single-threaded, owned by the leader."""

    def __init__(self, tier: Tier, num_blocks: int, policy: EvictionPolicy) -> None:
        self.tier = tier
        self.num_blocks = num_blocks
        self._policy = policy
        self._free: list[BlockId] = list(range(num_blocks - 1, -1, -1))
        self._ready: dict[BlockHash, BlockId] = {}
        self._reserved: dict[BlockHash, BlockId] = {}
        self._pins: dict[BlockId, int] = {}
        self._detached: set[BlockId] = set()
        self._unkeyed: set[BlockId] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_reserved(self) -> int:
        """RESERVED ids, those without a key included."""
        return len(self._reserved) + len(self._unkeyed)

    @property
    def num_ready(self) -> int:
        """READY ids, those that were dropped while pinned included."""
        return len(self._ready) + len(self._detached)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    @property
    def num_available(self) -> int:
        """Ids that a reservation can have: FREE ones, and READY ones that nobody holds."""
        num_pinned_ready = len(self._pins) - len(self._detached)
        return len(self._free) + len(self._ready) - num_pinned_ready

    def __contains__(self, key: BlockHash) -> bool:
        """Whether the key is READY or on its way (RESERVED)."""
        return key in self._ready or key in self._reserved

    def is_ready(self, key: BlockHash) -> bool:
        return key in self._ready

    def ready_keys(self) -> list[BlockHash]:
        return list(self._ready)

    def match(self, keys: Sequence[BlockHash], start: int) -> int:
        """How many of `keys[start:]` are READY without a gap.

        Looks at keys in growing slices, so that a miss costs the first few of a lazy chain.
        """
        ready, index, step = self._ready, start, _FIRST_LOOK
        while part := keys[index : index + step]:
            for key in part:
                if key not in ready:
                    return index - start
                index += 1
            step *= 2
        return index - start

    def missing(self, keys: Sequence[BlockHash]) -> list[int]:
        """Indices of those of `keys` that are neither READY nor on their way."""
        ready, reserved = self._ready, self._reserved
        return [i for i, key in enumerate(keys) if key not in ready and key not in reserved]

    def restore(self, entries: Iterable[tuple[BlockHash, BlockId]]) -> None:
        """FREE → READY for blocks that an earlier process left, least recently used first.

        Raises IllegalTransition unless the pool is empty and every key and id comes once.
        """
        entries = list(entries)
        ready = dict(entries)
        taken = set(ready.values())
        if len(self._free) < self.num_blocks or not len(taken) == len(ready) == len(entries):
            raise IllegalTransition(f"{len(entries)} blocks can't be restored to {self.tier.value}")
        if taken and not 0 <= min(taken) <= max(taken) < self.num_blocks:
            raise IllegalTransition(f"ids of restored blocks exceed {self.num_blocks}")
        self._free = [i for i in range(self.num_blocks - 1, -1, -1) if i not in taken]
        self._ready = ready
        self._policy.insert(ready)

    def reserve(
        self,
        keys: Sequence[BlockHash],
        keep: Callable[[BlockHash], bool] = _keep_none,
    ) -> tuple[list[BlockId], list[BlockHash]]:
        """Reserve ids for a leading part of `keys`; returns those ids and the keys evicted.

        No key may be in the pool, or twice in `keys`. Keys for which `keep` holds are not evicted
        for this.
        """
        ready, reserved = self._ready, self._reserved
        for key in keys:
            if key in ready or key in reserved:
                raise IllegalTransition(f"block {key.hex()[:16]} is already in {self.tier.value}")
        if len(set(keys)) != len(keys):
            raise IllegalTransition(f"{len(keys)} keys to reserve are not all different")
        evicted = self._evict(len(keys) - len(self._free), keep)
        ids = [self._free.pop() for _ in range(min(len(keys), len(self._free)))]
        reserved.update(zip(keys, ids, strict=False))
        return ids, evicted

    def commit(self, keys: Sequence[BlockHash]) -> None:
        """RESERVED → READY: every rank has the bytes."""
        for key in keys:
            self._ready[key] = self._take_reserved(key)
        self._policy.insert(reversed(keys))

    def abort(self, keys: Iterable[BlockHash]) -> None:
        """RESERVED → FREE: at least one rank has not."""
        for key in keys:
            self._free.append(self._take_reserved(key))

    def orphan(self, keys: Iterable[BlockHash]) -> None:
        """RESERVED blocks whose bytes will not be wanted give up their keys, so that these can be
        reserved anew; the ids stay RESERVED until `free_unkeyed`."""
        for key in keys:
            self._unkeyed.add(self._take_reserved(key))

    def reserve_unkeyed(self, count: int) -> tuple[list[BlockId], list[BlockHash]]:
        """Reserve `count` ids without keys; returns them and the keys evicted.

        All or none. Nothing is evicted where `num_available` is less.
        """
        num_missing = count - len(self._free)
        if count > self.num_available:
            return [], []
        evicted = self._evict(num_missing, _keep_none)
        if len(evicted) < num_missing:
            # The policy looked at so many pinned blocks that it gave up: move them out of its way.
            ready, pins = self._ready, self._pins
            self._policy.touch([key for key in ready if ready[key] in pins])
            evicted += self._evict(num_missing - len(evicted), _keep_none)
        if count > len(self._free):
            return [], evicted
        ids = [self._free.pop() for _ in range(count)]
        self._unkeyed.update(ids)
        return ids, evicted

    def commit_unkeyed(self, entries: Sequence[tuple[BlockHash, BlockId]]) -> None:
        """RESERVED → READY for ids without a key, under these keys.

        Raises IllegalTransition, and moves none, where a key is in the pool already or comes
        twice, or an id is not RESERVED without a key.
        """
        keys, ids = [key for key, _ in entries], {block_id for _, block_id in entries}
        if any(key in self for key in keys) or not len(set(keys)) == len(ids) == len(entries):
            raise IllegalTransition(f"{len(entries)} keys are not all new in {self.tier.value}")
        if not ids <= self._unkeyed:
            raise IllegalTransition(f"{ids - self._unkeyed} are not reserved without a key")
        self._unkeyed -= ids
        self._ready.update(entries)
        self._policy.insert(reversed(keys))

    def free_unkeyed(self, ids: Iterable[BlockId]) -> None:
        """RESERVED → FREE for ids without a key: nothing writes them any more."""
        for block_id in ids:
            self._unkeyed.remove(block_id)
            self._free.append(block_id)

    def pin(self, keys: Sequence[BlockHash]) -> list[BlockId]:
        """Keep READY blocks until `unpin` of the ids returned; not a use, see `touch`."""
        try:
            ids = [self._ready[key] for key in keys]
        except KeyError as error:
            raise IllegalTransition(f"pin of a block not ready in {self.tier.value}") from error
        pins = self._pins
        for block_id in ids:
            pins[block_id] = pins.get(block_id, 0) + 1
        return ids

    def unpin(self, ids: Iterable[BlockId]) -> None:
        """Undo one `pin` of each id."""
        for block_id in ids:
            left = self._pins[block_id] - 1
            if left:
                self._pins[block_id] = left
                continue
            del self._pins[block_id]
            if block_id in self._detached:
                self._detached.remove(block_id)
                self._free.append(block_id)

    def touch(self, keys: Sequence[BlockHash]) -> None:
        """Count a use of those of `keys` that are READY, tail before head."""
        ready = self._ready
        self._policy.touch([key for key in reversed(keys) if key in ready])

    def drop(self, keys: Iterable[BlockHash]) -> int:
        """READY → FREE for those of `keys` that are READY; returns how many."""
        num_dropped = 0
        for key in keys:
            block_id = self._ready.pop(key, None)
            if block_id is None:
                continue
            num_dropped += 1
            self._policy.remove(key)
            if block_id in self._pins:
                self._detached.add(block_id)
            else:
                self._free.append(block_id)
        return num_dropped

    def _evict(self, count: int, keep: Callable[[BlockHash], bool]) -> list[BlockHash]:
        if count <= 0:
            return []
        ready, pins = self._ready, self._pins
        victims = self._policy.victims(count, lambda key: ready[key] in pins or keep(key))
        self.drop(victims)
        return victims

    def _take_reserved(self, key: BlockHash) -> BlockId:
        try:
            return self._reserved.pop(key)
        except KeyError:
            raise IllegalTransition(
                f"block {key.hex()[:16]} is not reserved in {self.tier.value}"
            ) from None
