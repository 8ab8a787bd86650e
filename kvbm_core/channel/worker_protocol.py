"""A worker's half of the channel: joining, what it owes to the leader, whether the leader lives.

    SEEKING ──beat──▶ JOINING ──welcome──▶ JOINED ──dropped──▶ OUTSIDE ──join──▶ SEEKING
                          └────refusal────▶ OUTSIDE

Lives here: decisions over messages that have come and a clock that is passed in.
Does not live here: sockets, threads.
Invariant: reports and plans belong to one incarnation; what was owed to another is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvbm_core.channel.messages import (
    Ack,
    Alive,
    Beat,
    Data,
    Dropped,
    Goodbye,
    Hello,
    Message,
    OtherVersion,
    Refusal,
    Welcome,
)
from kvbm_core.channel.stream import NOT_OVERDUE, Inbox, Outbox
from kvbm_core.channel.timing import Stopwatch, Timing
from kvbm_core.errors import WireError
from kvbm_core.wire import StepPlan, decode_plan

_MAX_HELLO_BEATS = 8


class Membership(Enum):
    OUTSIDE = "outside"
    SEEKING = "seeking"
    JOINING = "joining"
    JOINED = "joined"


@dataclass(frozen=True)
class Welcomed:
    incarnation: str


@dataclass(frozen=True)
class Planned:
    plan: StepPlan


@dataclass(frozen=True)
class Outside:
    """Not a member any more. is_final: joining again would not help."""

    why: str
    is_final: bool


@dataclass(frozen=True)
class LeaderSeen:
    is_alive: bool


WorkerEvent = Welcomed | Planned | Outside | LeaderSeen


class WorkerProtocol:
    """Called from one thread. `outgoing` and `events` are the caller's to empty."""

    def __init__(self, session: str, timing: Timing) -> None:
        self.outgoing: list[Message] = []
        self.events: list[WorkerEvent] = []
        self.num_malformed = 0
        self._session = session
        self._timing = timing
        self._membership = Membership.OUTSIDE
        self._hello: Hello | None = None
        self._is_leader_alive = False
        self._heard_seconds = 0.0
        self._next_hello_seconds = 0.0
        self._hello_beats = 1
        self._next_beat_seconds = 0.0
        self._stopwatch = Stopwatch(timing)
        self._outbox = Outbox(timing.resend_seconds)
        self._inbox = Inbox()

    def join(self, hello: Hello) -> None:
        """Ask to become a member, as a new incarnation."""
        self._hello = hello
        self._membership = Membership.JOINING if self._is_leader_alive else Membership.SEEKING
        self._outbox, self._inbox = Outbox(self._timing.resend_seconds), Inbox()
        self._next_hello_seconds, self._hello_beats = 0.0, 1

    def send(self, incarnation: str, payload: bytes) -> None:
        """Owe an encoded report to the leader, if that incarnation is still a member."""
        if self._is_member(incarnation):
            self._outbox.put(payload)

    def leave(self) -> None:
        """Send what is owed, and say goodbye."""
        if self._hello is not None and self._membership is not Membership.OUTSIDE:
            for seq, payload in self._outbox.due(NOT_OVERDUE):
                self._send_report(self._hello, seq, payload)
            self.outgoing.append(Goodbye(self._hello.handshake.rank, self._hello.incarnation))
        self._membership = Membership.OUTSIDE

    def receive(self, message: Message, now_seconds: float) -> None:
        if isinstance(message, Beat):
            self._receive_beat(message, now_seconds)
            return
        if isinstance(message, Hello | Alive | Goodbye):
            self.num_malformed += 1
            return
        if self._hello is None or message.incarnation not in ("", self._hello.incarnation):
            return
        if isinstance(message, Refusal):
            self._step_out(message.reason, is_final=True)
        elif isinstance(message, Dropped):
            if self._membership is Membership.JOINED:
                self._step_out("the leader counts this rank as lost", is_final=False)
        elif isinstance(message, Welcome):
            if self._membership is Membership.JOINING:
                self._membership = Membership.JOINED
                self.events.append(Welcomed(message.incarnation))
        elif isinstance(message, Ack):
            self._outbox.acked(message.seq)
        elif self._membership is Membership.JOINED:
            self._receive_plan(message)

    def receive_malformed(self, error: WireError) -> None:
        """Bytes that are no message of this release."""
        self.num_malformed += 1
        if isinstance(error, OtherVersion) and self._membership is not Membership.JOINED:
            self._step_out(str(error), is_final=True)

    def tick(self, now_seconds: float) -> None:
        """Whatever is due. Call after all messages that have come were received."""
        gap_seconds = self._stopwatch.stood_still_seconds(now_seconds)
        self._heard_seconds = min(now_seconds, self._heard_seconds + gap_seconds)
        silent_seconds = now_seconds - self._heard_seconds
        if self._is_leader_alive and silent_seconds > self._timing.timeout_seconds:
            self._is_leader_alive = False
            self.events.append(LeaderSeen(False))
        if self._hello is None:
            return
        if self._membership is Membership.JOINING and now_seconds >= self._next_hello_seconds:
            self.outgoing.append(self._hello)
            wait_seconds = self._hello_beats * self._timing.beat_seconds
            self._next_hello_seconds = now_seconds + wait_seconds
            self._hello_beats = min(2 * self._hello_beats, _MAX_HELLO_BEATS)
        if self._membership is Membership.JOINED:
            self._speak(self._hello, now_seconds)

    def _speak(self, hello: Hello, now_seconds: float) -> None:
        for seq, payload in self._outbox.due(now_seconds):
            self._send_report(hello, seq, payload)
        if now_seconds >= self._next_beat_seconds:
            self._next_beat_seconds = now_seconds + self._timing.beat_seconds
            self.outgoing.append(Alive(hello.handshake.rank, hello.incarnation))

    def _send_report(self, hello: Hello, seq: int, payload: bytes) -> None:
        self.outgoing.append(Data(hello.handshake.rank, hello.incarnation, seq, payload))

    def _receive_beat(self, beat: Beat, now_seconds: float) -> None:
        if beat.session != self._session:
            return  # whoever took over the address of a leader that is gone
        self._heard_seconds = now_seconds
        if not self._is_leader_alive:
            self._is_leader_alive = True
            self.events.append(LeaderSeen(True))
        if self._membership is Membership.SEEKING:
            self._membership = Membership.JOINING

    def _receive_plan(self, data: Data) -> None:
        if self._inbox.take(data.seq):
            try:
                plan = decode_plan(data.payload)
            except WireError as error:
                # Its ops would be waited for for ever: let the leader count this rank as lost.
                self.num_malformed += 1
                self.leave()
                self.events.append(Outside(f"a plan can't be read: {error}", is_final=False))
                return
            self.events.append(Planned(plan))
        self.outgoing.append(Ack(data.rank, data.incarnation, self._inbox.last_seq))

    def _step_out(self, why: str, *, is_final: bool) -> None:
        if self._membership is not Membership.OUTSIDE:
            self._membership = Membership.OUTSIDE
            self.events.append(Outside(why, is_final))

    def _is_member(self, incarnation: str) -> bool:
        is_joined = self._membership is Membership.JOINED
        return is_joined and self._hello is not None and self._hello.incarnation == incarnation
