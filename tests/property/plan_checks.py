"""What the simulated engine checks of each plan, each op's end and each answer to a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvbm_core.cascade import MAX_WAIT_SECONDS, Cascade
from kvbm_core.types import BlockHash, BlockId, OpId, Tier, TransferOp
from tests.property.cluster import key_at
from tests.property.content import Content
from tests.property.requests import BLOCK_SIZE, OpMirror, Request

if TYPE_CHECKING:
    from tests.property.engine import Engine


def check_plan(
    engine: Engine,
    ops: Sequence[TransferOp],
    fences: Iterable[OpId],
    before: Mapping[BlockId, Content],
) -> None:
    """No op comes twice or moves what another one moves already. before: what the device held
    before this step's forward, for offloads that it overwrites."""
    known = {*engine.ops, *(op.op_id for op in ops)}
    in_doubt = engine.abandoned  # a rank that was lost may be alive, and still at it
    assert set(fences) <= known | in_doubt, "a fence on an op that is not in flight"
    for op in ops:
        assert op.op_id not in engine.ops, "an op was planned twice"
        held = before if op.op_id in set(fences) else engine.device.contents
        contents = _contents_of(engine, op, held)
        mirror = OpMirror(op, contents, set(range(len(engine.ranks))), engine.planned_seconds)
        for other in engine.ops.values():
            if other.route == mirror.route:
                assert not set(other.contents) & set(mirror.contents), "the same blocks move twice"
        engine.ops[op.op_id] = mirror


def check_end(engine: Engine, mirror: OpMirror) -> None:
    """Nothing that failed on some rank is kept where it was to go, or where it failed to come from.

    Called when the leader has heard all ranks.
    """
    failed = range(len(mirror.contents)) if mirror.op.is_onboard else mirror.failed_positions
    if not mirror.failed:
        return
    pools = {Tier.HOST: engine.pool, Tier.DISK: engine.disk_pool}
    upward = mirror.op.src.tier if mirror.op.is_upward else None
    for tier in {mirror.op.dst.tier, upward} & pools.keys():
        pool = pools[tier]
        ready = {engine.contents_of_key[key] for key in pool.ready_keys()} if pool else ()
        for position in failed:
            epoch, tokens = mirror.contents[position]
            assert epoch != engine.epoch or tokens not in ready, f"kept in {tier} after a failure"


def check_loaded(engine: Engine, request: Request) -> None:
    """Every rank has what a load that ended well was to bring."""
    contents = request.full_contents(request.num_computed)
    engine.num_loaded_blocks += len(contents) - request.num_hits
    for rank in engine.ranks:
        for block, content in zip(request.table, contents, strict=False):
            assert rank.device(block) == content, (
                f"rank {rank.index} loaded {rank.device(block)}, not {content}"
            )


def check_wait(engine: Engine, request: Request, start: int) -> None:
    """A request told "not yet" waits for another's load, or, for a while, for the disk."""
    if loads_of_others(engine, request, start):
        return
    assert engine.setup.num_disk_blocks and engine.setup.can_wait, "waits for nothing"
    if request.waits_since_seconds is None:
        request.waits_since_seconds = engine.now_seconds
    waited_seconds = engine.planned_seconds - request.waits_since_seconds
    assert waited_seconds <= MAX_WAIT_SECONDS, "waits longer than computing would take"


def loads_of_others(engine: Engine, request: Request, start: int) -> set[int]:
    """Epochs of loads in flight of a block that the request has from `start` on."""
    wanted = {tokens for _, tokens in request.full_contents(len(request.tokens))[start:]}
    return {
        epoch
        for other in [*engine.requests, *engine.held]
        if other is not request and other.loading_ranks
        for epoch, tokens in other.full_contents(other.num_computed)[other.num_hits :]
        if tokens in wanted
    }


def waiting_to_be_written(engine: Engine) -> set[BlockHash]:
    """Blocks of host that were admitted and can't be on disk yet, while disk is in service."""
    cascade = engine.leader.cascade
    if cascade is None or not cascade._can_write:
        return set()
    return {key for key in cascade._queue if engine.pool.is_ready(key)}


def check_none_lost(engine: Engine, waiting: set[BlockHash]) -> None:
    """What waited before the plan is still there, unless the plan found the disk out of service."""
    cascade = engine.leader.cascade
    if isinstance(cascade, Cascade) and cascade._can_write:
        for key in waiting:
            assert engine.pool.is_ready(key), "evicted before it was written to disk"


def _contents_of(engine: Engine, op: TransferOp, held: Mapping[BlockId, Content]) -> list[Content]:
    if op.is_onboard:
        return _onboarded(engine, op)
    if not op.touches_device:
        return _moved_below(engine, op)
    contents = [held[block] for block in op.src.ids()]
    ready = {engine.contents_of_key[key] for key in engine.pool.ready_keys()}
    for epoch, tokens in contents:
        assert len(tokens) % BLOCK_SIZE == 0, f"{op} stores an incomplete block"
        assert epoch != engine.epoch or tokens not in ready, f"{op} stores {tokens} again"
    return contents


def _onboarded(engine: Engine, op: TransferOp) -> list[Content]:
    request = next(r for r in [*engine.requests, *engine.held] if r.id in op.request_ids)
    place = request.num_hits
    assert list(op.dst.ids()) == request.table[place : place + len(op.dst)]
    return request.full_contents(request.num_computed)[place:]


def _moved_below(engine: Engine, op: TransferOp) -> list[Content]:
    """Of an op between host and disk, whose blocks are READY here and RESERVED there."""
    keys = [key_at(op, position) for position in range(len(op.src))]
    source, target = engine.pool, engine.disk_pool
    if op.is_upward:
        source, target = target, source
    assert source is not None
    assert target is not None
    for key, src, dst in zip(keys, op.src.ids(), op.dst.ids(), strict=True):
        assert source._ready.get(key) == src, f"{op} moves a block that is not there"
        assert target._reserved.get(key) == dst, f"{op} writes a block that is not reserved for it"
    return [(engine.epoch, engine.contents_of_key[key]) for key in keys]
