"""A batch of requests that decode one token each a step, as the connector's leader sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.arrivals import BLOCK_SIZE, check_hooks, random_keys
from benchmarks.engine_objects import (
    AllocatedBlocks,
    BlockState,
    CachedRequests,
    ConstantTokens,
    NewRequest,
    Request,
    SchedulerOutput,
)
from benchmarks.timing import cpu_clock
from kvbm_connectors.vllm.metadata import KvbmMetadata, KvbmWorkerMetadata
from kvbm_connectors.vllm.scheduler_side import SchedulerSide
from kvbm_core.types import OpResult
from kvbm_core.wire import StepPlan, WorkerReport, decode_plan, encode

NUM_REQUESTS = 256
PROMPT_BLOCKS = 64


@dataclass(frozen=True)
class Step:
    """What one step's decisions took, how many ops it planned and how many results came back."""

    planning_seconds: float
    reporting_seconds: float
    num_ops: int
    num_results: int

    @property
    def seconds(self) -> float:
        return self.planning_seconds + self.reporting_seconds


class DecodingBatch:
    """Requests with engine keys that were just prefilled; `decode` takes one step.

    phase: request number → tokens that it already has in its last block. max_steps: that will
    be taken.
    """

    def __init__(self, side: SchedulerSide, *, max_steps: int, phase: Callable[[int], int]) -> None:
        self._side = side
        names = [f"request-{number}" for number in range(NUM_REQUESTS)]
        self._num_tokens = {
            name: PROMPT_BLOCKS * BLOCK_SIZE + phase(number) for number, name in enumerate(names)
        }
        size = PROMPT_BLOCKS + 2 + max_steps // BLOCK_SIZE
        self._tables = {
            name: list(range(number * size, (number + 1) * size))
            for number, name in enumerate(names)
        }
        self._results: tuple[OpResult, ...] = ()
        self._admit()

    def decode(self) -> Step:
        """Plan and report one step.

        Ops end during the step after theirs, so that its plan meets them in flight.
        """
        output = self._output()
        start = cpu_clock()
        plan = _received(self._side.build_metadata(output))
        planning_seconds = cpu_clock() - start
        num_results, reporting_seconds = len(self._results), self._report()
        self._results = _all_done(plan)
        check_hooks(self._side)
        for name in self._num_tokens:
            self._num_tokens[name] += 1
        return Step(planning_seconds, reporting_seconds, len(plan.ops), num_results)

    def compare(self) -> float:
        """Seconds of the least a step can do in Python: one comparison a request."""
        counts, num_complete = list(self._num_tokens.items()), 0
        start = cpu_clock()
        for _, num_tokens in counts:
            if num_tokens < 0:
                num_complete += 1
        return cpu_clock() - start

    def _report(self) -> float:
        if not self._results:
            return 0.0
        start = cpu_clock()
        report = encode(WorkerReport(0, self._results))
        self._side.apply(KvbmWorkerMetadata((report,)))
        return cpu_clock() - start

    def _admit(self) -> None:
        """Prefill all requests in one step."""
        for name, num_tokens in self._num_tokens.items():
            tokens = ConstantTokens([0] * num_tokens)
            request = Request(name, tokens, random_keys(len(self._tables[name])), num_tokens)
            self._side.match(request, 0)
            self._side.allocated(request, AllocatedBlocks(self._tables[name]), 0)
        new = [NewRequest(name, (self._tables[name],), 0) for name in self._num_tokens]
        none = CachedRequests([], set(), [], [])
        total = sum(self._num_tokens.values())
        output = SchedulerOutput(new, none, dict(self._num_tokens), total, self._block_state())
        self._results = _all_done(_received(self._side.build_metadata(output)))

    def _output(self) -> SchedulerOutput:
        """One token for each request; a new block for those whose last one is full."""
        names = list(self._num_tokens)
        counts = list(self._num_tokens.values())
        new_blocks = [self._new_block(name) for name in names]
        cached = CachedRequests(names, set(), new_blocks, counts)
        scheduled = dict.fromkeys(names, 1)
        return SchedulerOutput([], cached, scheduled, len(names), self._block_state())

    def _new_block(self, name: str) -> tuple[list[int], ...] | None:
        block, offset = divmod(self._num_tokens[name], BLOCK_SIZE)
        return None if offset else ([self._tables[name][block]],)

    def _block_state(self) -> BlockState:
        return BlockState(set(self._num_tokens), lambda name: ([*self._tables[name]],))


def _received(metadata: KvbmMetadata) -> StepPlan:
    """The plan as a worker gets it."""
    return decode_plan(metadata.plan) if metadata.plan else StepPlan()


def _all_done(plan: StepPlan) -> tuple[OpResult, ...]:
    return tuple(OpResult(op.op_id, 2**17 * len(op.src), 0.001) for op in plan.ops)
