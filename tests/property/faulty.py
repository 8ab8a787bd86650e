"""Parts with one fault each, to show that the checks would notice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from kvbm_core.leader import Leader
from kvbm_core.ledger import OpLedger, OpRecord
from kvbm_core.pool import BlockPool
from kvbm_core.slot import Slot
from kvbm_core.types import BlockHash, BlockId, OpId, OpResult, RequestId
from kvbm_core.wire import StepPlan, WorkerReport
from kvbm_core.worker import Worker


class MatchesReserved(BlockPool):
    """Offers blocks whose bytes are still on their way."""

    def match(self, keys: Sequence[BlockHash], start: int) -> int:
        found = 0
        while start + found < len(keys) and keys[start + found] in self:
            found += 1
        return found

    def pin(self, keys: Sequence[BlockHash]) -> list[BlockId]:
        ids = {**self._reserved, **self._ready}
        for key in keys:
            self._pins[ids[key]] = self._pins.get(ids[key], 0) + 1
        return [ids[key] for key in keys]


class FreesPinned(BlockPool):
    """Evicts and frees blocks that somebody reads."""

    def drop(self, keys: Iterable[BlockHash]) -> int:
        pins, self._pins = self._pins, {}
        num_dropped = super().drop(keys)
        self._pins = pins
        return num_dropped

    def _evict(self, count: int, keep: Callable[[BlockHash], bool]) -> list[BlockHash]:
        if count <= 0:
            return []
        victims = self._policy.victims(count, keep)
        self.drop(victims)
        return victims


class LeaksOnAbort(BlockPool):
    """Forgets the ids of an aborted reservation."""

    def abort(self, keys: Iterable[BlockHash]) -> None:
        for key in keys:
            self._take_reserved(key)


class NeverUnpins(BlockPool):
    def unpin(self, ids: Iterable[BlockId]) -> None:
        pass


class FreesOnFirstUnpin(BlockPool):
    """Forgets that others hold the block too."""

    def unpin(self, ids: Iterable[BlockId]) -> None:
        ids = list(ids)
        self._pins.update((block_id, 1) for block_id in ids)
        super().unpin(ids)


class NeverDrops(BlockPool):
    """Keeps blocks that are known to be bad; eviction works."""

    def drop(self, keys: Iterable[BlockHash]) -> int:
        return 0

    def _evict(self, count: int, keep: Callable[[BlockHash], bool]) -> list[BlockHash]:
        victims = self._policy.victims(max(0, count), lambda k: self._ready[k] in self._pins)
        super().drop(victims)
        return victims


class GivesOutUnkeyed(BlockPool):
    """Gives ids out without a key, and again."""

    def reserve_unkeyed(self, count: int) -> tuple[list[BlockId], list[BlockHash]]:
        ids, evicted = super().reserve_unkeyed(count)
        self._free += ids
        return ids, evicted


class EvictsThenFails(BlockPool):
    """Throws blocks away for a reservation that does not happen."""

    def reserve_unkeyed(self, count: int) -> tuple[list[BlockId], list[BlockHash]]:
        if count > self.num_available:
            self._evict(count, lambda _: False)
        return super().reserve_unkeyed(count)


class KeysWhatIsThere(BlockPool):
    """Gives a key to a second block."""

    def commit_unkeyed(self, entries: Sequence[tuple[BlockHash, BlockId]]) -> None:
        self.drop(key for key, _ in entries)
        super().commit_unkeyed(entries)


class LeaksUnkeyed(BlockPool):
    """Forgets ids that never got a key."""

    def free_unkeyed(self, ids: Iterable[BlockId]) -> None:
        self._unkeyed -= set(ids)


class WithLedger(Leader):
    """A leader with another ledger."""

    ledger: type[OpLedger] = OpLedger

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ledger = self._offloads._ledger = self.ledger(self.num_ranks)
        if self._cascade is not None:
            self._cascade._ledger = self._ledger


class CommitsOnFirstRank(WithLedger):
    """Takes the first rank's answer for all."""

    class ledger(OpLedger):
        def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
            self._records[result.op_id].pending_ranks = {rank}
            return super().answer(rank, result)


class ForgetsFences(WithLedger):
    """Never says that an op uses a device block."""

    class ledger(OpLedger):
        def ops_on(self, device_ids: Iterable[BlockId]) -> set[OpId]:
            return set()


