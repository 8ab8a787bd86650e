"""How workers learn where their leader is.

Lives here: the port, and what needs no service: an address passed by hand, or known ports.
Does not live here: discovery by etcd (see `kvbm_core.registry`).
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from kvbm_core.channel import sockets
from kvbm_core.channel.messages import Beat, LeaderAddress, decode
from kvbm_core.channel.sockets import zmq
from kvbm_core.errors import ChannelError, WireError

logger = logging.getLogger(__name__)

DEFAULT_BEAT_PORT = 56001
DEFAULT_PORT = 56002


class Rendezvous(Protocol):
    """A leader announces itself, its workers find it.

    host: where the leader must listen so that they reach it; None: on this machine only, by ipc.
    beat_port, port: the ports to listen on; 0: any free one.
    """

    beat_port: int
    port: int

    @property
    def host(self) -> str | None: ...

    def announce(self, address: LeaderAddress) -> None:
        """Make the leader known, and keep it known. Raises ChannelError, ConfigError."""

    def find(self, timeout_seconds: float) -> LeaderAddress:
        """Wait for the leader. Raises ChannelError with the remedy."""

    def withdraw(self) -> None:
        """The leader is going; undo `announce`."""


class DirectRendezvous:
    """Inside one process, or with the address carried by the caller."""

    host: str | None = None
    beat_port = 0
    port = 0

    def __init__(self, address: LeaderAddress | None = None) -> None:
        self._address = address

    def announce(self, address: LeaderAddress) -> None:
        self._address = address

    def find(self, timeout_seconds: float) -> LeaderAddress:
        if self._address is None:
            raise ChannelError(
                "nobody has told this worker where its leader is: pass the address of the open "
                "KvbmLeader, set DYN_KVBM_LEADER_ZMQ_HOST, or set ETCD_ENDPOINTS"
            )
        return self._address

    def withdraw(self) -> None:
        self._address = None


class FixedRendezvous:
    """A host and ports that both sides know. identity: of what the leader must serve."""

    def __init__(
        self,
        host: str,
        identity: str,
        beat_port: int = DEFAULT_BEAT_PORT,
        port: int = DEFAULT_PORT,
    ) -> None:
        self.host: str | None = host
        self.beat_port = beat_port
        self.port = port
        self._identity = identity

    def announce(self, address: LeaderAddress) -> None:
        pass

    def find(self, timeout_seconds: float) -> LeaderAddress:
        """Wait for the beat of whoever listens there: it tells the leader's session."""
        assert self.host is not None
        host = "localhost" if self.host in sockets.ANY_HOST else self.host
        endpoint = sockets.tcp_endpoint(host, self.beat_port)
        beat = await_beat(endpoint, timeout_seconds)
        if beat is None:
            raise ChannelError(
                f"no leader speaks at {endpoint} within {timeout_seconds:g} s: check that it "
                "runs, as the same kvbm-connectors release, and that DYN_KVBM_LEADER_ZMQ_HOST and "
                "_PUB_PORT name it on every rank"
            )
        if beat.identity != self._identity:
            raise ChannelError(
                f"the leader at {endpoint} serves {beat.identity!r}, this worker "
                f"{self._identity!r}: give each engine its own DYN_KVBM_LEADER_ZMQ_PUB_PORT and "
                "_ACK_PORT"
            )
        port = beat.port or self.port
        return LeaderAddress(beat.session, endpoint, sockets.tcp_endpoint(host, port))

    def withdraw(self) -> None:
        pass


def await_beat(endpoint: str, timeout_seconds: float, session: str = "") -> Beat | None:
    """The next beat of a leader, or of the one with that session; None where none comes."""
    deadline_seconds = time.monotonic() + timeout_seconds
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        sub = sockets.new_socket(context, zmq.SUB)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sockets.connect(sub, endpoint)
        while (left_seconds := deadline_seconds - time.monotonic()) > 0:
            if not sub.poll(int(left_seconds * 1000) + 1):
                continue
            try:
                message = decode(b"".join(sub.recv_multipart()))
            except WireError as error:
                logger.warning("kvbm: %s speaks, and is not understood: %s", endpoint, error)
                continue
            if isinstance(message, Beat) and session in ("", message.session):
                return message
        return None
    finally:
        context.destroy(linger=0)
