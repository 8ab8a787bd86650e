"""Each fault planted in the disk tier is noticed by the machine of `test_leader`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.property import faulty, faulty_disk
from tests.property.leader_machine import WITH_DISK
from tests.property.setup import Parts
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
    Parts(agree=faulty_disk.trusts_the_first_rank),
]

# Where an earlier process left the prompts on disk, there is less to write.
NOTHING_SERVED = {"num_served_tokens": 0}
CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "CommitsFailedWrites": {**NOTHING_SERVED, "num_ranks": 1},
    "EvictsUnwritten": NOTHING_SERVED,
    "ForgetsToVoid": NOTHING_SERVED,
    "StepsForAQueue": {**NOTHING_SERVED, "window_blocks": 1},
    "TrustsAnyHeader": NOTHING_SERVED,
    "trusts_the_first_rank": {**NOTHING_SERVED, "num_ranks": 2},
}


def _name(parts: Parts) -> str:
    return next(p.__name__ for p in vars(parts).values() if "faulty" in p.__module__)


@pytest.mark.parametrize("parts", FAULTS, ids=_name)
def test_the_machine_notices(parts: Parts) -> None:
    search(parts, {**WITH_DISK, **CIRCUMSTANCES.get(_name(parts), {})})
