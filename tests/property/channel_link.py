"""A leader's and some workers' protocols over a link that loses, repeats and reorders messages.

A worker that is told that it is outside joins again as a new incarnation. What it has sent and
what the leader has applied is compared incarnation by incarnation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvbm_core.channel.leader_protocol import Joined, LeaderProtocol, Lost, Reported, Terms
from kvbm_core.channel.messages import Hello, Message, decode, encode
from kvbm_core.channel.timing import Timing
from kvbm_core.channel.worker_protocol import Outside, Planned, Welcomed, WorkerProtocol
from kvbm_core.types import OpResult
from kvbm_core.wire import Handshake, StepPlan, WorkerReport
from kvbm_core.wire import encode as encode_body

TIMING = Timing(beat_seconds=1.0, timeout_seconds=6.0, resend_seconds=1.0)
TERMS = Terms("s", "model", 2, 4, False)
TURN_SECONDS = 0.5


@dataclass
class Worker:
    """One rank. sent: reports by the incarnation that sent them; plans: what it has taken, too."""

    rank: int
    protocol: WorkerProtocol
    incarnation: str = ""
    num_incarnations: int = 0
    is_member: bool = False
    sent: dict[str, list[int]] = field(default_factory=dict)
    plans: dict[str, list[int]] = field(default_factory=dict)

    def join(self) -> None:
        self.num_incarnations += 1
        self.incarnation = f"{self.rank}.{self.num_incarnations}"
        self.sent[self.incarnation], self.plans[self.incarnation] = [], []
        handshake = Handshake(self.rank, 8, 8, TERMS.block_size, 64, "f")
        self.protocol.join(Hello("s", "model", self.incarnation, TERMS.num_ranks, handshake))

    def send(self, number: int) -> None:
        if self.is_member:
            self.sent[self.incarnation].append(number)
            report = WorkerReport(self.rank, (OpResult(number, 0, 0.0),))
            self.protocol.send(self.incarnation, encode_body(report))


class Link:
    """chances: of a message to be lost, and to be repeated, each time."""

    def __init__(self, seed: int, lost: float, repeated: float) -> None:
        self.lost, self.repeated = lost, repeated
        self.random = random.Random(seed)
        self.now = 0.0
        self.leader = LeaderProtocol(TERMS, TIMING)
        self.workers = [Worker(rank, WorkerProtocol("s", TIMING)) for rank in range(2)]
        self.to_leader: list[tuple[bytes, bytes]] = []
        self.to_worker: list[tuple[int, bytes]] = []
        self.applied: dict[str, list[int]] = {}
        self.published: dict[str, list[int]] = {}
        self.member: dict[int, str] = {}
        for worker in self.workers:
            worker.join()

    def publish(self, number: int) -> None:
        self.leader.publish(encode_body(StepPlan(fences=(number,))))
        for incarnation in self.member.values():
            self.published[incarnation].append(number)

    def turn(self) -> None:
        """Half a second in which each message in flight is delivered, lost, or delivered twice."""
        self.now += TURN_SECONDS
        for route, data in self._passed(self.to_leader):
            self.leader.receive(route, decode(data), self.now)
        for rank, data in self._passed(self.to_worker):
            self.workers[rank].protocol.receive(decode(data), self.now)
        self.leader.tick(self.now)
        for worker in self.workers:
            worker.protocol.tick(self.now)
        self._collect()

    def _passed(self, queue: list[tuple[bytes, bytes]] | list[tuple[int, bytes]]) -> list:  # type: ignore[type-arg]
        passed = [item for item in queue if self.random.random() >= self.lost]
        passed += [item for item in passed if self.random.random() < self.repeated]
        if self.lost or self.repeated:
            self.random.shuffle(passed)
        queue.clear()
        return passed

    def _collect(self) -> None:
        for route, message in self.leader.outgoing:
            targets = range(2) if route is None else [int(route)]
            self.to_worker += [(rank, encode(message)) for rank in targets]
        self.leader.outgoing.clear()
        for worker in self.workers:
            self._collect_from(worker)
        for event in self.leader.events:
            self._note(event)
        self.leader.events.clear()

    def _collect_from(self, worker: Worker) -> None:
        messages: list[Message] = worker.protocol.outgoing
        self.to_leader += [(str(worker.rank).encode(), encode(m)) for m in messages]
        messages.clear()
        for event in worker.protocol.events:
            if isinstance(event, Welcomed):
                worker.is_member = True
            elif isinstance(event, Planned):
                worker.plans[worker.incarnation] += event.plan.fences
            elif isinstance(event, Outside):
                assert not event.is_final, event
                worker.is_member = False
                worker.join()
        worker.protocol.events.clear()

    def _note(self, event: object) -> None:
        if isinstance(event, Joined):
            assert event.rank not in self.member, "a rank joins only after it was lost"
            incarnation = self.leader._members[event.rank].incarnation
            self.member[event.rank] = incarnation
            self.applied[incarnation], self.published[incarnation] = [], []
        elif isinstance(event, Lost):
            del self.member[event.rank]
        elif isinstance(event, Reported):
            incarnation = self.member[event.report.rank]
            self.applied[incarnation] += [result.op_id for result in event.report.results]

    def check(self) -> None:
        """Nothing came twice, out of order, or from nowhere."""
        for worker in self.workers:
            for incarnation, sent in worker.sent.items():
                applied = self.applied.get(incarnation, [])
                assert applied == sent[: len(applied)]
            for incarnation, plans in worker.plans.items():
                assert plans == self.published.get(incarnation, [])[: len(plans)]

    def check_settled(self) -> None:
        """On a link that works again all are members, and all that members sent has come."""
        self.lost = self.repeated = 0.0
        for _ in range(80):
            self.turn()
            self.check()
        for worker in self.workers:
            assert self.member.get(worker.rank) == worker.incarnation
            assert self.applied[worker.incarnation] == worker.sent[worker.incarnation]
            assert worker.plans[worker.incarnation] == self.published[worker.incarnation]
