"""What must hold of the simulated engine and its leader after every call, and when idle."""

from __future__ import annotations

from collections import Counter

from kvbm_core.cascade import DEADLINE_SECONDS
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.slot import SlotState
from kvbm_core.types import BlockHash, BlockId, RequestId
from tests.property.engine import Engine


def check(engine: Engine) -> None:
    """What holds always."""
    for pool in pools_of(engine):
        check_conserved(pool)
        check_held(engine, pool)
    if engine.lost:
        assert not any(pool.ready_keys() for pool in pools_of(engine))
    check_ready(engine)
    check_ready_on_disk(engine)
    for request in engine.requests:
        assert engine.leader.has_slot(request.id)
        assert is_loading(engine.leader, request.id) == (request.state == "loading")


def check_idle(engine: Engine) -> None:
    """Nothing is left of requests that are all done."""
    leader = engine.leader
    for pool in pools_of(engine):
        assert (pool.num_pinned, pool.num_reserved) == (0, 0)
    assert (leader.num_slots, leader.num_ops_in_flight) == (0, 0)
    assert not engine.held, "the engine was never told to free these"
    assert not engine.ops
    assert engine.device.num_free == engine.device.num_blocks
    num_ended = sum(route.num_ops for route in leader.counters.routes.values())
    assert num_ended == engine.num_ended_ops
    assert engine.num_lost or not leader.counters.num_bad_reports
    check(engine)


def check_at_rest(engine: Engine) -> None:
    """All requests are done, and only a disk that has not answered for long owes anything."""
    assert not engine.requests
    assert not engine.leader.has_work()
    if mirrors := engine.ops.values():
        assert not any(mirror.op.touches_device for mirror in mirrors)
        began_seconds = min(mirror.began_seconds for mirror in mirrors)
        assert engine.planned_seconds - began_seconds > DEADLINE_SECONDS
    check(engine)


def pools_of(engine: Engine) -> list[BlockPool]:
    return [engine.pool] if engine.disk_pool is None else [engine.pool, engine.disk_pool]


def check_conserved(pool: BlockPool) -> None:
    """Every id is FREE, RESERVED or READY, exactly once."""
    ids = [
        *pool._free,
        *pool._reserved.values(),
        *pool._ready.values(),
        *pool._detached,
        *pool._unkeyed,
    ]
    assert sorted(ids) == list(range(pool.num_blocks))
    assert pool.num_free + pool.num_reserved + pool.num_ready == pool.num_blocks


def check_held(engine: Engine, pool: BlockPool) -> None:
    """What an op in flight reads is pinned, and nothing else; what it writes is RESERVED."""
    ops = [mirror.op for mirror in engine.ops.values()]
    read = dict(Counter(i for op in ops if op.src.tier is pool.tier for i in op.src.ids()))
    assert read == pool._pins, f"{pool.tier}: ops read {read}, pinned is {pool._pins}"
    written = {i for op in ops if op.dst.tier is pool.tier for i in op.dst.ids()}
    assert written <= {*pool._reserved.values(), *pool._unkeyed}, f"{pool.tier} is written"


def check_ready_on_disk(engine: Engine) -> None:
    """A block READY on disk holds the right bytes on every rank, or such as fail their check."""
    for key, disk_id in ready_blocks(engine.disk_pool).items() if engine.disk_pool else ():
        content = (engine.epoch, engine.contents_of_key[key])
        for rank, disk in zip(engine.ranks, engine.disks, strict=True):
            assert disk_id in disk.corrupted or disk.contents.get(disk_id) == content, (
                f"disk block {disk_id} is READY, but rank {rank.index} has "
                f"{disk.contents.get(disk_id)}, not {content}"
            )


def check_ready(engine: Engine) -> None:
    """A READY block holds the right bytes on every rank."""
    for key, host_id in ready_blocks(engine.pool).items():
        content = (engine.epoch, engine.contents_of_key[key])
        for rank in engine.ranks:
            assert rank.host(host_id) == content, (
                f"host block {host_id} is READY, but rank {rank.index} has "
                f"{rank.host(host_id)}, not {content}"
            )


def is_loading(leader: Leader, request_id: RequestId) -> bool:
    """Whether an onboard of that request is in flight, as the leader sees it."""
    return leader._slots[request_id].state is SlotState.LOADING


def ready_blocks(pool: BlockPool) -> dict[BlockHash, BlockId]:
    """READY keys with their ids; reads the pool's own map, since a pin would count as a use."""
    return dict(pool._ready)
