"""Which ops are in flight, on which ranks, over which device blocks.

Lives here: op numbers, outstanding ranks, the map from device blocks to the op that uses them.
Does not live here: what ending an op means (see `kvbm_core.leader`).
Invariant: every op gets exactly one terminal verdict: when the last rank has answered, failed
if any rank failed. Answers of unknown ops or ranks change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbm_core.metrics import RouteCounters
from kvbm_core.types import (
    BlockHash,
    BlockId,
    Blocks,
    OpId,
    OpResult,
    RequestId,
    Tier,
    TransferOp,
    unpack_ids,
)

logger = logging.getLogger(__name__)


@dataclass
class OpRecord:
    """One op in flight. doomed: its bytes must not be kept even if it succeeds.

    failed: positions that failed on some rank; meaningless without an error.
    """

    op: TransferOp
    keys: Sequence[BlockHash]
    src_ids: Sequence[BlockId]
    dst_ids: Sequence[BlockId]
    pending_ranks: set[int]
    error: str = ""
    failed: set[int] = field(default_factory=set)
    doomed: bool = False

    def split(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Keys whose blocks every rank has, and the others."""
        good = [key for i, key in enumerate(self.keys) if i not in self.failed]
        return good, [self.keys[i] for i in sorted(self.failed)]


class OpLedger:
    """Ops in flight of one leader over `num_ranks` ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._next_op_id: OpId = 1
        self._records: dict[OpId, OpRecord] = {}
        self._op_of_device_block: dict[BlockId, OpId] = {}
        self._abandoned_op_of_device_block: dict[BlockId, OpId] = {}

    def __len__(self) -> int:
        return len(self._records)

    def records(self) -> list[OpRecord]:
        return list(self._records.values())

    def open(
        self,
        route: tuple[Tier, Tier],
        keys: Sequence[BlockHash],
        src_ids: Sequence[BlockId],
        dst_ids: Sequence[BlockId],
        request_ids: tuple[RequestId, ...] = (),
    ) -> TransferOp:
        """Number and record an op along a route (source tier, destination tier)."""
        src, dst = Blocks.of(route[0], src_ids), Blocks.of(route[1], dst_ids)
        packed_keys = b"".join(keys) if Tier.DISK in route else b""
        op = TransferOp(self._next_op_id, request_ids, src, dst, packed_keys)
        self._next_op_id += 1
        ranks = set(range(self._num_ranks))
        self._records[op.op_id] = OpRecord(op, keys, src_ids, dst_ids, ranks)
        device_ids = _device_ids(route, src_ids, dst_ids)
        self._op_of_device_block.update(dict.fromkeys(device_ids, op.op_id))
        return op

    def ops_on(self, device_ids: Iterable[BlockId]) -> set[OpId]:
        """Ops, in flight or abandoned, that read or write any of these device blocks."""
        found: set[OpId] = set()
        for of in (self._op_of_device_block, self._abandoned_op_of_device_block):
            if of:
                found |= {of[block_id] for block_id in device_ids if block_id in of}
        return found

    def abandon(self, record: OpRecord) -> None:
        """A rank that can't be asked may still do the op: whatever its verdict, fence its device
        blocks until `take_abandoned`."""
        route = record.op.src.tier, record.op.dst.tier
        device_ids = _device_ids(route, record.src_ids, record.dst_ids)
        self._abandoned_op_of_device_block.update(dict.fromkeys(device_ids, record.op.op_id))

    def take_abandoned(self) -> set[OpId]:
        """All of them, to be fenced one last time."""
        op_ids = set(self._abandoned_op_of_device_block.values())
        self._abandoned_op_of_device_block.clear()
        return op_ids

    def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
        """Take one rank's result; the op's record, and whether that ended the op.

        Raises KeyError where that rank owes no answer for that op.
        """
        record = self._records[result.op_id]
        record.pending_ranks.remove(rank)
        if not result.ok:
            record.error = record.error or f"rank {rank}: {result.error}"
            # A request takes all of what it loads, or is told that all of it failed.
            everything = range(len(record.keys))
            failed = unpack_ids(result.failed)
            is_partial = failed and max(failed) in everything and not record.op.touches_device
            record.failed.update(failed if is_partial else everything)
        has_ended = not record.pending_ranks
        if has_ended:
            self._close(record)
        return record, has_ended

    def _close(self, record: OpRecord) -> None:
        op_id = record.op.op_id
        del self._records[op_id]
        route = record.op.src.tier, record.op.dst.tier
        for block_id in _device_ids(route, record.src_ids, record.dst_ids):
            if self._op_of_device_block.get(block_id) == op_id:
                del self._op_of_device_block[block_id]


def _device_ids(
    route: tuple[Tier, Tier], src_ids: Sequence[BlockId], dst_ids: Sequence[BlockId]
) -> Sequence[BlockId]:
    if Tier.DEVICE not in route:
        return ()
    return src_ids if route[0] is Tier.DEVICE else dst_ids


def count_end(record: OpRecord, route: RouteCounters) -> None:
    """Count and log an op that has all its answers."""
    op = record.op
    route.num_ops += 1
    num_blocks = len(record.keys) - len(record.failed)
    route.num_blocks += num_blocks
    if record.error:
        route.num_failed_ops += 1
        text = "%s: op %d failed for %d of %d blocks, %s"
        logger.warning(text, op.route, op.op_id, len(record.failed), len(record.keys), record.error)
        return
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "%s: op %d moved %d blocks for %s",
            op.route,
            op.op_id,
            num_blocks,
            ", ".join(op.request_ids),
        )
