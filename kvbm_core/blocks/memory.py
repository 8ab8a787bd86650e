"""The bytes of one tier's blocks, and views of them that keep a block from being reused.

Lives here: where the memory comes from, how a view of it becomes a tensor. Does not live here:
which block is whose (see `kvbm_core.blocks.tier`).
Invariant: a tensor made here, and every tensor, array or capsule that shares its bytes, keeps the
memory mapped and its Hold alive.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from typing import Any

import torch

from kvbm_core import host_memory
from kvbm_core.blocks.geometry import BlockGeometry
from kvbm_core.config import BYTES_PER_GB
from kvbm_core.errors import ConfigError
from kvbm_core.host_memory import HostArena

logger = logging.getLogger(__name__)


class BlockMemory:
    """`num_blocks` blocks side by side; freed with the last reference to this object.

    tensor: uint8 of shape ``[num_blocks, block_bytes]``.
    """

    def __init__(self, tensor: torch.Tensor, geometry: BlockGeometry) -> None:
        self.tensor = tensor
        self._geometry = geometry

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def block(self, block_id: int, hold: object) -> torch.Tensor:
        """A block's elements as a tensor that keeps `hold`."""
        geometry = self._geometry
        return self._view(block_id, 0, geometry.block_bytes, hold).view(geometry.block_shape)

    def layer(self, block_id: int, layer: int, hold: object) -> torch.Tensor:
        """One layer's elements of a block as a tensor that keeps `hold`."""
        geometry, num_bytes = self._geometry, self._geometry.layer_bytes
        return self._view(block_id, layer * num_bytes, num_bytes, hold).view(geometry.layer_shape)

    def _view(self, block_id: int, offset_bytes: int, num_bytes: int, hold: object) -> torch.Tensor:
        """A new storage over these bytes, so that its end can be noticed: torch frees the object it
        was made from with the last tensor, of any library, that uses the storage."""
        address = self.tensor[block_id].data_ptr() + offset_bytes
        dtype = getattr(torch, self._geometry.dtype)
        owners = (hold, self)
        if self.device.type == "cpu":
            run = (ctypes.c_ubyte * num_bytes).from_address(address)
            run.owners = owners  # type: ignore[attr-defined]
            return torch.frombuffer(run, dtype=dtype)
        flat = torch.as_tensor(_CudaRun(address, num_bytes, owners), device=self.device)
        return flat.view(dtype)


class _CudaRun:
    """Device bytes for torch.as_tensor, which shares them and keeps this object."""

    def __init__(self, address: int, num_bytes: int, owners: object) -> None:
        self.owners = owners
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def open_host(num_blocks: int, geometry: BlockGeometry) -> BlockMemory:
    """Blocks in host memory, page-locked where there is a GPU. Raises ConfigError, StorageError."""
    _check_fits("host_num_blocks", num_blocks, geometry, host_memory.available_bytes())
    return _arena(num_blocks, geometry, pinned=torch.cuda.is_available())


def open_device(num_blocks: int, geometry: BlockGeometry, device_id: int) -> BlockMemory:
    """Blocks on a GPU, or in ordinary memory where there is none. Raises as `open_host`."""
    if not torch.cuda.is_available():
        _check_fits("device_num_blocks", num_blocks, geometry, host_memory.available_bytes())
        logger.info("no GPU: the %d device blocks are in ordinary memory", num_blocks)
        return _arena(num_blocks, geometry, pinned=False)
    if device_id >= (count := torch.cuda.device_count()):
        problem = f"there are {count} GPUs"
        raise ConfigError("device_id", device_id, problem, "Give the index of one of them.")
    device = torch.device("cuda", device_id)
    _check_fits("device_num_blocks", num_blocks, geometry, torch.cuda.mem_get_info(device)[0])
    shape = (num_blocks, geometry.block_bytes)
    return BlockMemory(torch.zeros(shape, dtype=torch.uint8, device=device), geometry)


def _arena(num_blocks: int, geometry: BlockGeometry, *, pinned: bool) -> BlockMemory:
    arena = HostArena(num_blocks, geometry.block_bytes, pinned=pinned)
    arena.open()
    memory = BlockMemory(arena.tensor, geometry)
    weakref.finalize(memory, arena.close).atexit = False
    return memory


def _check_fits(
    option: str, num_blocks: int, geometry: BlockGeometry, available_bytes: int
) -> None:
    wanted_bytes = num_blocks * geometry.block_bytes
    if wanted_bytes > available_bytes:
        raise ConfigError(
            option,
            num_blocks,
            f"blocks of {geometry.block_bytes} bytes need {wanted_bytes / BYTES_PER_GB:.2f} GB; "
            f"{available_bytes / BYTES_PER_GB:.2f} GB are free",
            f"Give at most {available_bytes // geometry.block_bytes}.",
        )
