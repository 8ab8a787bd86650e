"""Copies of whole blocks between device memory and the host arena, page by page.

Lives here: the two ways to copy a batch of blocks in one call that releases the GIL.
Does not live here: threads, streams, ops.
Invariant: a copy writes exactly the pages of the destination blocks named, or raises before
it writes anything.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Protocol

import torch

from kvbm_core.errors import LayoutMismatch
from kvbm_core.layout import KvLayout, check_layout
from kvbm_core.types import BlockId, pack_ids

try:
    from kvbm_core.transfer import _copy
except ImportError:  # installed without a C compiler
    _copy = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class BlockCopier(Protocol):
    """Copies blocks; thread-safe as long as no two calls share a destination block."""

    block_bytes: int

    def copy(
        self, device_ids: Sequence[BlockId], host_ids: Sequence[BlockId], *, to_host: bool
    ) -> None:
        """Copy block by block. Raises ValueError, IndexError or OverflowError on bad ids."""


class NativeCopier:
    """One compiled call for a batch; memory that the CPU can address.

    regions: flat uint8 tensors that the layout's planes lie in; host: uint8 tensor
    ``[num_host_blocks, block_bytes]``. Both must outlive the copier.
    """

    def __init__(
        self, layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor
    ) -> None:
        _check_memory(layout, regions, host)
        self.block_bytes = layout.block_bytes
        self._num_device_blocks = layout.num_device_blocks
        self._num_host_blocks = host.shape[0]
        self._host_address = host.data_ptr()
        self._keep_alive = (tuple(regions), host)
        self._planes = array("q")
        for plane, host_offset in zip(layout.planes, layout.host_offsets(), strict=True):
            address = regions[plane.region].data_ptr() + plane.offset_bytes
            self._planes.extend((address, plane.stride_bytes, plane.page_bytes, host_offset))

    def copy(
        self, device_ids: Sequence[BlockId], host_ids: Sequence[BlockId], *, to_host: bool
    ) -> None:
        _copy.copy_blocks(
            self._planes,
            self._host_address,
            self.block_bytes,
            self._num_device_blocks,
            self._num_host_blocks,
            pack_ids(device_ids),
            pack_ids(host_ids),
            to_host,
        )


class ForeachCopier:
    """One `torch._foreach_copy_` for a batch, on any device, on the current stream of a GPU.

    Arguments as NativeCopier. With a GPU the call returns before the bytes have moved.
    """

    def __init__(
        self, layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor
    ) -> None:
        _check_memory(layout, regions, host)
        self.block_bytes = layout.block_bytes
        self._num_device_blocks = layout.num_device_blocks
        self._num_host_blocks = host.shape[0]
        self._pages = [
            (
                regions[plane.region].as_strided(
                    (layout.num_device_blocks, plane.page_bytes),
                    (plane.stride_bytes, 1),
                    regions[plane.region].storage_offset() + plane.offset_bytes,
                ),
                host[:, host_offset : host_offset + plane.page_bytes],
            )
            for plane, host_offset in zip(layout.planes, layout.host_offsets(), strict=True)
        ]

    def copy(
        self, device_ids: Sequence[BlockId], host_ids: Sequence[BlockId], *, to_host: bool
    ) -> None:
        if len(device_ids) != len(host_ids):
            raise ValueError(f"{len(device_ids)} device ids for {len(host_ids)} host ids")
        _check_ids(device_ids, self._num_device_blocks)
        _check_ids(host_ids, self._num_host_blocks)
        if not device_ids:
            return
        on_device = [pages[i] for pages, _ in self._pages for i in device_ids]
        on_host = [pages[i] for _, pages in self._pages for i in host_ids]
        if to_host:
            torch._foreach_copy_(on_host, on_device, non_blocking=True)
        else:
            torch._foreach_copy_(on_device, on_host, non_blocking=True)


def _check_memory(layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor) -> None:
    check_layout(layout, [region.numel() for region in regions])
    if host.ndim != 2 or host.shape[1] != layout.block_bytes or not host.is_contiguous():
        raise LayoutMismatch(
            f"host memory of shape {tuple(host.shape)} does not hold blocks of "
            f"{layout.block_bytes} bytes"
        )


def _check_ids(ids: Sequence[BlockId], num_blocks: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < num_blocks:
        raise IndexError(f"block ids {min(ids)} to {max(ids)} are not all below {num_blocks}")


def cpu_copier(
    layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor
) -> BlockCopier:
    """The faster copier this installation has for memory of the CPU."""
    if _copy is not None:
        return NativeCopier(layout, regions, host)
    logger.warning(
        "kvbm_core was installed without its C extension: copies are several times slower beside a "
        "busy engine. Install a C compiler and reinstall kvbm-connectors."
    )
    return ForeachCopier(layout, regions, host)
