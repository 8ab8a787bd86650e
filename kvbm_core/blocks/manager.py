"""The library's front door: device and host blocks that a program allocates, fills and finds.

Lives here: a program's calls, in terms of tiers and copies. Does not live here: books, memory.

Compatible with `BlockManager` of Dynamo's Python binding (lib/bindings/python/rust/llm,
signature and behaviour as of 2025): same names, same order of arguments, same shapes; asking for
too many blocks raises at once instead of waiting.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

from kvbm_core.blocks.block import BlockList
from kvbm_core.blocks.copies import Copies
from kvbm_core.blocks.geometry import BlockGeometry, check_count, geometry_of
from kvbm_core.blocks.memory import BlockMemory, open_device, open_host
from kvbm_core.blocks.sequence import TokenSequence
from kvbm_core.blocks.state import BlockState
from kvbm_core.blocks.tier import BlockTier, Lease
from kvbm_core.build import ENGINES
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import BlocksUnavailable, IllegalTransition
from kvbm_core.eviction import Lru
from kvbm_core.pool import BlockPool
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import Blocks, Tier


class BlockManager:
    """Blocks of one geometry on one device and in host memory. Thread-safe; also a context manager.

    worker_id: yours, for telling managers apart. num_layer, outer_dim (2: keys and values, 1: MLA),
    page_size (tokens a block), inner_dim (elements a token): the shape of a block. dtype:
    ``fp16``, ``bf16``, ``fp32``, their torch names, or None for fp16. host_num_blocks,
    device_num_blocks: None for no such tier. device_id: of the GPU; without one, device blocks
    are in ordinary memory.

    Owns the memory: `close` frees it, and so does dropping the manager and its blocks. A tensor
    made from a block keeps it mapped for as long as it lives.
    Raises ConfigError on bad values and on more memory than is free.
    """

    def __init__(
        self,
        worker_id: int,
        num_layer: int,
        outer_dim: int,
        page_size: int,
        inner_dim: int,
        dtype: Any = "fp16",
        host_num_blocks: int | None = None,
        device_num_blocks: int | None = None,
        device_id: int = 0,
    ) -> None:
        check_count("worker_id", worker_id, least=0)
        check_count("device_id", device_id, least=0)
        if host_num_blocks is not None:
            check_count("host_num_blocks", host_num_blocks, least=1)
        if device_num_blocks is not None:
            check_count("device_num_blocks", device_num_blocks, least=1)
        self.worker_id = worker_id
        self._geometry = geometry_of(
            num_layer=num_layer,
            outer_dim=outer_dim,
            page_size=page_size,
            inner_dim=inner_dim,
            dtype=dtype,
        )
        memories: dict[Tier, BlockMemory] = {}
        if host_num_blocks is not None:
            memories[Tier.HOST] = open_host(host_num_blocks, self._geometry)
        if device_num_blocks is not None:
            memories[Tier.DEVICE] = open_device(device_num_blocks, self._geometry, device_id)
        lock = threading.Lock()
        self._tiers = {name: _tier(name, memory, lock) for name, memory in memories.items()}
        self._copies: Copies | None = None
        if len(memories) == 2:
            open_engine = partial(_open_engine, self._geometry, memories)
            self._copies = Copies(open_engine, memories[Tier.DEVICE].device)
            # The thread holds the memory; told to end, it lets go of it.
            weakref.finalize(self, self._copies.jobs.put, None).atexit = False

    def __enter__(self) -> BlockManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        tiers = ", ".join(tier.value for tier in self._tiers)
        return f"BlockManager(worker {self.worker_id}: {tiers or 'no blocks'})"

    def block_size(self) -> int:
        """Tokens of a block."""
        return self._geometry.page_size

    @property
    def num_available_host_blocks(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones that nobody holds."""
        return self._tier(Tier.HOST).num_available

    @property
    def num_available_device_blocks(self) -> int:
        """As `num_available_host_blocks`."""
        return self._tier(Tier.DEVICE).num_available

    def allocate_host_blocks_blocking(self, count: int) -> BlockList:
        """`count` blocks of host memory, of unspecified content.

        Takes cached blocks that nobody holds, least recently used first. Raises BlocksUnavailable,
        at once and without giving any, where there are fewer; ConfigError where count is no count.
        """
        return self._allocate(Tier.HOST, count)

    async def allocate_host_blocks(self, count: int) -> BlockList:
        """As `allocate_host_blocks_blocking`; neither waits for blocks."""
        return self._allocate(Tier.HOST, count)

    def allocate_device_blocks_blocking(self, count: int) -> BlockList:
        """As `allocate_host_blocks_blocking`, on the device."""
        return self._allocate(Tier.DEVICE, count)

    async def allocate_device_blocks(self, count: int) -> BlockList:
        """As `allocate_host_blocks`, on the device."""
        return self._allocate(Tier.DEVICE, count)

    def match_host_blocks(self, tokens: Sequence[int], salt: str = "") -> BlockList:
        """The registered host blocks of the longest prefix of `tokens`, held for the caller; maybe
        none. Counts as a use of them. Raises OverflowError at a token that is no u32."""
        return self._match(Tier.HOST, tokens, salt)

    def match_device_blocks(self, tokens: Sequence[int], salt: str = "") -> BlockList:
        """As `match_host_blocks`, on the device."""
        return self._match(Tier.DEVICE, tokens, salt)

    def offload_blocking(self, blocks: BlockList) -> BlockList:
        """Copies of device blocks in host memory, in the same states, with the same tokens.

        A registered block that host has already is not copied but found. Raises BlocksUnavailable
        as an allocation; IllegalTransition for PARTIAL or released blocks, or those of another tier
        or manager.
        """
        return self._copy_blocking(blocks, Tier.DEVICE, Tier.HOST)

    async def offload(self, blocks: BlockList) -> BlockList:
        """As `offload_blocking`, without keeping the event loop. Cancelled: the copy goes on, and
        its blocks are given back when it ends."""
        return await self._copy(blocks, Tier.DEVICE, Tier.HOST)

    def onboard_blocking(self, blocks: BlockList) -> BlockList:
        """As `offload_blocking`, from host memory to the device."""
        return self._copy_blocking(blocks, Tier.HOST, Tier.DEVICE)

    async def onboard(self, blocks: BlockList) -> BlockList:
        """As `offload`, from host memory to the device."""
        return await self._copy(blocks, Tier.HOST, Tier.DEVICE)

    def reset(self) -> None:
        """Forget every registered block. Those held stay valid for their holders, but match no
        more."""
        for tier in self._tiers.values():
            tier.forget()

    def close(self) -> None:
        """Let copies in flight end, and free the memory that no tensor uses. Blocks raise
        IllegalTransition from now on. May be repeated."""
        if self._copies is not None:
            self._copies.close()
        for tier in self._tiers.values():
            tier.close()

    def _tier(self, name: Tier) -> BlockTier:
        tier = self._tiers.get(name)
        if tier is None:
            raise BlocksUnavailable(
                f"this manager has no {name.value} blocks. Make it with {name.value}_num_blocks."
            )
        return tier

    def _allocate(self, name: Tier, count: int) -> BlockList:
        check_count("count", count, least=0)
        return BlockList(self._tier(name).allocate(count), self._geometry)

    def _match(self, name: Tier, tokens: Sequence[int], salt: str) -> BlockList:
        size = self._geometry.page_size
        complete = tokens[: len(tokens) // size * size]
        sequence = TokenSequence(self._geometry.root(salt), size, complete)
        return BlockList(self._tier(name).match(sequence), self._geometry)

    def _copy_blocking(self, blocks: BlockList, src: Tier, dst: Tier) -> BlockList:
        copy = _Copy(blocks, self._tier(src), self._tier(dst), self._geometry)
        assert self._copies is not None, "there are two tiers"
        done = copy.start(self._copies)
        try:
            done.result()
        finally:
            del done  # its error holds this frame, and blocks in such a circle would stay
        return copy.finish()

    async def _copy(self, blocks: BlockList, src: Tier, dst: Tier) -> BlockList:
        copy = _Copy(blocks, self._tier(src), self._tier(dst), self._geometry)
        assert self._copies is not None, "there are two tiers"
        await asyncio.wrap_future(copy.start(self._copies))
        return copy.finish()


class _Copy:
    """One call's blocks on their way from one tier to another."""

    def __init__(
        self, blocks: BlockList, src: BlockTier, dst: BlockTier, geometry: BlockGeometry
    ) -> None:
        self._leases = list(blocks.leases)
        for lease in self._leases:
            _check_source(lease, src)
        self._src = src
        self._dst = dst
        self._geometry = geometry
        self._sources = [(lease.state, lease.span) for lease in self._leases]
        self._targets = dst.prepare_copies(self._leases)

    def start(self, copies: Copies) -> Future[None]:
        """Copy the blocks that were not found."""
        holds = [lease.hold for lease in (*self._leases, *self._targets)]
        moving = [
            (source.block_id, target.block_id)
            for source, target in zip(self._leases, self._targets, strict=True)
            if target.state is BlockState.RESET
        ]
        src = Blocks.of(self._src.tier, (source for source, _ in moving))
        dst = Blocks.of(self._dst.tier, (target for _, target in moving))
        return copies.start(src, dst, holds)

    def finish(self) -> BlockList:
        """The bytes are there."""
        return BlockList(self._dst.finish_copies(self._targets, self._sources), self._geometry)


def _check_source(lease: Lease, tier: BlockTier) -> None:
    _ = lease.hold
    if lease.tier is not tier:
        raise IllegalTransition(
            f"block {lease.block_id} is of {lease.tier.tier.value} or of another manager. Give "
            f"{tier.tier.value} blocks of this one."
        )
    if lease.state is BlockState.PARTIAL:
        raise IllegalTransition(f"block {lease.block_id} is partial. Fill it and commit it first.")


def _tier(name: Tier, memory: BlockMemory, lock: threading.Lock) -> BlockTier:
    return BlockTier(BlockPool(name, len(memory.tensor), Lru()), memory, lock)


def _open_engine(geometry: BlockGeometry, memories: Mapping[Tier, BlockMemory]) -> TransferEngine:
    """Of the device's kind, with the default settings."""
    device, host = memories[Tier.DEVICE], memories[Tier.HOST]
    make = ENGINES[device.device.type]
    layout = geometry.layout(len(device.tensor))
    engine: TransferEngine = make(KvbmConfig(), layout, [device.tensor.view(-1)], host.tensor)
    return engine
