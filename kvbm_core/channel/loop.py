"""One I/O thread of the channel: it alone touches the sockets.

    user thread ──post──▶ [deque, eventfd] ──▶ I/O thread ──▶ sockets
    user thread ◀──take── [deque, event]   ◀── I/O thread ◀── sockets

Lives here: the thread, the wake-up, the bounds of a turn. Does not live here: what is said.
Invariant: the user's calls never wait for a socket; whatever arrives, the thread goes on, and if
it ever ends by itself, `failure` says so.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from kvbm_core.channel.sockets import zmq

logger = logging.getLogger(__name__)

MAX_MESSAGES_PER_TURN = 1000
_Event = TypeVar("_Event")


class Speaker(Protocol):
    """What a loop drives: sockets with a protocol behind them; used by the I/O thread only."""

    def open(self) -> None: ...

    def sockets(self) -> Iterable[Any]:
        """On which messages may come."""

    def receive(self, now_seconds: float) -> bool:
        """Take one message; False where none waits. Never raises for what is in it."""

    def tick(self, now_seconds: float) -> None:
        """Whatever is due."""

    def send(self) -> None:
        """Send all that is to be sent. Never waits."""

    def close(self) -> None:
        """Say goodbye and close the sockets."""


class Loop(Generic[_Event]):
    """Runs a speaker. beat_seconds: the longest time between two ticks, times two.

    take_events: moves out what the speaker has for the user.
    """

    def __init__(
        self,
        name: str,
        speaker: Speaker,
        take_events: Callable[[], list[_Event]],
        beat_seconds: float,
    ) -> None:
        self.failure: str | None = None
        self._speaker = speaker
        self._take_events = take_events
        self._wait_seconds = beat_seconds / 2
        self._commands: deque[Callable[[], None]] = deque()
        self._events: deque[_Event] = deque()
        self._news = threading.Event()
        self._is_closing = False
        self._wakeup_fd = -1
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def open(self) -> None:
        """Open the sockets, here, so that what is wrong with them is raised here; then run."""
        self._wakeup_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._speaker.open()
        except BaseException:
            os.close(self._wakeup_fd)
            raise
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Have the I/O thread call this. Never waits."""
        self._commands.append(command)
        os.eventfd_write(self._wakeup_fd, 1)

    def take(self) -> list[_Event]:
        """Events since the last call, in order. Never waits."""
        self._news.clear()
        events: list[_Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def wait(self, timeout_seconds: float) -> None:
        """Return when there may be events, or after the time-out."""
        self._news.wait(max(0.0, timeout_seconds))

    def close(self) -> None:
        """End the thread after a goodbye; it closes the sockets."""
        self._is_closing = True
        os.eventfd_write(self._wakeup_fd, 1)
        self._thread.join()
        os.close(self._wakeup_fd)

    def _run(self) -> None:
        try:
            self._turn_until_closed()
        except Exception as error:  # boundary: the user's thread must hear of it
            logger.exception("the I/O thread %s has failed", self._thread.name)
            self.failure = f"{type(error).__name__}: {error}"
            self._news.set()
        finally:
            self._speaker.close()

    def _turn_until_closed(self) -> None:
        poller = zmq.Poller()
        for socket in (self._wakeup_fd, *self._speaker.sockets()):
            poller.register(socket, zmq.POLLIN)
        is_behind = False
        while not self._is_closing:
            poller.poll(0 if is_behind else int(self._wait_seconds * 1000))
            self._take_commands()
            now_seconds = time.monotonic()
            num_received = 0
            while num_received < MAX_MESSAGES_PER_TURN and self._speaker.receive(now_seconds):
                num_received += 1
            is_behind = num_received == MAX_MESSAGES_PER_TURN
            self._speaker.tick(now_seconds)
            # First the user here, then the other side: what that knows is known here.
            if events := self._take_events():
                self._events.extend(events)
                self._news.set()
            self._speaker.send()
        self._take_commands()
        self._speaker.send()

    def _take_commands(self) -> None:
        try:
            os.eventfd_read(self._wakeup_fd)
        except BlockingIOError:
            return
        while self._commands:
            self._commands.popleft()()
