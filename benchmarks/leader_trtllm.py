"""What the leader's decisions cost behind TensorRT-LLM's hooks, beside vLLM's; no bytes are copied.

The same decisions on the same core, measured in turn: on TensorRT-LLM keys are always our own,
tokens are read from the engine's lists, and each iteration names every request with its tokens and
blocks. Times are the thread's own processor time.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import arrivals
from benchmarks.arrivals import BLOCK_SIZE, HOST_BLOCKS, NUM_BLOCKS
from benchmarks.decoding import NUM_REQUESTS, PROMPT_BLOCKS, DecodingBatch
from benchmarks.report import Ratio, Result, text_table, time_figure
from benchmarks.timing import Timed, cpu_clock, interleaved
from kvbm_connectors.trtllm.leader_side import LeaderSide
from kvbm_core.build import build_leader
from kvbm_core.config import KvbmConfig
from kvbm_core.hashing import chain_hashes
from kvbm_core.leader import Leader
from kvbm_core.types import BlockHash, OpResult
from kvbm_core.wire import WorkerReport, decode_plan

COLD, RESIDENT = "match, 1,000 blocks cold", "match, 1,000 blocks resident"
DECODES = "256 decodes, 16 blocks complete (mean of 16)"
HEADER = ("decision", "TensorRT-LLM ms", "median", "vLLM ms", "median", "ratio of best", "median")

_numbers = itertools.count()


class Joined:
    """As much of a KvbmLeader as the hooks use, with every rank there and nothing to say."""

    is_ready = True

    def __init__(self, leader: Leader) -> None:
        self.leader = leader

    def poll(self) -> None: ...


@dataclass
class Request:
    """The view of a request that TensorRT-LLM's match hook gets."""

    tokens: list[int]
    request_id: int = field(default_factory=lambda: next(_numbers))
    is_dummy_request: bool = False
    is_finished: bool = False
    lora_task_id: None = None
    cache_salt_id: None = None

    @property
    def prompt_len(self) -> int:
        return len(self.tokens)

    def get_tokens(self, beam: int) -> list[int]:
        return [*self.tokens]


@dataclass
class RequestData:
    """As in kv_cache_connector.py of TensorRT-LLM 1.2."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure arrivals and steps of both connectors; `scratch` is not used."""
    repeats, cycles = (10, 2) if quick else (200, 25)
    result = Result("leader_trtllm", {"block_size": BLOCK_SIZE, "repeats": repeats})
    matches = _matches()
    gc.collect()
    gc.freeze()
    seconds = interleaved(matches, repeats) | _steps(cycles)
    gc.unfreeze()
    rows = [_row(result, name, seconds) for name in (COLD, RESIDENT, DECODES)]
    result.table = text_table(HEADER, rows)
    return result


def _matches() -> dict[str, Timed]:
    tokens = [*arrivals.new_tokens(), 0]  # one more than is matched, as the engine wants it
    keys = arrivals.own_keys(tokens[:-1])
    own = chain_hashes(arrivals.NAMESPACE.root(), tokens[:-1], BLOCK_SIZE)
    vllm = arrivals.full_side(engine_keys=False, resident=keys)
    trtllm = full_side(resident=own)
    other = [*arrivals.new_tokens(), 0]
    return {
        COLD: _matching(trtllm, other, 0),
        RESIDENT: _matching(trtllm, tokens, NUM_BLOCKS),
        _vllm(COLD): arrivals.matching(vllm, arrivals.arrivals(other), 0),
        _vllm(RESIDENT): arrivals.matching(vllm, arrivals.arrivals(tokens), NUM_BLOCKS),
    }


def full_side(*, resident: Sequence[BlockHash] = ()) -> LeaderSide:
    """Rank 0's half of a connector whose host tier is full; `resident` was used last."""
    leader = build_leader(
        KvbmConfig(),
        num_host_blocks=HOST_BLOCKS,
        block_size=BLOCK_SIZE,
        block_bytes=2**17,
        num_ranks=1,
        engine_holds_blocks=False,
        engine_shares_blocks=False,
        engine_can_wait=False,
    )
    for keys in (arrivals.random_keys(HOST_BLOCKS - len(resident)), resident):
        leader.pool.reserve(keys)
        leader.pool.commit(keys)
    kvbm: Any = Joined(leader)
    return LeaderSide(kvbm, arrivals.NAMESPACE, loads_async=True, is_chunked=False)


