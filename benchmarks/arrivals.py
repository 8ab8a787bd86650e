"""What the connector's leader does when a request of 16,000 tokens arrives, and how to time it."""

from __future__ import annotations

import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Sequence

from benchmarks.engine_objects import AllocatedBlocks, ConstantTokens, Request, SchedulerOutput
from benchmarks.timing import Timed, cpu_clock, whole
from kvbm_connectors.vllm.identity import Adapters
from kvbm_connectors.vllm.metadata import KvbmHandshake, KvbmWorkerMetadata
from kvbm_connectors.vllm.scheduler_side import SchedulerSide
from kvbm_connectors.vllm.translate import chain_of
from kvbm_core.config import KvbmConfig
from kvbm_core.hashing import KEY_BYTES, CacheNamespace, chain_hashes
from kvbm_core.types import BlockHash, OpResult
from kvbm_core.wire import WorkerReport, decode_plan, encode

BLOCK_SIZE = 16
NUM_BLOCKS = 1000
HOST_BLOCKS = 60_000
NAMESPACE = CacheNamespace("model", "", "bfloat16", "vllm", BLOCK_SIZE, "tp1.pp1")

NewRequest = Callable[[], Request]
_numbers = itertools.count()


def full_side(*, engine_keys: bool, resident: Sequence[BlockHash] = ()) -> SchedulerSide:
    """The scheduler's half of a connector whose host tier is full; `resident` was used last."""
    side = SchedulerSide(
        KvbmConfig(),
        block_size=BLOCK_SIZE,
        num_ranks=1,
        namespace=NAMESPACE,
        engine_keys=engine_keys,
    )
    side.open([KvbmHandshake(0, HOST_BLOCKS, HOST_BLOCKS, 2**17, "benchmark")])
    pool = side.leader.pool
    for keys in (random_keys(HOST_BLOCKS - len(resident)), resident):
        pool.reserve(keys)
        pool.commit(keys)
    return side


def check_hooks(side: SchedulerSide) -> None:
    """Raise where a hook has failed: it would answer at once, and time as fast."""
    if side.failed_hooks:
        raise RuntimeError(f"hooks failed: {dict(side.failed_hooks)}")


def random_keys(count: int) -> list[BlockHash]:
    """Keys such as an engine's own block hashes."""
    return _split(os.urandom(count * KEY_BYTES))


def new_tokens() -> list[int]:
    """NUM_BLOCKS blocks of tokens that no request had before."""
    return array("H", os.urandom(NUM_BLOCKS * BLOCK_SIZE * 2)).tolist()


def arrivals(tokens: Sequence[int], keys: Sequence[BlockHash] = ()) -> NewRequest:
    """Requests with this prompt and these engine keys.

    Each brings keys that are equal and not the same objects, as an engine does: Python would
    otherwise skip hashing and comparing them.
    """
    joined = b"".join(keys)

    def new_request() -> Request:
        name = f"request-{next(_numbers)}"
        return Request(name, ConstantTokens([*tokens]), _split(joined), len(tokens))

    return new_request


def own_keys(tokens: Sequence[int]) -> list[BlockHash]:
    return [*chain_of(arrivals(tokens)(), NAMESPACE, Adapters())]


def matching(side: SchedulerSide, new_request: NewRequest, num_matched: int) -> Timed:
    """Create a slot and match: `num_matched` blocks are found."""

    def once() -> float:
        request = new_request()
        start = cpu_clock()
        found, _ = side.match(request, 0)
        seconds = cpu_clock() - start
        if found != num_matched * BLOCK_SIZE:
            raise RuntimeError(f"{found} tokens were found, not {num_matched * BLOCK_SIZE}")
        side.finish(request, [])
        check_hooks(side)
        return seconds

    return once


def loading(side: SchedulerSide, new_request: NewRequest) -> Timed:
    """Once matched: pin, plan, send and end the load of NUM_BLOCKS blocks."""
    blocks = AllocatedBlocks(list(range(NUM_BLOCKS + 1)))

    def once() -> float:
        request = new_request()
        num_tokens, _ = side.match(request, 0)
        start = cpu_clock()
        side.allocated(request, blocks, num_tokens or 0)
        plan = decode_plan(side.build_metadata(SchedulerOutput.empty()).plan)
        results = tuple(OpResult(op.op_id, 2**27, 0.03) for op in plan.ops)
        side.apply(KvbmWorkerMetadata((encode(WorkerReport(0, results)),)))
        seconds = cpu_clock() - start
        side.finish(request, blocks.block_ids)
        check_hooks(side)
        return seconds

    return once


def hashing(tokens: Sequence[int]) -> Timed:
    """All keys of our own chain, which a match computes only as far as it finds blocks."""
    root, view = NAMESPACE.root(), ConstantTokens([*tokens])
    return whole(lambda: chain_hashes(root, view, BLOCK_SIZE), cpu_clock)


def look_ups(side: SchedulerSide, keys: Sequence[BlockHash]) -> Timed:
    """The least a match of NUM_BLOCKS resident blocks can do in Python: look each of them up."""
    ready, joined = dict.fromkeys(side.leader.pool.ready_keys()), b"".join(keys)

    def once() -> float:
        fresh = _split(joined)
        start = cpu_clock()
        for key in fresh:
            if key not in ready:
                break
        return cpu_clock() - start

    return once


def digests(tokens: Sequence[int]) -> Timed:
    """The least a chain of NUM_BLOCKS blocks can do: hash packed tokens, a digest a block."""
    packed, size = array("I", tokens).tobytes(), BLOCK_SIZE * 4
    parts = [packed[at : at + size] for at in range(0, len(packed), size)]

    def action() -> None:
        state = hashlib.blake2b(digest_size=KEY_BYTES)
        for part in parts:
            state.update(part)
            state.copy().digest()

    return whole(action, cpu_clock)


def _split(joined: bytes) -> list[BlockHash]:
    return [BlockHash(joined[at : at + KEY_BYTES]) for at in range(0, len(joined), KEY_BYTES)]
