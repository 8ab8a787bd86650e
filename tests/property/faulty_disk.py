"""Parts of the disk tier with one fault each, to show that the checks would notice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kvbm_core.cascade import Cascade
from kvbm_core.leader import Leader
from kvbm_core.ledger import OpLedger, OpRecord
from kvbm_core.pool import BlockPool
from kvbm_core.restore import agreed_blocks
from kvbm_core.slot import Slot
from kvbm_core.storage.index import DiskIndex
from kvbm_core.types import BlockHash, BlockId, OpResult
from kvbm_core.wire import DiskInventory, StepPlan
from kvbm_core.worker import Worker
from tests.property.faulty import WithLedger


class WithCascade(Leader):
    """A leader with another cascade."""

    lower: type[Cascade] = Cascade

    def __init__(self, *args: Any, disk: Any = None, **options: Any) -> None:
        super().__init__(*args, disk=disk, **options)
        if disk is not None:
            self._cascade = self._offloads._cascade = self.lower(
                self._pool, disk, self._ledger, self.counters, self._block_size
            )


class CommitsBadBlocks(WithCascade):
    """Offers what could not be read."""

    class lower(Cascade):
        def _end_promotion(self, record: OpRecord) -> None:
            record.failed.clear()
            super()._end_promotion(record)


class CommitsFailedWrites(WithCascade):
    class lower(Cascade):
        def _end_write(self, record: OpRecord) -> None:
            record.failed.clear()
            super()._end_write(record)


class EvictsUnwritten(WithCascade):
    """Makes room in host with blocks that wait to be written."""

    class lower(Cascade):
        def must_stay(self, key: BlockHash) -> bool:
            return False


class PromotesTwice(WithCascade):
    """Does not know what is on its way up."""

    class lower(Cascade):
        def _reach(self, slot: Slot, block: int) -> tuple[list[BlockHash], list[BlockHash], int]:
            wanted = []
            for key in slot.keys[block:]:
                if not self.disk.is_ready(key) or self._host.is_ready(key):
                    break
                wanted.append(key)
            return wanted, [], block


class NeverUnpinsWritten(WithCascade):
    class lower(Cascade):
        def _end_write(self, record: OpRecord) -> None:
            super()._end_write(record)
            self._host.pin([key for key in record.keys if self._host.is_ready(key)])


class WaitsForever(WithCascade):
    """Knows no deadline for a promotion."""

    class lower(Cascade):
        def _patience_seconds(self, num_blocks: int) -> float:
            return float("inf")


class NeverRests(WithCascade):
    """Keeps an engine stepping for a disk that hangs."""

    class lower(Cascade):
        @property
        def num_overdue_ops(self) -> int:
            return 0


class StepsForAQueue(WithCascade):
    """Keeps an engine stepping for writes that it can't send."""

    class lower(Cascade):
        @property
        def has_work(self) -> bool:
            return bool(self._queue or self._asked or self._reset)


class ForgetsToVoid(WithCascade):
    """Resets its own books, and lets the next process find what old weights made."""

    class lower(Cascade):
        def begin_anew(self, *, persists: bool) -> None:
            super().begin_anew(persists=True)


class KeepsFlightsOnReset(WithCascade):
    """Forgets on reset what is there, not what is on its way."""

    class lower(Cascade):
        def reset(self) -> None:
            flights, self._flights = self._flights, {}
            super().reset()
            self._flights = flights


class CommitsOnFirstRank(WithLedger):
    """Takes the first rank's answer about a disk op for all."""

    class ledger(OpLedger):
        def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
            record = self._records[result.op_id]
            if not record.op.touches_device:
                record.pending_ranks = {rank}
            return super().answer(rank, result)


class ForgetsFailedPositions(WithLedger):
    """Remembers only what the last rank said of a disk op's blocks."""

    class ledger(OpLedger):
        def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
            if not self._records[result.op_id].op.touches_device:
                self._records[result.op_id].failed.clear()
            return super().answer(rank, result)


class NeverPins(BlockPool):
    """Lets blocks of disk be overwritten while they are read."""

    def pin(self, keys: Sequence[BlockHash]) -> list[BlockId]:
        return [self._ready[key] for key in keys]

    def unpin(self, ids: Iterable[BlockId]) -> None:
        pass


class TrustsAnyHeader(DiskIndex):
    """Goes on with blocks that were not to outlive their process."""

    def begin_anew(self, generation: bytes, *, persists: bool) -> None:
        super().begin_anew(generation, persists=True)


class ForgetsToResetDisk(Worker):
    """Does not void the disk when weights change."""

    def begin(self, plan: StepPlan) -> None:
        reset = plan.disk_reset
        is_kept = reset is not None and reset.persists
        super().begin(msgspec.structs.replace(plan, disk_reset=reset if is_kept else None))


def trusts_the_first_rank(
    inventories: Sequence[DiskInventory], num_blocks: int
) -> list[tuple[BlockHash, BlockId]] | None:
    """Restores what one rank has."""
    return agreed_blocks(inventories[:1], num_blocks)
