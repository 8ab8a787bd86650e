"""The leader's half of the channel: who has joined, what is owed to whom, who is lost.

Lives here: decisions over messages that have come and a clock that is passed in.
Does not live here: sockets, threads; what a lost rank means for the cache (see `kvbm_leader`).
Invariant: a rank has at most one incarnation. Its events are Joined, Reported…, Lost, in this
order; a report leaves as an event exactly once and in order, or the rank is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from kvbm_core.channel.stream import Inbox, Outbox
from kvbm_core.channel.timing import Stopwatch, Timing
from kvbm_core.errors import WireError
from kvbm_core.wire import Handshake, WorkerReport, decode_report

Route = bytes
"""How the sockets reach one worker."""

_MAX_REASON_LENGTH = 4000


@dataclass(frozen=True)
class Terms:
    """What a worker must agree with to join. identity: of what its blocks mean, in readable words.
    block_size: tokens."""

    session: str
    identity: str
    num_ranks: int
    block_size: int
    has_disk: bool


@dataclass(frozen=True)
class Joined:
    rank: int
    handshake: Handshake


@dataclass(frozen=True)
class Reported:
    report: WorkerReport


@dataclass(frozen=True)
class Lost:
    rank: int
    why: str


@dataclass(frozen=True)
class Refused:
    rank: int
    why: str


LeaderEvent = Joined | Reported | Lost | Refused


@dataclass
class _Member:
    incarnation: str
    handshake: Handshake
    route: Route
    heard_seconds: float
    outbox: Outbox
    inbox: Inbox


@dataclass
class _Candidate:
    """Who wants the place of a rank that is still counted as alive."""

    hello: Hello
    route: Route
    since_seconds: float


class LeaderProtocol:
    """Called from one thread. `outgoing` (route None: to all) and `events` are the caller's to
    empty."""

    def __init__(self, terms: Terms, timing: Timing, *, port: int = 0) -> None:
        self.outgoing: list[tuple[Route | None, Message]] = []
        self.events: list[LeaderEvent] = []
        self.num_malformed = 0
        self._terms = terms
        self._timing = timing
        self._beat = Beat(terms.session, terms.identity, port)
        self._next_beat_seconds = float("-inf")
        self._stopwatch = Stopwatch(timing)
        self._members: dict[int, _Member] = {}
        self._candidates: dict[int, _Candidate] = {}
        self._least: Handshake | None = None

    def publish(self, payload: bytes) -> None:
        """Owe an encoded plan to every rank that has joined."""
        for member in self._members.values():
            member.outbox.put(payload)

    def receive(self, route: Route, message: Message, now_seconds: float) -> None:
        if isinstance(message, Hello):
            self._receive_hello(route, message, now_seconds)
            return
        if not isinstance(message, Alive | Data | Ack | Goodbye):
            self.num_malformed += 1
            return
        member = self._members.get(message.rank)
        if member is None or member.incarnation != message.incarnation:
            if not isinstance(message, Goodbye):
                self.outgoing.append((route, Dropped(message.incarnation)))
            return
        member.heard_seconds, member.route = now_seconds, route
        if isinstance(message, Goodbye):
            self._lose(message.rank, "it has said goodbye")
        elif isinstance(message, Ack):
            member.outbox.acked(message.seq)
        elif isinstance(message, Data):
            self._receive_report(member, message)

    def receive_malformed(self, route: Route, error: WireError) -> None:
        """Bytes that are no message of this release."""
        self.num_malformed += 1
        if isinstance(error, OtherVersion):
            self.outgoing.append((route, Refusal("", str(error))))

    def hasten_beat(self) -> None:
        """Beat with the next tick."""
        self._next_beat_seconds = float("-inf")

    def tick(self, now_seconds: float) -> None:
        """Whatever is due. Call after all messages that have come were received."""
        if gap_seconds := self._stopwatch.stood_still_seconds(now_seconds):
            for member in self._members.values():
                member.heard_seconds = min(now_seconds, member.heard_seconds + gap_seconds)
            for candidate in self._candidates.values():
                candidate.since_seconds = min(now_seconds, candidate.since_seconds + gap_seconds)
        for rank, member in list(self._members.items()):
            silent_seconds = now_seconds - member.heard_seconds
            if silent_seconds > self._timing.timeout_seconds:
                self._lose(rank, f"it was silent for {silent_seconds:.1f} s")
        for rank in list(self._candidates):
            self._judge(rank, now_seconds)
        for rank, member in self._members.items():
            for seq, payload in member.outbox.due(now_seconds):
                data = Data(rank, member.incarnation, seq, payload)
                self.outgoing.append((member.route, data))
        if now_seconds >= self._next_beat_seconds:
            self._next_beat_seconds = now_seconds + self._timing.beat_seconds
            self.outgoing.append((None, self._beat))

    def _receive_hello(self, route: Route, hello: Hello, now_seconds: float) -> None:
        rank = hello.handshake.rank
        if why := self._objection(hello):
            self._refuse(route, hello, why)
            return
        member = self._members.get(rank)
        if member is None:
            self._admit(route, hello, now_seconds)
        elif member.incarnation == hello.incarnation:
            member.heard_seconds, member.route = now_seconds, route
            self.outgoing.append((route, Welcome(hello.incarnation)))
        else:
            known = self._candidates.get(rank)
            is_new = known is None or known.hello.incarnation != hello.incarnation
            since_seconds = now_seconds if known is None or is_new else known.since_seconds
            self._candidates[rank] = _Candidate(hello, route, since_seconds)

    def _judge(self, rank: int, now_seconds: float) -> None:
        """A second worker of a rank takes over if the first is dead, and is refused if it lives."""
        candidate, member = self._candidates[rank], self._members.get(rank)
        if member is None:
            del self._candidates[rank]
            self._receive_hello(candidate.route, candidate.hello, now_seconds)
        elif member.heard_seconds > candidate.since_seconds + self._timing.beat_seconds:
            del self._candidates[rank]
            why = f"rank {rank} is served by another worker, which is alive"
            self._refuse(candidate.route, candidate.hello, why)

    def _admit(self, route: Route, hello: Hello, now_seconds: float) -> None:
        rank, handshake = hello.handshake.rank, hello.handshake
        self._candidates.pop(rank, None)  # itself, or one who will ask again
        self._members[rank] = _Member(
            hello.incarnation,
            handshake,
            route,
            now_seconds,
            Outbox(self._timing.resend_seconds),
            Inbox(),
        )
        self.outgoing.append((route, Welcome(hello.incarnation)))
        self.events.append(Joined(rank, handshake))
        if self._least is None and len(self._members) == self._terms.num_ranks:
            self._least = least_of([member.handshake for member in self._members.values()])

    def _refuse(self, route: Route, hello: Hello, why: str) -> None:
        if len(why) > _MAX_REASON_LENGTH:  # it quotes what came
            half = _MAX_REASON_LENGTH // 2
            why = f"{why[:half]} … {why[-half:]}"
        self.outgoing.append((route, Refusal(hello.incarnation, why)))
        self.events.append(Refused(hello.handshake.rank, why))

    def _lose(self, rank: int, why: str) -> None:
        del self._members[rank]
        self.events.append(Lost(rank, why))

    def _receive_report(self, member: _Member, data: Data) -> None:
        if member.inbox.take(data.seq):
            try:
                report = decode_report(data.payload)
                if report.rank != data.rank:
                    raise WireError(f"it is of rank {report.rank}")
            except WireError as error:
                # Its ops would be waited for for ever.
                self.num_malformed += 1
                self.outgoing.append((member.route, Dropped(member.incarnation)))
                self._lose(data.rank, f"its report can't be read: {error}")
                return
            self.events.append(Reported(report))
        ack = Ack(data.rank, member.incarnation, member.inbox.last_seq)
        self.outgoing.append((member.route, ack))

    def _objection(self, hello: Hello) -> str:
        """Why this worker can't join; empty where it can."""
        terms, its = self._terms, hello.handshake
        if hello.session != terms.session:
            return f"it looks for leader {hello.session}, this is leader {terms.session}"
        if hello.identity != terms.identity:
            return f"its blocks are of {hello.identity!r}, the leader's of {terms.identity!r}"
        if hello.num_ranks != terms.num_ranks or not 0 <= its.rank < terms.num_ranks:
            counts = f"rank {its.rank} of {hello.num_ranks}"
            return f"it is {counts}, the leader serves {terms.num_ranks} ranks from 0 on"
        if its.block_size != terms.block_size:
            return f"its blocks are of {its.block_size} tokens, the leader's of {terms.block_size}"
        if (its.disk is not None) != terms.has_disk:
            return (
                "it and the leader do not agree on whether there is a disk tier: set the same "
                "DYN_KVBM_DISK_* for all processes, on every node"
            )
        return self._objection_to_geometry(its)

    def _objection_to_geometry(self, its: Handshake) -> str:
        others = [m.handshake for rank, m in self._members.items() if rank != its.rank]
        reference = self._least or next(iter(others), None)
        if reference is None:
            return ""
        expected = reference.num_device_blocks, reference.block_bytes, reference.fingerprint
        found = its.num_device_blocks, its.block_bytes, its.fingerprint
        if found != expected:
            names = "device blocks, bytes a block, layout"
            return f"its geometry ({names}) is {found}, that of other ranks {expected}"
        if self._least is not None and not _has_room(its, self._least):
            return (
                f"it has {its.num_host_blocks} host blocks now, or less disk, where every rank has "
                f"{self._least.num_host_blocks}: a rank may come back only with the same memory"
            )
        return ""


def least_of(handshakes: list[Handshake]) -> Handshake:
    """What every rank has at least; geometry and rank are the first one's."""
    first = handshakes[0]
    disks = [handshake.disk for handshake in handshakes if handshake.disk is not None]
    return Handshake(
        first.rank,
        min(handshake.num_host_blocks for handshake in handshakes),
        first.num_device_blocks,
        first.block_size,
        first.block_bytes,
        first.fingerprint,
        min(disks, key=lambda disk: disk.num_blocks) if disks else None,
    )


def _has_room(its: Handshake, least: Handshake) -> bool:
    num_disk_blocks = [0 if end.disk is None else end.disk.num_blocks for end in (its, least)]
    return its.num_host_blocks >= least.num_host_blocks and num_disk_blocks[0] >= num_disk_blocks[1]
