"""Each planted fault is noticed by the machine of `test_leader`; the seed is fixed, so always."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvbm_core.errors import KvbmError
from tests.property import faulty
from tests.property.leader_machine import LeaderMachine
from tests.property.setup import Parts

SEARCH = settings(
    max_examples=2000,
    stateful_step_count=40,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

FAULTS = [
    Parts(pool=faulty.MatchesReserved),
    Parts(pool=faulty.FreesPinned),
    Parts(pool=faulty.LeaksOnAbort),
    Parts(pool=faulty.NeverUnpins),
    Parts(pool=faulty.NeverDrops),
    Parts(leader=faulty.CommitsOnFirstRank),
    Parts(leader=faulty.ForgetsFences),
    Parts(leader=faulty.CommitsFailures),
    Parts(leader=faulty.FreesUnderOffloads),
    Parts(leader=faulty.ForgetsDrains),
    Parts(leader=faulty.KeepsOldWeights),
    Parts(leader=faulty.KeepsBlocksOfLostRanks),
    Parts(leader=faulty.WaitsForLostRanks),
    Parts(leader=faulty.LoadsTwice),
    Parts(leader=faulty.NeverStopsWaiting),
    Parts(leader=faulty.StoresTooEarly),
    Parts(leader=faulty.LoadsOneBlockLate),
    Parts(worker=faulty.SkipsFences),
    Parts(worker=faulty.SubmitsFencedLate),
    Parts(worker=faulty.DrainsAtOnce),
    Parts(worker=faulty.HidesLoadErrors),
    Parts(worker=faulty.ReportsEarly),
    Parts(worker=faulty.ReportsTwice),
    Parts(worker=faulty.LosesReports),
]

# What a fault needs to show that the random engine rarely is.
WITHOUT_DISK = {"num_disk_blocks": 0}
CIRCUMSTANCES = {
    "FreesPinned": {**WITHOUT_DISK, "num_host_blocks": 3, "device_remembers": False},
    "SubmitsFencedLate": {
        **WITHOUT_DISK,
        "num_ranks": 1,
        "num_host_blocks": 8,
        "num_device_blocks": 9,
        "eager_reuse": True,
        "device_remembers": False,
        "offload_generated": True,
        "late_offloads": False,
        "holds_blocks": False,
        "late_keys": True,
    },
}


def _name(parts: Parts) -> str:
    return next(
        part.__name__ for part in vars(parts).values() if part.__module__ == faulty.__name__
    )


@pytest.mark.parametrize("parts", FAULTS, ids=_name)
def test_the_machine_notices(parts: Parts) -> None:
    search(parts, CIRCUMSTANCES.get(_name(parts), WITHOUT_DISK))


def search(parts: Parts, circumstances: dict[str, Any]) -> None:
    """Run the machine with a planted fault until it notices, or fail."""

    class Faulty(LeaderMachine):
        pass

    Faulty.parts = parts
    Faulty.circumstances = circumstances
    with pytest.raises((AssertionError, KvbmError, KeyError)):
        run_state_machine_as_test(Faulty, settings=SEARCH)
