"""What leader and workers say to each other, and its versioned codec.

    XPUB, leader → all:      Beat
    ROUTER, worker → leader: Hello, Alive, Data (a report), Ack, Goodbye
    ROUTER, leader → worker: Welcome, Refusal, Dropped, Data (a plan), Ack

Lives here: the messages as data. Does not live here: when they are sent, sockets.
Invariant: `decode` returns a message or raises WireError, whatever the bytes are.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from kvbm_core.errors import WireError
from kvbm_core.wire import MAX_MESSAGE_BYTES, WIRE_VERSION, Handshake, check_handshake

_MAGIC = b"kvbm"
_PREFIX = _MAGIC + bytes([WIRE_VERSION])
_OVERHEAD_BYTES = 4096

Incarnation = Annotated[str, msgspec.Meta(max_length=64)]
"""Bounded, since answers repeat it: what came must not make one that is too large to send."""


class OtherVersion(WireError):
    """The message is of another release; its content can't be read."""


class LeaderAddress(msgspec.Struct, frozen=True):
    """Where a leader is. session: of this leader's life, 32 hex digits; equal for all its ranks.
    beat_endpoint, endpoint: of its two sockets, as ZMQ writes them."""

    session: str
    beat_endpoint: str
    endpoint: str

    def encode(self) -> str:
        """One line of ASCII text, to be handed to workers by whatever means."""
        return msgspec.json.encode(self).decode("ascii")

    @classmethod
    def decode(cls, text: str | bytes) -> LeaderAddress:
        """What `encode` made. Raises WireError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WireError(f"{text!r} is no leader's address: {error}") from error


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """The leader lives. port: of its ROUTER socket, 0 where that is no tcp."""

    session: str
    identity: str
    port: int = 0


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A worker wants to join. incarnation: random, new with each attempt to join with an empty
    memory."""

    session: str
    identity: str
    incarnation: Incarnation
    num_ranks: int
    handshake: Handshake


class Alive(msgspec.Struct, frozen=True, array_like=True, tag="alive"):
    """A worker that has joined lives."""

    rank: int
    incarnation: Incarnation


class Data(msgspec.Struct, frozen=True, array_like=True, tag="data"):
    """One encoded report or plan; seq counts from 1 in each direction of one incarnation."""

    rank: int
    incarnation: Incarnation
    seq: int
    payload: bytes


class Ack(msgspec.Struct, frozen=True, array_like=True, tag="ack"):
    """Everything up to seq has arrived."""

    rank: int
    incarnation: Incarnation
    seq: int


class Goodbye(msgspec.Struct, frozen=True, array_like=True, tag="goodbye"):
    """The worker leaves."""

    rank: int
    incarnation: Incarnation


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    incarnation: Incarnation


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """The worker can't join; asking again would not help."""

    incarnation: Incarnation
    reason: str


class Dropped(msgspec.Struct, frozen=True, array_like=True, tag="dropped"):
    """The leader counts this incarnation as lost, or never knew it."""

    incarnation: Incarnation


Message: TypeAlias = Beat | Hello | Alive | Data | Ack | Goodbye | Welcome | Refusal | Dropped

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Encode a message. Raises WireError above the size that the other side would take."""
    data = _PREFIX + _encoder.encode(message)
    _check_size(data)
    return data


def decode(data: bytes) -> Message:
    """Decode a message. Raises OtherVersion, else WireError where it is not one."""
    _check_size(data)
    if not data.startswith(_MAGIC) or len(data) < len(_PREFIX):
        raise WireError(f"{len(data)} bytes that are no message of ours")
    if (version := data[len(_MAGIC)]) != WIRE_VERSION:
        raise OtherVersion(
            f"the other side has wire version {version}, this process speaks {WIRE_VERSION}: "
            "run the same kvbm-connectors release on every rank"
        )
    try:
        message = _decoder.decode(memoryview(data)[len(_PREFIX) :])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"message of {len(data)} bytes is malformed: {error}") from error
    if isinstance(message, Alive | Data | Ack | Goodbye) and message.rank < 0:
        raise WireError(f"rank {message.rank} of a message is negative")
    if isinstance(message, Hello):
        check_handshake(message.handshake)
    return message


def check_payload(payload: bytes) -> None:
    """Raise WireError for a report or plan that the other side would refuse for its size."""
    if len(payload) > MAX_MESSAGE_BYTES:
        size = f"{len(payload)} bytes"
        raise WireError(f"a payload of {size} exceeds the limit of {MAX_MESSAGE_BYTES}")


def _check_size(data: bytes) -> None:
    limit = MAX_MESSAGE_BYTES + _OVERHEAD_BYTES
    if len(data) > limit:
        raise WireError(f"message of {len(data)} bytes exceeds the limit of {limit}")
