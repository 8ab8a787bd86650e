"""The parts of a simulated engine's process: a leader, ranks with their disks, a device cache."""

from __future__ import annotations

from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, OpId
from kvbm_core.wire import GENERATION_BYTES
from tests.property.cluster import Rank
from tests.property.device_cache import DeviceCache
from tests.property.model_disk import ModelDisk
from tests.property.requests import OpMirror, Request
from tests.property.setup import Setup


class Process:
    """Holds what the engine knows, and starts it from what is on the disks.

    planned_seconds: when the last step was planned. An epoch is a set of weights; 0 are those that
    every process starts with.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.disks = [
            ModelDisk(setup.num_disk_blocks, setup.parts.index)
            for _ in range(setup.num_ranks if setup.num_disk_blocks else 0)
        ]
        self.requests: list[Request] = []
        self.held: list[Request] = []
        self.ops: dict[OpId, OpMirror] = {}
        self.contents_of_key: dict[BlockHash, tuple[int, ...]] = {}
        self.now_seconds = self.planned_seconds = 0.0
        self.num_lost = 0
        self.lost: set[int] = set()
        self.abandoned: set[OpId] = set()
        self.num_resets = 0
        self.num_restarts = 0
        self.num_loaded_blocks = 0
        self._num_epochs = 0
        self._num_generations = 0
        self._names = 0
        self.start()

    def start(self) -> None:
        """A process begins, with nothing but what is on its disks."""
        setup = self.setup
        inventories = [disk.open() for disk in self.disks]
        self.leader = setup.make_leader(inventories, self._new_generation)
        self.pool = self.leader.pool
        cascade = self.leader.cascade
        self.disk_pool: BlockPool | None = None if cascade is None else cascade.disk
        disks = self.disks or [None] * setup.num_ranks
        self.ranks = [self.make_rank(i, 0, disk) for i, disk in enumerate(disks)]
        self.device = DeviceCache(
            setup.num_device_blocks, eager=setup.eager_reuse, remembers=setup.device_remembers
        )
        self.num_ended_ops = 0
        self.epoch = 0

    def make_rank(self, index: int, generation: int, disk: ModelDisk | None) -> Rank:
        late = self.setup.late_offloads
        return Rank(index, generation, self.setup.parts.worker, late=late, disk=disk)

    def _new_generation(self) -> bytes:
        self._num_generations += 1
        return self._num_generations.to_bytes(GENERATION_BYTES, "little")

    def close(self) -> None:
        for disk in self.disks:
            disk.close()
