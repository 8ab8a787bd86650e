"""The block manager against a model: who holds which block, what is cached, what is seen in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm_core import BlockManager
from kvbm_core.blocks.block import BlockList
from kvbm_core.errors import BlocksUnavailable
from kvbm_core.types import BlockId, Tier
from tests.property.checks import check_conserved, ready_blocks

NUM_BLOCKS = 5
PICKS = st.integers(0, 7)
# Prefixes that share blocks: two tokens a block, up to three blocks.
PROMPTS = st.lists(st.sampled_from([(0, 0), (0, 1)]), min_size=1, max_size=3).map(
    lambda blocks: [token for block in blocks for token in block]
)


def make_manager() -> BlockManager:
    return BlockManager(0, 1, 1, 2, 1, "fp32", NUM_BLOCKS)


class BlocksMachine(RuleBasedStateMachine):
    """Blocks of one tier. `make` is replaced by a subclass that plants a fault.

    held: lists of blocks with the number each was filled with; a cached block's number is that of
    its prompt. tensors: views that outlive their blocks, with their ids and numbers.
    """

    make: Callable[[], BlockManager] = staticmethod(make_manager)

    @initialize()
    def start(self) -> None:
        self.manager = type(self).make()
        self.pool = self.manager._tiers[Tier.HOST]._pool
        self.held: list[tuple[BlockList, list[float]]] = []
        self.tensors: list[tuple[BlockId, torch.Tensor, float]] = []
        self.numbers: dict[tuple[int, ...], float] = {}
        self.next_number = 1.0

    @property
    def holders(self) -> Counter[BlockId]:
        ids = [block_id for blocks, _ in self.held for block_id in blocks.block_ids]
        return Counter([*ids, *(block_id for block_id, _, _ in self.tensors)])

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        num_available = NUM_BLOCKS - len(self.holders)
        before = set(self.holders)
        try:
            blocks = self.manager.allocate_host_blocks_blocking(count)
        except BlocksUnavailable:
            assert count > num_available
            return
        assert count <= num_available
        assert not before & set(blocks.block_ids), "a block was given away that somebody has"
        self._hold(blocks, [self._write(blocks, i) for i in range(count)])

    @rule(tokens=PROMPTS)
    def register(self, tokens: list[int]) -> None:
        try:
            blocks = self.manager.allocate_host_blocks_blocking(len(tokens) // 2)
        except BlocksUnavailable:
            return
        new = [self._write(blocks, i) for i in range(len(blocks))]
        blocks.fill(tokens)
        found = blocks.register()
        for i, block_id in enumerate(found.block_ids):
            if block_id == blocks.block_ids[i]:
                self.numbers[tuple(tokens[: 2 * i + 2])] = new[i]
        del blocks  # not released: `found` has those that nobody else had registered
        self._hold(found, [self.numbers[tuple(tokens[: 2 * i + 2])] for i in range(len(found))])

    @rule(tokens=PROMPTS)
    def match(self, tokens: list[int]) -> None:
        found = self.manager.match_host_blocks(tokens)
        numbers = [self.numbers[tuple(tokens[: 2 * i + 2])] for i in range(len(found))]
        self._hold(found, numbers)

    @precondition(lambda self: self.held)
    @rule(pick=PICKS, by_name=st.booleans())
    def let_go(self, pick: int, by_name: bool) -> None:
        blocks, _ = self.held.pop(pick % len(self.held))
        if by_name:
            blocks.release()

    @precondition(lambda self: self.held)
    @rule(pick=PICKS)
    def export(self, pick: int) -> None:
        blocks, numbers = self.held[pick % len(self.held)]
        for block, number in zip(blocks, numbers, strict=True):
            self.tensors.append((block.block_id, torch.from_dlpack(block)[0, 0], number))

    @precondition(lambda self: self.tensors)
    @rule(pick=PICKS)
    def drop_tensor(self, pick: int) -> None:
        del self.tensors[pick % len(self.tensors)]

    @rule()
    def reset(self) -> None:
        self.manager.reset()
        assert not ready_blocks(self.pool)

    def _write(self, blocks: BlockList, index: int) -> float:
        self.next_number += 1
        torch.from_dlpack(blocks[index]).fill_(self.next_number)
        return self.next_number

    def _hold(self, blocks: BlockList, numbers: list[float]) -> None:
        if len(blocks):
            self.held.append((blocks, numbers))

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "manager"):
            return
        assert self.manager.num_available_host_blocks == NUM_BLOCKS - len(self.holders)
        check_conserved(self.pool)
        for _, tensor, number in self.tensors:
            assert (tensor == number).all(), "somebody wrote to a block that has a tensor"
        for blocks, numbers in self.held:
            for block, number in zip(blocks, numbers, strict=True):
                assert (torch.from_dlpack(block) == number).all()

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.held.clear()
        self.tensors.clear()
        assert self.manager.num_available_host_blocks == NUM_BLOCKS
        assert (self.pool.num_pinned, self.pool.num_reserved) == (0, 0)
