from __future__ import annotations

import pytest

from kvbm_core.errors import IllegalTransition
from kvbm_core.eviction import Lru
from kvbm_core.eviction.lru import MAX_LOOKS
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, Tier

KEYS = [BlockHash(bytes([i]) * 8) for i in range(20)]


def pool_of(num_blocks: int, ready: int = 0) -> BlockPool:
    pool = BlockPool(Tier.HOST, num_blocks, Lru())
    if ready:
        pool.reserve(KEYS[:ready])
        pool.commit(KEYS[:ready])
    return pool


def test_a_new_pool_is_free() -> None:
    pool = pool_of(3)
    assert (pool.num_free, pool.num_reserved, pool.num_ready, pool.num_pinned) == (3, 0, 0, 0)


def test_a_reserved_block_never_matches() -> None:
    pool = pool_of(3)
    pool.reserve(KEYS[:2])
    assert pool.match(KEYS, 0) == 0
    assert KEYS[0] in pool
    assert not pool.is_ready(KEYS[0])


def test_a_reserved_block_cannot_be_pinned() -> None:
    pool = pool_of(3)
    pool.reserve(KEYS[:1])
    with pytest.raises(IllegalTransition, match="not ready in host"):
        pool.pin(KEYS[:1])
    assert pool.num_pinned == 0


def test_a_committed_block_matches() -> None:
    assert pool_of(3, ready=2).match(KEYS, 0) == 2


def test_a_match_ends_at_the_first_gap() -> None:
    pool = pool_of(20, ready=15)
    pool.drop([KEYS[4], KEYS[11]])
    assert [pool.match(KEYS, start) for start in (0, 4, 5, 12, 15, 19, 99)] == [4, 0, 6, 3, 0, 0, 0]


def test_an_aborted_block_is_free_again() -> None:
    pool = pool_of(3)
    pool.reserve(KEYS[:2])
    pool.abort(KEYS[:2])
    assert (pool.num_free, KEYS[0] in pool) == (3, False)


@pytest.mark.parametrize("ready", [0, 1])
def test_a_key_cannot_be_reserved_twice(ready: int) -> None:
    pool = pool_of(3, ready)
    if not ready:
        pool.reserve(KEYS[:1])
    with pytest.raises(IllegalTransition, match="already in host"):
        pool.reserve(KEYS[:1])
    assert pool.num_free == 2


def test_one_key_twice_in_one_reservation_is_refused() -> None:
    pool = pool_of(3)
    with pytest.raises(IllegalTransition):
        pool.reserve([KEYS[0], KEYS[0]])
    assert pool.num_free == 3


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_what_is_not_reserved_can_be_neither_committed_nor_aborted(end: str) -> None:
    with pytest.raises(IllegalTransition, match="is not reserved in host"):
        getattr(pool_of(3, ready=1), end)(KEYS[:1])


def test_a_full_pool_gives_what_it_can() -> None:
    pool = pool_of(3)
    ids, evicted = pool.reserve(KEYS[:5])
    assert (len(ids), evicted, pool.num_free) == (3, [], 0)
    assert KEYS[2] in pool
    assert KEYS[3] not in pool


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = pool_of(3, ready=3)
    ids, evicted = pool.reserve(KEYS[10:12])
    assert (len(ids), evicted) == (2, [KEYS[2], KEYS[1]])
    assert pool.match(KEYS, 0) == 1


def test_a_pinned_block_is_never_evicted() -> None:
    pool = pool_of(3, ready=3)
    held = pool.pin(KEYS[:2])
    ids, evicted = pool.reserve(KEYS[10:13])
    assert evicted == [KEYS[2]]
    assert not set(ids) & set(held)


def test_a_block_that_is_to_be_kept_is_not_evicted() -> None:
    pool = pool_of(2, ready=2)
    ids, evicted = pool.reserve(KEYS[10:12], KEYS[:1].__contains__)
    assert (len(ids), evicted) == (1, [KEYS[1]])


def test_a_block_dropped_while_pinned_stops_matching_and_is_freed_with_its_last_pin() -> None:
    pool = pool_of(1, ready=1)
    first, second = pool.pin(KEYS[:1]), pool.pin(KEYS[:1])
    assert pool.drop(KEYS[:1]) == 1
    assert pool.match(KEYS, 0) == 0
    assert KEYS[0] not in pool
    pool.unpin(first)
    assert (pool.num_free, pool.num_ready) == (0, 1)
    pool.unpin(second)
    assert (pool.num_free, pool.num_ready) == (1, 0)


def test_a_key_dropped_while_pinned_may_come_back_elsewhere() -> None:
    pool = pool_of(2, ready=1)
    held = pool.pin(KEYS[:1])
    pool.drop(KEYS[:1])
    ids, _ = pool.reserve(KEYS[:1])
    pool.commit(KEYS[:1])
    assert ids != held
    pool.unpin(held)
    assert (pool.match(KEYS, 0), pool.num_free) == (1, 1)


def test_a_touch_counts_as_a_use_and_keeps_head_after_tail() -> None:
    pool = pool_of(3, ready=3)
    pool.unpin(pool.pin(KEYS[:2]))  # which is no use: a write to disk pins as well
    pool.touch(KEYS[1:3])
    assert pool.reserve(KEYS[10:12])[1] == [KEYS[0], KEYS[2]]


def test_a_touch_of_unknown_keys_does_nothing() -> None:
    pool = pool_of(2, ready=2)
    pool.touch([KEYS[9], KEYS[1], KEYS[8]])
    assert pool.reserve(KEYS[10:11])[1] == [KEYS[0]]


