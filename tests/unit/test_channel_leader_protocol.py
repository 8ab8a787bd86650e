"""The leader's half: who may join, who is lost, what is applied once."""

from __future__ import annotations

import pytest

from kvbm_core.channel.leader_protocol import Joined, LeaderProtocol, Lost, Refused, Reported
from kvbm_core.channel.messages import (
    Ack,
    Alive,
    Beat,
    Data,
    Dropped,
    Goodbye,
    OtherVersion,
    Refusal,
    Welcome,
    encode,
)
from kvbm_core.errors import WireError
from kvbm_core.wire import MAX_MESSAGE_BYTES
from tests.unit.channels import TIMING, disk, hello, report, sent, terms


def joined(num_ranks: int = 2, *, has_disk: bool = False) -> LeaderProtocol:
    """A leader whose ranks have all joined at time 0, by routes of their numbers."""
    protocol = LeaderProtocol(terms(num_ranks, has_disk=has_disk), TIMING)
    for rank in range(num_ranks):
        inventory = disk() if has_disk else None
        protocol.receive(route(rank), hello(rank, disk=inventory, num_ranks=num_ranks), 0.0)
    assert [type(event) for event in protocol.events] == [Joined] * num_ranks
    protocol.events.clear()
    protocol.outgoing.clear()
    return protocol


def route(rank: int) -> bytes:
    return bytes([rank])


def run(protocol: LeaderProtocol, until: float, *alive: int, start: float = 0.0) -> None:
    """Tick each half second; these ranks speak."""
    now = start
    while now < until:
        now += 0.5
        for rank in alive:
            protocol.receive(route(rank), Alive(rank, f"i{rank}"), now)
        protocol.tick(now)


def why_refused(protocol: LeaderProtocol) -> str:
    (event,) = protocol.events
    assert isinstance(event, Refused)
    (answer,) = [m for _, m in protocol.outgoing if isinstance(m, Refusal)]
    assert answer.reason == event.why
    return event.why


def test_a_worker_that_agrees_is_welcomed() -> None:
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(1), 0.0)
    assert protocol.events == [Joined(1, hello(1).handshake)]
    assert sent(protocol, b"r", Welcome) == [Welcome("i1")]


def test_a_repeated_hello_is_welcomed_again_and_joins_once() -> None:
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(1), 0.0)
    protocol.receive(b"s", hello(1), 0.1)
    assert len(protocol.events) == 1
    assert sent(protocol, b"s", Welcome) == [Welcome("i1")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"session": "other"}, "looks for leader other"),
        ({"identity": "b model"}, "of 'b model', the leader's of 'a model'"),
        ({"num_ranks": 4}, "rank 0 of 4"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"block_size": 8}, "of 8 tokens"),
        ({"disk": disk()}, "disk tier"),
    ],
)
def test_a_worker_that_disagrees_is_told_why(changes: dict[str, object], why: str) -> None:
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(**changes), 0.0)  # type: ignore[arg-type]
    assert why in why_refused(protocol)


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "x"}, {"num_device_blocks": 9}, {"block_bytes": 9}]
)
def test_a_rank_of_another_geometry_than_the_others_is_refused(changes: dict[str, object]) -> None:
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(0), 0.0)
    protocol.events.clear()
    protocol.receive(b"s", hello(1, **changes), 0.0)
    assert "geometry" in why_refused(protocol)


def test_ranks_may_differ_in_host_memory() -> None:
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(0), 0.0)
    protocol.receive(b"s", hello(1, num_host_blocks=3), 0.0)
    assert [type(event) for event in protocol.events] == [Joined, Joined]


def test_a_silent_rank_is_lost_and_a_speaking_one_is_not() -> None:
    protocol = joined()
    run(protocol, 11.0, 0)
    (event,) = protocol.events
    assert isinstance(event, Lost)
    assert (event.rank, "silent" in event.why) == (1, True)


def test_a_leader_that_stood_still_itself_loses_nobody() -> None:
    protocol = joined()
    run(protocol, 2.0, 0, 1)
    protocol.tick(500.0)
    assert protocol.events == []
    run(protocol, 520.0, start=500.0)
    assert [type(event) for event in protocol.events] == [Lost, Lost]


def test_time_that_the_leader_stood_still_is_given_to_nobody_who_spoke_after_it() -> None:
    protocol = joined()
    run(protocol, 2.0, 0, 1)
    protocol.receive(route(0), Alive(0, "i0"), 500.0)
    protocol.tick(500.0)
    run(protocol, 511.0, start=500.0)
    assert Lost(0, "it was silent for 10.5 s") in protocol.events


def test_a_rank_that_says_goodbye_is_lost_at_once() -> None:
    protocol = joined()
    protocol.receive(route(1), Goodbye(1, "i1"), 0.5)
    assert protocol.events == [Lost(1, "it has said goodbye")]


