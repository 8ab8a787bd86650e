"""One direction of numbered messages: exactly once, in order, however many copies are lost.

Lives here: what is still owed to the other side, and what of its messages is new.
Does not live here: sockets, clocks. Invariant: a payload leaves `Outbox` only when it is
acknowledged, and leaves `Inbox` once, after all before it.
"""

from __future__ import annotations

from collections import deque

NOT_OVERDUE = float("-inf")
"""A time at which only what is new is due."""


class Outbox:
    """Payloads that the other side has not acknowledged. resend_seconds: patience before all of
    them are sent again."""

    def __init__(self, resend_seconds: float) -> None:
        self._resend_seconds = resend_seconds
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._next_seq = 1
        self._num_sent = 0
        self._sent_seconds = 0.0

    def __len__(self) -> int:
        return len(self._unacked)

    def put(self, payload: bytes) -> None:
        self._unacked.append((self._next_seq, payload))
        self._next_seq += 1

    def acked(self, seq: int) -> None:
        """Everything up to seq has arrived. An ack of what was not sent changes nothing."""
        if seq >= self._next_seq:
            return
        while self._unacked and self._unacked[0][0] <= seq:
            self._unacked.popleft()
            self._num_sent = max(0, self._num_sent - 1)

    def due(self, now_seconds: float) -> list[tuple[int, bytes]]:
        """(seq, payload) to be sent now: what is new, or all where an ack is overdue."""
        is_overdue = now_seconds - self._sent_seconds >= self._resend_seconds
        first = 0 if is_overdue else self._num_sent
        due = [self._unacked[i] for i in range(first, len(self._unacked))]
        if due:
            if is_overdue or self._num_sent == 0:
                self._sent_seconds = now_seconds
            self._num_sent = len(self._unacked)
        return due


class Inbox:
    """What has arrived. last_seq: to be acknowledged."""

    def __init__(self) -> None:
        self.last_seq = 0

    def take(self, seq: int) -> bool:
        """Whether the message is the next one; others are repeats, or come again."""
        if seq != self.last_seq + 1:
            return False
        self.last_seq = seq
        return True
