"""One rank's worker: executes plans with a transfer engine and reports what ended.

    begin → submit_onboards → submit_offloads → poll → take_…

Lives here: the order of a step's effects, and which requests they concern.
Does not live here: decisions, copies, engine types.
Invariant: every op of a plan is reported exactly once; an onboard that failed names its device
blocks no later than it is reported as received; a drained request has no offload in flight here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from kvbm_core.storage.disk import DiskStore
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import BlockId, OpId, OpResult, RequestId, Tier, TransferOp
from kvbm_core.wire import DiskReset, StepPlan, WorkerReport

IDLE_WAIT_SECONDS = 0.002


class Worker:
    """Used by one thread. Owns the transfer engine; `on_close` frees the memory under it."""

    def __init__(
        self,
        rank: int,
        transfer: TransferEngine,
        on_close: Callable[[], None] = lambda: None,
        disk: DiskStore | None = None,
    ) -> None:
        self.rank = rank
        self._transfer = transfer
        self._on_close = on_close
        self._disk = disk
        self._is_idle_step = False
        self._onboards: list[TransferOp] = []
        self._offloads: list[TransferOp] = []
        self._in_flight: dict[OpId, TransferOp] = {}
        self._num_offloads: Counter[RequestId] = Counter()
        self._draining: set[RequestId] = set()
        self._received: set[RequestId] = set()
        self._load_errors: set[BlockId] = set()
        self._results: list[OpResult] = []
        self._void_promotions: dict[OpId, set[BlockId]] = {}

    @property
    def num_ops_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def disk(self) -> DiskStore | None:
        """This rank's disk tier."""
        return self._disk

    def begin(self, plan: StepPlan) -> None:
        """Take a step's plan, and wait for its fences: call before the forward writes blocks.

        Offloads count from here on: an engine may ask who is drained before it lets them be
        submitted (vLLM with speculative decoding does), and may submit them in the next step. One
        that is fenced in its own plan is of a request that finished: an earlier forward wrote its
        source, this one overwrites it.
        """
        self.submit_offloads()
        self._is_idle_step = plan.idle
        if plan.disk_reset is not None:
            self._begin_disk_anew(plan.disk_reset)
        for op in plan.ops:
            self._in_flight[op.op_id] = op
            if op.src.tier is Tier.DEVICE:
                self._num_offloads.update(op.request_ids)
            if self._void_promotions and self._meets_void_promotion(op):
                self._refuse(op, "an op from before a reset still writes its blocks")
            elif not op.touches_device or (op.op_id in plan.fences and not op.is_onboard):
                self._transfer.submit(op)
            else:
                (self._onboards if op.is_onboard else self._offloads).append(op)
        self._draining.update(plan.drain)
        if plan.fences:
            self._transfer.wait(plan.fences)

    def submit_onboards(self) -> None:
        """Submit what writes blocks that no forward uses yet."""
        for op in self._onboards:
            self._transfer.submit(op)
        self._onboards.clear()

    def submit_offloads(self) -> None:
        """Submit what reads the forward's blocks: call after it was launched."""
        for op in self._offloads:
            self._transfer.submit(op)
        self._offloads.clear()

    def refuse_offloads(self, why: str) -> None:
        """Answer offloads that were not submitted as failed: no forward has written their blocks.
        For engines that go on after a forward has failed."""
        for op in self._offloads:
            self._refuse(op, why)
        self._offloads.clear()

    def wait_onboards(self) -> None:
        """Return when every load that was submitted has ended, well or not."""
        self._transfer.wait([op.op_id for op in self._in_flight.values() if op.is_onboard])

    def wait_offloads(self) -> None:
        """Return when nothing that was submitted reads device blocks any more."""
        waiting = [op for op in self._in_flight.values() if op.src.tier is Tier.DEVICE]
        self._transfer.wait([op.op_id for op in waiting])

    def poll(self) -> None:
        """Collect ops that ended; in a step without a forward, wait a moment for one."""
        if not self._in_flight:
            return
        if self._is_idle_step:
            self._transfer.wait_any(IDLE_WAIT_SECONDS)
        for result in self._transfer.poll():
            self._end(self._in_flight.pop(result.op_id), result)
            self._results.append(result)

    def take_received(self) -> set[RequestId]:
        """Requests whose load ended, well or not, since the last call."""
        received, self._received = self._received, set()
        return received

    def take_drained(self) -> set[RequestId]:
        """Requests the leader wants drained that have no offload left, since the last call."""
        drained = {request for request in self._draining if request not in self._num_offloads}
        self._draining -= drained
        return drained

    def take_load_errors(self) -> set[BlockId]:
        """Device blocks that a failed load left without content, since the last call."""
        errors, self._load_errors = self._load_errors, set()
        return errors

    def take_report(self) -> WorkerReport | None:
        """Results since the last call; None without any."""
        if not self._results:
            return None
        report = WorkerReport(self.rank, tuple(self._results))
        self._results.clear()
        return report

    def fail_load(self, request_id: RequestId, device_ids: Collection[BlockId]) -> None:
        """Report a load that the engine waits for and no op will do."""
        self._received.add(request_id)
        self._load_errors.update(device_ids)

    def close(self) -> None:
        """End copies in flight, then free the memory under them."""
        self._transfer.close()
        self._on_close()

    def _begin_disk_anew(self, reset: DiskReset) -> None:
        if self._disk is not None:
            self._disk.begin_anew(reset)
        promotions = [op for op in self._in_flight.values() if op.src.tier is Tier.DISK]
        self._void_promotions = {op.op_id: set(op.dst.ids()) for op in promotions}

    def _meets_void_promotion(self, op: TransferOp) -> bool:
        """Whether an op from before a reset still writes host blocks of this one. A leader that
        had lost this rank knows nothing of that op any more."""
        ends = [end for end in (op.src, op.dst) if end.tier is Tier.HOST]
        host_ids = {block_id for end in ends for block_id in end.ids()}
        return any(not host_ids.isdisjoint(ids) for ids in self._void_promotions.values())

    def _refuse(self, op: TransferOp, why: str) -> None:
        result = OpResult(op.op_id, 0, 0.0, why)
        self._end(self._in_flight.pop(op.op_id), result)
        self._results.append(result)

    def _end(self, op: TransferOp, result: OpResult) -> None:
        self._void_promotions.pop(op.op_id, None)
        if op.is_onboard:
            self._received.update(op.request_ids)
            if not result.ok:
                self._load_errors.update(op.dst.ids())
        for request_id in op.request_ids if op.src.tier is Tier.DEVICE else ():
            self._num_offloads[request_id] -= 1
            if not self._num_offloads[request_id]:
                del self._num_offloads[request_id]
