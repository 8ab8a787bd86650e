"""The only place where names become classes and sizes become memory.

Lives here: wiring of one leader and one worker from a KvbmConfig.
Does not live here: engines' types; every decision.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvbm_core import host_memory
from kvbm_core.admission import ADMISSION_FILTERS, OFFLOAD_FILTERS, OffloadFilter
from kvbm_core.cascade import DiskTier
from kvbm_core.config import BYTES_PER_GB, KvbmConfig
from kvbm_core.errors import ConfigError
from kvbm_core.eviction import POLICIES
from kvbm_core.host_memory import HostArena
from kvbm_core.layout import KvLayout
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.restore import agreed_blocks
from kvbm_core.storage.disk import ALIGNMENT, DiskOptions, DiskStore
from kvbm_core.transfer import disk_probe, nixl_posix
from kvbm_core.transfer.cpu import CpuTransferEngine
from kvbm_core.transfer.cuda import CudaTransferEngine
from kvbm_core.transfer.disk import BlockFile, BlockIo, DiskTransferEngine, PreadIo
from kvbm_core.transfer.pages import ForeachCopier, cpu_copier
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.transfer.router import RoutedTransfer
from kvbm_core.types import Tier
from kvbm_core.wire import GENERATION_BYTES, DiskInventory
from kvbm_core.worker import Worker

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.25
STAGING_BYTES = 2**30
STAGING_MEMORY_SHARE = 0.1
MAX_DISK_THREADS = 16
WINDOW_BYTES = 64 * 2**20

EngineFactory = Callable[[KvbmConfig, KvLayout, Sequence[torch.Tensor], torch.Tensor], Any]
"""(config, layout, device regions, host arena) → an open TransferEngine."""


def cpu_engine(
    config: KvbmConfig, layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor
) -> CpuTransferEngine:
    """Copy threads, at most one a core."""
    _check_device("cpu", regions)
    engine = CpuTransferEngine(
        cpu_copier(layout, regions, host),
        num_threads=min(config.max_concurrent_transfers, os.cpu_count() or 1),
        piece_blocks=config.max_transfer_batch_size,
    )
    engine.open()
    return engine


def cuda_engine(
    config: KvbmConfig, layout: KvLayout, regions: Sequence[torch.Tensor], host: torch.Tensor
) -> CudaTransferEngine:
    """Side streams of the device that the regions are on."""
    _check_device("cuda", regions)
    engine = CudaTransferEngine(ForeachCopier(layout, regions, host), regions[0].device)
    engine.open()
    return engine


ENGINES: dict[str, EngineFactory] = {"cpu": cpu_engine, "cuda": cuda_engine}


def pread_io(config: KvbmConfig, file: BlockFile, host: torch.Tensor) -> BlockIo:
    """pread and pwrite."""
    return PreadIo(file, host)


def nixl_io(config: KvbmConfig, file: BlockFile, host: torch.Tensor) -> BlockIo:
    """NIXL's POSIX plugin: io_uring, or AIO."""
    return nixl_posix.NixlIo(file, host)


def nixl_gds_io(config: KvbmConfig, file: BlockFile, host: torch.Tensor) -> BlockIo:
    """NIXL's GPUDirect Storage; never measured, so only where it is named."""
    return nixl_posix.NixlIo(file, host, backend="GDS_MT")


DiskIoFactory = Callable[[KvbmConfig, BlockFile, torch.Tensor], BlockIo]
"""(config, file, host arena) → what moves blocks between the two."""

DISK_ENGINES: dict[str, DiskIoFactory] = {
    "threads": pread_io,
    "nixl": nixl_io,
    "nixl_gds": nixl_gds_io,
}


