"""A leader and two workers in three processes, without an engine: blocks leave the "device" for
host memory, are overwritten there, and come back byte for byte. What travels between the
processes travels through ZMQ.

    python -m examples.two_ranks
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable

import torch

from kvbm_core import KvbmConfig, KvbmLeader, KvbmWorker, KvLayout, Plane, Tier, chain_hashes
from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.wire import StepPlan

NUM_RANKS = 2
NUM_BLOCKS = 32
BLOCK_SIZE = 16  # tokens
BLOCK_BYTES = 65_536
IDENTITY = "two_ranks example"
CONFIG = KvbmConfig(cpu_cache_override_num_blocks=64)
SECONDS = 60.0


def contents(rank: int, block: int) -> torch.Tensor:
    """What a forward on this rank would leave in a block."""
    generator = torch.Generator().manual_seed(1000 * rank + block)
    return torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8, generator=generator)


def serve_rank(rank: int, address: str, verdicts: multiprocessing.Queue[tuple[int, bool]]) -> None:
    """A rank's process: its device memory is filled, offloaded, wiped, loaded and compared."""
    memory = torch.cat([contents(rank, block) for block in range(NUM_BLOCKS)])
    plane = Plane(region=0, offset_bytes=0, stride_bytes=BLOCK_BYTES, page_bytes=BLOCK_BYTES)
    worker = KvbmWorker(
        CONFIG,
        rank=rank,
        num_ranks=NUM_RANKS,
        identity=IDENTITY,
        address=LeaderAddress.decode(address),
    )
    worker.open(KvLayout((plane,), NUM_BLOCKS, BLOCK_SIZE, "uint8"), [memory])
    worker.wait_welcome(SECONDS)
    is_loaded = False
    deadline_seconds = time.monotonic() + SECONDS
    while not is_loaded and time.monotonic() < deadline_seconds:
        for plan in worker.take_plans():
            if any(op.is_onboard for op in plan.ops):
                memory.zero_()  # whatever comes back comes from host memory
            execute(worker, plan)
        worker.poll()
        is_loaded = bool(worker.worker.take_received())
        time.sleep(0.001)
    expected = torch.cat([contents(rank, block) for block in range(NUM_BLOCKS)])
    verdicts.put((rank, is_loaded and torch.equal(memory, expected)))
    worker.close()


def execute(worker: KvbmWorker, plan: StepPlan) -> None:
    """What an engine's step does around its forward."""
    worker.worker.begin(plan)
    worker.worker.submit_onboards()
    worker.worker.submit_offloads()


def until(is_done: Callable[[], bool], leader: KvbmLeader) -> None:
    deadline_seconds = time.monotonic() + SECONDS
    while not is_done():
        if time.monotonic() > deadline_seconds:
            raise TimeoutError("a rank has not answered")
        leader.poll()
        time.sleep(0.001)


def run_requests(kvbm: KvbmLeader) -> float:
    """Two requests with one prompt: the first one's blocks are kept, the second one loads them.
    Returns the seconds of the load."""
    keys = chain_hashes(b"example", list(range(NUM_BLOCKS * BLOCK_SIZE)), BLOCK_SIZE)
    num_tokens, table = NUM_BLOCKS * BLOCK_SIZE, list(range(NUM_BLOCKS))
    leader = kvbm.leader
    leader.create_slot("first", keys, num_tokens)
    leader.match("first", 0)
    leader.allocated("first", 0, table)
    kvbm.publish(leader.plan_step([("first", num_tokens)], lambda _: table))
    until(lambda: leader.num_ops_in_flight == 0, kvbm)
    leader.finish("first", num_tokens, table)
    began_seconds = time.monotonic()
    leader.create_slot("second", keys, num_tokens)
    found = leader.match("second", 0)
    assert found == num_tokens, f"{found} of {num_tokens} tokens were found"
    leader.allocated("second", found, table)
    kvbm.publish(leader.take_plan())
    until(lambda: leader.num_ops_in_flight == 0, kvbm)
    leader.finish("second", num_tokens, table)
    return time.monotonic() - began_seconds


def main() -> int:
    spawn = multiprocessing.get_context("spawn")
    verdicts = spawn.Queue()
    kvbm = KvbmLeader(CONFIG, num_ranks=NUM_RANKS, block_size=BLOCK_SIZE, identity=IDENTITY)
    kvbm.open()
    address = kvbm.address.encode()
    ranks = [
        spawn.Process(target=serve_rank, args=(r, address, verdicts)) for r in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        kvbm.wait(SECONDS)
        seconds = run_requests(kvbm)
        are_equal = dict(verdicts.get(timeout=SECONDS) for _ in ranks)
    finally:
        for process in ranks:
            process.join(SECONDS)
        kvbm.close()
    counters = kvbm.leader.counters.routes[f"{Tier.HOST.value}_to_{Tier.DEVICE.value}"]
    print(f"{NUM_RANKS} ranks, {NUM_BLOCKS} blocks of {BLOCK_BYTES} bytes on each")
    print(f"loaded {counters.num_bytes} bytes from host memory in {seconds * 1000:.1f} ms")
    for rank in sorted(are_equal):
        print(f"rank {rank}: {'all bytes are back' if are_equal[rank] else 'WRONG BYTES'}")
    return 0 if all(are_equal.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
