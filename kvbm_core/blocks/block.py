"""What a program holds: a list of blocks, a block, a layer of one.

Lives here: handles. Does not live here: who holds what (see `kvbm_core.blocks.tier`).
Invariant: a block goes back to its tier when its last handle and the last tensor made from it are
gone; the content of a registered block is shared and must not be written.

Names and shapes are those of Dynamo's Python binding (lib/bindings/python/rust/llm/block_manager).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch

from kvbm_core.blocks.geometry import BlockGeometry
from kvbm_core.blocks.sequence import TokenSequence, TokenSpan
from kvbm_core.blocks.state import BlockEvent, BlockState, moved
from kvbm_core.blocks.tier import Lease
from kvbm_core.errors import IllegalTransition
from kvbm_core.types import BlockId, Tier


class _Exporter(ABC):
    """DLPack without a copy. The tensor keeps the block from being reused, also after `release`."""

    @abstractmethod
    def _tensor(self) -> torch.Tensor:
        """The bytes; raises IllegalTransition after `release` and `close`."""

    def __dlpack__(
        self,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule; arguments as in the array API standard. Raises as `_tensor`."""
        given = {
            "stream": stream,
            "max_version": max_version,
            "dl_device": dl_device,
            "copy": copy,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return self._tensor().__dlpack__(**chosen)

    def __dlpack_device__(self) -> tuple[Any, int]:
        """DLPack's device type and index."""
        device: tuple[Any, int] = self._tensor().__dlpack_device__()
        return device


class Layer(_Exporter):
    """One layer of a block; a tensor of shape ``[1, 1, outer_dim, page_size, inner_dim]``."""

    def __init__(self, lease: Lease, layer: int) -> None:
        self._lease = lease
        self._layer = layer

    def _tensor(self) -> torch.Tensor:
        lease = self._lease
        return lease.tier.memory.layer(lease.block_id, self._layer, lease.hold)


class Block(_Exporter):
    """One block; a sequence of its layers, and a tensor of shape
    ``[1, num_layer, outer_dim, page_size, inner_dim]``.

    Its states: see `kvbm_core.blocks.state`. Every method raises IllegalTransition after `release`,
    and where the state does not allow it.
    """

    def __init__(self, lease: Lease, geometry: BlockGeometry) -> None:
        self._lease = lease
        self._geometry = geometry

    def __len__(self) -> int:
        return self._geometry.num_layer

    def __getitem__(self, index: int) -> Layer:
        return Layer(self._lease, range(len(self))[index])

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.to_list())

    def _tensor(self) -> torch.Tensor:
        return self._lease.tier.memory.block(self._lease.block_id, self._lease.hold)

    def __repr__(self) -> str:
        state = "released" if self._lease.is_released else self._lease.state.value
        return f"Block({self.tier.value} {self.block_id}, {state})"

    def to_list(self) -> list[Layer]:
        return [Layer(self._lease, layer) for layer in range(len(self))]

    @property
    def block_id(self) -> BlockId:
        return self._lease.block_id

    @property
    def tier(self) -> Tier:
        return self._lease.tier.tier

    @property
    def state(self) -> BlockState:
        return self._lease.state

    @property
    def tokens(self) -> list[int]:
        """Those it has so far."""
        span = self._lease.span
        return [] if span is None else span.tokens

    def init_sequence(self, salt: str = "", parent: Block | None = None) -> None:
        """Begin to fill the block: with the first tokens of a sequence, or with those after
        `parent`, a complete block of the same manager.

        salt: blocks of different salts never match each other; a parent's goes on.
        """
        lease = self._usable()
        with lease.tier.lock:
            target = moved(lease.state, BlockEvent.SEQUENCE_BEGUN)
            if parent is None:
                sequence = TokenSequence(self._geometry.root(salt), self._geometry.page_size)
                lease.span = sequence.span(0)
            else:
                lease.span = self._span_after(parent, salt)
            lease.state = target

    def add_token(self, token: int) -> None:
        """Raises IllegalTransition where the block is full, OverflowError where the token is no
        u32."""
        if self.add_tokens([token]):
            raise IllegalTransition(f"the block has all its {len(self.tokens)} tokens. Commit it.")

    def add_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Add what there is room for; returns the others. Raises OverflowError as `add_token`."""
        lease = self._usable()
        with lease.tier.lock:
            lease.state = moved(lease.state, BlockEvent.TOKENS_ADDED)
            assert lease.span is not None
            return lease.span.add(tokens)

    def commit(self) -> None:
        """All tokens are there: fix the key. Raises IllegalTransition where some are missing."""
        lease = self._usable()
        with lease.tier.lock:
            target = moved(lease.state, BlockEvent.COMMITTED)
            assert lease.span is not None
            _ = lease.span.key
            lease.state = target

    def register(self) -> Block:
        """Let others find the block, whose bytes are written. Returns the block that is found: this
        one, or the one that was registered with the same tokens before. Go on with that one, and
        let this one go. Each call counts a use of all blocks before; for many at once,
        `BlockList.register` counts one."""
        lease = self._usable()
        return Block(lease.tier.register([lease])[0], self._geometry)

    def release(self) -> None:
        """Give the block back now, for all its handles. A registered one stays in the cache until
        its room is needed. May be repeated."""
        if not self._lease.is_released:
            self._lease.release()

    def _usable(self) -> Lease:
        _ = self._lease.hold
        return self._lease

    def _span_after(self, parent: Block, salt: str) -> TokenSpan:
        lease = parent._usable()
        if salt:
            raise IllegalTransition("a salt beside a parent. Leave it out: the parent's goes on.")
        if lease.tier.lock is not self._lease.tier.lock:
            raise IllegalTransition("the parent is of another block manager. Fill both from one.")
        if lease.span is None or lease.state in (BlockState.RESET, BlockState.PARTIAL):
            raise IllegalTransition(f"the parent is {lease.state.value}. Commit it first.")
        return lease.span.next()


class BlockList(Sequence[Block]):
    """Blocks of one tier. Indexing and iterating make new handles of the same blocks."""

    def __init__(self, leases: Sequence[Lease], geometry: BlockGeometry) -> None:
        self._leases = list(leases)
        self._geometry = geometry

    def __len__(self) -> int:
        return len(self._leases)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> BlockList: ...
    def __getitem__(self, index: int | slice) -> Block | BlockList:
        if isinstance(index, slice):
            return BlockList(self._leases[index], self._geometry)
        return Block(self._leases[index], self._geometry)

    def __repr__(self) -> str:
        return f"BlockList({self.to_list()})"

    def to_list(self) -> list[Block]:
        return [Block(lease, self._geometry) for lease in self._leases]

    @property
    def leases(self) -> list[Lease]:
        """Of the blocks, for this package."""
        return self._leases

    @property
    def block_ids(self) -> list[BlockId]:
        return [lease.block_id for lease in self._leases]

    def fill(self, tokens: Sequence[int], salt: str = "", parent: Block | None = None) -> None:
        """`init_sequence`, `add_tokens` and `commit` of each block in turn; a last one that stays
        short of tokens is left PARTIAL, those beyond it RESET.

        Raises, before anything is changed, IllegalTransition where there are more tokens than room
        or a block is not RESET, and OverflowError where a token is no u32.
        """
        room = len(self) * self._geometry.page_size
        if len(tokens) > room:
            raise IllegalTransition(
                f"{len(tokens)} tokens for {len(self)} blocks with room for {room}. Allocate more."
            )
        for lease in self._leases:
            lease.check(BlockEvent.SEQUENCE_BEGUN)
        tokens, size = array("I", tokens), self._geometry.page_size
        for start, block in zip(range(0, len(tokens), size), self, strict=False):
            block.init_sequence("" if start else salt, parent)
            block.add_tokens(tokens[start : start + size])
            if start + size <= len(tokens):
                block.commit()
            parent = block

    def register(self) -> BlockList:
        """`Block.register` of all or, where one can't be, none; returns those that are found."""
        if not self._leases:
            return self
        return BlockList(self._leases[0].tier.register(self._leases), self._geometry)

    def release(self) -> None:
        """`Block.release` of each."""
        for block in self:
            block.release()
