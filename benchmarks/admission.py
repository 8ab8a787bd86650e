"""What the frequency filter saves an SSD, and what it costs in hits: a trace of real requests.

The trace goes through a real leader with host and disk pools, at its own times, with the filter
and without it; see `benchmarks.replay`. All numbers are counts: they are the same in every run.

--trace, or the environment variable KVBM_TRACE, names the trace: JSON lines with `timestamp` and
`hash_ids`, such as the Mooncake project publishes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.replay import BLOCK_BYTES, BLOCK_SIZE, Traffic, read_trace, replay
from benchmarks.report import Figure, Ratio, Result, Skipped, text_table

TRACE_VARIABLE = "KVBM_TRACE"
SIZES = ((2_000, 16_000), (2_000, 64_000), (8_000, 16_000), (8_000, 64_000), (16_000, 128_000))
"""Blocks of host and of disk; the trace has 182,790 different ones."""

QUICK_SIZES = ((2_000, 16_000),)
QUICK_REQUESTS = 2_000
FREQUENCY, ALL = "frequency", "all"
NAMES = {FREQUENCY: "frequency filter", ALL: "no filter"}
HEADER = (
    *("host, disk, filter", "written", "disk hits", "host hits", "all hits", "evicted from disk"),
    "disk hits a write",
)
RATIO_HEADER = ("frequency filter / no filter", "written", "disk hits", "all hits", "hits a write")


def run(*, quick: bool, scratch: Path) -> Result:
    """Replay with and without the filter at every size; `scratch` is not used."""
    path = _trace()
    arrivals = read_trace(path, QUICK_REQUESTS if quick else None)
    settings = {
        "trace": path.name,
        "requests": len(arrivals),
        "blocks": sum(len(arrival.keys) for arrival in arrivals),
        "block_size": BLOCK_SIZE,
        "block_bytes": BLOCK_BYTES,
    }
    result = Result("admission", settings)
    rows, ratio_rows = [], []
    for num_host, num_disk in QUICK_SIZES if quick else SIZES:
        place = f"host {num_host:,}, disk {num_disk:,}"
        traffic = {
            name: replay(
                arrivals, num_host_blocks=num_host, num_disk_blocks=num_disk, disk_filter=name
            )
            for name in NAMES
        }
        for name, found in traffic.items():
            result.figures += _figures(f"{place}, {NAMES[name]}", found)
            rows.append(_row(f"{place}, {NAMES[name]}", found))
        ratios = list(_ratios(place, traffic[FREQUENCY], traffic[ALL]))
        result.ratios += ratios
        ratio_rows.append([place, *(f"{ratio.value:.2f}" for ratio in ratios)])
    result.table = _tables(settings, rows, ratio_rows)
    return result


def _trace() -> Path:
    """Raises Skipped where none is named."""
    name = os.environ.get(TRACE_VARIABLE, "")
    if not name:
        raise Skipped(f"needs a trace: give --trace PATH or set {TRACE_VARIABLE}")
    path = Path(name)
    if not path.is_file():
        raise Skipped(f"there is no trace {path}")
    return path


def _figures(name: str, found: Traffic) -> Iterator[Figure]:
    counts = {
        ("written to disk", "blocks"): found.num_written,
        ("disk hits", "blocks hit"): found.num_disk_hits,
        ("host hits", "blocks hit"): found.num_host_hits,
    }
    for (kind, unit), count in counts.items():
        if count:  # nothing to compare otherwise
            yield Figure(f"{name}: {kind}", unit, count, count, 1)


def _ratios(place: str, frequency: Traffic, everything: Traffic) -> Iterator[Ratio]:
    """The filter to no filter. More hits a write is the filter's purpose, hits are its price."""
    pairs = {
        "written": (frequency.num_written, everything.num_written),
        "disk hits": (frequency.num_disk_hits, everything.num_disk_hits),
        "all hits": (frequency.num_hits, everything.num_hits),
        "disk hits a write": (frequency.hits_per_write, everything.hits_per_write),
    }
    for name, (one, other) in pairs.items():
        yield Ratio(f"{place}: {name}", one / other if other else 0.0)


def _row(name: str, found: Traffic) -> list[str]:
    counts = found.num_written, found.num_disk_hits, found.num_host_hits
    share = f"{found.num_hits / found.num_queried:.1%}"
    cells = [*(f"{count:,}" for count in counts), share, f"{found.num_disk_evicted:,}"]
    return [name, *cells, f"{found.hits_per_write:.2f}"]


def _tables(settings: dict[str, object], rows: list[list[str]], ratios: list[list[str]]) -> str:
    head = (
        f"{settings['requests']:,} requests of {settings['trace']}, {settings['blocks']:,} blocks "
        f"of {BLOCK_SIZE} tokens; no device cache"
    )
    return "\n\n".join([head, text_table(HEADER, rows), text_table(RATIO_HEADER, ratios)])
