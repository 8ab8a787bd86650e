"""Each fault planted in the disk tier is noticed by the machine of `test_leader`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.property import faulty, faulty_disk
from tests.property.checks import check
from tests.property.engine import Engine
from tests.property.leader_machine import WITH_DISK
from tests.property.setup import Parts, Setup
from tests.property.test_leader_faults import search

FAULTS = [
    Parts(leader=faulty_disk.CommitsBadBlocks),
    Parts(leader=faulty_disk.CommitsFailedWrites),
    Parts(leader=faulty_disk.EvictsUnwritten),
    Parts(leader=faulty_disk.PromotesTwice),
    Parts(leader=faulty_disk.NeverUnpinsWritten),
    Parts(leader=faulty_disk.WaitsForever),
    Parts(leader=faulty_disk.NeverRests),
    Parts(leader=faulty_disk.StepsForAQueue),
    Parts(leader=faulty_disk.ForgetsToVoid),
    Parts(leader=faulty_disk.KeepsFlightsOnReset),
    Parts(leader=faulty_disk.CommitsOnFirstRank),
    Parts(leader=faulty_disk.ForgetsFailedPositions),
    Parts(disk_pool=faulty.NeverDrops),
    Parts(disk_pool=faulty_disk.NeverPins),
    Parts(worker=faulty_disk.ForgetsToResetDisk),
    Parts(index=faulty_disk.TrustsAnyHeader),
]

# Where an earlier process left the prompts on disk, there is less to write.
NOTHING_SERVED = {"num_served_tokens": 0}
CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "CommitsFailedWrites": {**NOTHING_SERVED, "num_ranks": 1},
    "EvictsUnwritten": NOTHING_SERVED,
    "ForgetsToVoid": NOTHING_SERVED,
    "StepsForAQueue": {**NOTHING_SERVED, "window_blocks": 1},
    "TrustsAnyHeader": NOTHING_SERVED,
}


def _name(parts: Parts) -> str:
    return next(p.__name__ for p in vars(parts).values() if "faulty" in p.__module__)


@pytest.mark.parametrize("parts", FAULTS, ids=_name)
def test_the_machine_notices(parts: Parts) -> None:
    search(parts, {**WITH_DISK, **CIRCUMSTANCES.get(_name(parts), {})})


def dies_while_one_rank_lags(parts: Parts) -> Engine:
    """An engine after a restart; the disk of one rank hung when its process died."""
    engine = Engine(
        Setup(
            num_ranks=2,
            num_host_blocks=4,
            num_device_blocks=9,
            num_disk_blocks=4,
            num_served_tokens=4,
            parts=parts,
        )
    )
    engine.submit([1] * 4, 0)
    engine.ranks[1].transfer.is_hung = True
    for _ in range(6):
        engine.round(4)
    engine.restart()
    return engine


def test_what_one_rank_had_not_written_when_it_died_is_not_restored() -> None:
    engine = dies_while_one_rank_lags(Parts())
    check(engine)
    assert engine.disk_pool is not None
    assert engine.disk_pool.num_ready == 2
    engine.close()


def test_a_leader_that_trusts_the_first_rank_is_noticed() -> None:
    engine = dies_while_one_rank_lags(Parts(agree=faulty_disk.trusts_the_first_rank))
    with pytest.raises(AssertionError, match="is READY, but rank 1 has None"):
        check(engine)
    engine.close()
