"""The only place where names become classes and sizes become memory.

Lives here: wiring of one leader and one worker from a KvbmConfig.
Does not live here: engines' types; every decision.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kvbm_core import host_memory
from kvbm_core.config import BYTES_PER_GB, KvbmConfig
from kvbm_core.errors import ConfigError
from kvbm_core.eviction import POLICIES
from kvbm_core.host_memory import HostArena
from kvbm_core.layout import KvLayout
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.transfer.cpu import CpuTransferEngine
from kvbm_core.transfer.cuda import CudaTransferEngine
from kvbm_core.transfer.pages import ForeachCopier, cpu_copier
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import Tier
from kvbm_core.worker import Worker

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.25

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


def build_leader(
    config: KvbmConfig,
    *,
    num_host_blocks: int,
    block_size: int,
    num_ranks: int,
    engine_holds_blocks: bool = True,
    engine_shares_blocks: bool = True,
) -> Leader:
    """A leader over an empty host tier of `num_host_blocks` blocks; see Leader for the rest."""
    policy = named(POLICIES, config.eviction_policy, "eviction_policy")()
    return Leader(
        BlockPool(Tier.HOST, num_host_blocks, policy),
        block_size=block_size,
        num_ranks=num_ranks,
        offload_generated_blocks=config.offload_generated_blocks,
        engine_holds_blocks=engine_holds_blocks,
        engine_shares_blocks=engine_shares_blocks,
    )


def build_worker(
    config: KvbmConfig,
    layout: KvLayout,
    regions: Sequence[torch.Tensor],
    *,
    rank: int,
    num_host_blocks: int,
) -> Worker:
    """One rank's worker with its arena open and its engine running; `Worker.close` ends both.

    regions: flat uint8 tensors on one device that the layout's planes lie in.
    """
    device = regions[0].device
    name = device.type if config.transfer_engine == "auto" else config.transfer_engine
    make_engine = named(ENGINES, name, "transfer_engine")
    arena = HostArena(num_host_blocks, layout.block_bytes, pinned=device.type == "cuda")
    arena.open()
    engine: TransferEngine = make_engine(config, layout, regions, arena.tensor)
    return Worker(rank, engine, arena.close)


def count_host_blocks(
    config: KvbmConfig, *, block_bytes: int, num_ranks: int, ranks_per_node: int
) -> int:
    """Host blocks of one rank, from the config or a share of free memory.

    Raises ConfigError where it is less than one block or more than the machine has.
    """
    available = host_memory.available_bytes()
    if (count := config.cpu_cache_override_num_blocks) is not None:
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
