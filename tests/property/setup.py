"""What the simulated engine is made of, and how a process of it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbm_core.admission import ADMISSION_FILTERS
from kvbm_core.cascade import DiskTier
from kvbm_core.eviction import Lru
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.restore import agreed_blocks
from kvbm_core.storage.index import DiskIndex
from kvbm_core.types import BlockHash, BlockId, Tier
from kvbm_core.wire import DiskInventory
from kvbm_core.worker import Worker
from tests.property.requests import BLOCK_SIZE


@dataclass(frozen=True)
class Parts:
    """What the engine is built from; a planted fault replaces one."""

    pool: Callable[..., BlockPool] = BlockPool
    leader: Callable[..., Leader] = Leader
    worker: Callable[..., Worker] = Worker
    disk_pool: Callable[..., BlockPool] = BlockPool
    index: Callable[..., DiskIndex] = DiskIndex
    agree: Callable[[Sequence[DiskInventory], int], list[tuple[BlockHash, BlockId]] | None] = (
        agreed_blocks
    )


@dataclass(frozen=True)
class Setup:
    """The circumstances of one run; without disk blocks there is no disk tier.

    num_served_tokens: of a prompt of zeros that an earlier process has served.
    """

    num_ranks: int
    num_host_blocks: int
    num_device_blocks: int
    eager_reuse: bool = False
    device_remembers: bool = True
    offload_generated: bool = True
    late_offloads: bool = False
    holds_blocks: bool = True
    late_keys: bool = False
    num_disk_blocks: int = 0
    disk_filter: str = "all"
    window_blocks: int = 4
    can_wait: bool = True
    num_served_tokens: int = 0
    parts: Parts = field(default_factory=Parts)

    def make_leader(
        self, inventories: Sequence[DiskInventory], new_generation: Callable[[], bytes]
    ) -> Leader:
        """A leader that goes on with what the ranks found on their disks."""
        parts = self.parts
        disk = None
        if self.num_disk_blocks:
            disk = DiskTier(
                parts.disk_pool(Tier.DISK, self.num_disk_blocks, Lru()),
                ADMISSION_FILTERS[self.disk_filter](),
                self.window_blocks,
                new_generation,
                can_wait=self.can_wait,
            )
        leader = parts.leader(
            parts.pool(Tier.HOST, self.num_host_blocks, Lru()),
            block_size=BLOCK_SIZE,
            num_ranks=self.num_ranks,
            disk=disk,
            offload_generated_blocks=self.offload_generated,
            engine_holds_blocks=self.holds_blocks,
        )
        if leader.cascade is not None:
            blocks = parts.agree(inventories, self.num_disk_blocks)
            leader.cascade.start(blocks, persists=True)
        return leader
