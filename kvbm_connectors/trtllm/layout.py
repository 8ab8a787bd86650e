"""TensorRT-LLM's KV pool as a KvLayout.

One tensor for all layers, ``[num_blocks, num_layers, kv_factor, block_size]``: kv_factor 1 for MLA,
else 2; block_size is elements, kv_heads · head_dim · tokens of one rank.
"""

from __future__ import annotations

import torch

from kvbm_core.errors import LayoutMismatch
from kvbm_core.layout import KvLayout, merge_planes, tensor_planes

AXES: tuple[str, ...] = ("block", "layer", "kv", "content")


def layout_of(cache: torch.Tensor, *, block_size: int) -> tuple[KvLayout, list[torch.Tensor]]:
    """The pool's layout, and the memory region (flat uint8) it lies in. block_size: tokens.

    Raises LayoutMismatch on anything but one tensor with these axes.
    """
    if not isinstance(cache, torch.Tensor) or cache.ndim != len(AXES):
        shape = tuple(cache.shape) if isinstance(cache, torch.Tensor) else type(cache).__name__
        raise LayoutMismatch(
            f"the KV cache is {shape}, not one tensor with axes {AXES}: models with several pools "
            "(windows of several sizes, Mamba) are not supported"
        )
    item_bytes = cache.element_size()
    planes = tensor_planes(
        region=0,
        offset_bytes=cache.storage_offset() * item_bytes,
        axes=AXES,
        shape=cache.shape,
        strides_bytes=[stride * item_bytes for stride in cache.stride()],
        item_bytes=item_bytes,
    )
    region = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(cache.untyped_storage())
    order = " ".join(
        f"{axis}:{length}" for axis, length in zip(AXES[1:], cache.shape[1:], strict=True)
    )
    dtype = str(cache.dtype).removeprefix("torch.")
    return KvLayout(merge_planes(planes), cache.shape[0], block_size, dtype, order), [region]
