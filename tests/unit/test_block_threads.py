"""A block manager used by several threads, and by finalizers in the middle of its own work."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvbm_core import BlockManager
from kvbm_core.blocks.tier import Hold
from kvbm_core.errors import BlocksUnavailable
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, BlockId, Tier
from tests.property.checks import check_conserved
from tests.unit.blocks import PAGE_SIZE, manager_of

NUM_THREADS, NUM_ROUNDS = 4, 60


def _work(manager: BlockManager, thread: int) -> int:
    """Allocate, write, check, register, find, copy and let go; returns blocks that changed."""
    num_bad = 0
    for turn in range(NUM_ROUNDS):
        number = float(thread * NUM_ROUNDS + turn + 1)
        tokens = [thread, turn % 3, *range(2, PAGE_SIZE)]
        try:
            blocks = manager.allocate_device_blocks_blocking(1 + turn % 2)
        except BlocksUnavailable:
            continue
        tensors = [torch.from_dlpack(block).fill_(number) for block in blocks]
        found = manager.match_host_blocks(tokens)
        if not found:
            blocks.fill(tokens)
            blocks = blocks[:1].register()
        try:
            stored = manager.offload_blocking(blocks)
        except BlocksUnavailable:
            stored = None
        blocks.release()
        num_bad += sum(not bool((tensor == number).all()) for tensor in tensors)
        if stored is not None and turn % 2:
            stored.release()
    return num_bad


def test_threads_never_share_a_block_and_leave_none_behind() -> None:
    manager = manager_of(device_num_blocks=6, host_num_blocks=6)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        bad = list(threads.map(lambda thread: _work(manager, thread), range(NUM_THREADS)))
    assert bad == [0] * NUM_THREADS
    manager.reset()
    gc.collect()
    assert manager.num_available_device_blocks == 6
    assert manager.num_available_host_blocks == 6
    for tier in manager._tiers.values():
        check_conserved(tier._pool)


class CollectsGarbage(BlockPool):
    """Lets the garbage collector run in the middle of an allocation, under the manager's lock."""

    garbage: list[object]

    def reserve_unkeyed(self, count: int) -> tuple[list[BlockId], list[BlockHash]]:
        self.garbage.clear()
        gc.collect()
        return super().reserve_unkeyed(count)

    def unpin(self, ids: Sequence[BlockId]) -> None:  # type: ignore[override]
        gc.collect()
        super().unpin(ids)


def _allocate_while_garbage_is_collected(manager: BlockManager) -> None:
    cycle: list[object] = [manager.allocate_host_blocks_blocking(2)]
    cycle.append(cycle)
    pool = manager._tiers[Tier.HOST]._pool
    pool.__class__ = CollectsGarbage
    pool.garbage = [cycle]  # type: ignore[attr-defined]
    del cycle
    manager.allocate_host_blocks_blocking(1).release()


def test_a_finalizer_in_the_middle_of_an_allocation_gives_its_blocks_back() -> None:
    manager = manager_of()
    _allocate_while_garbage_is_collected(manager)
    assert manager.num_available_host_blocks == 4


def test_the_check_notices_a_finalizer_that_wants_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = manager_of()
    lock, was_free = manager._tiers[Tier.HOST].lock, []

    def takes_the_lock(hold: Hold) -> None:
        was_free.append(lock.acquire(timeout=0.05))
        if was_free[-1]:
            lock.release()

    monkeypatch.setattr(Hold, "__del__", takes_the_lock)
    _allocate_while_garbage_is_collected(manager)
    assert was_free == [False, False, True], "two would have waited for their own thread"
