"""The leader's sockets: XPUB for its beat, ROUTER for everything else.

Lives here: binding, sending, receiving. Does not live here: who may join (`leader_protocol`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from kvbm_core.channel import sockets
from kvbm_core.channel.leader_protocol import LeaderEvent, LeaderProtocol, Terms
from kvbm_core.channel.loop import Loop
from kvbm_core.channel.messages import LeaderAddress, check_payload, decode, encode
from kvbm_core.channel.sockets import zmq
from kvbm_core.channel.timing import Timing
from kvbm_core.errors import WireError


class _LeaderSockets:
    """A Speaker. host None: ipc."""

    def __init__(
        self, terms: Terms, timing: Timing, host: str | None, beat_port: int, port: int
    ) -> None:
        self.address: LeaderAddress | None = None
        self.protocol = LeaderProtocol(terms, timing)
        self._terms, self._timing = terms, timing
        self._host, self._beat_port, self._port = host, beat_port, port
        self._directory: Path | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = sockets.new_socket(self._context, zmq.XPUB)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)  # tell of every subscriber
        self._router = sockets.new_socket(self._context, zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def open(self) -> None:
        try:
            self.address = self._bind_ipc() if self._host is None else self._bind_tcp(self._host)
        except BaseException:
            self._close_sockets()
            raise

    def _bind_ipc(self) -> LeaderAddress:
        self._directory = sockets.new_ipc_directory()
        beat_endpoint, endpoint = (f"ipc://{self._directory}/{name}" for name in ("beat", "main"))
        self._pub.bind(beat_endpoint)
        self._router.bind(endpoint)
        return LeaderAddress(self._terms.session, beat_endpoint, endpoint)

    def _bind_tcp(self, host: str) -> LeaderAddress:
        beat_port = sockets.bind_tcp(self._pub, host, self._beat_port, "leader_zmq_pub_port")
        port = sockets.bind_tcp(self._router, host, self._port, "leader_zmq_ack_port")
        self.protocol = LeaderProtocol(self._terms, self._timing, port=port)
        name = sockets.reachable_host(host)
        return LeaderAddress(
            self._terms.session,
            sockets.tcp_endpoint(name, beat_port),
            sockets.tcp_endpoint(name, port),
        )

    def sockets(self) -> Iterable[zmq.Socket[bytes]]:
        return (self._router, self._pub)

    def receive(self, now_seconds: float) -> bool:
        return self._receive_subscriber() or self._receive_message(now_seconds)

    def _receive_subscriber(self) -> bool:
        """A worker that has just come waits for a beat before it says hello."""
        try:
            self._pub.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.protocol.hasten_beat()
        return True

    def _receive_message(self, now_seconds: float) -> bool:
        try:
            route, *frames = self._router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            message = decode(b"".join(frames))
        except WireError as error:
            self.protocol.receive_malformed(route, error)
        else:
            self.protocol.receive(route, message, now_seconds)
        return True

    def tick(self, now_seconds: float) -> None:
        self.protocol.tick(now_seconds)

    def send(self) -> None:
        for route, message in self.protocol.outgoing:
            data = encode(message)
            try:
                if route is None:
                    self._pub.send(data, zmq.NOBLOCK)
                else:
                    self._router.send_multipart((route, data), zmq.NOBLOCK)
            except zmq.ZMQError as error:
                # Nobody there, or its queue is full: what matters is sent again.
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
        self.protocol.outgoing.clear()

    def take_events(self) -> list[LeaderEvent]:
        events, self.protocol.events = self.protocol.events, []
        return events

    def close(self) -> None:
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._context.destroy(linger=sockets.LINGER_MS)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class LeaderEnd:
    """The leader's side of the channel; used by one thread, which never waits here except in `wait`
    and `close`.

    host: listen there by tcp, on these ports (0: any free one); None: by ipc, in a directory that
    only this user may enter.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        timing: Timing,
        host: str | None = None,
        beat_port: int = 0,
        port: int = 0,
    ) -> None:
        self._sockets = _LeaderSockets(terms, timing, host, beat_port, port)
        take_events = self._sockets.take_events
        self._loop = Loop("kvbm-leader", self._sockets, take_events, timing.beat_seconds)

    @property
    def address(self) -> LeaderAddress:
        if self._sockets.address is None:
            raise RuntimeError("the leader has no address before it is open")
        return self._sockets.address

    @property
    def failure(self) -> str | None:
        """Why the I/O thread has ended by itself; None while it runs."""
        return self._loop.failure

    @property
    def num_malformed(self) -> int:
        """Messages that were dropped because they could not be read."""
        return self._sockets.protocol.num_malformed

    def open(self) -> None:
        """Bind and listen. Raises ConfigError with the remedy."""
        self._loop.open()

    def publish(self, payload: bytes) -> None:
        """Send an encoded plan to every rank that has joined. Raises WireError where it is too
        large."""
        check_payload(payload)
        self._loop.post(lambda: self._sockets.protocol.publish(payload))

    def take_events(self) -> list[LeaderEvent]:
        """What has happened since the last call, in order."""
        return self._loop.take()

    def wait(self, timeout_seconds: float) -> None:
        """Return when something may have happened, or after the time-out."""
        self._loop.wait(timeout_seconds)

    def close(self) -> None:
        self._loop.close()
