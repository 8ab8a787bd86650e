"""The pool behaves as its model under every order of calls, and a faulty one does not."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvbm_core.errors import KvbmError
from kvbm_core.pool import BlockPool
from tests.property import faulty
from tests.property.pool_machine import PoolMachine
from tests.property.test_leader_faults import SEARCH


def test_the_pool_behaves_as_its_model() -> None:
    run_state_machine_as_test(
        PoolMachine, settings=settings(max_examples=100, stateful_step_count=40)
    )


@pytest.mark.parametrize(
    "pool",
    [
        faulty.MatchesReserved,
        faulty.FreesPinned,
        faulty.LeaksOnAbort,
        faulty.NeverUnpins,
        faulty.FreesOnFirstUnpin,
        faulty.NeverDrops,
        faulty.GivesOutUnkeyed,
        faulty.EvictsThenFails,
        faulty.KeysWhatIsThere,
        faulty.LeaksUnkeyed,
    ],
)
def test_the_model_notices(pool: type[BlockPool]) -> None:
    class Faulty(PoolMachine):
        make_pool = pool

    with pytest.raises((AssertionError, KvbmError, KeyError)):
        run_state_machine_as_test(Faulty, settings=SEARCH)
