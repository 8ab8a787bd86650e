"""A worker's sockets: SUB for the leader's beat, DEALER for everything else.

Lives here: connecting, sending, receiving. Does not live here: when to join (`worker_protocol`).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvbm_core.channel import sockets
from kvbm_core.channel.loop import Loop
from kvbm_core.channel.messages import Hello, LeaderAddress, check_payload, decode, encode
from kvbm_core.channel.sockets import zmq
from kvbm_core.channel.timing import Timing
from kvbm_core.channel.worker_protocol import WorkerEvent, WorkerProtocol
from kvbm_core.errors import WireError


class _WorkerSockets:
    """A Speaker."""

    def __init__(self, address: LeaderAddress, timing: Timing) -> None:
        self.protocol = WorkerProtocol(address.session, timing)
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = sockets.new_socket(self._context, zmq.SUB)
        self._dealer = sockets.new_socket(self._context, zmq.DEALER)
        # To a leader that is not there nothing is queued: what matters is sent again.
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)

    def open(self) -> None:
        self._sub.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            sockets.connect(self._sub, self._address.beat_endpoint)
            sockets.connect(self._dealer, self._address.endpoint)
        except BaseException:
            self.close()
            raise

    def sockets(self) -> Iterable[zmq.Socket[bytes]]:
        return (self._sub, self._dealer)

    def receive(self, now_seconds: float) -> bool:
        has_received = False
        for socket in (self._sub, self._dealer):
            try:
                data = b"".join(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                continue
            has_received = True
            try:
                message = decode(data)
            except WireError as error:
                self.protocol.receive_malformed(error)
            else:
                self.protocol.receive(message, now_seconds)
        return has_received

    def tick(self, now_seconds: float) -> None:
        self.protocol.tick(now_seconds)

    def send(self) -> None:
        for message in self.protocol.outgoing:
            try:
                self._dealer.send(encode(message), zmq.NOBLOCK)
            except zmq.Again:
                break  # what matters is sent again
        self.protocol.outgoing.clear()

    def take_events(self) -> list[WorkerEvent]:
        events, self.protocol.events = self.protocol.events, []
        return events

    def close(self) -> None:
        self._context.destroy(linger=sockets.LINGER_MS)


class WorkerEnd:
    """A worker's side of the channel; used by one thread, which never waits here except in `wait`
    and `close`."""

    def __init__(self, address: LeaderAddress, *, timing: Timing) -> None:
        self._sockets = _WorkerSockets(address, timing)
        take_events = self._sockets.take_events
        self._loop = Loop("kvbm-worker", self._sockets, take_events, timing.beat_seconds)

    @property
    def failure(self) -> str | None:
        """Why the I/O thread has ended by itself; None while it runs."""
        return self._loop.failure

    @property
    def num_malformed(self) -> int:
        """Messages that were dropped because they could not be read."""
        return self._sockets.protocol.num_malformed

    def open(self) -> None:
        """Connect, in the background: there may be nobody yet."""
        self._loop.open()

    def join(self, hello: Hello) -> None:
        """Ask to become a member; Welcomed or Outside says how that went. Raises WireError where
        the message is too large."""
        encode(hello)
        self._loop.post(lambda: self._sockets.protocol.join(hello))

    def send(self, incarnation: str, payload: bytes) -> None:
        """Send an encoded report, as long as that incarnation is a member. Raises WireError where
        it is too large."""
        check_payload(payload)
        self._loop.post(lambda: self._sockets.protocol.send(incarnation, payload))

    def take_events(self) -> list[WorkerEvent]:
        """What has happened since the last call, in order."""
        return self._loop.take()

    def wait(self, timeout_seconds: float) -> None:
        """Return when something may have happened, or after the time-out."""
        self._loop.wait(timeout_seconds)

    def close(self) -> None:
        self._loop.post(self._sockets.protocol.leave)
        self._loop.close()
