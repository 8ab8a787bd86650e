"""A worker's half: when it says hello, what it owes, whether its leader lives."""

from __future__ import annotations

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
from kvbm_core.channel.worker_protocol import (
    LeaderSeen,
    Outside,
    Planned,
    Welcomed,
    WorkerProtocol,
)
from kvbm_core.errors import WireError
from kvbm_core.wire import StepPlan, encode
from tests.unit.channels import IDENTITY, SESSION, TIMING, hello, report

BEAT = Beat(SESSION, IDENTITY)
PLAN = StepPlan(fences=(1,))


def seeking() -> WorkerProtocol:
    protocol = WorkerProtocol(SESSION, TIMING)
    protocol.join(hello())
    return protocol


def joined() -> WorkerProtocol:
    protocol = seeking()
    protocol.receive(BEAT, 0.0)
    protocol.tick(0.0)
    protocol.receive(Welcome("i0"), 0.0)
    assert protocol.events == [LeaderSeen(True), Welcomed("i0")]
    protocol.events.clear()
    protocol.outgoing.clear()
    return protocol


def run(protocol: WorkerProtocol, until: float, *, start: float = 0.0, leader: bool = True) -> None:
    now = start
    while now < until:
        now += 0.5
        if leader:
            protocol.receive(BEAT, now)
        protocol.tick(now)


def kinds(protocol: WorkerProtocol, kind: type[Message]) -> list[Message]:  # type: ignore[valid-type]
    return [message for message in protocol.outgoing if isinstance(message, kind)]


def test_it_says_hello_only_once_it_has_heard_its_leader() -> None:
    protocol = seeking()
    run(protocol, 5.0, leader=False)
    assert protocol.outgoing == []
    protocol.receive(BEAT, 5.0)
    protocol.tick(5.0)
    assert protocol.outgoing == [hello()]


def test_the_beat_of_another_leader_is_not_its_leaders() -> None:
    protocol = seeking()
    protocol.receive(Beat("other", IDENTITY), 0.0)
    protocol.tick(0.0)
    assert (protocol.outgoing, protocol.events) == ([], [])


def test_an_unanswered_hello_is_repeated_ever_more_seldom() -> None:
    protocol = seeking()
    run(protocol, 32.0)
    assert 4 <= len(kinds(protocol, Hello)) <= 8


def test_a_member_speaks_each_second_and_says_no_more_hello() -> None:
    protocol = joined()
    run(protocol, 5.0)
    assert len(kinds(protocol, Alive)) == 5
    assert not kinds(protocol, Hello)


def test_reports_are_repeated_until_they_are_acknowledged() -> None:
    protocol = joined()
    protocol.send("i0", report())
    run(protocol, 3.0)
    assert len(kinds(protocol, Data)) == 3
    protocol.receive(Ack(0, "i0", 1), 3.0)
    protocol.outgoing.clear()
    run(protocol, 6.0, start=3.0)
    assert not kinds(protocol, Data)


def test_reports_of_another_incarnation_are_not_sent() -> None:
    protocol = joined()
    protocol.send("before", report())
    run(protocol, 1.0)
    assert not kinds(protocol, Data)


def test_plans_are_taken_once_in_order_and_acknowledged() -> None:
    protocol = joined()
    for seq in (1, 1, 3, 2):
        protocol.receive(Data(0, "i0", seq, encode(StepPlan(fences=(seq,)))), 0.0)
    plans = [event.plan.fences for event in protocol.events if isinstance(event, Planned)]
    assert plans == [(1,), (2,)]
    assert [ack.seq for ack in kinds(protocol, Ack)] == [1, 1, 1, 2]  # type: ignore[union-attr]


def test_a_plan_that_can_not_be_read_makes_it_leave() -> None:
    """Whose ops would be waited for for ever."""
    protocol = joined()
    protocol.receive(Data(0, "i0", 1, b"nonsense"), 0.0)
    (event,) = protocol.events
    assert isinstance(event, Outside)
    assert not event.is_final
    assert kinds(protocol, Goodbye) == [Goodbye(0, "i0")]


def test_a_refusal_is_final() -> None:
    protocol = seeking()
    protocol.receive(BEAT, 0.0)
    protocol.receive(Refusal("i0", "why"), 0.0)
    run(protocol, 9.0)
    assert protocol.events == [LeaderSeen(True), Outside("why", is_final=True)]
    assert protocol.outgoing == []


def test_a_dropped_member_is_outside_until_it_joins_again() -> None:
    protocol = joined()
    protocol.send("i0", report())
    protocol.receive(Dropped("i0"), 0.0)
    run(protocol, 3.0)
    assert [type(event) for event in protocol.events] == [Outside]
    assert protocol.outgoing == []
    protocol.join(hello(0, "again"))
    run(protocol, 4.0, start=3.0)
    assert kinds(protocol, Hello) == [hello(0, "again")]
    protocol.receive(Welcome("again"), 4.0)
    run(protocol, 9.0, start=4.0)
    assert not kinds(protocol, Data)


def test_what_is_meant_for_another_incarnation_changes_nothing() -> None:
    protocol = joined()
    plan = encode(PLAN)
    for message in (Dropped("x"), Refusal("x", ""), Data(0, "x", 1, plan), Welcome("x")):
        protocol.receive(message, 0.0)
    assert (protocol.events, protocol.outgoing) == ([], [])


def test_a_leader_that_falls_silent_is_noticed_and_so_is_its_return() -> None:
    protocol = joined()
    run(protocol, 12.0, leader=False)
    assert protocol.events == [LeaderSeen(False)]
    protocol.receive(BEAT, 13.0)
    assert protocol.events == [LeaderSeen(False), LeaderSeen(True)]


def test_a_worker_that_stood_still_itself_does_not_miss_its_leader() -> None:
    protocol = joined()
    run(protocol, 2.0)
    protocol.tick(500.0)
    assert protocol.events == []


def test_a_leader_of_another_release_is_named() -> None:
    protocol = seeking()
    protocol.receive_malformed(WireError("noise"))
    protocol.receive_malformed(OtherVersion("of another release"))
    assert protocol.events == [Outside("of another release", is_final=True)]
    assert protocol.num_malformed == 2


def test_who_leaves_sends_first_what_it_owes() -> None:
    protocol = joined()
    protocol.send("i0", report())
    protocol.leave()
    assert [type(message) for message in protocol.outgoing] == [Data, Goodbye]
