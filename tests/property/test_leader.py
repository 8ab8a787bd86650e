"""The leader with its workers under every order of events: never a wrong token, nothing left."""

from __future__ import annotations

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.leader_machine import WITH_DISK, LeaderMachine


def test_no_order_of_events_gives_a_wrong_token_or_leaves_something_behind() -> None:
    run_state_machine_as_test(
        LeaderMachine, settings=settings(max_examples=80, stateful_step_count=50)
    )


def test_nor_does_any_with_a_disk_that_fails_hangs_forgets_and_outlives_its_process() -> None:
    class WithDisk(LeaderMachine):
        circumstances = WITH_DISK

    run_state_machine_as_test(WithDisk, settings=settings(max_examples=80, stateful_step_count=50))
