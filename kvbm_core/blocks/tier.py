"""One tier's blocks in a program's hands: who holds which, and what becomes of those let go.

Lives here: leases, holds, the lock around the pool. Does not live here: what the pool decides,
the handles a program sees.
Invariant: an id that a Hold names is RESERVED without a key, or READY and pinned once for that
Hold; it goes back to the pool only when nothing refers to the Hold any more: no handle, no
exported tensor, no copy in flight.

A Hold may end in any thread and in the middle of anything, even in the locked part below (the
garbage collector runs finalizers where it likes). So its end takes no lock: it appends to a queue,
which is emptied under the lock before the books are looked at.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvbm_core.blocks.memory import BlockMemory
from kvbm_core.blocks.sequence import TokenSequence, TokenSpan
from kvbm_core.blocks.state import BlockEvent, BlockState, moved
from kvbm_core.errors import BlocksUnavailable, IllegalTransition
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockId, Tier


class Hold:
    """One claim on one block, given back with the last reference to this object."""

    def __init__(self, block_id: BlockId, returned: deque[tuple[BlockId, bool]]) -> None:
        self.block_id = block_id
        self.is_pin = False
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append((self.block_id, self.is_pin))


class Lease:
    """What all handles of one holder's block share; changed under the tier's lock."""

    def __init__(self, tier: BlockTier, hold: Hold) -> None:
        self.tier = tier
        self.block_id = hold.block_id
        self.state = BlockState.RESET
        self.span: TokenSpan | None = None
        self._hold: Hold | None = hold

    @property
    def hold(self) -> Hold:
        """Raises IllegalTransition after `release`."""
        if self._hold is None:
            raise IllegalTransition(
                f"{self.tier.tier.value} block {self.block_id} was released. Allocate another one."
            )
        return self._hold

    @property
    def is_released(self) -> bool:
        return self._hold is None

    def check(self, event: BlockEvent) -> None:
        """Raise IllegalTransition where the block was released or its state has no such edge."""
        _ = self.hold
        moved(self.state, event)

    def release(self) -> None:
        """Let go; takes no lock. The block is free once no exported tensor holds it either."""
        self.state, self._hold = moved(self.state, BlockEvent.DROPPED), None


class BlockTier:
    """Allocates, registers and finds blocks of one tier. Thread-safe.

    lock: shared by the tiers between which sequences are shared; not re-entrant, so finalizers may
    release blocks, but not allocate any.
    """

    def __init__(self, pool: BlockPool, memory: BlockMemory, lock: threading.Lock) -> None:
        self.tier: Tier = pool.tier
        self.lock = lock
        self._pool = pool
        self._memory: BlockMemory | None = memory
        self._returned: deque[tuple[BlockId, bool]] = deque()

    @property
    def memory(self) -> BlockMemory:
        """Raises IllegalTransition after `close`."""
        if self._memory is None:
            raise IllegalTransition("the block manager was closed. Make another one.")
        return self._memory

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now."""
        with self._books() as pool:
            return pool.num_available

    def close(self) -> None:
        """Free the memory as soon as no exported tensor needs it."""
        with self.lock:
            self._memory = None

    def allocate(self, count: int) -> list[Lease]:
        """RESET blocks; evicts registered ones that nobody holds. Raises BlocksUnavailable."""
        with self._books() as pool:
            return self._allocate(pool, count)

    def match(self, sequence: TokenSequence) -> list[Lease]:
        """The longest registered prefix of a sequence that is new, held for the caller."""
        with self._books() as pool:
            num_blocks = pool.match(sequence.keys, 0)
            keys = sequence.keys[:num_blocks]
            ids = pool.pin(keys)
            pool.touch(keys)
            return [self._pinned(i, sequence.span(n)) for n, i in enumerate(ids)]

    def register(self, leases: Sequence[Lease]) -> list[Lease]:
        """COMPLETE → REGISTERED; a block whose key another one has stays COMPLETE, and that other
        one is returned instead, held for the caller. Registers all or, where one can't be, none."""
        with self._books() as pool:
            for lease in leases:
                lease.check(BlockEvent.REGISTERED)
            return self._register(pool, leases)

    def prepare_copies(self, sources: Sequence[Lease]) -> list[Lease]:
        """For each source the registered block here that has its key, or a new block."""
        with self._books() as pool:
            found = [self._registered_like(pool, source) for source in sources]
            new = iter(self._allocate(pool, sum(lease is None for lease in found)))
            return [lease or next(new) for lease in found]

    def finish_copies(
        self, leases: Sequence[Lease], sources: Sequence[tuple[BlockState, TokenSpan | None]]
    ) -> list[Lease]:
        """The new ones of what `prepare_copies` gave have the bytes of their sources: give them the
        sources' states and tokens. Returns the blocks that are found, as `register`."""
        with self._books() as pool:
            done, registered = list(leases), []
            for index, (lease, (state, span)) in enumerate(zip(leases, sources, strict=True)):
                if lease.state is BlockState.RESET and span is not None:
                    lease.state, lease.span = BlockState.COMPLETE, span
                    if state is BlockState.REGISTERED:
                        registered.append(index)
            found = self._register(pool, [leases[index] for index in registered])
            for index, lease in zip(registered, found, strict=True):
                done[index] = lease
            return done

    def forget(self) -> None:
        """Every registered block stops matching; those held are freed when they are let go."""
        with self._books() as pool:
            pool.drop(pool.ready_keys())

    @contextmanager
    def _books(self) -> Iterator[BlockPool]:
        """The pool, locked, with all that was let go given back."""
        with self.lock:
            if self._memory is None:
                raise IllegalTransition("the block manager was closed. Make another one.")
            while self._returned:
                block_id, is_pin = self._returned.popleft()
                (self._pool.unpin if is_pin else self._pool.free_unkeyed)([block_id])
            yield self._pool

    def _allocate(self, pool: BlockPool, count: int) -> list[Lease]:
        available = pool.num_available
        ids, _ = pool.reserve_unkeyed(count)
        if len(ids) < count:
            raise BlocksUnavailable(
                f"Not enough blocks available in {self.tier.value}, requested: {count}, "
                f"available: {available}. Release some, or give {self.tier.value}_num_blocks a "
                "higher number."
            )
        return [Lease(self, Hold(block_id, self._returned)) for block_id in ids]

    def _pinned(self, block_id: BlockId, span: TokenSpan) -> Lease:
        """For an id that was just pinned."""
        hold = Hold(block_id, self._returned)
        hold.is_pin = True
        lease = Lease(self, hold)
        lease.state, lease.span = BlockState.REGISTERED, span
        return lease

    def _register(self, pool: BlockPool, leases: Sequence[Lease]) -> list[Lease]:
        holds = [lease.hold for lease in leases]
        spans = [lease.span for lease in leases if lease.span is not None]
        keys = [span.key for span in spans]
        new = {key: hold for key, hold in zip(keys, holds, strict=True) if key not in pool}
        pool.commit_unkeyed([(key, hold.block_id) for key, hold in new.items()])
        ids = pool.pin(keys)
        for span in {span.sequence: span for span in spans}.values():
            pool.touch(span.prefix_keys)  # what makes a block reachable is evicted after it
        found = []
        for lease, hold, block_id, span in zip(leases, holds, ids, spans, strict=True):
            if block_id == hold.block_id:
                hold.is_pin = True
                lease.state = BlockState.REGISTERED
                found.append(lease)
            else:
                found.append(self._pinned(block_id, span))
        return found

    def _registered_like(self, pool: BlockPool, source: Lease) -> Lease | None:
        span = source.span
        if source.state is not BlockState.REGISTERED or span is None or not pool.is_ready(span.key):
            return None
        pool.touch([span.key])
        return self._pinned(pool.pin([span.key])[0], span)
