"""A trace of real requests, sent one after another through a leader whose worker is instant.

A trace has one JSON object a line: `timestamp` in ms, and `hash_ids`, one a block of the prompt;
equal ids mean equal blocks after equal prefixes. No engine, no bytes: an op has ended as soon as
it is planned. There is no device cache either, so that every use of a block is one of the leader's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvbm_core.build import build_leader
from kvbm_core.config import KvbmConfig
from kvbm_core.leader import Leader
from kvbm_core.types import KEY_BYTES, BlockHash, OpResult
from kvbm_core.wire import DiskInventory, WorkerReport

BLOCK_SIZE = 512
"""Tokens in a block of the trace."""

BLOCK_BYTES = BLOCK_SIZE * 32 * 1024
"""Of the model with 32 KiB of KV a token that the other benchmarks use; sizes the writes."""

MAX_STEPS = 10_000


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: its time and the keys of its blocks."""

    seconds: float
    keys: list[BlockHash]


@dataclass(frozen=True)
class Traffic:
    """What became of a trace, in blocks. A block that came up from disk is no hit of host."""

    num_queried: int
    num_host_hits: int
    num_disk_hits: int
    num_written: int
    num_disk_evicted: int
    num_refused: int

    @property
    def num_hits(self) -> int:
        return self.num_host_hits + self.num_disk_hits

    @property
    def hits_per_write(self) -> float:
        """Blocks that disk saved from being computed, for each that was written to it."""
        return self.num_disk_hits / self.num_written if self.num_written else 0.0


def read_trace(path: Path, limit: int | None = None) -> list[Arrival]:
    """The first `limit` requests in order of time. Raises ValueError where it is no trace."""
    arrivals = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if number > (limit or number):
                break
            try:
                entry = json.loads(line)
                keys = [_key(block) for block in entry["hash_ids"]]
                arrivals.append(Arrival(entry["timestamp"] / 1000, keys))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no request: {error!r}") from error
    return sorted(arrivals, key=lambda arrival: arrival.seconds)


def replay(
    arrivals: list[Arrival], *, num_host_blocks: int, num_disk_blocks: int, disk_filter: str
) -> Traffic:
    """Send all requests through a new leader. disk_filter: a name of ADMISSION_FILTERS."""
    leader = build_leader(
        KvbmConfig(disk_offload_filter=disk_filter, cpu_cache_override_num_blocks=num_host_blocks),
        num_host_blocks=num_host_blocks,
        block_size=BLOCK_SIZE,
        block_bytes=BLOCK_BYTES,
        num_ranks=1,
        inventories=[DiskInventory(num_disk_blocks)],
        engine_holds_blocks=False,
    )
    for number, arrival in enumerate(arrivals):
        _serve(leader, f"request-{number}", arrival)
        _settle(leader, arrival.seconds)
    return _traffic(leader)


def _serve(leader: Leader, name: str, arrival: Arrival) -> None:
    """What an engine asks and tells for one request, computed in one step."""
    num_tokens = len(arrival.keys) * BLOCK_SIZE
    device_ids = range(len(arrival.keys))
    leader.create_slot(name, arrival.keys, num_tokens)
    while (num_matched := leader.match(name, 0)) is None:
        _step(leader, arrival.seconds)
    leader.allocated(name, num_matched, device_ids)
    _step(leader, arrival.seconds)
    leader.note_progress([(name, num_tokens)], lambda _: device_ids)
    _step(leader, arrival.seconds)
    leader.note_progress([(name, num_tokens)], lambda _: device_ids)
    leader.finish(name, num_tokens, device_ids)


def _settle(leader: Leader, now_seconds: float) -> None:
    """Steps until nothing is left to do, as an engine has that waits for its next request."""
    for _ in range(MAX_STEPS):
        if not leader.has_work():
            return
        _step(leader, now_seconds)
    raise RuntimeError(f"the leader still has work after {MAX_STEPS} steps without a request")


def _step(leader: Leader, now_seconds: float) -> None:
    plan = leader.take_plan(now_seconds=now_seconds)
    results = [OpResult(op.op_id, len(op.src) * BLOCK_BYTES, 0.0) for op in plan.ops]
    leader.apply(WorkerReport(0, tuple(results)))


def _traffic(leader: Leader) -> Traffic:
    counters, routes = leader.counters, leader.counters.routes
    num_disk_hits = routes["disk_to_host"].num_blocks
    return Traffic(
        num_queried=counters.num_queried_blocks,
        num_host_hits=counters.num_matched_blocks - num_disk_hits,
        num_disk_hits=num_disk_hits,
        num_written=routes["host_to_disk"].num_blocks,
        num_disk_evicted=counters.num_disk_evicted_blocks,
        num_refused=counters.num_refused_blocks,
    )


def _key(block: int) -> BlockHash:
    return BlockHash(block.to_bytes(KEY_BYTES, "big"))
