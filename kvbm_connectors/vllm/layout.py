"""vLLM's KV cache tensors as a KvLayout.

vLLM 0.30 to 0.32 hand over one tensor a layer whose logical axes are (block, head, token,
content), in whatever memory order the layout of that run has (vllm/v1/kv_cache_interface.py);
kernel blocks may split the block axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvbm_core.errors import LayoutMismatch
from kvbm_core.layout import KvLayout, Plane, merge_planes, tensor_planes

AXES: tuple[str, ...] = ("block", "head", "token", "content")
SPLIT_AXES: tuple[str, ...] = ("block", "kernel_block", "head", "token", "content")


def layout_of(
    kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int, block_size: int
) -> tuple[KvLayout, list[torch.Tensor]]:
    """The layout of all layers, and the memory regions (flat uint8) that its planes lie in.

    num_blocks: of the scheduler. block_size: tokens. Raises LayoutMismatch on tensors that are
    not KV pages of that many blocks.
    """
    regions: list[torch.Tensor] = []
    region_of: dict[int, int] = {}
    planes: list[Plane] = []
    for name, cache in kv_caches.items():
        if not isinstance(cache, torch.Tensor) or cache.ndim != len(AXES):
            raise LayoutMismatch(f"layer {name} has no KV tensor with axes {AXES}: {type(cache)}")
        storage = cache.untyped_storage()
        if storage.data_ptr() not in region_of:
            region_of[storage.data_ptr()] = len(regions)
            regions.append(torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage))
        planes += _planes_of(name, cache, region_of[storage.data_ptr()], num_blocks)
    dtypes = {str(cache.dtype).removeprefix("torch.") for cache in kv_caches.values()}
    orders = sorted({_order_of(cache) for cache in kv_caches.values()})
    layout = KvLayout(
        merge_planes(planes), num_blocks, block_size, "+".join(sorted(dtypes)), "+".join(orders)
    )
    return layout, regions


def _order_of(cache: torch.Tensor) -> str:
    """Axes as they lie in memory, with their lengths: equal bytes mean equal KV only then."""
    inner = zip(cache.stride()[1:], AXES[1:], cache.shape[1:], strict=True)
    return " ".join(f"{axis}:{length}" for _, axis, length in sorted(inner, reverse=True))


def _planes_of(name: str, cache: torch.Tensor, region: int, num_blocks: int) -> list[Plane]:
    if cache.shape[0] % num_blocks:
        raise LayoutMismatch(f"layer {name} has {cache.shape[0]} blocks, not {num_blocks}")
    axes = AXES
    if cache.shape[0] != num_blocks:
        cache, axes = cache.unflatten(0, (num_blocks, -1)), SPLIT_AXES
    item_bytes = cache.element_size()
    return tensor_planes(
        region=region,
        offset_bytes=cache.storage_offset() * item_bytes,
        axes=axes,
        shape=cache.shape,
        strides_bytes=[stride * item_bytes for stride in cache.stride()],
        item_bytes=item_bytes,
    )
