from __future__ import annotations

from kvbm_core.channel.stream import NOT_OVERDUE, Inbox, Outbox


def test_what_was_put_is_due_once() -> None:
    outbox = Outbox(resend_seconds=1.0)
    outbox.put(b"a")
    outbox.put(b"b")
    assert outbox.due(10.0) == [(1, b"a"), (2, b"b")]
    assert outbox.due(10.5) == []


def test_only_what_is_new_is_due_before_an_ack_is_overdue() -> None:
    outbox = Outbox(1.0)
    outbox.put(b"a")
    outbox.due(10.0)
    outbox.put(b"b")
    assert outbox.due(10.5) == [(2, b"b")]
    outbox.put(b"c")
    assert outbox.due(NOT_OVERDUE) == [(3, b"c")]


def test_all_of_it_is_due_again_when_an_ack_is_overdue() -> None:
    outbox = Outbox(1.0)
    outbox.put(b"a")
    outbox.put(b"b")
    outbox.due(10.0)
    outbox.acked(1)
    assert outbox.due(11.0) == [(2, b"b")]


def test_what_is_acknowledged_is_never_due_again() -> None:
    outbox = Outbox(1.0)
    outbox.put(b"a")
    outbox.due(10.0)
    outbox.acked(1)
    assert (outbox.due(99.0), len(outbox)) == ([], 0)


def test_an_ack_of_what_was_never_put_changes_nothing() -> None:
    outbox = Outbox(1.0)
    outbox.put(b"a")
    outbox.acked(2)
    assert outbox.due(10.0) == [(1, b"a")]


def test_an_inbox_takes_each_message_once_and_in_order() -> None:
    inbox = Inbox()
    assert [inbox.take(seq) for seq in (2, 1, 1, 3, 2, 3)] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]
    assert inbox.last_seq == 3
