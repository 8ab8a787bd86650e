from __future__ import annotations

import logging

import pytest

from kvbm_core.restore import agreed_blocks
from kvbm_core.types import BlockHash, BlockId
from kvbm_core.wire import GENERATION_BYTES, DiskInventory

KEYS = [BlockHash(bytes([i]) * 32) for i in range(6)]
ONE, TWO = bytes([1]) * GENERATION_BYTES, bytes([2]) * GENERATION_BYTES
NUM_BLOCKS = 8

Entries = list[tuple[BlockHash, BlockId]]
ENTRIES: Entries = [(KEYS[2], 5), (KEYS[0], 1), (KEYS[1], 0)]


def found(entries: Entries = ENTRIES, generation: bytes = ONE) -> DiskInventory:
    return DiskInventory.of(NUM_BLOCKS, generation, entries)


def test_what_one_rank_found_is_restored_oldest_first() -> None:
    assert agreed_blocks([found()], NUM_BLOCKS) == ENTRIES


def test_what_every_rank_has_at_the_same_place_is_restored_in_the_first_ones_order() -> None:
    assert agreed_blocks([found(), found(ENTRIES[::-1])], NUM_BLOCKS) == ENTRIES


def test_a_block_that_one_rank_lacks_is_not_restored() -> None:
    ranks = [found(), found(ENTRIES[1:]), found(ENTRIES[:2])]
    assert agreed_blocks(ranks, NUM_BLOCKS) == ENTRIES[1:2]


def test_a_block_that_ranks_have_at_different_places_is_not_restored() -> None:
    moved = [(KEYS[2], 5), (KEYS[0], 0), (KEYS[1], 1)]
    assert agreed_blocks([found(), found(moved)], NUM_BLOCKS) == ENTRIES[:1]


def test_a_place_where_ranks_have_different_blocks_is_not_restored() -> None:
    other = [(KEYS[3], 5), *ENTRIES[1:]]
    assert agreed_blocks([found(), found(other)], NUM_BLOCKS) == ENTRIES[1:]


def test_a_place_that_the_smallest_rank_lacks_is_not_restored() -> None:
    assert agreed_blocks([found()], 5) == ENTRIES[1:]


def test_ranks_of_different_generations_continue_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert agreed_blocks([found(), found(generation=TWO)], NUM_BLOCKS) is None
    assert "not of one run" in caplog.text


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_new_disks_continue_nothing_and_nobody_is_warned(
    num_ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = [found([], b"") for _ in range(num_ranks)]
    assert agreed_blocks(ranks, NUM_BLOCKS) is None
    assert not caplog.records


def test_one_rank_with_a_new_disk_voids_those_of_the_others() -> None:
    assert agreed_blocks([found(), found([], b"")], NUM_BLOCKS) is None


def test_one_generation_with_no_common_block_is_continued_empty() -> None:
    assert agreed_blocks([found(), found([])], NUM_BLOCKS) == []


def test_no_ranks_continue_nothing() -> None:
    assert agreed_blocks([], NUM_BLOCKS) is None