def _matching(side: LeaderSide, tokens: list[int], num_matched: int) -> Timed:
    def once() -> float:
        request = Request(tokens)
        start = cpu_clock()
        found, _ = side.match(request, 0)
        seconds = cpu_clock() - start
        if found != num_matched * BLOCK_SIZE or side.failed_hooks:
            raise RuntimeError(f"{found} tokens were found; failed hooks: {side.failed_hooks}")
        side.finish(request)
        return seconds

    return once


class Decoding:
    """A batch that decodes one token each a step; see benchmarks.decoding for vLLM's."""

    def __init__(self, side: LeaderSide, *, max_steps: int, phase: Callable[[int], int]) -> None:
        self._side = side
        size = PROMPT_BLOCKS + 2 + max_steps // BLOCK_SIZE
        self._requests = [
            Request(_random_tokens(PROMPT_BLOCKS * BLOCK_SIZE + phase(number)))
            for number in range(NUM_REQUESTS)
        ]
        self._tables = [range(n * size, (n + 1) * size) for n in range(NUM_REQUESTS)]
        self._num_tokens = [request.prompt_len for request in self._requests]
        self._results: tuple[OpResult, ...] = ()
        new = []
        for request, table in zip(self._requests, self._tables, strict=True):
            num_blocks = -(-request.prompt_len // BLOCK_SIZE)
            side.match(request, 0)
            side.allocated(request, table[:num_blocks])
            ids, count = [*table[:num_blocks]], request.prompt_len
            new.append(RequestData(request.request_id, request.tokens, ids, 0, count))
        self._plan(new, [])

    def decode(self) -> tuple[float, int]:
        """Seconds of one step, and how many ops it planned or ended."""
        cached = [self._next_data(number) for number in range(NUM_REQUESTS)]
        num_ended = len(self._results)
        start = cpu_clock()
        if self._results:
            self._side.leader.apply(WorkerReport(0, self._results))
        num_planned = self._plan([], cached)
        seconds = cpu_clock() - start
        if self._side.failed_hooks:
            raise RuntimeError(f"hooks failed: {self._side.failed_hooks}")
        return seconds, num_planned + num_ended

    def _plan(self, new: list[RequestData], cached: list[RequestData]) -> int:
        output = SimpleNamespace(new_requests=new, cached_requests=cached)
        metadata = self._side.build_metadata(output)
        ops = decode_plan(metadata.plan).ops if metadata.plan else ()
        self._results = tuple(OpResult(op.op_id, 2**17 * len(op.src), 0.001) for op in ops)
        return len(ops)

    def _next_data(self, number: int) -> RequestData:
        """The token sampled last, whose KV the step computes."""
        position = self._num_tokens[number]
        self._num_tokens[number] += 1
        block, offset = divmod(position, BLOCK_SIZE)
        ids = [] if offset else [self._tables[number][block]]
        return RequestData(self._requests[number].request_id, [position], ids, position, 1)


def _random_tokens(count: int) -> list[int]:
    return [random.randrange(2**16) for _ in range(count)]


def _steps(cycles: int) -> dict[str, list[float]]:
    """Seconds of steps, from two batches that take turns; the first cycle warms up."""
    found: dict[str, list[float]] = {}
    max_steps = (cycles + 1) * BLOCK_SIZE
    phase = BLOCK_SIZE.__rmod__
    trtllm = Decoding(full_side(), max_steps=max_steps, phase=phase)
    side = arrivals.full_side(engine_keys=True)
    vllm = DecodingBatch(side, max_steps=max_steps, phase=phase)
    for cycle in range(cycles + 1):
        mine, theirs = [], []
        for _ in range(BLOCK_SIZE):
            mine.append(trtllm.decode())
            theirs.append(vllm.decode())
        if not cycle:
            continue
        found.setdefault(DECODES, []).append(sum(s for s, _ in mine) / BLOCK_SIZE)
        theirs_mean = sum(step.seconds for step in theirs) / BLOCK_SIZE
        found.setdefault(_vllm(DECODES), []).append(theirs_mean)
    return found


def _vllm(name: str) -> str:
    return f"vLLM: {name}"


def _row(result: Result, name: str, seconds: dict[str, list[float]]) -> list[str]:
    own = time_figure(name, "ms", seconds[name])
    other = time_figure(_vllm(name), "ms", seconds[_vllm(name)])
    best = Ratio(f"{name}: to vLLM's", own.best / other.best)
    median = Ratio(f"{name}: to vLLM's, median", own.median / other.median)
    result.figures += (own, other)
    result.ratios += (best, median)
    cells = [f"{f:.3f}" for f in (own.best, own.median, other.best, other.median)]
    return [name, *cells, f"{best.value:.2f}", f"{median.value:.2f}"]
