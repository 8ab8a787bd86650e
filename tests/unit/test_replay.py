"""The replay of a trace counts what a reader can count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.replay import Arrival, Traffic, read_trace, replay


def trace(path: Path, *requests: list[int]) -> list[Arrival]:
    lines = [json.dumps({"timestamp": i, "hash_ids": ids}) for i, ids in enumerate(requests)]
    path.write_text("\n".join(lines))
    return read_trace(path)


def test_a_block_that_left_host_unused_comes_from_disk_only_without_the_filter(
    tmp_path: Path,
) -> None:
    arrivals = trace(tmp_path / "trace", [1, 2], [3, 4], [1, 2])
    sizes = {"num_host_blocks": 2, "num_disk_blocks": 10}
    assert replay(arrivals, **sizes, disk_filter="all") == Traffic(
        num_queried=6,
        num_host_hits=0,
        num_disk_hits=2,
        num_written=4,
        num_disk_evicted=0,
        num_refused=0,
    )
    filtered = replay(arrivals, **sizes, disk_filter="frequency")
    assert (filtered.num_hits, filtered.num_written) == (0, 0)


def test_the_filter_writes_a_block_that_was_used_from_host(tmp_path: Path) -> None:
    arrivals = trace(tmp_path / "trace", [1, 2], [1, 2], [3, 4], [1, 2])
    found = replay(arrivals, num_host_blocks=2, num_disk_blocks=10, disk_filter="frequency")
    assert (found.num_host_hits, found.num_disk_hits, found.num_written) == (2, 2, 2)
    assert found.hits_per_write == 1.0


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n{"timestamp": 0}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_trace(path)
