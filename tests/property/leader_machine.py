"""The state machine over the simulated engine: every order of events that an engine can bring."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm_core.types import OpId
from tests.property.checks import check, check_idle
from tests.property.cluster import ModelTransfer
from tests.property.engine import Engine
from tests.property.requests import Parts

MAX_REQUESTS = 5
MAX_DISASTERS = 1
RANKS = st.integers(0, 2)
FATES = st.lists(st.sampled_from(["waits", "moves", "ends", "fails"]), min_size=3, max_size=6)
PICKS = st.integers(0, 7)


class LeaderMachine(RuleBasedStateMachine):
    """A subclass plants a fault in `parts`, and may fix the `circumstances` that show it."""

    parts = Parts()
    circumstances: ClassVar[dict[str, Any]] = {}
    engine: Engine

    @initialize(
        num_ranks=st.integers(1, 3),
        num_host_blocks=st.integers(1, 8),
        num_device_blocks=st.integers(9, 14),
        eager_reuse=st.booleans(),
        device_remembers=st.sampled_from([False, False, True]),
        offload_generated=st.booleans(),
        late_offloads=st.booleans(),
        holds_blocks=st.booleans(),
        late_keys=st.booleans(),
    )
    def start(
        self,
        num_ranks: int,
        num_host_blocks: int,
        num_device_blocks: int,
        eager_reuse: bool,
        device_remembers: bool,
        offload_generated: bool,
        late_offloads: bool,
        holds_blocks: bool,
        late_keys: bool,
    ) -> None:
        drawn = {
            "num_ranks": num_ranks,
            "num_host_blocks": num_host_blocks,
            "num_device_blocks": num_device_blocks,
            "eager_reuse": eager_reuse,
            "device_remembers": device_remembers,
            "offload_generated": offload_generated,
            "late_offloads": late_offloads,
            "holds_blocks": holds_blocks,
            "late_keys": late_keys,
        }
        self.engine = Engine(**{**drawn, **self.circumstances}, parts=self.parts)

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

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine"):
            check(self.engine)

    def teardown(self) -> None:
        """Let everything end by itself: all requests finish, and nothing is left."""
        has_failed = sys.exc_info()[0] is not None  # then that is what is to be seen
        if hasattr(self, "engine") and not has_failed:
            self.engine.settle()
            check_idle(self.engine)
