"""Blocks as a library: fill them, find them again by their tokens, move them between tiers.

Runs in a second on any machine; without a GPU the device blocks are in ordinary memory.

    python -m examples.block_manager
"""

from __future__ import annotations

import asyncio

import torch

from kvbm_core import BlockManager

PAGE_SIZE = 16
PROMPT = list(range(3 * PAGE_SIZE))


def compute(block: torch.Tensor, tokens: list[int]) -> None:
    """Stands for a model: writes each token's number to all its keys and values."""
    numbers = torch.tensor(tokens, dtype=block.dtype, device=block.device)
    block.copy_(numbers.view(1, 1, 1, -1, 1).expand_as(block))


async def main() -> None:
    with BlockManager(
        worker_id=1,
        num_layer=4,
        outer_dim=2,
        page_size=PAGE_SIZE,
        inner_dim=128,
        dtype="bf16",
        device_num_blocks=4,
        host_num_blocks=16,
    ) as manager:
        blocks = await manager.allocate_device_blocks(3)
        blocks.fill(PROMPT)
        for block in blocks:
            compute(torch.from_dlpack(block), block.tokens)  # no copy: this is the block
        blocks = blocks.register()
        print(f"filled and registered {blocks}")

        stored = await manager.offload(blocks)
        print(f"offloaded to          {stored}")
        blocks.release()  # or let the last reference go
        stored.release()

        # Another use of the device takes the room; what is registered on host stays.
        other = manager.allocate_device_blocks_blocking(4)
        print(f"on the device now     {len(manager.match_device_blocks(PROMPT))} of 3 blocks")
        other.release()

        # The same prompt, then other tokens: its whole blocks come back.
        found = manager.match_host_blocks([*PROMPT, 7, 8, 9])
        print(f"found on host         {found}")
        again = await manager.onboard(found)
        tensors = [torch.from_dlpack(block) for block in again]
        firsts = [int(tensor[0, 0, 0, 0, 0]) for tensor in tensors]
        print(f"onboarded             {again}, first tokens {firsts}")
        if firsts != PROMPT[::PAGE_SIZE]:
            raise SystemExit("the blocks came back with other bytes")


if __name__ == "__main__":
    asyncio.run(main())
