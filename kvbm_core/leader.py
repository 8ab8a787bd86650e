"""The leader: what of a request is cached, what to load, what to keep, what must wait.

    match → allocated → plan_step → (worker) → apply → … → finish

Lives here: the decisions of one engine between device and host. Does not live here: the tier below
host (see `kvbm_core.cascade`), engine types, bytes, clocks, threads.
Invariant: single-threaded; eviction happens only in `plan_step`, `finish` and `apply`; a hash is
READY only after every rank has its bytes; no device block is reused under an op (the engine
holds it, or a fence precedes its reuse); when idle, nothing is pinned and no slot is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from kvbm_core.admission import OffloadFilter
from kvbm_core.cascade import Cascade, DiskTier
from kvbm_core.errors import IllegalTransition
from kvbm_core.ledger import OpLedger, OpRecord, count_end
from kvbm_core.metrics import Counters, RouteCounters
from kvbm_core.offload import OffloadBatch, Offloads
from kvbm_core.pool import BlockPool
from kvbm_core.slot import NEVER, Slot, SlotEvent, SlotState
from kvbm_core.types import BlockHash, BlockId, OpId, OpResult, RequestId, Tier, TransferOp
from kvbm_core.wire import StepPlan, WorkerReport

logger = logging.getLogger(__name__)


class Leader:
    """Decides for one engine with `num_ranks` ranks; `block_size` is in tokens.

    engine_holds_blocks: a finished request and its device blocks stay until it is reported drained;
    else both are gone at once, and fences alone keep blocks from being rewritten under an op.
    engine_shares_blocks: what one request loaded, the next finds on the device.
    disk: a tier below the host tier `pool`. offload_filter: what may leave the device; None: all.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        num_ranks: int,
        disk: DiskTier | None = None,
        offload_filter: OffloadFilter | None = None,
        offload_generated_blocks: bool = True,
        engine_holds_blocks: bool = True,
        engine_shares_blocks: bool = True,
    ) -> None:
        self.counters = Counters()
        self.num_ranks = num_ranks
        self._pool = pool
        self._block_size = block_size
        self._engine_holds_blocks = engine_holds_blocks
        self._engine_shares_blocks = engine_shares_blocks
        self._ledger = OpLedger(num_ranks)
        self._cascade: Cascade | None = None
        if disk is not None:
            self._cascade = Cascade(pool, disk, self._ledger, self.counters, block_size)
        self._offloads = Offloads(
            pool,
            self._cascade,
            self._ledger,
            self.counters,
            block_size=block_size,
            with_generated_blocks=offload_generated_blocks,
            offload_filter=offload_filter,
        )
        self._num_step_tokens = 0
        self._slots: dict[RequestId, Slot] = {}
        self._loading: dict[BlockHash, OpId] = {}
        self._queued_ops: list[TransferOp] = []
        self._queued_fences: set[OpId] = set()
        self._queued_drains: list[RequestId] = []
        self._lost_ranks: set[int] = set()

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def cascade(self) -> Cascade | None:
        """What lies below host; None without a disk tier."""
        return self._cascade

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_ops_in_flight(self) -> int:
        return len(self._ledger)

    def has_work(self) -> bool:
        """Whether the engine must keep stepping for ops to be sent or to end."""
        cascade = self._cascade
        if cascade is None:
            return bool(self._ledger or self._queued_drains)
        num_expected_ops = len(self._ledger) - cascade.num_overdue_ops
        return bool(num_expected_ops or self._queued_drains or cascade.has_work)

    def has_slot(self, request_id: RequestId) -> bool:
        return request_id in self._slots

    def create_slot(
        self,
        request_id: RequestId,
        keys: Sequence[BlockHash],
        num_prompt_tokens: int,
        priorities: Sequence[int] = (),
    ) -> None:
        """Begin to follow a request. `keys` stays the caller's and grows with the request.

        priorities: of its blocks, for the offload filter; the last one counts for all that follow.
        Raises IllegalTransition for a request that is already followed.
        """
        if request_id in self._slots:
            raise IllegalTransition(f"request {request_id} has a slot already")
        slot = Slot(request_id, keys, num_prompt_tokens, priorities=priorities)
        self._slots[request_id] = slot

    def match(
        self, request_id: RequestId, num_device_tokens: int, *, may_read: bool = True
    ) -> int | None:
        """Tokens beyond the engine's own `num_device_tokens` that can be loaded now.

        A multiple of the block size, up to all complete blocks of the request. None: not yet,
        another request is bringing the first of these blocks to the device, or blocks come up from
        disk; ask again. Pins nothing and may be repeated. A running request that is matched again
        was preempted. may_read: whether the request may use what is cached; else 0.
        """
        slot = self._slots[request_id]
        if slot.state is SlotState.RUNNING:
            slot.move(SlotEvent.PREEMPTED)
            slot.promotion = None
        slot.num_device_tokens = num_device_tokens
        if not may_read:
            return 0
        start = num_device_tokens // self._block_size
        if self._is_on_its_way(slot, start):
            return None
        num_blocks = self._pool.match(slot.keys, start)
        if self._cascade is not None and self._cascade.awaits(slot, start + num_blocks):
            return None
        return num_blocks * self._block_size

    def ignore(self, request_id: RequestId) -> None:
        """Cache nothing of a request any more: its keys can't be had."""
        slot = self._slots[request_id]
        slot.keys, slot.num_planned_blocks, slot.next_offload_tokens = (), 0, NEVER

    def allocated(
        self,
        request_id: RequestId,
        num_external_tokens: int,
        device_ids: Sequence[BlockId],
    ) -> None:
        """The engine holds `device_ids` (all blocks of the request) and will load this many tokens.

        Raises IllegalTransition where these were not offered; then no load was started.
        """
        slot = self._slots[request_id]
        is_admission = slot.state is SlotState.WAITING
        start = slot.num_device_tokens // self._block_size
        if is_admission:
            # A load may write these, ours or another connector's, with no step in between.
            self._queued_fences |= self._ledger.ops_on(device_ids[start:])
        if num_external_tokens:
            self._start_load(slot, num_external_tokens, device_ids)
        else:
            slot.move(SlotEvent.ADMITTED)
        if is_admission and self._cascade is not None:
            self._cascade.used(slot.keys[start : start + num_external_tokens // self._block_size])
        if is_admission:
            slot.num_written_tokens = 0
            slot.num_cached_tokens = slot.num_device_tokens + num_external_tokens
            self.counters.num_queried_blocks += max(0, len(slot.keys) - start)
            self.counters.num_matched_blocks += num_external_tokens // self._block_size
            slot.num_planned_blocks = 0
            slot.next_offload_tokens = self._block_size

    def plan_step(
        self,
        progress: Iterable[tuple[RequestId, int]],
        device_table: Callable[[RequestId], Sequence[BlockId]],
        *,
        reissued: Iterable[BlockId] = (),
        idle: bool = False,
        now_seconds: float = 0.0,
    ) -> StepPlan:
        """The plan of one engine step: `note_progress`, then `take_plan`."""
        self.note_progress(progress, device_table, reissued)
        return self.take_plan(idle=idle, now_seconds=now_seconds)

    def note_progress(
        self,
        progress: Iterable[tuple[RequestId, int]],
        device_table: Callable[[RequestId], Sequence[BlockId]],
        reissued: Iterable[BlockId] = (),
    ) -> None:
        """Queue offloads of blocks that this step completes, and fences for blocks it rewrites.

        progress: for each scheduled request, the tokens whose KV exists once this step's forward
        is done. device_table: all device blocks of a scheduled request, asked only where a block
        became complete. reissued: device blocks that this step's forward writes for the first
        time.
        """
        self._queued_fences |= self._ledger.ops_on(reissued)
        slots, batch = self._slots, OffloadBatch()
        offloads = self._offloads
        for request_id, num_tokens in progress:
            slot = slots.get(request_id)
            if slot is None:
                continue
            known = max(slot.num_written_tokens, slot.num_cached_tokens)
            self._num_step_tokens += max(0, num_tokens - known)
            slot.num_written_tokens = num_tokens
            if num_tokens >= slot.next_offload_tokens and not self._lost_ranks:
                offloads.plan(slot, num_tokens, device_table, batch)
        self._queued_ops += offloads.open(batch)

    def take_plan(self, *, idle: bool = False, now_seconds: float = 0.0) -> StepPlan:
        """All that was queued since the last plan. idle: the step has no forward. now_seconds: of a
        clock that never goes back; needed where there is a disk tier."""
        disk_reset = None
        if self._cascade is not None:
            self._cascade.tick(self._num_step_tokens, now_seconds)
            disk_reset = self._cascade.take_reset()
            self._queued_ops += self._cascade.take_ops()
        self._num_step_tokens = 0
        plan = StepPlan(
            ops=tuple(self._queued_ops),
            fences=tuple(sorted(self._queued_fences)),
            drain=tuple(self._queued_drains),
            idle=idle and bool(self._ledger),
            disk_reset=disk_reset,
        )
        self.counters.num_fences += len(plan.fences)
        self._queued_ops.clear()
        self._queued_fences.clear()
        self._queued_drains.clear()
        return plan

    def finish(
        self, request_id: RequestId, num_computed_tokens: int, device_ids: Sequence[BlockId]
    ) -> bool:
        """The engine is done with a request, for whatever reason; complete blocks are kept.

        True: offloads still read its device blocks; the workers report it drained when the
        engine may free them. False: nothing reads them, or a load still writes them, of whose
        end the engine is told anyway. Unknown requests are none of ours: False.
        """
        slot = self._slots.get(request_id)
        if slot is None or slot.state is SlotState.DRAINING:
            return False
        is_loading = slot.state is SlotState.LOADING
        num_tokens = min(num_computed_tokens, slot.num_written_tokens)
        is_running = slot.state is SlotState.RUNNING and not self._lost_ranks
        if is_running and num_tokens >= slot.next_offload_tokens:
            batch = OffloadBatch()
            self._offloads.plan(slot, num_tokens, lambda _: device_ids, batch)
            self._queued_ops += self._offloads.open(batch)
        if not is_loading:
            self._pool.touch(slot.keys[: slot.num_planned_blocks])
        if self._cascade is not None:
            self._cascade.forget(slot, is_last=len(self._slots) == 1)
        slot.move(SlotEvent.FINISHED_BUSY if slot.op_ids else SlotEvent.FINISHED_IDLE)
        if slot.state is SlotState.FINISHED or not self._engine_holds_blocks:
            # An engine that forgets the request may give its name to another one at once.
            del self._slots[request_id]
            return False
        if is_loading:
            return False
        self._queued_drains.append(request_id)
        return True

    def apply(self, report: WorkerReport) -> None:
        """Take one rank's results; end the ops that thereby have all their answers."""
        for result in report.results:
            try:
                record, has_ended = self._ledger.answer(report.rank, result)
            except KeyError:
                self.counters.num_bad_reports += 1
                logger.warning("rank %d answered op %d, which owes none", report.rank, result.op_id)
                continue
            route = self.counters.routes[record.op.route]
            route.num_bytes += result.num_bytes
            route.seconds += result.seconds
            if has_ended:
                self._end(record, route)

    def lose_rank(self, rank: int) -> None:
        """A rank is gone and its memory with it: fail what it owed, forget what it held.

        Ops that no rank was sent yet are failed on all of them. Until `regain_rank` nothing is
        stored, so nothing matches; device blocks that the rank may still use stay fenced.
        """
        if rank in self._lost_ranks:
            return
        self._lost_ranks.add(rank)
        self.reset()
        unsent = {op.op_id for op in self._queued_ops}
        self._queued_ops.clear()
        for record in self._ledger.records():
            is_unsent = record.op.op_id in unsent
            if rank in record.pending_ranks and not is_unsent:
                self._ledger.abandon(record)
            result = OpResult(record.op.op_id, 0, 0.0, "rank lost")
            for owing in sorted(record.pending_ranks):
                if is_unsent or owing == rank:
                    self.apply(WorkerReport(owing, (result,)))

    def regain_rank(self, rank: int) -> None:
        """A lost rank is back, with empty memory; once all are, caching begins anew.

        What running requests computed is not stored: its device memory may be empty too.
        """
        self._lost_ranks.discard(rank)
        if not self._lost_ranks:
            self.reset()
            self._queued_fences |= self._ledger.take_abandoned()

    def reset(self) -> None:
        """Forget every cached block, and what running requests computed so far."""
        self.counters.num_dropped_blocks += self._pool.drop(self._pool.ready_keys())
        if self._cascade is not None:
            self._cascade.reset()
        for record in self._ledger.records():
            if record.op.src.tier is Tier.DEVICE and not record.doomed:
                record.doomed = True
                self._pool.orphan(record.keys)
        for slot in self._slots.values():
            slot.next_offload_tokens = NEVER
            slot.stored.clear()
            slot.promotion = None

    def _is_on_its_way(self, slot: Slot, block: int) -> bool:
        """Whether waiting for another request's load brings this block to the device."""
        return (
            self._engine_shares_blocks
            and block < len(slot.keys)
            and slot.keys[block] in self._loading
        )

    def _start_load(
        self, slot: Slot, num_external_tokens: int, device_ids: Sequence[BlockId]
    ) -> None:
        start = slot.num_device_tokens // self._block_size
        end = start + num_external_tokens // self._block_size
        keys = slot.keys[start:end]
        if (
            num_external_tokens % self._block_size
            or len(device_ids) < end
            or len(keys) < end - start
        ):
            raise IllegalTransition(
                f"request {slot.request_id} wants {num_external_tokens} tokens from block {start} "
                f"loaded into {len(device_ids)} device blocks of {self._block_size} tokens"
            )
        targets = device_ids[start:end]
        host_ids = self._pool.pin(keys)
        self._pool.touch(keys)
        try:
            slot.move(SlotEvent.LOAD_STARTED)
        except IllegalTransition:
            self._pool.unpin(host_ids)
            raise
        route = self._pool.tier, Tier.DEVICE
        op = self._ledger.open(route, keys, host_ids, targets, (slot.request_id,))
        self._loading.update(dict.fromkeys(keys, op.op_id))
        slot.op_ids.add(op.op_id)
        slot.stored.update(keys)
        self._queued_ops.append(op)

    def _end(self, record: OpRecord, route: RouteCounters) -> None:
        count_end(record, route)
        if not record.op.touches_device:
            assert self._cascade is not None
            self._cascade.end(record)
        elif record.op.is_onboard:
            self._end_load(record)
        elif record.doomed:
            self._pool.free_unkeyed(record.dst_ids)
        elif record.error:
            self._pool.abort(record.keys)
        else:
            self._pool.commit(record.keys)
            if self._cascade is not None:
                self._cascade.stored(record.keys)
        for slot in self._slots_of(record):
            slot.op_ids.remove(record.op.op_id)
            if slot.state is SlotState.DRAINING and not slot.op_ids:
                slot.move(SlotEvent.DRAINED)
                del self._slots[slot.request_id]

    def _end_load(self, record: OpRecord) -> None:
        self._pool.unpin(record.src_ids)
        for key in record.keys:
            if self._loading.get(key) == record.op.op_id:
                del self._loading[key]
        if record.error:
            self.counters.num_dropped_blocks += self._pool.drop(record.keys)
        for slot in self._slots_of(record):
            slot.move(SlotEvent.LOAD_ENDED)

    def _slots_of(self, record: OpRecord) -> list[Slot]:
        """Slots that still wait for the op; a namesake of a forgotten request does not."""
        found = [self._slots.get(request_id) for request_id in record.op.request_ids]
        return [slot for slot in found if slot is not None and record.op.op_id in slot.op_ids]
