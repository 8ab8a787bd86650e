"""Leaders and workers over real sockets, for tests: small memory, short intervals."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvbm_core import KvbmConfig, KvbmLeader, KvbmWorker, KvLayout, Plane, chain_hashes
from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.channel.timing import Timing

QUICK = Timing(beat_seconds=0.05, timeout_seconds=1.0, resend_seconds=0.1)
PATIENT = Timing(beat_seconds=0.05, timeout_seconds=30.0, resend_seconds=0.1)
IDENTITY = "a model"
NUM_BLOCKS, BLOCK_SIZE, BLOCK_BYTES = 8, 4, 512
NUM_TOKENS = NUM_BLOCKS * BLOCK_SIZE
CONFIG = KvbmConfig(cpu_cache_override_num_blocks=16)
KEYS = chain_hashes(b"root", list(range(NUM_TOKENS)), BLOCK_SIZE)
DEADLINE_SECONDS = 30.0


def until(is_done: Callable[[], Any], *polled: KvbmLeader | KvbmWorker) -> None:
    """Poll these until the condition holds; fail at a deadline."""
    deadline_seconds = time.monotonic() + DEADLINE_SECONDS
    while not is_done():
        assert time.monotonic() < deadline_seconds, "never happened"
        for end in polled:
            end.poll()
        time.sleep(0.002)


class Rank:
    """A KvbmWorker with device memory of its own."""

    def __init__(
        self, rank: int, num_ranks: int, *, config: KvbmConfig = CONFIG, **options: Any
    ) -> None:
        self.memory = torch.randint(0, 256, (NUM_BLOCKS * BLOCK_BYTES,), dtype=torch.uint8)
        options = {"identity": IDENTITY, "timing": QUICK, **options}
        self.kvbm = KvbmWorker(config, rank=rank, num_ranks=num_ranks, **options)

    def open(self, *, num_device_blocks: int = NUM_BLOCKS) -> Rank:
        plane = Plane(0, 0, BLOCK_BYTES, BLOCK_BYTES)
        self.kvbm.open(KvLayout((plane,), num_device_blocks, BLOCK_SIZE, "uint8"), [self.memory])
        return self

    def serve(self) -> None:
        """Execute what was published, and report."""
        for plan in self.kvbm.take_plans():
            self.kvbm.worker.begin(plan)
            self.kvbm.worker.submit_onboards()
            self.kvbm.worker.submit_offloads()
        self.kvbm.poll()


def leader_of(num_ranks: int, *, config: KvbmConfig = CONFIG, **options: Any) -> KvbmLeader:
    options = {"identity": IDENTITY, "timing": QUICK, **options}
    return KvbmLeader(config, num_ranks=num_ranks, block_size=BLOCK_SIZE, **options)


def names() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"request {number}"


NAMES = names()


def start_request(kvbm: KvbmLeader) -> tuple[str, int]:
    """A request with the prompt that all share comes in, and its plan is published: its name, and
    how many tokens are loaded for it."""
    name, table, leader = next(NAMES), list(range(NUM_BLOCKS)), kvbm.leader
    leader.create_slot(name, KEYS, NUM_TOKENS)
    found = leader.match(name, 0)
    assert found is not None
    leader.allocated(name, found, table)
    progress = [] if found else [(name, NUM_TOKENS)]
    kvbm.publish(leader.plan_step(progress, lambda _: table))
    return name, found


def finish_request(kvbm: KvbmLeader, name: str) -> None:
    kvbm.leader.finish(name, NUM_TOKENS, list(range(NUM_BLOCKS)))


def run_request(kvbm: KvbmLeader, ranks: Sequence[Rank] = ()) -> int:
    """One request from begin to end; ranks in other processes serve themselves. Returns the tokens
    that came from the cache."""
    name, found = start_request(kvbm)

    def is_done() -> bool:
        for rank in ranks:
            rank.serve()
        return kvbm.leader.num_ops_in_flight == 0

    until(is_done, kvbm)
    finish_request(kvbm, name)
    return found


def serve_for_ever(rank: int, num_ranks: int, address: str) -> None:
    """A rank's process. Without an address it looks for the leader as the environment says."""
    torch.set_num_threads(1)
    known = LeaderAddress.decode(address) if address else None
    own = Rank(rank, num_ranks, address=known).open()
    while True:
        own.serve()
        time.sleep(0.002)


def lead(num_ranks: int) -> None:
    """A leader's process: two requests with one prompt; prints the tokens found for each."""
    kvbm = leader_of(num_ranks)
    kvbm.open()
    kvbm.wait(DEADLINE_SECONDS)
    found = [run_request(kvbm), run_request(kvbm)]
    sys.stdout.write(f"{kvbm.address.endpoint} {found}")
    kvbm.close()


if __name__ == "__main__":
    if sys.argv[1] == "leader":
        lead(int(sys.argv[2]))
    else:
        serve_for_ever(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