def build_leader(
    config: KvbmConfig,
    *,
    num_host_blocks: int,
    block_size: int,
    block_bytes: int,
    num_ranks: int,
    inventories: Sequence[DiskInventory] = (),
    engine_holds_blocks: bool = True,
    engine_shares_blocks: bool = True,
    engine_can_wait: bool = True,
) -> Leader:
    """A leader over an empty host tier of `num_host_blocks` blocks; see Leader for the rest.

    block_bytes: of the rank with the largest blocks. inventories: what the disk of each rank
    holds, where there is a disk tier. engine_can_wait: it takes "not yet" for a match.
    """
    disk = None
    if inventories:
        num_disk_blocks = min(inventory.num_blocks for inventory in inventories)
        disk = DiskTier(
            _pool(config, Tier.DISK, num_disk_blocks),
            named(ADMISSION_FILTERS, _disk_filter(config), "disk_offload_filter")(),
            window_blocks=max(1, WINDOW_BYTES // block_bytes),
            new_generation=lambda: os.urandom(GENERATION_BYTES),
            can_wait=engine_can_wait,
        )
    leader = Leader(
        _pool(config, Tier.HOST, num_host_blocks),
        block_size=block_size,
        num_ranks=num_ranks,
        disk=disk,
        offload_filter=_offload_filter(config),
        offload_generated_blocks=config.offload_generated_blocks,
        engine_holds_blocks=engine_holds_blocks,
        engine_shares_blocks=engine_shares_blocks,
    )
    if leader.cascade is not None:
        blocks = None
        if config.disk_cache_persist:
            blocks = agreed_blocks(inventories, leader.cascade.disk.num_blocks)
        leader.cascade.start(blocks, persists=config.disk_cache_persist)
    return leader


def _pool(config: KvbmConfig, tier: Tier, num_blocks: int) -> BlockPool:
    policy = named(POLICIES, config.eviction_policy, "eviction_policy")()
    return BlockPool(tier, num_blocks, policy)


def _disk_filter(config: KvbmConfig) -> str:
    if config.disable_disk_offload_filter or config.is_disk_only:
        return "all"
    return config.disk_offload_filter


def _offload_filter(config: KvbmConfig) -> OffloadFilter | None:
    minimum = config.host_offload_prefix_min_priority
    make = named(OFFLOAD_FILTERS, config.host_offload_filter, "host_offload_filter")
    return None if minimum is None else make(minimum)


@dataclass(frozen=True)
class DiskPlace:
    """Where one rank's disk tier goes. identity: what must be equal for blocks to be used again, in
    readable words. engine_id: the same in all ranks of one engine, and in no other."""

    num_blocks: int
    identity: str
    engine_id: str
    num_ranks: int


def build_worker(
    config: KvbmConfig,
    layout: KvLayout,
    regions: Sequence[torch.Tensor],
    *,
    rank: int,
    num_host_blocks: int,
    disk: DiskPlace | None = None,
) -> Worker:
    """One rank's worker with its memory and files open and its engines running; `Worker.close` ends
    all of it.

    regions: flat uint8 tensors on one device that the layout's planes lie in.
    """
    device = regions[0].device
    name = device.type if config.transfer_engine == "auto" else config.transfer_engine
    make_engine = named(ENGINES, name, "transfer_engine")
    arena = HostArena(num_host_blocks, layout.block_bytes, pinned=device.type == "cuda")
    arena.open()
    engine: TransferEngine = make_engine(config, layout, regions, arena.tensor)
    store = None
    if disk is not None:
        store, disk_engine = _open_disk(config, layout, arena, disk, rank)
        engine = RoutedTransfer(engine, disk_engine)
    return Worker(rank, engine, arena.close, store)


def _open_disk(
    config: KvbmConfig, layout: KvLayout, arena: HostArena, place: DiskPlace, rank: int
) -> tuple[DiskStore, TransferEngine]:
    options = DiskOptions(
        Path(config.disk_cache_dir or tempfile.gettempdir()),
        zerofill=config.disk_zerofill_fallback,
        direct=not config.disk_disable_o_direct,
        persist=config.disk_cache_persist,
    )
    store = DiskStore(
        options,
        num_blocks=place.num_blocks,
        block_bytes=layout.block_bytes,
        identity=f"{place.identity}; layout {layout.fingerprint()}; "
        f"rank {rank} of {place.num_ranks}; blocks of {layout.block_bytes} bytes",
        engine=place.engine_id,
        rank=rank,
        num_ranks=place.num_ranks,
    )
    store.open()
    engine = DiskTransferEngine(
        store,
        arena.tensor,
        _disk_io(config, store, arena.tensor),
        num_threads=_num_disk_threads(config),
        piece_blocks=config.max_transfer_batch_size,
    )
    engine.open()
    return store, engine


def _disk_io(config: KvbmConfig, store: DiskStore, host: torch.Tensor) -> BlockIo:
    """What the config names; where it leaves the choice, something that works."""
    if config.disk_engine != "auto":
        return named(DISK_ENGINES, config.disk_engine, "disk_engine")(config, store, host)  # type: ignore[no-any-return]
    name = _fastest_disk(config, store)
    try:
        return DISK_ENGINES[name](config, store, host)
    except (ConfigError, OSError) as error:
        logger.warning(
            "kvbm: disk engine %s, since %s failed: %s", disk_probe.REFERENCE, name, error
        )
        return DISK_ENGINES[disk_probe.REFERENCE](config, store, host)


def _fastest_disk(config: KvbmConfig, store: DiskStore) -> str:
    names = ["threads", "nixl"] if nixl_posix.is_installed() else ["threads"]
    if len(names) == 1:
        return names[0]
    candidates = {name: partial(DISK_ENGINES[name], config) for name in names}
    return disk_probe.fastest(candidates, store, num_threads=_num_disk_threads(config))


def _num_disk_threads(config: KvbmConfig) -> int:
    return min(config.max_concurrent_transfers, MAX_DISK_THREADS)


def disk_place(
    config: KvbmConfig, *, block_bytes: int, identity: str, engine_id: str, num_ranks: int
) -> DiskPlace | None:
    """Where one rank's disk tier goes; None without one. Raises ConfigError, see below."""
    if not config.has_disk:
        return None
    num_blocks = count_disk_blocks(config, block_bytes=block_bytes, num_ranks=num_ranks)
    return DiskPlace(num_blocks, identity, engine_id, num_ranks)


def count_disk_blocks(config: KvbmConfig, *, block_bytes: int, num_ranks: int) -> int:
    """Disk blocks of one rank; 0 without a disk tier. Raises ConfigError below one block."""
    if config.disk_cache_override_num_blocks is not None:
        return config.disk_cache_override_num_blocks
    if config.disk_cache_gb is None:
        return 0
    extent_bytes = -(-block_bytes // ALIGNMENT) * ALIGNMENT
    count = int(config.disk_cache_gb * BYTES_PER_GB / num_ranks) // extent_bytes
    if count < 1:
        problem = f"is less than one block of {extent_bytes} bytes on each of {num_ranks} ranks"
        raise ConfigError("disk_cache_gb", config.disk_cache_gb, problem, "Raise it.")
    return count


def count_host_blocks(
    config: KvbmConfig, *, block_bytes: int, num_ranks: int, ranks_per_node: int
) -> int:
    """Host blocks of one rank, from the config or a share of free memory.

    Raises ConfigError where it is less than one block or more than the machine has.
    """
    available = host_memory.available_bytes()
    if config.is_disk_only:
        wanted_bytes = min(STAGING_BYTES / num_ranks, available * STAGING_MEMORY_SHARE)
        num_disk_blocks = count_disk_blocks(config, block_bytes=block_bytes, num_ranks=num_ranks)
        count = max(1, min(int(wanted_bytes) // block_bytes, num_disk_blocks))
        logger.info(
            "disk only: blocks pass through %d blocks of host memory, %.2f GB a rank; set "
            "DYN_KVBM_CPU_CACHE_GB for a host tier of its own",
            count,
            count * block_bytes / BYTES_PER_GB,
        )
        return count
    if config.cpu_cache_override_num_blocks is not None:
        count = config.cpu_cache_override_num_blocks
        option, value = "cpu_cache_override_num_blocks", count * 1.0
    elif config.cpu_cache_gb is not None:
        option, value = "cpu_cache_gb", config.cpu_cache_gb
        count = int(value * BYTES_PER_GB / num_ranks) // block_bytes
    else:
        option, value = "cpu_cache_gb", available * DEFAULT_MEMORY_SHARE / BYTES_PER_GB
        count = int(available * DEFAULT_MEMORY_SHARE / ranks_per_node) // block_bytes
        logger.info(
            "cpu_cache_gb is unset: the host tier takes %.0f%% of free memory, %.2f GB; "
            "set DYN_KVBM_CPU_CACHE_GB to choose",
            DEFAULT_MEMORY_SHARE * 100,
            value,
        )
    _check_fits(option, value, count, block_bytes, ranks_per_node, available)
    return count


def named(table: Mapping[str, Any], name: str, option: str) -> Any:
    """The table's entry, or what ``module:Name`` names. Raises ConfigError."""
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    known = f"Give one of {', '.join(table)}, or module:Name."
    if not (module and colon and attribute):
        raise ConfigError(option, name, "no built-in of that name", known)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(option, name, f"cannot be imported: {error}", known) from error


def _check_device(engine: str, regions: Sequence[torch.Tensor]) -> None:
    if (device := regions[0].device.type) != engine:
        problem = f"can't copy the engine's KV cache, which is on {device}"
        raise ConfigError("transfer_engine", engine, problem, "Give auto.")


def _check_fits(
    option: str, value: float, count: int, block_bytes: int, ranks_per_node: int, available: int
) -> None:
    wanted, total = count * block_bytes * ranks_per_node, host_memory.total_bytes()
    if count < 1:
        problem = f"is less than one block of {block_bytes} bytes on each rank"
        raise ConfigError(option, value, problem, "Raise it, or lower the engine's block size.")
    if wanted > total or count * block_bytes > available:
        raise ConfigError(
            option,
            value,
            f"needs {wanted / BYTES_PER_GB:.2f} GB of memory; this machine has "
            f"{total / BYTES_PER_GB:.2f} GB, of which {available / BYTES_PER_GB:.2f} GB are free",
            "Lower it, or leave it unset for a share of free memory.",
        )
