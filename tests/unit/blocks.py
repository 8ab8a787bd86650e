"""Small block managers and what their tests do with them."""

from __future__ import annotations

from typing import Any

import torch

from kvbm_core import BlockManager
from kvbm_core.blocks.block import Block, BlockList

PAGE_SIZE = 4


def manager_of(**changes: Any) -> BlockManager:
    given: dict[str, Any] = {
        "worker_id": 0,
        "num_layer": 3,
        "outer_dim": 2,
        "page_size": PAGE_SIZE,
        "inner_dim": 5,
        "dtype": "fp32",
        "host_num_blocks": 4,
        "device_num_blocks": 4,
    }
    return BlockManager(**{**given, **changes})


def write(block: Block, number: float) -> None:
    torch.from_dlpack(block).fill_(number)


def numbers(blocks: BlockList) -> list[float]:
    """What `write` wrote, checked to be in all of each block."""
    tensors = [torch.from_dlpack(block) for block in blocks]
    assert all((tensor == tensor.flatten()[0]).all() for tensor in tensors)
    return [float(tensor.flatten()[0]) for tensor in tensors]


def registered(manager: BlockManager, tokens: list[int], first_number: float = 1.0) -> BlockList:
    """Host blocks filled with `tokens` and with numbers that count up."""
    blocks = manager.allocate_host_blocks_blocking(-(-len(tokens) // PAGE_SIZE))
    blocks.fill(tokens)
    for index, block in enumerate(blocks):
        write(block, first_number + index)
    return blocks.register()
