from __future__ import annotations

import pytest

from kvbm_core.eviction import POLICIES, Lru
from kvbm_core.eviction.lru import MAX_LOOKS
from kvbm_core.types import BlockHash

A, B, C = (BlockHash(name) for name in (b"a", b"b", b"c"))


def policy() -> Lru:
    lru = Lru()
    lru.insert([A, B, C])
    return lru


def keep_none(key: BlockHash) -> bool:
    return False


def test_the_first_in_is_the_first_out() -> None:
    assert policy().victims(2, keep_none) == [A, B]


def test_a_touch_makes_a_key_the_last_to_go() -> None:
    lru = policy()
    lru.touch([A])
    assert lru.victims(3, keep_none) == [B, C, A]


def test_a_kept_key_is_passed_over() -> None:
    assert policy().victims(2, {A, B}.__contains__) == [C]


def test_asking_for_victims_changes_nothing() -> None:
    lru = policy()
    assert lru.victims(2, keep_none) == lru.victims(2, keep_none) == [A, B]


def test_a_removed_key_is_no_victim_and_unknown_to_touch() -> None:
    lru = policy()
    lru.remove(A)
    assert lru.victims(9, keep_none) == [B, C]
    with pytest.raises(KeyError):
        lru.touch([A])
    with pytest.raises(KeyError):
        lru.remove(A)


def test_no_victims_are_asked_for_and_none_given() -> None:
    assert policy().victims(0, keep_none) == []


def test_lru_is_a_policy_by_name() -> None:
    assert POLICIES["lru"] is Lru


def test_a_tier_whose_old_keys_all_have_to_stay_is_not_searched_to_its_end() -> None:
    lru = Lru()
    keys = [BlockHash(i.to_bytes(4, "little")) for i in range(MAX_LOOKS + 10)]
    lru.insert(keys)
    asked: list[BlockHash] = []

    def keep(key: BlockHash) -> bool:
        asked.append(key)
        return True

    assert lru.victims(2, keep) == []
    assert len(asked) == MAX_LOOKS + 2
