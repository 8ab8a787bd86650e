"""What of an earlier process's disk cache all ranks agree on.

Lives here: one pure decision over what each rank found. Does not live here: files, pools.
Invariant: a block is restored only if every rank has it at the same place and all ranks continue
the same generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from kvbm_core.types import KEY_BYTES, BlockHash, BlockId
from kvbm_core.wire import DiskInventory

logger = logging.getLogger(__name__)


def agreed_blocks(
    inventories: Sequence[DiskInventory], num_blocks: int
) -> list[tuple[BlockHash, BlockId]] | None:
    """Blocks to restore, oldest first; None where the ranks don't continue one cache."""
    generations = {inventory.generation for inventory in inventories}
    if len(generations) != 1 or b"" in generations:
        if any(inventory.block_ids for inventory in inventories):
            logger.warning(
                "kvbm: the disk caches of the %d ranks are not of one run (generations %s): their "
                "blocks are discarded",
                len(inventories),
                ", ".join(sorted(generation.hex()[:8] or "none" for generation in generations)),
            )
        return None
    first, *others = inventories
    found = dict(_entries(first))
    for inventory in others:
        its = dict(_entries(inventory))
        found = {block_id: key for block_id, key in found.items() if its.get(block_id) == key}
    return [(key, block_id) for block_id, key in found.items() if block_id < num_blocks]


def _entries(inventory: DiskInventory) -> Iterator[tuple[BlockId, BlockHash]]:
    keys = inventory.keys
    for i, block_id in enumerate(inventory.ids()):
        yield block_id, BlockHash(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES])
