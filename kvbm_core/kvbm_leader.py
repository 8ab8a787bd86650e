"""A Leader with its side of the channel: ranks join, report, get lost and come back.

Lives here: what membership means for the cache. Does not live here: decisions about blocks (see
`leader`), messages (see `channel`).
Invariant: the Leader exists once every rank has joined; while a rank is lost nothing is matched
and nothing waits for it; when it is back, caching begins with empty tiers.
"""

from __future__ import annotations

import logging
import os

from kvbm_core.announce import announce
from kvbm_core.build import build_leader
from kvbm_core.channel.leader_end import LeaderEnd
from kvbm_core.channel.leader_protocol import (
    Joined,
    LeaderEvent,
    Lost,
    Refused,
    Reported,
    Terms,
    least_of,
)
from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.channel.rendezvous import Rendezvous
from kvbm_core.channel.timing import Timing
from kvbm_core.channel.waiting import wait_until
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ChannelError
from kvbm_core.leader import Leader
from kvbm_core.registry.choose import rendezvous_for
from kvbm_core.wire import Handshake, StepPlan, encode

logger = logging.getLogger(__name__)


class KvbmLeader:
    """One engine's leader, for engines that carry no messages between its ranks.

    Used by one thread; only `wait` waits. num_ranks: workers to wait for. block_size: tokens.
    identity: what blocks mean (model, weights, layout), equal on all ranks, in readable words.
    rendezvous: how workers find it; None: as config and environment say. engine_…: see Leader.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        num_ranks: int,
        block_size: int,
        identity: str,
        rendezvous: Rendezvous | None = None,
        engine_holds_blocks: bool = True,
        engine_shares_blocks: bool = True,
        engine_can_wait: bool = True,
        timing: Timing | None = None,
    ) -> None:
        self._config = config
        self._num_ranks = num_ranks
        self._block_size = block_size
        self._identity = identity
        self._rendezvous = rendezvous
        self._engine_holds_blocks = engine_holds_blocks
        self._engine_shares_blocks = engine_shares_blocks
        self._engine_can_wait = engine_can_wait
        self._timing = timing or Timing()
        self._end: LeaderEnd | None = None
        self._leader: Leader | None = None
        self._handshakes: dict[int, Handshake] = {}
        self._lost_ranks: set[int] = set()
        self._refusals: dict[int, str] = {}

    def open(self) -> None:
        """Listen, and announce the address; returns at once. Raises ConfigError, ChannelError."""
        if self._rendezvous is None:
            self._rendezvous = rendezvous_for(self._config, self._identity, os.environ)
        terms = Terms(
            session=os.urandom(16).hex(),
            identity=self._identity,
            num_ranks=self._num_ranks,
            block_size=self._block_size,
            has_disk=self._config.has_disk,
        )
        end = LeaderEnd(
            terms,
            timing=self._timing,
            host=self._rendezvous.host,
            beat_port=self._rendezvous.beat_port,
            port=self._rendezvous.port,
        )
        end.open()
        try:
            self._rendezvous.announce(end.address)
        except BaseException:
            end.close()
            raise
        self._end = end
        logger.info("kvbm: leader %s listens at %s", terms.session, end.address.endpoint)

    @property
    def address(self) -> LeaderAddress:
        """Where workers find it, to be passed on by whatever means; there once it is open."""
        return self._open_end.address

    @property
    def is_ready(self) -> bool:
        """Whether every rank has joined at least once, so that there is a Leader."""
        return self._leader is not None

    @property
    def leader(self) -> Leader:
        if self._leader is None:
            raise RuntimeError(f"ranks {self.missing_ranks} have not joined yet")
        return self._leader

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks that are not there now."""
        return sorted(set(range(self._num_ranks)) - set(self._handshakes))

    @property
    def lost_ranks(self) -> frozenset[int]:
        """Ranks that were there when the Leader was built, and are not now."""
        return frozenset(self._lost_ranks)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when every rank has joined. None: the configured time.

        Raises ChannelError that names the missing ranks.
        """
        if timeout_seconds is None:
            timeout_seconds = self._config.leader_worker_init_timeout_secs
        end = self._open_end
        if not wait_until(end, self._is_joined, timeout_seconds=timeout_seconds, say=self._say):
            raise ChannelError(self._say_who_is_missing(timeout_seconds))

    def _is_joined(self) -> bool:
        self.poll()
        if not self.is_ready and self._open_end.failure is not None:
            raise ChannelError(f"the leader's I/O thread has failed: {self._open_end.failure}")
        return self.is_ready

    def _say(self, passed_seconds: float) -> None:
        logger.info(
            "kvbm: waiting for ranks %s of %d since %.0f s",
            self.missing_ranks,
            self._num_ranks,
            passed_seconds,
        )

    def poll(self) -> None:
        """Apply what workers have said since the last call. Never waits.

        Raises ConfigError, each time, where all have joined and the Leader can't be built.
        """
        failure = self._open_end.failure  # before the events: after it there are no more
        for event in self._open_end.take_events():
            self._take(event)
        if failure is not None:
            for rank in list(self._handshakes):
                self._lose(rank, f"the leader's I/O thread has failed: {failure}")
        if self._leader is None and not self.missing_ranks:
            self._build()

    def publish(self, plan: StepPlan) -> None:
        """Send a plan to every rank, for engines that do not carry it themselves."""
        if plan:
            self._open_end.publish(encode(plan))

    def close(self) -> None:
        """Withdraw the address and close the sockets."""
        if self._end is None:
            return
        assert self._rendezvous is not None
        self._rendezvous.withdraw()
        self._end.close()
        self._end = None

    @property
    def _open_end(self) -> LeaderEnd:
        if self._end is None:
            raise RuntimeError("the leader is not open")
        return self._end

    def _take(self, event: LeaderEvent) -> None:
        if isinstance(event, Joined):
            self._join(event.rank, event.handshake)
        elif isinstance(event, Reported):
            self._apply(event)
        elif isinstance(event, Lost):
            self._lose(event.rank, event.why)
        elif isinstance(event, Refused):
            self._refusals[event.rank] = event.why
            logger.error("kvbm: a worker of rank %d was refused: %s", event.rank, event.why)

    def _join(self, rank: int, handshake: Handshake) -> None:
        self._handshakes[rank] = handshake
        self._refusals.pop(rank, None)
        if self._leader is not None:
            self._lost_ranks.discard(rank)
            self._leader.regain_rank(rank)
            logger.info("kvbm: rank %d is back; lost ranks: %s", rank, sorted(self._lost_ranks))

    def _apply(self, event: Reported) -> None:
        # Before there is a Leader there was no op.
        if self._leader is not None:
            self._leader.apply(event.report)

    def _lose(self, rank: int, why: str) -> None:
        del self._handshakes[rank]
        logger.warning("kvbm: rank %d is lost: %s", rank, why)
        if self._leader is not None:
            self._lost_ranks.add(rank)
            self._leader.lose_rank(rank)

    def _build(self) -> None:
        handshakes = [self._handshakes[rank] for rank in range(self._num_ranks)]
        num_host_blocks = least_of(handshakes).num_host_blocks
        self._leader = build_leader(
            self._config,
            num_host_blocks=num_host_blocks,
            block_size=self._block_size,
            block_bytes=max(handshake.block_bytes for handshake in handshakes),
            num_ranks=self._num_ranks,
            inventories=[h.disk for h in handshakes if h.disk is not None],
            engine_holds_blocks=self._engine_holds_blocks,
            engine_shares_blocks=self._engine_shares_blocks,
            engine_can_wait=self._engine_can_wait,
        )
        announce(
            self._leader,
            self._config,
            handshakes,
            block_size=self._block_size,
            keys=f"keys of {self._identity}",
        )

    def _say_who_is_missing(self, timeout_seconds: float) -> str:
        reasons = "".join(f"; rank {rank}: {why}" for rank, why in sorted(self._refusals.items()))
        return (
            f"ranks {self.missing_ranks} of {self._num_ranks} have not joined the leader at "
            f"{self.address.endpoint} within {timeout_seconds:g} s{reasons}. Look at their logs "
            "and whether they reach that address; where loading takes longer, raise "
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"
        )