class CommitsFailures(WithLedger):
    """Takes every answer for a success."""

    class ledger(OpLedger):
        def answer(self, rank: int, result: OpResult) -> tuple[OpRecord, bool]:
            return super().answer(rank, OpResult(result.op_id, result.num_bytes, 0.0))


class FreesUnderOffloads(Leader):
    """Lets the engine free the device blocks of a finished request at once."""

    def finish(
        self, request_id: RequestId, num_computed_tokens: int, device_ids: Sequence[BlockId]
    ) -> bool:
        super().finish(request_id, num_computed_tokens, device_ids)
        return False


class ForgetsDrains(Leader):
    """Never tells the workers which requests the engine waits for."""

    def take_plan(self, *, idle: bool = False, now_seconds: float = 0.0) -> StepPlan:
        self._queued_drains.clear()
        return super().take_plan(idle=idle, now_seconds=now_seconds)


class KeepsOldWeights(Leader):
    """A reset that forgets what is on its way."""

    def reset(self) -> None:
        self._pool.drop(self._pool.ready_keys())


class KeepsBlocksOfLostRanks(Leader):
    def lose_rank(self, rank: int) -> None:
        owed = [r for r in self._ledger.records() if rank in r.pending_ranks]
        self.apply(WorkerReport(rank, tuple(OpResult(r.op.op_id, 0, 0.0, "lost") for r in owed)))


class WaitsForLostRanks(Leader):
    def lose_rank(self, rank: int) -> None:
        self.reset()


class LoadsTwice(Leader):
    """Never answers "not yet"."""

    def match(self, request_id: RequestId, num_device_tokens: int) -> int | None:
        self._loading.clear()
        return super().match(request_id, num_device_tokens)


class NeverStopsWaiting(Leader):
    """Remembers loads that ended."""

    def _end_load(self, record: OpRecord) -> None:
        loading = dict(self._loading)
        super()._end_load(record)
        self._loading = loading


class StoresTooEarly(Leader):
    """Takes a block for complete one token before it is."""

    def note_progress(self, progress: Any, *args: Any) -> None:
        ahead = [(request_id, num_tokens + 1) for request_id, num_tokens in progress]
        super().note_progress(ahead, *args)


class LoadsOneBlockLate(Leader):
    """Fills device blocks with their neighbours' contents."""

    def _start_load(self, slot: Slot, num_tokens: int, device_ids: Sequence[BlockId]) -> None:
        start = slot.num_device_tokens // self._block_size
        shifted = [*device_ids[:start], *reversed(device_ids[start:])]
        super()._start_load(slot, num_tokens, shifted)


class SkipsFences(Worker):
    """Starts the forward before the ops that it must wait for have ended."""

    def begin(self, plan: StepPlan) -> None:
        super().begin(StepPlan(ops=plan.ops, drain=plan.drain, idle=plan.idle))


class DrainsAtOnce(Worker):
    """Reports a request drained that an offload still reads."""

    def take_drained(self) -> set[RequestId]:
        drained, self._draining = self._draining, set()
        return drained


class HidesLoadErrors(Worker):
    """Reports a failed load as received and says nothing of its blocks."""

    def take_load_errors(self) -> set[BlockId]:
        super().take_load_errors()
        return set()


class SubmitsFencedLate(Worker):
    """Submits an offload after the forward that its own plan fences."""

    def begin(self, plan: StepPlan) -> None:
        own = {op.op_id for op in plan.ops}
        fences = tuple(op_id for op_id in plan.fences if op_id not in own)
        super().begin(msgspec.structs.replace(plan, fences=fences))


class ReportsEarly(Worker):
    """Reports a load received when it was submitted."""

    def submit_onboards(self) -> None:
        self._received.update(name for op in self._onboards for name in op.request_ids)
        super().submit_onboards()


class ReportsTwice(Worker):
    def take_report(self) -> WorkerReport | None:
        report = super().take_report()
        return report and WorkerReport(report.rank, report.results * 2)


class LosesReports(Worker):
    """Drops every second result."""

    def take_report(self) -> WorkerReport | None:
        report = super().take_report()
        return report and WorkerReport(report.rank, _every_second(report.results))


def _every_second(results: Collection[OpResult]) -> tuple[OpResult, ...]:
    return tuple(result for result in results if result.op_id % 2)
