from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import pytest
import torch

from kvbm_core import BlockManager
from kvbm_core.blocks.state import BlockState
from kvbm_core.errors import BlocksUnavailable, ConfigError, IllegalTransition
from tests.unit.blocks import manager_of, numbers, registered, write

TOKENS = list(range(12))


def test_arguments_come_in_the_order_of_dynamos_binding() -> None:
    manager = BlockManager(0, 5, 2, 4, 13, "FP32", 16, 8, 0)
    assert (manager.num_available_host_blocks, manager.num_available_device_blocks) == (16, 8)
    assert manager.block_size() == 4


def test_a_manager_may_have_one_tier_or_none() -> None:
    assert BlockManager(0, 5, 2, 4, 13, host_num_blocks=2).num_available_host_blocks == 2
    with pytest.raises(BlocksUnavailable, match=r"no host blocks\. Make it with host_num_blocks"):
        BlockManager(0, 5, 2, 4, 13).allocate_host_blocks_blocking(1)


@pytest.mark.parametrize("option", ["host_num_blocks", "device_num_blocks"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True])
def test_a_number_of_blocks_that_is_none_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option}=.*Give an integer of 1 or more"):
        manager_of(**{option: value})


@pytest.mark.parametrize("option", ["host_num_blocks", "device_num_blocks"])
def test_more_memory_than_there_is_is_refused_with_what_fits(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option}=\d+: blocks of .* Give at most \d+"):
        manager_of(**{option: 2**50})
    with pytest.raises(ConfigError, match="Give at most 0"):
        manager_of(**{option: 1, "inner_dim": 2**60})


