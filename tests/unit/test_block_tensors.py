"""Tensors of blocks: no copies, and no block reused under one."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch

from kvbm_core import BlockManager
from kvbm_core.blocks.memory import BlockMemory
from kvbm_core.errors import BlocksUnavailable
from kvbm_core.types import Tier
from tests.unit.blocks import manager_of, numbers, registered, write

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("outer_dim", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_and_its_layers_are_tensors_of_the_bindings_shapes(
    dtype: str, outer_dim: int
) -> None:
    manager = manager_of(dtype=dtype, outer_dim=outer_dim)
    block = manager.allocate_host_blocks_blocking(1)[0]
    tensor = torch.from_dlpack(block)
    assert (tensor.shape, tensor.dtype) == ((1, 3, outer_dim, 4, 5), DTYPES[dtype])
    assert (tensor.get_device(), tensor.is_contiguous()) == (-1, True)
    for layer in block:
        tensor = torch.from_dlpack(layer)
        assert (tensor.shape, tensor.dtype) == ((1, 1, outer_dim, 4, 5), DTYPES[dtype])


def test_what_is_written_to_a_tensor_is_seen_in_all_others() -> None:
    blocks = manager_of().allocate_device_blocks_blocking(2)
    whole, again = torch.from_dlpack(blocks[1]), torch.from_dlpack(blocks.to_list()[1])
    other = torch.from_dlpack(blocks[0])
    other.fill_(-1)
    layers = [torch.from_dlpack(layer) for layer in blocks[1]]
    for index, layer in enumerate(layers):
        layer.fill_(index)
    assert [whole[0, i].unique().tolist() for i in range(3)] == [[0], [1], [2]]
    whole[0, 2, 1, 3, 4] = 9
    assert layers[2][0, 0, 1, 3, 4] == again[0, 2, 1, 3, 4] == 9
    assert (other == -1).all()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_numpy_shares_the_bytes_too(dtype: str) -> None:
    block = manager_of(dtype=dtype).allocate_host_blocks_blocking(1)[0]
    array = np.from_dlpack(block)
    write(block, 3)
    assert (array.shape, float(array.min()), float(array.max())) == ((1, 3, 2, 4, 5), 3.0, 3.0)


def test_numpy_has_no_bf16_and_says_so() -> None:
    manager = manager_of(dtype="bf16")
    block = manager.allocate_host_blocks_blocking(1)[0]
    with pytest.raises((RuntimeError, BufferError)):
        np.from_dlpack(block)
    block.release()
    assert manager.num_available_host_blocks == 4


def test_a_copy_can_be_asked_for() -> None:
    block = manager_of().allocate_host_blocks_blocking(1)[0]
    write(block, 1)
    copied = torch.from_dlpack(block, copy=True)
    write(block, 2)
    assert (copied == 1).all()


def test_a_capsule_that_nobody_takes_lets_go() -> None:
    manager = manager_of()
    block = manager.allocate_host_blocks_blocking(1)[0]
    capsule = block.__dlpack__()
    block.release()
    assert manager.num_available_host_blocks == 3
    del capsule
    assert manager.num_available_host_blocks == 4


def was_overwritten(manager: BlockManager, as_array: bool) -> bool:
    """Whether a tensor of a released block changes under its holder's hands."""
    block = manager.allocate_host_blocks_blocking(1)[0]
    write(block, 7)
    view = np.from_dlpack(block)[0, 1] if as_array else torch.from_dlpack(block)[0, 1].unbind(0)[0]
    block.release()
    with suppress(BlocksUnavailable):
        write(manager.allocate_host_blocks_blocking(1)[0], 9)
    return bool((view == 9).any())


@pytest.mark.parametrize("as_array", [False, True])
def test_a_released_block_is_not_given_away_while_a_tensor_of_it_lives(as_array: bool) -> None:
    manager = manager_of(host_num_blocks=1)
    assert not was_overwritten(manager, as_array)
    assert manager.num_available_host_blocks == 1, "the tensor is gone"


def forgetful(memory: BlockMemory, block_id: int, offset: int, size: int, _: object):  # type: ignore[no-untyped-def]
    """A plain view of the tier's memory: nobody notices its end."""
    return memory.tensor[block_id][offset : offset + size].view(torch.float32)


@pytest.mark.parametrize("as_array", [False, True])
def test_the_check_notices_tensors_that_do_not_hold_their_block(
    as_array: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockMemory, "_view", forgetful)
    assert was_overwritten(manager_of(host_num_blocks=1), as_array)


def test_a_cached_block_is_not_evicted_while_a_tensor_of_it_lives() -> None:
    manager = manager_of(host_num_blocks=1)
    registered(manager, [1, 2, 3, 4]).release()
    tensor = torch.from_dlpack(manager.match_host_blocks([1, 2, 3, 4])[0])
    with pytest.raises(BlocksUnavailable):
        manager.allocate_host_blocks_blocking(1)
    assert len(manager.match_host_blocks([1, 2, 3, 4])) == 1
    del tensor
    assert len(manager.allocate_host_blocks_blocking(1)) == 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_tensor_keeps_the_memory_and_the_last_one_frees_it(closed: bool) -> None:
    manager = manager_of()
    memory = weakref.ref(manager._tiers[Tier.HOST].memory)
    blocks = manager.allocate_host_blocks_blocking(2)
    write(blocks[1], 5)
    tensor = torch.from_dlpack(blocks[1])
    if closed:
        manager.close()
    else:
        del manager, blocks
        gc.collect()
    assert (tensor == 5).all()
    assert memory() is not None
    del tensor
    assert memory() is None


def test_close_frees_memory_whoever_still_has_blocks() -> None:
    manager = manager_of()
    memories = [weakref.ref(tier.memory) for tier in manager._tiers.values()]
    blocks = manager.offload_blocking(manager.allocate_device_blocks_blocking(2))
    assert len(numbers(blocks)) == 2
    manager.close()
    assert [memory() for memory in memories] == [None, None]


def test_a_manager_that_nobody_closed_ends_its_thread_and_frees_its_memory() -> None:
    manager = manager_of()
    manager.offload_blocking(manager.allocate_device_blocks_blocking(2))
    memories = [weakref.ref(tier.memory) for tier in manager._tiers.values()]
    assert manager._copies is not None
    thread = manager._copies._thread
    assert thread is not None
    del manager
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert [memory() for memory in memories] == [None, None]
