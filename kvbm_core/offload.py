"""Which device blocks go down to host, and into which host blocks.

Lives here: what of a request is complete, worth keeping and not there yet. Does not live here: when
a step is planned, how an op ends (see `kvbm_core.leader`).
Invariant: what is kept of a request is a leading part of it, since blocks beyond a gap could never
be matched; a request never evicts its own prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbm_core.admission import OffloadFilter
from kvbm_core.cascade import Cascade
from kvbm_core.ledger import OpLedger
from kvbm_core.metrics import Counters
from kvbm_core.pool import BlockPool
from kvbm_core.slot import NEVER, Slot
from kvbm_core.types import BlockHash, BlockId, RequestId, Tier, TransferOp


@dataclass
class OffloadBatch:
    """Blocks that requests completed in one step, with host blocks reserved for them."""

    slots: list[Slot] = field(default_factory=list)
    keys: list[BlockHash] = field(default_factory=list)
    host_ids: list[BlockId] = field(default_factory=list)
    device_ids: list[BlockId] = field(default_factory=list)


class Offloads:
    """Plans offloads for one leader, whose ledger, counters and cascade it shares.

    block_size: tokens. with_generated_blocks: not those of the prompt only. offload_filter: what
    may leave the device; None: everything.
    """

    def __init__(
        self,
        pool: BlockPool,
        cascade: Cascade | None,
        ledger: OpLedger,
        counters: Counters,
        *,
        block_size: int,
        with_generated_blocks: bool,
        offload_filter: OffloadFilter | None,
    ) -> None:
        self._pool = pool
        self._cascade = cascade
        self._ledger = ledger
        self._counters = counters
        self._block_size = block_size
        self._with_generated_blocks = with_generated_blocks
        self._filter = offload_filter

    def plan(
        self,
        slot: Slot,
        num_tokens: int,
        device_table: Callable[[RequestId], Sequence[BlockId]],
        batch: OffloadBatch,
    ) -> None:
        """Add to the batch what the request's first `num_tokens` complete."""
        start = slot.num_planned_blocks
        end = min(num_tokens // self._block_size, len(slot.keys), self._last_block(slot))
        if end <= start or (self._cascade is not None and self._cascade.is_choked):
            return
        end = self._filtered(slot, start, end)
        keys = slot.keys[start:end]
        missing = self._pool.missing(keys)
        slot.stored.update(keys)
        slot.num_planned_blocks = end
        if missing:
            table = device_table(slot.request_id)
            blocks = [start + i for i in missing]
            self._reserve(slot, blocks, [table[i] for i in blocks], batch)

    def open(self, batch: OffloadBatch) -> list[TransferOp]:
        """One op for a step's offloads: an op costs more than a block of it."""
        if not batch.slots:
            return []
        request_ids = tuple([slot.request_id for slot in batch.slots])
        route = Tier.DEVICE, self._pool.tier
        op = self._ledger.open(route, batch.keys, batch.device_ids, batch.host_ids, request_ids)
        for slot in batch.slots:
            slot.op_ids.add(op.op_id)
        return [op]

    def _filtered(self, slot: Slot, start: int, end: int) -> int:
        """Where the part of the request ends that may be offloaded; sets when to look again."""
        num_blocks = end - start
        if self._filter is not None:
            num_blocks = self._filter.num_admitted(slot.priorities, start, end)
            self._counters.num_filtered_blocks += end - start - num_blocks
        is_last = num_blocks < end - start or end == self._last_block(slot)
        slot.next_offload_tokens = NEVER if is_last else (end + 1) * self._block_size
        return start + num_blocks

    def _reserve(
        self, slot: Slot, blocks: list[int], sources: list[BlockId], batch: OffloadBatch
    ) -> None:
        """Reserve host blocks for these of the request. What does not fit is asked for again where
        writes to disk make room, else it ends the request's offloads."""
        keys = [slot.keys[i] for i in blocks]
        host_ids, evicted = self._pool.reserve(keys, self._kept_for(slot))
        self._counters.num_evicted_blocks += len(evicted)
        if num_refused := len(keys) - len(host_ids):
            if self._cascade is not None and self._cascade.choke():
                slot.num_planned_blocks = blocks[len(host_ids)]
                slot.next_offload_tokens = (slot.num_planned_blocks + 1) * self._block_size
            else:
                self._counters.num_refused_blocks += num_refused
                slot.next_offload_tokens = NEVER
        if host_ids:
            batch.slots.append(slot)
            batch.keys += keys[: len(host_ids)]
            batch.host_ids += host_ids
            batch.device_ids += sources[: len(host_ids)]

    def _kept_for(self, slot: Slot) -> Callable[[BlockHash], bool]:
        """What may not be evicted for a request: its own prefix, unless it is on disk as well."""
        cascade, stored = self._cascade, slot.stored
        if cascade is None:
            return stored.__contains__
        on_disk = cascade.disk.is_ready
        return lambda key: (key in stored and not on_disk(key)) or cascade.must_stay(key)

    def _last_block(self, slot: Slot) -> int:
        if self._with_generated_blocks:
            return NEVER
        return slot.num_prompt_tokens // self._block_size