@pytest.mark.parametrize("option", ["worker_id", "device_id"])
def test_a_negative_id_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}=-1"):
        manager_of(**{option: -1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_device_blocks_are_in_ordinary_memory_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        blocks = manager_of().allocate_device_blocks_blocking(1)
    assert [record.message for record in caplog.records] == [
        "no GPU: the 4 device blocks are in ordinary memory"
    ]
    assert torch.from_dlpack(blocks[0]).device.type == "cpu"


def test_blocks_are_a_list() -> None:
    blocks = manager_of().allocate_host_blocks_blocking(3)
    assert len(blocks) == len(blocks.to_list()) == len(set(blocks.block_ids)) == 3
    assert [block.block_id for block in blocks] == blocks.block_ids
    assert blocks[-1].block_id == blocks[1:].block_ids[-1]
    with pytest.raises(IndexError):
        _ = blocks[3]
    assert manager_of().allocate_device_blocks_blocking(0).to_list() == []


def test_layers_of_a_block_are_a_list() -> None:
    block = manager_of().allocate_host_blocks_blocking(1)[0]
    assert len(block) == len(block.to_list()) == len(list(block)) == 3
    with pytest.raises(IndexError):
        _ = block[3]


@pytest.mark.parametrize("count", [-1, 1.0, None])
def test_a_count_of_blocks_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="count="):
        manager_of().allocate_host_blocks_blocking(count)


def test_more_blocks_than_there_are_raises_at_once_and_takes_none() -> None:
    manager = manager_of()
    held = manager.allocate_host_blocks_blocking(3)
    with pytest.raises(BlocksUnavailable, match=r"requested: 2, available: 1.*Release some"):
        manager.allocate_host_blocks_blocking(2)
    assert len(manager.allocate_host_blocks_blocking(1)) == 1
    assert len(held) == 3


def test_allocation_can_be_awaited_and_raises_the_same() -> None:
    async def allocate(manager: BlockManager) -> list[int]:
        host = await manager.allocate_host_blocks(2)
        device = await manager.allocate_device_blocks(4)
        with pytest.raises(BlocksUnavailable):
            await manager.allocate_device_blocks(1)
        with pytest.raises(BlocksUnavailable):
            await manager.allocate_host_blocks(3)
        return [len(host), len(device)]

    assert asyncio.run(allocate(manager_of())) == [2, 4]


def test_blocks_come_back_with_the_last_reference() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(4)
    layer = blocks[2][0]
    del blocks
    assert manager.num_available_host_blocks == 3
    del layer
    assert manager.num_available_host_blocks == 4


def test_blocks_in_a_cycle_come_back_with_the_garbage_collector() -> None:
    manager = manager_of()
    cycle: list[object] = [manager.allocate_host_blocks_blocking(4)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert manager.num_available_host_blocks == 4


def test_a_released_block_is_free_and_raises_for_all_its_handles() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(4)
    block, layer = blocks[1], blocks[1][0]
    block.release()
    block.release()
    assert manager.num_available_host_blocks == 1
    for use in (
        block.init_sequence,
        block.commit,
        block.register,
        block.__dlpack__,
        layer.__dlpack_device__,
        blocks[1:].register,
        lambda: block.add_token(1),
        lambda: blocks.fill(TOKENS),
    ):
        with pytest.raises(IllegalTransition, match=r"block \d was released"):
            use()
    assert "released" in repr(block)


def test_a_list_is_released_as_a_whole() -> None:
    manager = manager_of()
    manager.allocate_host_blocks_blocking(4).release()
    blocks = manager.allocate_host_blocks_blocking(4)
    blocks.release()
    assert manager.num_available_host_blocks == 4


def test_a_block_goes_through_its_states() -> None:
    manager = manager_of()
    block = manager.allocate_host_blocks_blocking(1)[0]
    states = [block.state]
    block.init_sequence(salt="s")
    assert block.add_tokens([1, 2]) == []
    states.append(block.state)
    assert block.add_tokens([3, 4, 5]) == [5]
    block.commit()
    states.append(block.state)
    same = block.register()
    states.append(block.state)
    assert states == list(BlockState)
    assert (same.block_id, block.tokens) == (block.block_id, [1, 2, 3, 4])


def test_a_full_block_takes_no_token_and_a_short_one_is_not_committed() -> None:
    block = manager_of().allocate_host_blocks_blocking(1)[0]
    block.init_sequence()
    for token in range(3):
        block.add_token(token)
    with pytest.raises(IllegalTransition, match="3 of 4 tokens"):
        block.commit()
    block.add_token(3)
    with pytest.raises(IllegalTransition, match="has all its 4 tokens"):
        block.add_token(4)
    block.commit()
    with pytest.raises(IllegalTransition, match="a complete block can't add_tokens"):
        block.add_token(4)


def test_a_sequence_goes_on_after_a_complete_parent_only() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(3)
    with pytest.raises(IllegalTransition, match="the parent is reset"):
        blocks[1].init_sequence(parent=blocks[0])
    blocks[0].init_sequence()
    with pytest.raises(IllegalTransition, match="the parent is partial"):
        blocks[1].init_sequence(parent=blocks[0])
    blocks[0].add_tokens([1, 2, 3, 4])
    blocks[0].commit()
    with pytest.raises(IllegalTransition, match="a salt beside a parent"):
        blocks[1].init_sequence("salt", blocks[0])
    with pytest.raises(IllegalTransition, match="another block manager"):
        manager_of().allocate_host_blocks_blocking(1)[0].init_sequence(parent=blocks[0])
    assert blocks[1].state is BlockState.RESET
    blocks[1].init_sequence(parent=blocks[0])
    blocks[2].init_sequence(parent=blocks[0])  # a fork


def test_two_continuations_of_one_block_are_both_found() -> None:
    manager = manager_of()
    head = registered(manager, [1, 2, 3, 4])
    for number, tail in enumerate(([5, 6, 7, 8], [5, 6, 7, 9])):
        block = manager.allocate_host_blocks_blocking(1)
        block.fill(tail, parent=head[0])
        write(block[0], 10 + number)
        block.register()
    assert numbers(manager.match_host_blocks([1, 2, 3, 4, 5, 6, 7, 8])) == [1, 10]
    assert numbers(manager.match_host_blocks([1, 2, 3, 4, 5, 6, 7, 9])) == [1, 11]


def test_filling_a_list_leaves_a_short_block_partial_and_the_others_reset() -> None:
    blocks = manager_of().allocate_host_blocks_blocking(4)
    blocks.fill(range(10))
    assert [block.state for block in blocks] == [
        BlockState.COMPLETE,
        BlockState.COMPLETE,
        BlockState.PARTIAL,
        BlockState.RESET,
    ]
    assert blocks[2].tokens == [8, 9]


@pytest.mark.parametrize("tokens", [[*range(9)], [1, -1], [2**32]])
def test_tokens_that_cannot_all_go_in_change_nothing(tokens: list[int]) -> None:
    blocks = manager_of().allocate_host_blocks_blocking(2)
    with pytest.raises((IllegalTransition, OverflowError)):
        blocks.fill(tokens)
    assert [block.state for block in blocks] == [BlockState.RESET] * 2


def test_registered_blocks_are_found_by_their_prefix_and_no_others() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(3)
    blocks.fill(TOKENS)
    assert len(manager.match_host_blocks(TOKENS)) == 0  # COMPLETE is not enough
    blocks[:2].register()
    found = manager.match_host_blocks([*TOKENS, 99])
    assert found.block_ids == blocks.block_ids[:2]
    assert [block.tokens for block in found] == [TOKENS[:4], TOKENS[4:8]]
    assert len(manager.match_host_blocks(TOKENS[1:])) == 0
    assert len(manager.match_host_blocks(TOKENS, salt="other")) == 0
    assert len(manager.match_host_blocks(TOKENS[:3])) == 0
    assert len(manager.match_device_blocks(TOKENS)) == 0


def test_a_found_block_can_be_the_parent_of_new_ones() -> None:
    manager = manager_of()
    registered(manager, TOKENS[:8]).release()
    found = manager.match_host_blocks(TOKENS)
    new = manager.allocate_host_blocks_blocking(1)
    new.fill(TOKENS[8:], parent=found[-1])
    new.register()
    assert len(manager.match_host_blocks(TOKENS)) == 3


def test_a_registered_block_that_nobody_holds_stays_until_its_room_is_needed() -> None:
    manager = manager_of()
    registered(manager, TOKENS).release()
    assert manager.num_available_host_blocks == 4
    held = manager.allocate_host_blocks_blocking(2)  # the free one, and the cached tail
    assert numbers(manager.match_host_blocks(TOKENS)) == [1, 2]
    assert len(held) == 2


def test_the_head_of_a_prefix_stays_longest_also_where_blocks_are_registered_one_by_one() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(3)
    blocks.fill(TOKENS)
    for block in blocks:
        block.register()
    block.release()
    blocks.release()
    held = manager.allocate_host_blocks_blocking(3)
    assert len(manager.match_host_blocks(TOKENS)) == 1
    assert len(held) == 3


def test_a_list_is_registered_as_a_whole_or_not_at_all() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(3)
    blocks.fill(TOKENS[:8])
    with pytest.raises(IllegalTransition, match="a reset block can't register"):
        blocks.register()
    assert len(manager.match_host_blocks(TOKENS)) == 0
    assert manager.allocate_host_blocks_blocking(0).register().to_list() == []


def test_two_blocks_of_one_list_with_the_same_tokens_are_registered_once() -> None:
    manager = manager_of()
    blocks = manager.allocate_host_blocks_blocking(2)
    for block in blocks:
        block.init_sequence()
        block.add_tokens(TOKENS[:4])
        block.commit()
    block.release()  # a handle of its own, which the list shares
    with pytest.raises(IllegalTransition, match="released"):
        blocks.register()
    blocks[0].register()
    twins = manager.allocate_host_blocks_blocking(2)
    for block in twins:
        block.init_sequence()
        block.add_tokens(TOKENS[4:8])
        block.commit()
    found = twins.register()
    assert len(set(found.block_ids)) == 1
    del block
    for held in (blocks, twins, found):
        held.release()
    assert manager.num_available_host_blocks == 4


def test_a_found_block_is_held() -> None:
    manager = manager_of()
    registered(manager, TOKENS).release()
    first, second = manager.match_host_blocks(TOKENS[:4]), manager.match_host_blocks(TOKENS[:4])
    first.release()
    with pytest.raises(BlocksUnavailable, match="requested: 4, available: 3"):
        manager.allocate_host_blocks_blocking(4)
    second.release()
    assert len(manager.allocate_host_blocks_blocking(4)) == 4
    assert len(manager.match_host_blocks(TOKENS)) == 0


def test_the_same_tokens_are_registered_once() -> None:
    manager = manager_of()
    first = registered(manager, TOKENS[:4], 1.0)
    second = manager.allocate_host_blocks_blocking(1)
    second.fill(TOKENS[:4])
    found = second.register()
    assert found.block_ids == first.block_ids != second.block_ids
    assert second[0].state is BlockState.COMPLETE
    for blocks in (first, second, found):
        blocks.release()
    assert manager.num_available_host_blocks == 4


def test_after_a_reset_nothing_is_found_and_holders_keep_their_blocks() -> None:
    manager = manager_of()
    blocks = registered(manager, TOKENS)
    manager.reset()
    assert len(manager.match_host_blocks(TOKENS)) == 0
    assert numbers(blocks) == [1, 2, 3]
    assert manager.num_available_host_blocks == 1
    blocks.release()
    assert manager.num_available_host_blocks == 4


def test_a_closed_manager_says_so() -> None:
    with manager_of() as manager:
        blocks = manager.allocate_device_blocks_blocking(1)
    manager.close()
    for use in (
        blocks[0].__dlpack__,
        manager.reset,
        lambda: manager.allocate_host_blocks_blocking(1),
        lambda: manager.match_device_blocks(TOKENS),
        lambda: manager.offload_blocking(blocks),
    ):
        with pytest.raises(IllegalTransition, match="the block manager was closed"):
            use()


def test_blocks_outlive_a_manager_that_nobody_closed() -> None:
    blocks = manager_of().allocate_host_blocks_blocking(1)
    gc.collect()
    write(blocks[0], 3)
    assert numbers(blocks) == [3]
