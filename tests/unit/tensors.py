"""KV caches as vLLM lays them out: every axis order that its layouts have, with planes for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvbm_core.layout import KvLayout, Plane, merge_planes, tensor_planes

NUM_BLOCKS = 6
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Cache:
    """layers: one tensor each, its axes named; regions: the flat memory that they lie in."""

    layers: tuple[torch.Tensor, ...]
    axes: tuple[str, ...]
    regions: tuple[torch.Tensor, ...]
    layout: KvLayout

    def block(self, index: int) -> bytes:
        """The bytes of a block by tensor indexing, each element with its own, sorted."""
        axis = self.axes.index("block")
        parts = [layer.select(axis, index).contiguous().view(torch.uint8) for layer in self.layers]
        return _sorted(torch.cat([part.flatten() for part in parts]))

    def block_by_planes(self, index: int) -> bytes:
        """The same by what the layout says."""
        pages = []
        for plane in self.layout.planes:
            start = plane.offset_bytes + index * plane.stride_bytes
            pages.append(self.regions[plane.region][start : start + plane.page_bytes])
        return _sorted(torch.cat(pages))


def numbered(num_items: int) -> torch.Tensor:
    """int32 memory in which every element differs from all others."""
    return torch.arange(num_items, dtype=torch.int32)


def cache_of(layers: Sequence[torch.Tensor], axes: Sequence[str]) -> Cache:
    """Planes of all layers, with one region for each storage."""
    regions: dict[int, torch.Tensor] = {}
    for layer in layers:
        storage = layer.untyped_storage()
        regions.setdefault(storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage))
    order = list(regions)
    planes: list[Plane] = []
    for layer in layers:
        planes += tensor_planes(
            region=order.index(layer.untyped_storage().data_ptr()),
            offset_bytes=layer.storage_offset() * layer.element_size(),
            axes=axes,
            shape=layer.shape,
            strides_bytes=[stride * layer.element_size() for stride in layer.stride()],
            item_bytes=layer.element_size(),
        )
    layout = KvLayout(merge_planes(planes), NUM_BLOCKS, BLOCK_SIZE, "int32")
    return Cache(tuple(layers), tuple(axes), tuple(regions.values()), layout)


HEADS, CONTENT = 2, 6  # content: key and value of one head, 2 * head_dim
CPU_AXES = ("block", "head", "token", "content")


def cpu() -> Cache:
    """The CPU backend: a contiguous tensor a layer, (block, head, token, key and value)."""
    shape = (NUM_BLOCKS, HEADS, BLOCK_SIZE, CONTENT)
    size = torch.Size(shape).numel()
    layers = [(numbered(size) + i * size).view(shape) for i in range(3)]
    return cache_of(layers, CPU_AXES)


def block_outermost() -> Cache:
    """BLHNC: all layers of a block side by side in one memory."""
    memory = numbered(NUM_BLOCKS * 3 * HEADS * BLOCK_SIZE * CONTENT)
    packed = memory.view(NUM_BLOCKS, 3, HEADS, BLOCK_SIZE, CONTENT)
    return cache_of(list(packed.unbind(1)), CPU_AXES)


def head_outermost() -> Cache:
    """LHBNC: within a layer heads come first, so a block is one page a head."""
    memory = numbered(2 * HEADS * NUM_BLOCKS * BLOCK_SIZE * CONTENT)
    packed = memory.view(2, HEADS, NUM_BLOCKS, BLOCK_SIZE, CONTENT)
    return cache_of([layer.transpose(0, 1) for layer in packed.unbind(0)], CPU_AXES)


def token_before_head() -> Cache:
    """LBNHC: tokens come before heads within a block, seen in the axes' usual order."""
    shape = (NUM_BLOCKS, BLOCK_SIZE, HEADS, CONTENT)
    size = torch.Size(shape).numel()
    layers = [(numbered(size) + i * size).view(shape).transpose(1, 2) for i in range(2)]
    return cache_of(layers, CPU_AXES)


def kv_outermost() -> Cache:
    """Keys of all blocks, then values of all blocks: (2, block, token, head, dim)."""
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, HEADS, CONTENT // 2)
    size = torch.Size(shape).numel()
    layers = [(numbered(size) + i * size).view(shape) for i in range(2)]
    return cache_of(layers, ("kv", "block", "token", "head", "content"))


def kernel_blocks() -> Cache:
    """The kernel's blocks are half as large as the scheduler's."""
    shape = (NUM_BLOCKS * 2, HEADS, BLOCK_SIZE // 2, CONTENT)
    size = torch.Size(shape).numel()
    layers = [(numbered(size) + i * size).view(shape) for i in range(2)]
    split = [layer.unflatten(0, (NUM_BLOCKS, 2)) for layer in layers]
    return cache_of(split, ("block", "kernel_block", "head", "token", "content"))


def mla() -> Cache:
    """One latent head of odd length: (block, 1, token, 7)."""
    shape = (NUM_BLOCKS, 1, BLOCK_SIZE, 7)
    size = torch.Size(shape).numel()
    return cache_of([(numbered(size) + i * size).view(shape) for i in range(2)], CPU_AXES)


def padded() -> Cache:
    """Blocks with bytes between them that are none of ours."""
    memory = numbered(NUM_BLOCKS * (HEADS * BLOCK_SIZE * CONTENT + 5))
    rows = memory.view(NUM_BLOCKS, -1)[:, 3:-2]
    return cache_of([rows.unflatten(1, (HEADS, BLOCK_SIZE, CONTENT))], CPU_AXES)


CACHES = [
    cpu,
    block_outermost,
    head_outermost,
    token_before_head,
    kv_outermost,
    kernel_blocks,
    mla,
    padded,
]


def _sorted(flat: torch.Tensor) -> bytes:
    return flat.contiguous().view(torch.int32).sort().values.numpy().tobytes()
