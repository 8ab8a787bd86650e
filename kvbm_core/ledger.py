"""Which ops are in flight, on which ranks, over which device blocks.

Lives here: op numbers, outstanding ranks, the map from device blocks to the op that uses them.
Does not live here: what ending an op means (see `kvbm_core.leader`).
Invariant: every op gets exactly one terminal verdict: when the last rank has answered, failed
if any rank failed. Answers of unknown ops or ranks change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbm_core.types import BlockHash, BlockId, Blocks, OpId, OpResult, RequestId, Tier, TransferOp


@dataclass
class OpRecord:
    """One op in flight. doomed: an offload whose bytes must not be kept even if it succeeds."""

    op: TransferOp
    keys: Sequence[BlockHash]
    host_ids: Sequence[BlockId]
    device_ids: Sequence[BlockId]
    pending_ranks: set[int]
    error: str = ""
    doomed: bool = False


class OpLedger:
    """Ops in flight of one leader over `num_ranks` ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._next_op_id: OpId = 1
        self._records: dict[OpId, OpRecord] = {}
        self._op_of_device_block: dict[BlockId, OpId] = {}

    def __len__(self) -> int:
        return len(self._records)

    def records(self) -> list[OpRecord]:
        return list(self._records.values())

    def open_onboard(
        self,
        request_ids: tuple[RequestId, ...],
        keys: Sequence[BlockHash],
        host_ids: Sequence[BlockId],
        device_ids: Sequence[BlockId],
    ) -> TransferOp:
        """Number and record an op from host to device."""
        src, dst = Blocks.of(Tier.HOST, host_ids), Blocks.of(Tier.DEVICE, device_ids)
        return self._open(request_ids, src, dst, keys, host_ids, device_ids)

    def open_offload(
        self,
        request_ids: tuple[RequestId, ...],
        keys: Sequence[BlockHash],
        host_ids: Sequence[BlockId],
        device_ids: Sequence[BlockId],
    ) -> TransferOp:
        """Number and record an op from device to host."""
        src, dst = Blocks.of(Tier.DEVICE, device_ids), Blocks.of(Tier.HOST, host_ids)
        return self._open(request_ids, src, dst, keys, host_ids, device_ids)

    def ops_on(self, device_ids: Iterable[BlockId]) -> set[OpId]:
        """Ops in flight that read or write any of these device blocks."""
        if not self._op_of_device_block:
            return set()
        of = self._op_of_device_block
        return {of[block_id] for block_id in device_ids if block_id in of}

    def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
        """Take one rank's result; the op's record, and whether that ended the op.

        Raises KeyError where that rank owes no answer for that op.
        """
        record = self._records[result.op_id]
        record.pending_ranks.remove(rank)
        if not result.ok and not record.error:
            record.error = f"rank {rank}: {result.error}"
        has_ended = not record.pending_ranks
        if has_ended:
            self._close(record)
        return record, has_ended

    def _open(
        self,
        request_ids: tuple[RequestId, ...],
        src: Blocks,
        dst: Blocks,
        keys: Sequence[BlockHash],
        host_ids: Sequence[BlockId],
        device_ids: Sequence[BlockId],
    ) -> TransferOp:
        op = TransferOp(self._next_op_id, request_ids, src, dst)
        self._next_op_id += 1
        ranks = set(range(self._num_ranks))
        self._records[op.op_id] = OpRecord(op, keys, host_ids, device_ids, ranks)
        self._op_of_device_block.update(dict.fromkeys(device_ids, op.op_id))
        return op

    def _close(self, record: OpRecord) -> None:
        op_id = record.op.op_id
        del self._records[op_id]
        for block_id in record.device_ids:
            if self._op_of_device_block.get(block_id) == op_id:
                del self._op_of_device_block[block_id]
