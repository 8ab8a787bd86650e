"""Handshakes and protocols for tests of the channel."""

from __future__ import annotations

import msgspec

from kvbm_core.channel.leader_protocol import LeaderProtocol, Terms
from kvbm_core.channel.messages import Hello, Message
from kvbm_core.channel.timing import Timing
from kvbm_core.types import OpResult
from kvbm_core.wire import DiskInventory, Handshake, WorkerReport, encode

TIMING = Timing(beat_seconds=1.0, timeout_seconds=10.0, resend_seconds=1.0)
SESSION = "5e55"
IDENTITY = "a model"
BLOCK_SIZE = 4
HANDSHAKE = Handshake(0, 8, 16, BLOCK_SIZE, 128, "f1a7")


def terms(num_ranks: int = 2, *, has_disk: bool = False) -> Terms:
    return Terms(SESSION, IDENTITY, num_ranks, BLOCK_SIZE, has_disk)


def hello(rank: int = 0, incarnation: str = "", **changes: object) -> Hello:
    """A worker that agrees, except for `changes` of the message or its handshake."""
    of_hello = {
        name: changes.pop(name) for name in list(changes) if name in Hello.__struct_fields__
    }
    handshake = msgspec.structs.replace(HANDSHAKE, rank=rank, **changes)
    agreed = Hello(SESSION, IDENTITY, incarnation or f"i{rank}", 2, handshake)
    return msgspec.structs.replace(agreed, **of_hello)


def disk(num_blocks: int = 8) -> DiskInventory:
    return DiskInventory(num_blocks)


def report(rank: int = 0, op_id: int = 1) -> bytes:
    return encode(WorkerReport(rank, (OpResult(op_id, 1, 0.0),)))


def sent(protocol: LeaderProtocol, route: bytes, kind: type[Message]) -> list[Message]:  # type: ignore[valid-type]
    """Messages of a kind to one worker, in order."""
    return [m for to, m in protocol.outgoing if to == route and isinstance(m, kind)]
