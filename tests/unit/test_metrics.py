from __future__ import annotations

from kvbm_core.metrics import Counters


def test_new_counters_are_zero() -> None:
    counters = Counters()
    assert (counters.num_onboarded_blocks, counters.num_offloaded_blocks) == (0, 0)
    assert all(pair.partition("=")[2] in ("0", "0.000") for pair in counters.summary().split())


def test_routes_count_apart_and_failures_together() -> None:
    counters = Counters()
    counters.routes["host_to_device"].num_blocks += 3
    counters.routes["device_to_host"].num_blocks += 4
    counters.routes["host_to_device"].num_failed_ops += 1
    counters.routes["device_to_host"].num_failed_ops += 2
    assert (counters.num_onboarded_blocks, counters.num_offloaded_blocks) == (3, 4)
    assert counters.num_failed_ops == 3


def test_the_summary_is_one_line_of_pairs() -> None:
    counters = Counters(num_matched_blocks=7, num_hook_errors=1)
    counters.routes["host_to_device"].seconds = 1.5
    summary = counters.summary()
    assert "\n" not in summary
    pairs = dict(pair.split("=") for pair in summary.split())
    assert (pairs["matched_blocks"], pairs["hook_errors"]) == ("7", "1")
    assert pairs["onboard_seconds"] == "1.500"
