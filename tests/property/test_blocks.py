"""The block manager behaves as its model under every order of calls, and a faulty one does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvbm_core import BlockManager
from kvbm_core.blocks.memory import BlockMemory
from kvbm_core.blocks.tier import BlockTier, Hold, Lease
from kvbm_core.errors import KvbmError
from kvbm_core.types import BlockId, Tier
from tests.property.blocks_machine import BlocksMachine, make_manager
from tests.property.test_leader_faults import SEARCH


def test_the_block_manager_behaves_as_its_model() -> None:
    run_state_machine_as_test(
        BlocksMachine, settings=settings(max_examples=60, stateful_step_count=30)
    )


class ForgetsTensors(BlockMemory):
    """Gives out views that do not hold their block."""

    def block(self, block_id: BlockId, hold: object) -> torch.Tensor:
        return super().block(block_id, None)


class FreesOnRelease(BlockTier):
    """Takes a block back while tensors of it live."""

    def allocate(self, count: int) -> list[Lease]:
        leases = super().allocate(count)
        for lease in leases:
            lease.__class__ = _Eager
        return leases


class _Eager(Lease):
    def release(self) -> None:
        hold = self.hold
        super().release()
        Hold.__del__(hold)
        hold._returned = type(hold._returned)()


class LeaksPins(BlockTier):
    """Pins what it finds, and never lets go."""

    def _pinned(self, block_id: BlockId, span: object) -> Lease:
        lease = super()._pinned(block_id, span)  # type: ignore[arg-type]
        self._pool.pin([lease.span.key])  # type: ignore[union-attr]
        return lease


class ForgetsToPin(BlockTier):
    """Finds blocks without holding them."""

    def _pinned(self, block_id: BlockId, span: object) -> Lease:
        lease = super()._pinned(block_id, span)  # type: ignore[arg-type]
        self._pool.unpin([block_id])
        lease.hold._returned = type(self._returned)()
        return lease


def _faulty(fault: type[BlockTier] | type[BlockMemory]) -> Callable[[], BlockManager]:
    def make() -> BlockManager:
        manager = make_manager()
        tier = manager._tiers[Tier.HOST]
        (tier if issubclass(fault, BlockTier) else tier.memory).__class__ = fault
        return manager

    return make


@pytest.mark.parametrize("fault", [ForgetsTensors, FreesOnRelease, LeaksPins, ForgetsToPin])
def test_the_model_notices(fault: type[BlockTier] | type[BlockMemory]) -> None:
    class Faulty(BlocksMachine):
        make = staticmethod(_faulty(fault))

    with pytest.raises((AssertionError, KvbmError, KeyError)):
        run_state_machine_as_test(Faulty, settings=SEARCH)
