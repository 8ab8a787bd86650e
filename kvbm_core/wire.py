"""Messages between leader and workers, and their versioned msgpack codec.

Lives here: what a step's plan and a rank's report are, how they become bytes and back.
Does not live here: who sends them (the engine's own metadata, or a channel).
Invariant: `decode_*` returns a message that obeys every bound stated here, or raises WireError.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from kvbm_core.errors import WireError
from kvbm_core.types import OpId, OpResult, RequestId, TransferOp

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 64 * 2**20


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """What every rank does in one engine step.

    fences: ops that must have ended before this step's forward may write device blocks.
    ops: submitted after the forward. drain: finished requests to report once their ops ended.
    idle: the step has no forward, so a worker may wait a moment instead of spinning.
    """

    version: int = WIRE_VERSION
    ops: tuple[TransferOp, ...] = ()
    fences: tuple[OpId, ...] = ()
    drain: tuple[RequestId, ...] = ()
    idle: bool = False

    def __bool__(self) -> bool:
        return bool(self.ops or self.fences or self.drain or self.idle)


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
    return plan


def decode_report(data: bytes) -> WorkerReport:
    """Decode a report. Raises WireError where it is not one."""
    report = _decode(_report_decoder, data)
    if report.rank < 0:
        raise WireError(f"rank {report.rank} of a worker report is negative")
    return report


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
    if op.src.tier is op.dst.tier:
        raise WireError(f"op {op.op_id} copies within the {op.src.tier.value} tier")
