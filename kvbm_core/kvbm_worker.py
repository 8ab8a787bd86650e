"""A rank's Worker with its side of the channel: it joins, reports, and rejoins after it was lost.

Lives here: what membership means for a worker. Does not live here: executing plans (see `worker`),
messages (see `channel`).
Invariant: every result reaches the leader, or the leader counts this rank as lost; a rank that
was lost rejoins only when nothing it was told before is in flight any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from enum import Enum

import msgspec
import torch

from kvbm_core.build import build_worker, count_host_blocks, disk_place
from kvbm_core.channel.messages import Hello, LeaderAddress
from kvbm_core.channel.rendezvous import DirectRendezvous, Rendezvous
from kvbm_core.channel.timing import Timing
from kvbm_core.channel.waiting import wait_until
from kvbm_core.channel.worker_end import WorkerEnd
from kvbm_core.channel.worker_protocol import (
    LeaderSeen,
    Outside,
    Planned,
    Welcomed,
    WorkerEvent,
)
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ChannelError
from kvbm_core.layout import KvLayout
from kvbm_core.registry.choose import rendezvous_for
from kvbm_core.storage.disk import DiskStore
from kvbm_core.wire import MAX_INVENTORY_BLOCKS, DiskInventory, Handshake, StepPlan, encode
from kvbm_core.worker import Worker

logger = logging.getLogger(__name__)


class _Membership(Enum):
    JOINING = "joining"
    JOINED = "joined"
    LEAVING = "leaving"  # lost; rejoins when nothing is in flight
    REFUSED = "refused"


class KvbmWorker:
    """One rank's worker, for engines that carry no messages from it to the leader.

    Used by one thread; only `open` and `wait_welcome` wait. identity: as for KvbmLeader.
    ranks_per_node: that share this machine's memory; None: all. address: of the leader; without it
    the rendezvous, or what config and environment say, is asked.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        rank: int,
        num_ranks: int,
        identity: str,
        ranks_per_node: int | None = None,
        address: LeaderAddress | None = None,
        rendezvous: Rendezvous | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._config = config
        self._rank = rank
        self._num_ranks = num_ranks
        self._identity = identity
        self._ranks_per_node = ranks_per_node or num_ranks
        self._rendezvous = rendezvous if address is None else DirectRendezvous(address)
        self._timing = timing or Timing()
        self._end: WorkerEnd | None = None
        self._worker: Worker | None = None
        self._hello: Hello | None = None
        self._membership = _Membership.JOINING
        self._refusal = ""
        self._is_leader_alive = False
        self._plans: list[StepPlan] = []

    def open(self, layout: KvLayout, regions: Sequence[torch.Tensor]) -> None:
        """Find the leader, open memory and files, and begin to join.

        regions: flat uint8 tensors on one device that the layout's planes lie in. Waits only where
        the leader must be looked for. Raises ChannelError, ConfigError, StorageError.
        """
        if self._rendezvous is None:
            self._rendezvous = rendezvous_for(self._config, self._identity, os.environ)
        address = self._rendezvous.find(self._config.leader_worker_init_timeout_secs)
        num_host_blocks = count_host_blocks(
            self._config,
            block_bytes=layout.block_bytes,
            num_ranks=self._num_ranks,
            ranks_per_node=self._ranks_per_node,
        )
        worker = build_worker(
            self._config,
            layout,
            regions,
            rank=self._rank,
            num_host_blocks=num_host_blocks,
            disk=disk_place(
                self._config,
                block_bytes=layout.block_bytes,
                identity=self._identity,
                engine_id=address.session,
                num_ranks=self._num_ranks,
            ),
        )
        end = WorkerEnd(address, timing=self._timing)
        try:
            end.open()
        except BaseException:
            worker.close()
            raise
        self._worker, self._end = worker, end
        handshake = Handshake(
            self._rank,
            num_host_blocks,
            layout.num_device_blocks,
            layout.block_size,
            layout.block_bytes,
            layout.fingerprint(),
            None if worker.disk is None else self._inventory(worker.disk),
        )
        self._join(address.session, handshake)

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("the worker is not open")
        return self._worker

    @property
    def is_joined(self) -> bool:
        return self._membership is _Membership.JOINED

    @property
    def is_leader_alive(self) -> bool:
        """Whether the leader has been heard of lately. Without it nothing is cached, and serving
        goes on."""
        return self._is_leader_alive and self._open_end.failure is None

    def wait_welcome(self, timeout_seconds: float | None = None) -> None:
        """Return when the leader has taken this rank in. None: the configured time.

        Raises ChannelError with the leader's reason, or where it does not answer.
        """
        if timeout_seconds is None:
            timeout_seconds = self._config.leader_worker_init_timeout_secs
        end = self._open_end
        if not wait_until(end, self._is_taken_in, timeout_seconds=timeout_seconds, say=self._say):
            raise ChannelError(
                f"rank {self._rank} was not taken in by the leader within "
                f"{timeout_seconds:g} s, which was "
                f"{'heard' if self.is_leader_alive else 'never heard'}: check that it runs and "
                "that this machine reaches it"
            )

    def _is_taken_in(self) -> bool:
        self.poll()
        if self.is_joined:
            return True
        if self._open_end.failure is not None:
            raise ChannelError(f"the worker's I/O thread has failed: {self._open_end.failure}")
        if self._refusal:
            raise ChannelError(f"the leader refuses rank {self._rank}: {self._refusal}")
        return False

    def _say(self, passed_seconds: float) -> None:
        logger.info("kvbm: rank %d is waiting for the leader", self._rank)

    def poll(self) -> None:
        """Collect ops that ended, tell the leader, take what it said. Never waits, except for an op
        in a step without a forward (see Worker)."""
        self.worker.poll()
        self._listen()
        if self._membership is _Membership.JOINED:
            self._report()
        elif self._membership is _Membership.LEAVING and not self.worker.num_ops_in_flight:
            self._rejoin()

    def take_plans(self) -> list[StepPlan]:
        """Plans that the leader has published since the last call, in order."""
        self._listen()
        plans, self._plans = self._plans, []
        return plans

    def close(self) -> None:
        """Say goodbye; end copies in flight, then free the memory under them."""
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def _open_end(self) -> WorkerEnd:
        if self._end is None:
            raise RuntimeError("the worker is not open")
        return self._end

    def _inventory(self, disk: DiskStore) -> DiskInventory:
        """What the leader is told of: as much as a message holds."""
        found = disk.take_inventory()
        told = found.newest(MAX_INVENTORY_BLOCKS)
        if told is not found:
            logger.warning(
                "kvbm: rank %d brings back the newest %d of its %d blocks on disk: more do not fit "
                "into a message",
                self._rank,
                MAX_INVENTORY_BLOCKS,
                len(found.ids()),
            )
        return told

    def _listen(self) -> None:
        for event in self._open_end.take_events():
            self._take(event)

    def _take(self, event: WorkerEvent) -> None:
        if isinstance(event, Welcomed):
            self._membership = _Membership.JOINED
            logger.info("kvbm: rank %d has joined its leader", self._rank)
        elif isinstance(event, Planned):
            self._plans.append(event.plan)
        elif isinstance(event, LeaderSeen):
            self._is_leader_alive = event.is_alive
            if not event.is_alive:
                text = "kvbm: rank %d hears nothing of its leader; serving goes on without cache"
                logger.warning(text, self._rank)
        elif isinstance(event, Outside):
            self._leave(event)

    def _leave(self, event: Outside) -> None:
        self._plans.clear()
        self._membership = _Membership.REFUSED if event.is_final else _Membership.LEAVING
        if event.is_final:
            self._refusal = event.why
            logger.error("kvbm: the leader refuses rank %d: %s", self._rank, event.why)
        else:
            logger.warning("kvbm: rank %d is outside and will rejoin: %s", self._rank, event.why)

    def _report(self) -> None:
        report = self.worker.take_report()
        if report is not None:
            assert self._hello is not None
            self._open_end.send(self._hello.incarnation, encode(report))

    def _rejoin(self) -> None:
        """With an empty memory, as far as the leader is concerned."""
        assert self._hello is not None
        self.worker.take_report()  # of ops that nobody waits for any more
        handshake = self._hello.handshake
        if handshake.disk is not None:
            empty = DiskInventory(handshake.disk.num_blocks)
            handshake = msgspec.structs.replace(handshake, disk=empty)
        self._join(self._hello.session, handshake)

    def _join(self, session: str, handshake: Handshake) -> None:
        incarnation = os.urandom(8).hex()
        hello = Hello(session, self._identity, incarnation, self._num_ranks, handshake)
        self._membership = _Membership.JOINING
        self._open_end.join(hello)
        self._hello = hello