def test_a_lost_worker_that_speaks_is_told_and_may_come_back() -> None:
    protocol = joined()
    run(protocol, 11.0, 0)
    protocol.events.clear()
    protocol.receive(route(1), Alive(1, "i1"), 11.0)
    assert sent(protocol, route(1), Dropped) == [Dropped("i1")]
    protocol.receive(route(1), hello(1, "again"), 11.5)
    assert protocol.events == [Joined(1, hello(1).handshake)]


def test_reports_of_a_lost_incarnation_reach_nobody() -> None:
    protocol = joined()
    run(protocol, 11.0, 0)
    protocol.receive(route(1), hello(1, "again"), 11.0)
    protocol.events.clear()
    protocol.receive(route(1), Data(1, "i1", 1, report(1)), 11.0)
    assert protocol.events == []


def test_a_restarted_worker_takes_its_place_once_the_dead_one_is_lost() -> None:
    protocol = joined()
    protocol.receive(b"new", hello(1, "new"), 1.0)
    run(protocol, 9.0, 0)
    assert protocol.events == []
    run(protocol, 12.0, 0, start=9.0)
    assert [type(event) for event in protocol.events] == [Lost, Joined]
    assert sent(protocol, b"new", Welcome) == [Welcome("new")]


def test_a_second_worker_of_a_rank_that_lives_is_refused() -> None:
    protocol = joined()
    protocol.receive(b"new", hello(1, "new"), 1.0)
    run(protocol, 5.0, 0, 1)
    assert "another worker, which is alive" in why_refused(protocol)


@pytest.mark.parametrize(
    "changes", [{"num_host_blocks": 7}, {"disk": disk(7)}, {"fingerprint": "x"}]
)
def test_a_rank_may_come_back_only_with_as_much_memory(changes: dict[str, object]) -> None:
    protocol = joined(has_disk=True)
    protocol.receive(route(1), Goodbye(1, "i1"), 0.5)
    protocol.events.clear()
    protocol.receive(route(1), hello(1, "again", **{"disk": disk(), **changes}), 1.0)
    assert why_refused(protocol)


def test_reports_are_applied_once_in_order_and_acknowledged() -> None:
    protocol = joined()
    for seq in (1, 1, 3, 2, 3, 2):
        protocol.receive(route(0), Data(0, "i0", seq, report(0, seq)), 0.5)
    applied = [e.report.results[0].op_id for e in protocol.events if isinstance(e, Reported)]
    assert applied == [1, 2, 3]
    assert [m.seq for m in sent(protocol, route(0), Ack)] == [1, 1, 1, 2, 3, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("payload", [b"", b"nonsense", report(rank=1)])
def test_a_report_that_can_not_be_read_loses_its_rank(payload: bytes) -> None:
    """Whose ops would be waited for for ever."""
    protocol = joined()
    protocol.receive(route(0), Data(0, "i0", 1, payload), 0.5)
    (event,) = protocol.events
    assert isinstance(event, Lost)
    assert (event.rank, protocol.num_malformed) == (0, 1)


def test_plans_are_sent_to_each_rank_until_it_has_acknowledged_them() -> None:
    protocol = joined()
    protocol.publish(b"plan")
    run(protocol, 0.5)
    protocol.receive(route(0), Ack(0, "i0", 1), 0.5)
    run(protocol, 2.0, 0, 1, start=0.5)
    assert len(sent(protocol, route(0), Data)) == 1
    assert len(sent(protocol, route(1), Data)) >= 2


def test_beats_go_to_all_once_a_second() -> None:
    protocol = joined()
    run(protocol, 4.0)
    beats = [m for to, m in protocol.outgoing if to is None]
    assert len(beats) == 4
    assert all(isinstance(beat, Beat) for beat in beats)


def test_who_took_over_after_a_goodbye_is_not_refused_as_its_own_rival() -> None:
    protocol = joined()
    protocol.receive(route(0), hello(0, "new"), 1.0)
    run(protocol, 4.0, 1)
    protocol.receive(route(0), Goodbye(0, "i0"), 4.5)
    protocol.receive(route(0), hello(0, "new"), 4.5)
    protocol.tick(4.5)
    assert [type(event) for event in protocol.events] == [Lost, Joined]
    assert sent(protocol, route(0), Refusal) == []


def test_a_refusal_fits_into_a_message_whatever_is_refused() -> None:
    """Else encoding it would end the I/O thread."""
    protocol = LeaderProtocol(terms(), TIMING)
    protocol.receive(b"r", hello(identity="\0" * (MAX_MESSAGE_BYTES // 2)), 0.0)
    ((_, refusal),) = protocol.outgoing
    assert len(encode(refusal)) < 10_000
    assert "leader's of 'a model'" in why_refused(protocol)


def test_noise_is_counted_and_another_release_is_told() -> None:
    protocol = joined()
    protocol.receive_malformed(b"x", WireError("noise"))
    protocol.receive_malformed(b"x", OtherVersion("of another release"))
    protocol.receive(b"x", Welcome("i"), 0.0)
    assert (protocol.num_malformed, protocol.events) == (3, [])
    assert sent(protocol, b"x", Refusal) == [Refusal("", "of another release")]
