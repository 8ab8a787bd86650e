"""The state machine over the simulated engine: every order of events that an engine can bring."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm_core.types import OpId
from tests.property.checks import check, check_at_rest, check_idle
from tests.property.cluster import ModelTransfer
from tests.property.engine import Engine
from tests.property.setup import Parts, Setup

MAX_REQUESTS = 5
MAX_DISASTERS = 1
MAX_RESTARTS = 4
RANKS = st.integers(0, 2)
FATES = st.lists(st.sampled_from(["waits", "moves", "ends", "fails"]), min_size=3, max_size=6)
PICKS = st.integers(0, 7)
PASSED_SECONDS = st.sampled_from([0.5, 11.0, 31.0, 61.0, 601.0])
SETUPS = st.builds(
    Setup,
    num_ranks=st.integers(1, 3),
    num_host_blocks=st.integers(1, 8),
    num_device_blocks=st.integers(9, 14),
    eager_reuse=st.booleans(),
    device_remembers=st.sampled_from([False, False, True]),
    offload_generated=st.booleans(),
    late_offloads=st.booleans(),
    holds_blocks=st.booleans(),
    late_keys=st.booleans(),
    num_disk_blocks=st.sampled_from([0, 0, 4, 8]),
    disk_filter=st.sampled_from(["all", "all", "frequency"]),
    window_blocks=st.integers(1, 4),
    can_wait=st.sampled_from([True, True, False]),
    num_served_tokens=st.sampled_from([0, 9]),
)

# So small a host that blocks come up from a disk that has served before.
WITH_DISK = {
    "num_host_blocks": 3,
    "num_disk_blocks": 6,
    "disk_filter": "all",
    "device_remembers": False,
    "can_wait": True,
    "num_served_tokens": 9,
}


def _has_disk(machine: LeaderMachine) -> bool:
    return machine.engine.disk_pool is not None


def _has_content_on_disk(machine: LeaderMachine) -> bool:
    return any(disk.contents for disk in machine.engine.disks)


def _is_hung(machine: LeaderMachine) -> bool:
    return any(rank.transfer.is_hung for rank in machine.engine.ranks)


class LeaderMachine(RuleBasedStateMachine):
    """A subclass plants a fault in `parts`, and may fix the `circumstances` that show it."""

    parts = Parts()
    circumstances: ClassVar[dict[str, Any]] = {}
    engine: Engine

    @initialize(setup=SETUPS)
    def start(self, setup: Setup) -> None:
        self.engine = Engine(replace(setup, **self.circumstances, parts=self.parts))

    @precondition(lambda self: len(self.engine.requests) < MAX_REQUESTS)
    @rule(shared=st.integers(1, 9), own=st.integers(0, 4), num_generated=st.integers(0, 4))
    def submit(self, shared: int, own: int, num_generated: int) -> None:
        """Prompts share the prefix of zeros, which generated tokens carry on."""
        self.engine.submit([0] * shared + [1] * own, num_generated)

    @rule(chunk=st.integers(0, 6), num_admitted=st.integers(0, 3))
    def step(self, chunk: int, num_admitted: int) -> None:
        self.engine.step(chunk, num_admitted)

    @rule(count=st.integers(1, 6))
    def rounds(self, count: int) -> None:
        """Steps as they are when nothing is late."""
        for _ in range(count):
            self.engine.round(4)

    @rule(chunk=st.integers(1, 6), num_admitted=st.integers(1, 3), fates=FATES)
    def rough_round(self, chunk: int, num_admitted: int, fates: list[str]) -> None:
        """A step on every rank, after which each op in flight meets its own fate."""
        self.engine.step(chunk, num_admitted)
        for rank in self.engine.ranks:
            while rank.steps:
                rank.run_step()
            for op_id, fate in zip(rank.transfer.op_ids, fates, strict=False):
                self._meet(rank.transfer, op_id, fate)
            fates = fates[1:] + fates[:1]
            while rank.bundles:
                self.engine.deliver(rank.index)

    def _meet(self, transfer: ModelTransfer, op_id: OpId, fate: str) -> None:
        if fate == "fails":
            transfer.fail(op_id)
        else:
            transfer.move(op_id, {"waits": 0, "moves": 1, "ends": 99}[fate])

    @rule(rank=RANKS)
    def run(self, rank: int) -> None:
        self.engine.run(rank % len(self.engine.ranks))

    @rule(rank=RANKS, pick=PICKS, count=st.integers(1, 5))
    def move(self, rank: int, pick: int, count: int) -> None:
        transfer = self.engine.ranks[rank % len(self.engine.ranks)].transfer
        if op_ids := transfer.op_ids:
            transfer.move(op_ids[pick % len(op_ids)], count)

    @rule()
    def move_all(self) -> None:
        for rank in self.engine.ranks:
            for op_id in rank.transfer.op_ids:
                rank.transfer.move(op_id, 99)

    @rule(rank=RANKS, pick=PICKS)
    def fail(self, rank: int, pick: int) -> None:
        transfer = self.engine.ranks[rank % len(self.engine.ranks)].transfer
        if op_ids := transfer.op_ids:
            transfer.fail(op_ids[pick % len(op_ids)])

    @rule(rank=RANKS)
    def deliver(self, rank: int) -> None:
        self.engine.deliver(rank % len(self.engine.ranks))

    @rule(pick=PICKS)
    def preempt(self, pick: int) -> None:
        requests = [r for r in self.engine.requests if r.state in ("running", "loaded")]
        if requests:
            self.engine.preempt(requests[pick % len(requests)])

    @precondition(lambda self: self.engine.requests)
    @rule(pick=PICKS)
    def abort(self, pick: int) -> None:
        requests = self.engine.requests
        self.engine.abort(requests[pick % len(requests)])

    @precondition(lambda self: self.engine.num_resets < MAX_DISASTERS)
    @rule()
    def reset(self) -> None:
        self.engine.reset()

    @precondition(lambda self: self.engine.num_lost < MAX_DISASTERS)
    @rule(rank=RANKS)
    def lose_rank(self, rank: int) -> None:
        self.engine.lose_rank(rank % len(self.engine.ranks))

    @precondition(lambda self: self.engine.lost)
    @rule()
    def regain_ranks(self) -> None:
        self.engine.regain_ranks()

    @precondition(_has_disk)
    @rule(seconds=PASSED_SECONDS)
    def pass_time(self, seconds: float) -> None:
        self.engine.now_seconds += seconds

    @precondition(_has_content_on_disk)
    @rule(rank=RANKS, pick=PICKS)
    def corrupt(self, rank: int, pick: int) -> None:
        disk = self.engine.disks[rank % len(self.engine.ranks)]
        if block_ids := sorted(disk.contents):
            disk.corrupt(block_ids[pick % len(block_ids)])

    @precondition(lambda self: _has_disk(self) and not _is_hung(self))
    @rule(rank=RANKS)
    def hang(self, rank: int) -> None:
        self.engine.ranks[rank % len(self.engine.ranks)].transfer.is_hung = True

    @precondition(_is_hung)
    @rule()
    def answer_again(self) -> None:
        self.engine.release_hung()

    @precondition(
        lambda self: _has_content_on_disk(self) and self.engine.num_restarts < MAX_RESTARTS
    )
    @rule(rank=RANKS, count=st.integers(0, 3), shared=st.integers(1, 9), own=st.integers(0, 4))
    def restart(self, rank: int, count: int, shared: int, own: int) -> None:
        """The process dies while one rank's disk lags behind; who was being served asks again."""
        self.submit(shared, own, 0)
        self.engine.ranks[rank % len(self.engine.ranks)].transfer.is_hung = True
        for _ in range(count):
            self.engine.round(4)
        self.engine.restart()
        self.submit(shared, own, 0)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            check(self.engine)

    def teardown(self) -> None:
        """Let everything end by itself: all requests finish, and nothing is left."""
        has_failed = sys.exc_info()[0] is not None  # then that is what is to be seen
        if not hasattr(self, "engine"):
            return
        try:
            if not has_failed:
                self._end_all()
        finally:
            self.engine.close()

    def _end_all(self) -> None:
        self.engine.settle()
        check_at_rest(self.engine)
        self.engine.release_hung()
        for _ in range(3):
            self.engine.round(0)
        self.engine.settle()
        check_idle(self.engine)
