"""The nouns every part of the suite shares.

Lives here: identifiers, tiers, packed block lists, transfer operations and their results.
Does not live here: anything that decides or acts.
Invariant: values of this module are immutable and mean the same in every process.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from enum import Enum
from typing import NewType

import msgspec

BlockHash = NewType("BlockHash", bytes)
"""Key of one block: covers its tokens, every token before them, and the cache namespace."""

KEY_BYTES = 32
"""Length of a key wherever keys are packed or stored."""

BlockId = int
"""Index of a block inside one tier."""

OpId = int
"""Number of a transfer operation, unique within one leader."""

RequestId = str

_BIG_ENDIAN = sys.byteorder == "big"


class Tier(str, Enum):
    """Where a block's bytes are, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


_ORDER = {tier: position for position, tier in enumerate(Tier)}
_ROUTES = {(src, dst): f"{src.value}_to_{dst.value}" for src in Tier for dst in Tier}


def pack_ids(ids: Iterable[BlockId]) -> bytes:
    """Pack block ids as little-endian u32."""
    packed = array("I", ids)
    if _BIG_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """Unpack what `pack_ids` made. Raises ValueError where the length is no multiple of 4."""
    ids = array("I")
    ids.frombytes(packed)
    if _BIG_ENDIAN:
        ids.byteswap()
    return ids


class Blocks(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of one tier, in order; `packed` is little-endian u32 ids."""

    tier: Tier
    packed: bytes

    @classmethod
    def of(cls, tier: Tier, ids: Iterable[BlockId]) -> Blocks:
        return cls(tier, pack_ids(ids))

    def ids(self) -> array[int]:
        return unpack_ids(self.packed)

    def __len__(self) -> int:
        return len(self.packed) // 4


class TransferOp(msgspec.Struct, frozen=True, array_like=True):
    """Copy `src[i]` to `dst[i]` for every i, on every rank.

    An onboard is for one request; an offload takes along what all requests completed in a step.
    keys: of the blocks, one after another, KEY_BYTES each; only where the op touches disk.
    """

    op_id: OpId
    request_ids: tuple[RequestId, ...]
    src: Blocks
    dst: Blocks
    keys: bytes = b""

    @property
    def is_onboard(self) -> bool:
        """Whether the op writes device blocks."""
        return self.dst.tier is Tier.DEVICE

    @property
    def is_upward(self) -> bool:
        """Whether the op brings blocks nearer to the device: such ops go first."""
        return _ORDER[self.dst.tier] < _ORDER[self.src.tier]

    @property
    def touches_device(self) -> bool:
        return Tier.DEVICE in (self.src.tier, self.dst.tier)

    @property
    def route(self) -> str:
        return _ROUTES[self.src.tier, self.dst.tier]


class OpResult(msgspec.Struct, frozen=True, array_like=True):
    """The one terminal result of an op on one rank. `error` is empty exactly when it succeeded.

    failed: packed positions in the op of the blocks that failed; empty beside an error: all did.
    """

    op_id: OpId
    num_bytes: int
    seconds: float
    error: str = ""
    failed: bytes = b""

    @property
    def ok(self) -> bool:
        return not self.error
