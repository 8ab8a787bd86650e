"""A leader with a disk tier, and reports made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.admission import AdmissionFilter, AdmitAll
from kvbm_core.cascade import Cascade, DiskTier
from kvbm_core.eviction import Lru
from kvbm_core.hashing import chain_hashes
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, OpResult, Tier, TransferOp, pack_ids
from kvbm_core.wire import GENERATION_BYTES, WorkerReport

SIZE = 4
KEYS = chain_hashes(b"root", list(range(64)), SIZE)
OTHERS = chain_hashes(b"other", list(range(64)), SIZE)
GENERATION = bytes(GENERATION_BYTES)


def leader_of(
    *,
    host: Sequence[BlockHash] = (),
    disk: Sequence[BlockHash] = (),
    num_host_blocks: int = 8,
    num_disk_blocks: int = 8,
    num_ranks: int = 1,
    window_blocks: int = 8,
    can_wait: bool = True,
    admission: AdmissionFilter | None = None,
) -> Leader:
    """Its tiers have these blocks READY, the first one used last; all blocks are admitted."""
    pool = BlockPool(Tier.HOST, num_host_blocks, Lru())
    pool.reserve(host)
    pool.commit(host)
    tier = DiskTier(
        BlockPool(Tier.DISK, num_disk_blocks, Lru()),
        admission or AdmitAll(),
        window_blocks,
        lambda: GENERATION,
        can_wait=can_wait,
    )
    leader = Leader(pool, block_size=SIZE, num_ranks=num_ranks, disk=tier)
    below(leader).start([(key, i) for i, key in enumerate(disk)][::-1], persists=True)
    return leader


def below(leader: Leader) -> Cascade:
    assert leader.cascade is not None
    return leader.cascade


def begin(leader: Leader, name: str = "a", keys: Sequence[BlockHash] = KEYS[:4]) -> None:
    leader.create_slot(name, keys, len(keys) * SIZE)


def plan(leader: Leader, now_seconds: float = 0.0) -> tuple[TransferOp, ...]:
    return leader.take_plan(now_seconds=now_seconds).ops


def ask(
    leader: Leader,
    name: str = "a",
    keys: Sequence[BlockHash] = KEYS[:4],
    now_seconds: float = 0.0,
) -> tuple[TransferOp, ...]:
    """The ops of the step in which a new request is told to wait."""
    begin(leader, name, keys)
    assert leader.match(name, 0) is None
    return plan(leader, now_seconds)


def store(
    leader: Leader,
    keys: Sequence[BlockHash],
    name: str = "w",
    *,
    first: int = 100,
    now_seconds: float = 0.0,
) -> tuple[TransferOp, ...]:
    """A request computes these blocks and they come to host; the ops planned after that."""
    begin(leader, name, keys)
    leader.match(name, 0)
    table = list(range(first, first + len(keys)))
    leader.allocated(name, 0, table)
    step = leader.plan_step([(name, len(keys) * SIZE)], lambda _: table, now_seconds=now_seconds)
    for op in step.ops:
        answer(leader, op)
    leader.finish(name, len(keys) * SIZE, table)
    return plan(leader, now_seconds)


def answer(
    leader: Leader,
    op: TransferOp,
    *,
    ranks: Sequence[int] = (0,),
    error: str = "",
    failed: Sequence[int] = (),
) -> None:
    for rank in ranks:
        result = OpResult(op.op_id, 1, 0.0, error or ("bad" if failed else ""), pack_ids(failed))
        leader.apply(WorkerReport(rank, (result,)))


def is_at_rest(leader: Leader) -> bool:
    """Whether nothing is pinned, reserved, in flight or followed."""
    pools = (leader.pool, below(leader).disk)
    held = [(pool.num_pinned, pool.num_reserved) for pool in pools]
    books = (leader.num_ops_in_flight, leader.num_slots, leader.has_work())
    return held == [(0, 0), (0, 0)] and books == (0, 0, False)
