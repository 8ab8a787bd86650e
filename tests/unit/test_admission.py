from __future__ import annotations

import pytest

from kvbm_core import admission as admission_module
from kvbm_core.admission import (
    DECAY_SECONDS,
    MAX_FREQUENCY,
    AdmitAll,
    FrequencyFilter,
    MinPriority,
)
from kvbm_core.types import BlockHash

KEYS = [BlockHash(i.to_bytes(4, "little")) for i in range(2000)]


def filter_at(now_seconds: float = 0.0) -> FrequencyFilter:
    admission = FrequencyFilter()
    admission.tick(now_seconds)
    return admission


def test_a_block_that_came_once_is_not_admitted() -> None:
    admission = filter_at()
    assert admission.stored(KEYS[:2]) == []
    assert admission.frequency(KEYS[0]) == 1


def test_coming_again_is_no_use_of_a_block() -> None:
    admission = filter_at()
    assert [admission.stored(KEYS[:1]) for _ in range(3)] == [[], [], []]


def test_a_hit_admits_and_doubles() -> None:
    admission = filter_at()
    admission.stored(KEYS[:1])
    assert admission.hit(KEYS[:1]) == KEYS[:1]
    assert admission.frequency(KEYS[0]) == 2
    admission.hit(KEYS[:1])
    assert admission.frequency(KEYS[0]) == 4


def test_what_was_hit_is_admitted_when_it_comes_again() -> None:
    admission = filter_at()
    admission.stored(KEYS[:2])
    admission.hit(KEYS[:1])
    assert admission.stored(KEYS[:2]) == KEYS[:1]


def test_a_frequency_is_bounded() -> None:
    admission = filter_at()
    for _ in range(20):
        admission.hit(KEYS[:1])
    assert admission.frequency(KEYS[0]) == MAX_FREQUENCY


def test_a_frequency_loses_one_each_decay_step() -> None:
    admission = filter_at(100.0)
    for _ in range(2):
        admission.hit(KEYS[:1])
    seen = []
    for num_steps in (0.99, 1, 2.5, 3, 4, 9):
        admission.tick(100.0 + num_steps * DECAY_SECONDS)
        seen.append(admission.frequency(KEYS[0]))
    assert seen == [4, 3, 2, 1, 0, 0]


def test_many_small_ticks_decay_as_one_large() -> None:
    admission = filter_at()
    for _ in range(3):
        admission.hit(KEYS[:1])
    for i in range(int(3 * DECAY_SECONDS) + 1):
        admission.tick(float(i))
    assert admission.frequency(KEYS[0]) == 8 - 3


def test_a_forgotten_block_begins_anew() -> None:
    admission = filter_at()
    admission.hit(KEYS[:1])
    admission.tick(2 * DECAY_SECONDS)
    assert admission.stored(KEYS[:1]) == []
    assert admission.frequency(KEYS[0]) == 1


def test_forgotten_blocks_take_no_memory_after_some_steps() -> None:
    admission = filter_at()
    admission.stored(KEYS)
    admission.hit(KEYS[:3])
    for _ in range(10):
        admission.tick(DECAY_SECONDS)
    assert set(admission._expiry) == set(KEYS[:3])


def test_a_sweep_keeps_what_came_back_meanwhile() -> None:
    admission = filter_at()
    admission.stored(KEYS)
    admission.tick(DECAY_SECONDS)
    admission.stored(KEYS[:3])
    for _ in range(10):
        admission.tick(DECAY_SECONDS + 1)
    assert set(admission._expiry) == set(KEYS[:3])


def test_a_sweep_that_the_next_step_overtakes_loses_nothing() -> None:
    admission = filter_at()
    admission.stored(KEYS)
    for i in range(1, 10):
        admission.tick(i * DECAY_SECONDS)
    assert admission._expiry == {}


def test_beyond_so_many_keys_only_hits_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MAX_KEYS", 2)
    admission = filter_at()
    admission.stored(KEYS[:3])
    assert set(admission._expiry) == set(KEYS[:2])
    assert admission.hit(KEYS[2:3]) == KEYS[2:3]
    assert admission.frequency(KEYS[2]) == 2


def test_admit_all_admits_all_at_once() -> None:
    admission = AdmitAll()
    admission.tick(0.0)
    assert admission.stored(iter(KEYS[:2])) == admission.hit(iter(KEYS[:2])) == KEYS[:2]


@pytest.mark.parametrize(
    ("priorities", "start", "end", "num_admitted"),
    [
        ([], 0, 4, 4),
        ([5], 0, 4, 4),
        ([4], 0, 4, 0),
        ([9, 5, 4, 9], 0, 4, 2),
        ([9, 5, 4, 9], 3, 6, 3),
        ([9, 4], 0, 4, 1),
        ([9, 4], 5, 7, 0),
        ([9, 4], 3, 3, 0),
    ],
)
def test_the_prefix_before_the_first_low_priority_may_leave_the_device(
    priorities: list[int], start: int, end: int, num_admitted: int
) -> None:
    assert MinPriority(5).num_admitted(priorities, start, end) == num_admitted
