"""Reports and plans arrive once and in order however bad the link is, or the rank is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm_core.channel import leader_protocol, worker_protocol
from kvbm_core.channel.stream import Inbox, Outbox
from tests.property.channel_link import Link

CHANCES = st.sampled_from([0.0, 0.1, 0.3, 0.6])


def run(seed: int, lost: float, repeated: float, num_turns: int) -> None:
    link = Link(seed, lost, repeated)
    for number in range(num_turns):
        link.turn()
        link.publish(number)
        for worker in link.workers:
            worker.send(number)
        link.check()
    link.check_settled()


@given(st.integers(0, 10**6), CHANCES, CHANCES, st.integers(1, 60))
@settings(max_examples=60)
def test_everything_arrives_once_and_in_order(
    seed: int, lost: float, repeated: float, num_turns: int
) -> None:
    run(seed, lost, repeated, num_turns)


class TakesRepeats(Inbox):
    def take(self, seq: int) -> bool:
        self.last_seq = max(self.last_seq, seq)
        return True


class SkipsGaps(Inbox):
    def take(self, seq: int) -> bool:
        if seq <= self.last_seq:
            return False
        self.last_seq = seq
        return True


class SendsOnce(Outbox):
    def due(self, now_seconds: float) -> list[tuple[int, bytes]]:
        due = super().due(now_seconds)
        self.acked(self._next_seq - 1)
        return due


@pytest.mark.parametrize("side", [leader_protocol, worker_protocol])
@pytest.mark.parametrize("fault", [TakesRepeats, SkipsGaps, SendsOnce])
def test_the_check_notices(fault: type, side: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, fault.__mro__[1].__name__, fault)
    with pytest.raises(AssertionError):
        for seed in range(20):
            run(seed, 0.3, 0.3, 40)