def test_a_pin_of_unknown_blocks_changes_nothing() -> None:
    pool = pool_of(2, ready=1)
    with pytest.raises(IllegalTransition):
        pool.pin(KEYS[:2])
    assert pool.num_pinned == 0


def test_an_unpin_without_a_pin_raises() -> None:
    with pytest.raises((IllegalTransition, KeyError)):
        pool_of(1, ready=1).unpin([0])


def test_a_drop_says_how_many_were_there() -> None:
    pool = pool_of(3, ready=2)
    pool.reserve([KEYS[5]])
    assert pool.drop(KEYS[:6]) == 2
    assert pool.num_free == 2


def test_restored_blocks_are_ready_where_they_were() -> None:
    pool = pool_of(4)
    pool.restore([(KEYS[0], 2), (KEYS[1], 0)])
    assert pool.match(KEYS, 0) == 2
    assert pool.pin(KEYS[:2]) == [2, 0]
    assert set(pool.reserve(KEYS[5:7])[0]) == {1, 3}


def test_restored_blocks_are_evicted_oldest_first() -> None:
    pool = pool_of(3)
    pool.restore([(KEYS[4], 2), (KEYS[0], 0), (KEYS[2], 1)])
    assert pool.reserve(KEYS[10:12])[1] == [KEYS[4], KEYS[0]]


def test_nothing_restored_leaves_an_empty_pool() -> None:
    pool = pool_of(3)
    pool.restore([])
    assert (pool.num_free, pool.num_ready) == (3, 0)


@pytest.mark.parametrize(
    "entries",
    [
        [(KEYS[0], 0), (KEYS[0], 1)],
        [(KEYS[0], 0), (KEYS[1], 0)],
        [(KEYS[0], 3)],
        [(KEYS[0], -1)],
        [(key, i) for i, key in enumerate(KEYS[:4])],
    ],
    ids=["a key twice", "an id twice", "too large an id", "a negative id", "too many"],
)
def test_blocks_that_cannot_all_be_there_are_not_restored(
    entries: list[tuple[BlockHash, int]],
) -> None:
    pool = pool_of(3)
    with pytest.raises(IllegalTransition):
        pool.restore(entries)
    assert (pool.num_free, pool.num_ready) == (3, 0)


@pytest.mark.parametrize("ready", [0, 1])
def test_a_pool_in_use_cannot_be_restored(ready: int) -> None:
    pool = pool_of(3, ready)
    if not ready:
        pool.reserve(KEYS[:1])
    with pytest.raises(IllegalTransition, match="can't be restored to host"):
        pool.restore([(KEYS[5], 2)])


def test_ids_without_a_key_are_reserved_until_they_are_freed() -> None:
    pool = pool_of(3)
    ids, evicted = pool.reserve_unkeyed(2)
    assert (len(set(ids)), evicted, pool.num_reserved, pool.num_available) == (2, [], 2, 1)
    pool.free_unkeyed(ids)
    assert (pool.num_free, pool.num_reserved) == (3, 0)


def test_more_ids_than_there_are_is_none_at_all() -> None:
    pool = pool_of(3, ready=2)
    pool.pin(KEYS[:1])
    assert pool.reserve_unkeyed(3) == ([], [])
    assert (pool.num_free, pool.match(KEYS, 0), pool.num_available) == (1, 2, 2)


def test_ids_without_a_key_are_taken_from_the_cache_tail_first() -> None:
    pool = pool_of(3, ready=3)
    ids, evicted = pool.reserve_unkeyed(2)
    assert (len(ids), evicted, pool.match(KEYS, 0)) == (2, [KEYS[2], KEYS[1]], 1)


def test_ids_are_found_behind_more_pinned_blocks_than_the_policy_looks_at() -> None:
    num_pinned = MAX_LOOKS + 10
    keys = [BlockHash(i.to_bytes(4, "little")) for i in range(num_pinned + 1)]
    pool = BlockPool(Tier.HOST, len(keys), Lru())
    pool.reserve(keys[::-1])
    pool.commit(keys[::-1])
    pool.pin(keys[:num_pinned])
    ids, evicted = pool.reserve_unkeyed(1)
    assert (len(ids), evicted) == (1, [keys[-1]])


def test_an_id_that_gets_a_key_matches_and_can_be_evicted() -> None:
    pool = pool_of(2)
    ids, _ = pool.reserve_unkeyed(2)
    pool.commit_unkeyed(list(zip(KEYS, ids, strict=False)))
    assert pool.pin(KEYS[:2]) == ids
    pool.unpin(ids)
    assert pool.reserve_unkeyed(1) == ([ids[1]], [KEYS[1]])


@pytest.mark.parametrize(
    "entries",
    [[(KEYS[0], 1)], [(KEYS[5], 1), (KEYS[5], 2)], [(KEYS[5], 0)], [(KEYS[5], 1), (KEYS[6], 1)]],
    ids=["a key that is READY", "a key twice", "an id that is READY", "an id twice"],
)
def test_keys_that_are_not_all_new_are_given_to_no_id(entries: list[tuple[BlockHash, int]]) -> None:
    pool = pool_of(3, ready=1)
    pool.reserve_unkeyed(2)
    with pytest.raises(IllegalTransition):
        pool.commit_unkeyed(entries)
    assert (pool.num_ready, pool.num_reserved) == (1, 2)
