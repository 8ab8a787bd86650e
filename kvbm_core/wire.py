"""Messages between leader and workers, and their versioned msgpack codec.

Lives here: what a step's plan and a rank's report are, how they become bytes and back.
Does not live here: who sends them (the engine's own metadata, or a channel).
Invariant: `decode_*` returns a message that obeys every bound stated here, or raises WireError.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from kvbm_core.errors import WireError
from kvbm_core.types import (
    KEY_BYTES,
    BlockHash,
    BlockId,
    OpId,
    OpResult,
    RequestId,
    Tier,
    TransferOp,
    pack_ids,
    unpack_ids,
)

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 2**20
GENERATION_BYTES = 16
MAX_INVENTORY_BLOCKS = (MAX_MESSAGE_BYTES - 2**16) // (KEY_BYTES + 4)
"""In one message, beside what else it says."""


class DiskReset(msgspec.Struct, frozen=True, array_like=True):
    """Every block on disk is void; what comes now belongs to a new generation.

    generation: GENERATION_BYTES. persists: a later process may use blocks of this generation.
    """

    generation: bytes
    persists: bool


class DiskInventory(msgspec.Struct, frozen=True, array_like=True):
    """What one rank's disk holds at start, oldest first.

    generation: empty where nothing can be used. keys: KEY_BYTES a block; block_ids: packed.
    """

    num_blocks: int
    generation: bytes = b""
    keys: bytes = b""
    block_ids: bytes = b""

    @classmethod
    def of(
        cls, num_blocks: int, generation: bytes, entries: Sequence[tuple[BlockHash, BlockId]]
    ) -> DiskInventory:
        keys = b"".join(key for key, _ in entries)
        return cls(num_blocks, generation, keys, pack_ids(block_id for _, block_id in entries))

    def ids(self) -> array[int]:
        return unpack_ids(self.block_ids)

    def newest(self, num_blocks: int) -> DiskInventory:
        """Without the oldest blocks beyond so many."""
        num_left_out = len(self.block_ids) // 4 - num_blocks
        if num_left_out <= 0:
            return self
        return msgspec.structs.replace(
            self,
            keys=self.keys[num_left_out * KEY_BYTES :],
            block_ids=self.block_ids[num_left_out * 4 :],
        )


class Handshake(msgspec.Struct, frozen=True, array_like=True):
    """One rank's geometry, sent once when its memory is open; bytes are of that rank.

    block_size: tokens. fingerprint: of its layout. disk: what its files hold; None without a tier.
    """

    rank: int
    num_host_blocks: int
    num_device_blocks: int
    block_size: int
    block_bytes: int
    fingerprint: str
    disk: DiskInventory | None = None


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What every rank does in one engine step.

    fences: ops that must have ended before this step's forward may write device blocks.
    ops: submitted after the forward. drain: finished requests to report once their ops ended.
    idle: the step has no forward, so a worker may wait a moment instead of spinning.
    disk_reset: to be done before any op of this plan.
    """

    version: int = WIRE_VERSION
    ops: tuple[TransferOp, ...] = ()
    fences: tuple[OpId, ...] = ()
    drain: tuple[RequestId, ...] = ()
    idle: bool = False
    disk_reset: DiskReset | None = None

    def __bool__(self) -> bool:
        return bool(self.ops or self.fences or self.drain or self.idle or self.disk_reset)


class WorkerReport(msgspec.Struct, frozen=True, array_like=True):
    """Ops that ended on one rank since its last report."""

    rank: int
    results: tuple[OpResult, ...]
    version: int = WIRE_VERSION


_Message = TypeVar("_Message", StepPlan, WorkerReport)

_encoder = msgspec.msgpack.Encoder()
_plan_decoder = msgspec.msgpack.Decoder(StepPlan)
_report_decoder = msgspec.msgpack.Decoder(WorkerReport)


def encode(message: StepPlan | WorkerReport) -> bytes:
    """Encode a message as msgpack."""
    return _encoder.encode(message)


def decode_plan(data: bytes) -> StepPlan:
    """Decode a plan. Raises WireError where it is not one."""
    plan = _decode(_plan_decoder, data)
    for op in plan.ops:
        _check_op(op)
    if plan.disk_reset is not None and len(plan.disk_reset.generation) != GENERATION_BYTES:
        raise WireError(
            f"disk generation of {len(plan.disk_reset.generation)} bytes, not {GENERATION_BYTES}"
        )
    return plan


def decode_report(data: bytes) -> WorkerReport:
    """Decode a report. Raises WireError where it is not one."""
    report = _decode(_report_decoder, data)
    if report.rank < 0:
        raise WireError(f"rank {report.rank} of a worker report is negative")
    for result in report.results:
        if len(result.failed) % 4:
            raise WireError(f"op {result.op_id} names failed blocks in {len(result.failed)} bytes")
        if result.failed and result.ok:
            raise WireError(f"op {result.op_id} names failed blocks and no error")
    return report


def check_handshake(handshake: Handshake) -> None:
    """Raise WireError where it breaks a bound."""
    disk = handshake.disk
    counts = [handshake.num_host_blocks, handshake.num_device_blocks, handshake.block_size]
    counts += [handshake.block_bytes] + ([] if disk is None else [disk.num_blocks])
    if handshake.rank < 0 or min(counts) < 1:
        raise WireError(f"handshake of rank {handshake.rank} has a count below 1: {counts}")
    if disk is None:
        return
    if disk.generation and len(disk.generation) != GENERATION_BYTES:
        raise WireError(f"disk generation of {len(disk.generation)} bytes, not {GENERATION_BYTES}")
    if len(disk.block_ids) % 4 or len(disk.keys) != len(disk.block_ids) // 4 * KEY_BYTES:
        raise WireError(
            f"disk inventory has {len(disk.keys)} bytes of keys for {len(disk.block_ids)} of ids"
        )


def _decode(decoder: msgspec.msgpack.Decoder[_Message], data: bytes) -> _Message:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        message = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"message of {len(data)} bytes is malformed: {error}") from error
    if message.version != WIRE_VERSION:
        raise WireError(
            f"message has wire version {message.version}, this process speaks {WIRE_VERSION}: "
            "run the same kvbm-connectors release on every rank"
        )
    return message


def _check_op(op: TransferOp) -> None:
    if len(op.src.packed) % 4 or len(op.src.packed) != len(op.dst.packed):
        raise WireError(
            f"op {op.op_id} copies {len(op.src.packed)} bytes of source ids "
            f"to {len(op.dst.packed)} bytes of destination ids"
        )
    num_key_bytes = len(op.src) * KEY_BYTES if Tier.DISK in (op.src.tier, op.dst.tier) else 0
    if len(op.keys) != num_key_bytes:
        raise WireError(f"op {op.op_id} has {len(op.keys)} bytes of keys, not {num_key_bytes}")
    if op.src.tier is op.dst.tier:
        raise WireError(f"op {op.op_id} copies within the {op.src.tier.value} tier")
