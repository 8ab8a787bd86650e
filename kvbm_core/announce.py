"""What the log says when a leader has come about: its tiers, and settings that do not help.

Lives here: words. Does not live here: what is in the tiers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from kvbm_core.config import BYTES_PER_GB, KvbmConfig
from kvbm_core.leader import Leader

logger = logging.getLogger(__name__)


class RankGeometry(Protocol):
    """What a rank's handshake says of it, however it travelled."""

    @property
    def num_device_blocks(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


def announce(
    leader: Leader,
    config: KvbmConfig,
    ranks: Sequence[RankGeometry],
    *,
    block_size: int,
    keys: str,
) -> None:
    """Log the tiers, over all ranks. block_size: tokens. keys: what names blocks."""
    block_bytes = sum(rank.block_bytes for rank in ranks)
    num_host_blocks, num_device_blocks = leader.pool.num_blocks, ranks[0].num_device_blocks
    logger.info(
        "kvbm: host tier of %d blocks of %d tokens, %.2f GB over %d rank(s), device cache "
        "%d blocks; layout %s, %s, eviction %s",
        num_host_blocks,
        block_size,
        num_host_blocks * block_bytes / BYTES_PER_GB,
        len(ranks),
        num_device_blocks,
        ranks[0].fingerprint,
        keys,
        config.eviction_policy,
    )
    if leader.cascade is not None:
        disk = leader.cascade.disk
        logger.info(
            "kvbm: disk tier of %d blocks, %.2f GB over %d rank(s); %d blocks of an earlier "
            "process are back",
            disk.num_blocks,
            disk.num_blocks * block_bytes / BYTES_PER_GB,
            len(ranks),
            disk.num_ready,
        )
    if num_host_blocks < num_device_blocks and not config.is_disk_only:
        logger.warning(
            "the host tier (%d blocks) is smaller than the device cache (%d blocks): what the "
            "device evicts has mostly left host by then, so offloads cost bandwidth and bring "
            "few hits. Give at least DYN_KVBM_CPU_CACHE_GB=%.1f.",
            num_host_blocks,
            num_device_blocks,
            num_device_blocks * block_bytes / BYTES_PER_GB + 0.05,
        )
    for setting in config.ignored:
        logger.warning("%s has no effect in this release", setting)
