"""A simulated engine that drives a real Leader, and real Workers over a model of memory.

It schedules like vLLM: chunked prefill, one async load a request, preemption by taking device
blocks away at once, and finish that waits for what the leader and the workers say. What it
checks by itself: no forward reads anything but the right tokens, no block is written under an op,
nothing is loaded or stored twice at a time, every op ends once.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvbm_core.types import BlockId, Tier, unpack_ids
from kvbm_core.wire import decode_report, encode
from tests.property.cluster import Bundle, Step
from tests.property.plan_checks import (
    check_end,
    check_loaded,
    check_none_lost,
    check_plan,
    check_wait,
    loads_of_others,
    waiting_to_be_written,
)
from tests.property.process import Process
from tests.property.requests import BLOCK_SIZE, OpMirror, Request, blocks_for
from tests.property.setup import Setup

MAX_QUEUED_STEPS = 2
ROUND_SECONDS = 0.01
SETTLING_SECONDS = 1.0


class Engine(Process):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.num_disk_blocks and setup.num_served_tokens:
            self.submit([0] * setup.num_served_tokens, 0)
            self.settle()
            self.restart()

    # What happens from outside

    def submit(self, tokens: Iterable[int], num_generated: int) -> Request:
        request = Request(f"r{self._names}", list(tokens), num_generated)
        self._names += 1
        self.requests.append(request)
        self.leader.create_slot(request.id, request.keys, len(request.tokens))
        self._learn_keys(request)
        request.keys.is_late = self.setup.late_keys
        return request

    def abort(self, request: Request) -> None:
        self._finish(request)

    def preempt(self, request: Request) -> None:
        """Take its device blocks away at once; the leader hears of it at the next match."""
        assert request.state in ("running", "loaded")
        self._restart(request)

    def reset(self) -> None:
        """New weights: nothing computed or stored before may reach an admission after."""
        self.leader.reset()
        self.num_resets += 1
        self._start_epoch()

    def lose_rank(self, index: int) -> None:
        """A rank dies with its memory and its queue; an empty one takes its place."""
        self.step(0, 0)  # nothing is queued in the leader; see test_leader_losing_a_rank
        self.num_lost += 1
        old = self.ranks[index]
        old.transfer.kill()
        if old.disk is not None:
            old.disk.open()
        new = self.make_rank(index, old.generation + 1, old.disk)
        new.bundles = old.bundles  # what it had sent may still arrive
        self.ranks[index] = new
        self.leader.lose_rank(index)
        self.lost.add(index)
        self.abandoned |= {op_id for op_id, mirror in self.ops.items() if index in mirror.owed}
        for mirror in list(self.ops.values()):
            mirror.fail(())
            self._answered(mirror, index)
        self._start_epoch()
        for request in [*self.requests, *self.held]:
            self._excuse(request, index)

    def regain_ranks(self) -> None:
        """The leader hears that lost ranks are back; they have taken part in steps since."""
        while self.lost:
            self.leader.regain_rank(self.lost.pop())

    def restart(self) -> None:
        """kill -9: nothing is left of the process but what its ranks have on disk."""
        self.num_restarts += 1
        for rank in self.ranks:
            rank.transfer.kill()
        for nothing in (self.requests, self.held, self.ops):
            nothing.clear()
        self.lost.clear()
        self.abandoned.clear()
        self.start()

    # A step

    def step(self, chunk: int, num_admitted: int) -> None:
        """Schedule up to `chunk` tokens a request, plan, and queue the step on every rank."""
        progress: list[tuple[Request, int]] = []
        reissued: list[BlockId] = []
        before = dict(self.device.contents)  # handing blocks out forgets what they held
        if chunk:
            for request in [r for r in self.requests if r.state in ("running", "loaded")]:
                self._schedule(request, chunk, progress, reissued)
            for request in [r for r in self.requests if r.state == "waiting"][:num_admitted]:
                self._admit(request, chunk, progress, reissued)
        forward = tuple(request.write(end) for request, end in progress)
        for part in forward:
            self.device.contents.update(part.writes)
        tables = {request.id: request.table for request, _ in progress}
        waiting = waiting_to_be_written(self)
        plan = self.leader.plan_step(
            [(request.id, end) for request, end in progress],
            tables.__getitem__,
            reissued=reissued,
            idle=not progress,
            now_seconds=self.now_seconds,
        )
        self.planned_seconds = self.now_seconds
        check_none_lost(self, waiting)
        check_plan(self, plan.ops, plan.fences, before)
        self._queue(Step(encode(plan), forward))
        for request, end in progress:
            self._advance(request, end)

    def run(self, index: int) -> None:
        if self.ranks[index].steps:
            self.ranks[index].run_step()

    def deliver(self, index: int) -> None:
        """Take a rank's oldest bundle as vLLM does: the connector first, then its own book."""
        rank = self.ranks[index]
        if not rank.bundles:
            return
        bundle = rank.bundles.popleft()
        if bundle.report is not None:
            self._apply(index, bundle)
        if bundle.generation == rank.generation:
            self._take(index, bundle)

    def round(self, chunk: int, num_admitted: int = 2) -> None:
        """A step in which every rank executes all it has, ends its ops and is heard."""
        self.now_seconds += ROUND_SECONDS
        self.step(chunk, num_admitted)
        for rank in self.ranks:
            while rank.steps:
                rank.run_step()
            for op_id in rank.transfer.op_ids:
                rank.transfer.move(op_id, 99)
            while rank.bundles:
                self.deliver(rank.index)

    def settle(self) -> None:
        """Step until all requests are done and the leader has no work left; ops that hang do not
        keep it from that."""
        self.regain_ranks()
        for i in range(300):
            self.now_seconds += SETTLING_SECONDS
            if not self.requests and not self.leader.has_work() and not self._is_stepping():
                return
            self.round(4, 2 if i < 50 else self._num_admitted_alone())
        waiting = [(r.id, r.state) for r in self.requests]
        raise AssertionError(f"never idle: {waiting}, work: {self.leader.has_work()}")

    def release_hung(self) -> None:
        for rank in self.ranks:
            rank.transfer.is_hung = False

    def _num_admitted_alone(self) -> int:
        """One at a time: two that each need all device blocks would preempt each other forever."""
        return int(all(request.state == "waiting" for request in self.requests))

    def _is_stepping(self) -> bool:
        """Whether a step that was sent is not executed or not reported yet."""
        return any(rank.steps or rank.bundles for rank in self.ranks)

    # Scheduling

    def _admit(
        self,
        request: Request,
        chunk: int,
        progress: list[tuple[Request, int]],
        reissued: list[BlockId],
    ) -> None:
        request.epoch = self.epoch
        hits = self.device.hits(request.full_contents(len(request.tokens) - 1))
        num_hit_tokens = len(hits) * BLOCK_SIZE
        found = self.leader.match(request.id, num_hit_tokens)
        if found is None:
            check_wait(self, request, len(hits))
            return
        request.waits_since_seconds = None
        assert found % BLOCK_SIZE == 0
        assert num_hit_tokens + found <= len(request.tokens)
        num_new = found // BLOCK_SIZE or blocks_for(
            min(num_hit_tokens + chunk, len(request.tokens))
        ) - len(hits)
        table = self.device.take(hits, num_new)
        if table is None:
            return
        request.table, request.num_hits, request.is_new = table, len(hits), True
        request.num_computed = num_hit_tokens + found
        if found:
            assert self.epoch not in loads_of_others(self, request, len(hits)), "loaded twice"
            request.state = "loading"
            request.loading_ranks = set(range(len(self.ranks)))
        else:
            request.state = "running"
        self.leader.allocated(request.id, found, request.table)
        if not found:
            self._schedule(request, chunk, progress, reissued)

    def _schedule(
        self,
        request: Request,
        chunk: int,
        progress: list[tuple[Request, int]],
        reissued: list[BlockId],
    ) -> None:
        end = min(request.num_computed + chunk, len(request.tokens))
        while request.state in ("running", "loaded"):
            num_new = max(0, blocks_for(end) - len(request.table))
            new = self.device.take([], num_new)
            if new is not None:
                break
            self.preempt([r for r in self.requests if r.state in ("running", "loaded")][-1])
        else:
            return
        if request.state == "loaded":
            request.state = "running"
            self.leader.allocated(request.id, 0, request.table)
        request.table += new
        reissued += request.table[request.num_computed // BLOCK_SIZE :] if request.is_new else new
        request.is_new = False
        progress.append((request, end))
        self.device.cache(request.full_contents(end), request.table)

    def _advance(self, request: Request, end: int) -> None:
        if request.state != "running":
            return
        request.num_computed = end
        if end < len(request.tokens):
            return
        if request.num_left:
            request.num_left -= 1
            request.tokens.append(0)
            self._learn_keys(request)
        else:
            self._finish(request)

    def _queue(self, step: Step) -> None:
        for rank in self.ranks:
            while len(rank.steps) >= MAX_QUEUED_STEPS:
                rank.run_step()
            rank.steps.append(step)

    # The end of things

    def _finish(self, request: Request) -> None:
        self.requests.remove(request)
        request.keys.is_late = False
        self._learn_keys(request)
        must_hold = self.leader.finish(request.id, request.num_computed, request.table)
        is_loading = request.state == "loading"
        request.state = "done"
        if is_loading:
            assert not must_hold, "the end of the load is what the engine waits for"
            self.held.append(request)
        elif must_hold:
            request.draining_ranks = set(range(len(self.ranks)))
            self.held.append(request)
        else:
            offloads = [m.op for m in self.ops.values() if m.op.src.tier is Tier.DEVICE]
            reading = [op for op in offloads if request.id in op.request_ids]
            is_read = any(set(op.src.ids()) & set(request.table) for op in reading)
            assert not (is_read and self.setup.holds_blocks)
            self._release(request)

    def _restart(self, request: Request) -> None:
        self._release(request)
        request.state, request.num_computed = "waiting", 0

    def _release(self, request: Request) -> None:
        self.device.release(request.table)
        request.table = []

    def _start_epoch(self) -> None:
        self._num_epochs += 1
        self.epoch = self._num_epochs
        self.device.clear()
        for request in self.requests:
            request.waits_since_seconds = None
            if request.state in ("running", "loaded"):
                self._restart(request)

    def _excuse(self, request: Request, index: int) -> None:
        if request.loading_ranks:
            request.bad_blocks.add(0)
            self._received(request, index)
        elif request.draining_ranks:
            self._drained(request, index)

    def _received(self, request: Request, index: int) -> None:
        request.loading_ranks.discard(index)
        if not request.loading_ranks:
            self._load_ended(request)

    def _drained(self, request: Request, index: int) -> None:
        request.draining_ranks.discard(index)
        if not request.draining_ranks:
            self.held.remove(request)
            self._release(request)

    def _load_ended(self, request: Request) -> None:
        if request.bad_blocks:
            request.num_computed = min(request.bad_blocks) * BLOCK_SIZE
            request.bad_blocks.clear()
        else:
            check_loaded(self, request)
        if request in self.held:
            self.held.remove(request)
            self._release(request)
        elif not request.num_computed:
            self._restart(request)
        else:
            self.device.cache(request.full_contents(request.num_computed), request.table)
            request.num_computed = min(request.num_computed, len(request.tokens) - 1)
            request.state = "loaded"

    # Reports

    def _apply(self, index: int, bundle: Bundle) -> None:
        assert bundle.report is not None
        report = decode_report(bundle.report)
        self.leader.apply(report)
        for result in report.results:
            mirror = self.ops.get(result.op_id)
            if mirror is not None and index in mirror.owed:
                if not result.ok:
                    mirror.fail(unpack_ids(result.failed))
                self._answered(mirror, index)
            else:
                assert bundle.generation != self.ranks[index].generation, f"{result} came twice"

    def _answered(self, mirror: OpMirror, index: int) -> None:
        mirror.owed.discard(index)
        if mirror.owed or mirror.op.op_id not in self.ops:
            return
        del self.ops[mirror.op.op_id]
        self.num_ended_ops += 1
        check_end(self, mirror)

    def _take(self, index: int, bundle: Bundle) -> None:
        everybody = [*self.requests, *self.held]
        for request in everybody:
            bad = [i for i, block in enumerate(request.table) if block in bundle.errors]
            if request.loading_ranks:
                request.bad_blocks.update(bad)
        for request in everybody:
            if request.id in bundle.received:
                self._received(request, index)
            if request.id in bundle.drained:
                self._drained(request, index)

    def _learn_keys(self, request: Request) -> None:
        for i, key in enumerate(request.keys):
            self.contents_of_key[key] = tuple(request.tokens[: (i + 1) * BLOCK_SIZE])
