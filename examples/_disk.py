"""What the prefix-reuse demo shows of the disk tier: a server, and the one that follows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from examples._client import CacheUse
from examples._report import Run, differing, ratio_of_medians, row, seconds_cell
from examples._workload import BLOCK_TOKENS, Kind, Workload

FILTER_NOTE = (
    "every block goes to disk (DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER=true): by default only blocks\n"
    "that were used again from host do, and in this rotation none is, since it has left host before"
)
DISK_HIT = "disk hit"
UP, DOWN = "disk_to_host", "host_to_disk"


@dataclass(frozen=True)
class DiskRuns:
    """The answers of a server with a disk tier, and of the one started after it had ended.

    Together they got the same requests as each of the other servers.
    """

    before: Run
    after: Run

    @property
    def name(self) -> str:
        return self.before.name

    @property
    def both(self) -> Run:
        """The two as if they were one server."""
        one, other = self.before, self.after
        return Run(
            name=self.name,
            requests=[*one.requests, *other.requests],
            answers=[*one.answers, *other.answers],
            cache=CacheUse(*map(sum, zip(_values(one.cache), _values(other.cache), strict=True))),
            summary={},
            hit=one.hit,
        )

    def returns(self) -> dict[str, tuple[Run, slice]]:
        """The label of each kind of return → who answered it, and where it stands in `both`."""
        middle = len(self.before.requests)
        return {
            "back from disk": (self.before, slice(0, middle)),
            "back after the server's restart": (self.after, slice(middle, None)),
        }


def environment(workload: Workload, directory: Path) -> dict[str, str]:
    """Settings of a server whose host tier is as small as the device's cache."""
    return {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(workload.device_blocks),
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(2 * workload.distinct_blocks),
        "DYN_KVBM_DISK_CACHE_DIR": str(directory),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
        "DYN_LOG": "debug",  # names every copy
    }


def table(baseline: Run, disk: DiskRuns) -> str:
    """Return the rows about the disk tier."""
    title = "with disk; host as small as device"
    header = row(title, baseline.name, disk.name, "speed-up")
    lines = [header, "-" * len(header)]
    for label, (run, place) in disk.returns().items():
        plain = _part(baseline, place)
        one = f"{seconds_cell(plain.ttfts(Kind.RETURN))} {plain.source(Kind.RETURN)}"
        other = f"{seconds_cell(run.ttfts(Kind.RETURN))} {run.source(Kind.RETURN)}"
        factor = ratio_of_medians(plain.ttfts(Kind.RETURN), run.ttfts(Kind.RETURN))
        lines.append(row(label, one, other, f"{factor:.1f}x"))
    lines += [row(label, "-", cell) for label, cell in _numbers_of(disk).items()]
    total = len(baseline.answers)
    same = total - len(differing(baseline, disk.both))
    return "\n".join([*lines, row("answers with the same tokens", "", f"{same} of {total}")])


def named(run: Run) -> Run:
    """Return the run with its hits called disk hits, where all blocks that returned were."""
    return replace(run, hit=DISK_HIT) if missing_blocks(run) <= 0 else run


def missing_blocks(run: Run) -> int:
    """Return how many cached blocks of returning prefixes did not come from disk."""
    cached = sum(a.cached_tokens for request, a in run.pairs() if request.kind is Kind.RETURN)
    return cached // BLOCK_TOKENS - run.moved_blocks.get(UP, 0)


def problems(baseline: Run, disk: DiskRuns) -> list[str]:
    """Say what keeps the disk tier's part of the demo from having shown what it is for."""
    found = []
    if wrong := differing(baseline, disk.both):
        found.append(f"with a disk tier, other tokens were given for requests {wrong}")
    for label, (run, _) in disk.returns().items():
        if (source := run.source(Kind.RETURN)) != DISK_HIT:
            found.append(f"{label}: {source}, not {DISK_HIT}")
    return found


def write_json(path: Path, baseline: Run, disk: DiskRuns) -> None:
    """Add the disk tier's numbers to the file that holds the demo's other ones."""
    content: dict[str, Any] = json.loads(path.read_text())
    content["disk"] = {
        "differing_requests": differing(baseline, disk.both),
        "before_restart": {**disk.before.numbers(), "moved_blocks": disk.before.moved_blocks},
        "after_restart": {**disk.after.numbers(), "moved_blocks": disk.after.moved_blocks},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _part(run: Run, place: slice) -> Run:
    """Return some of a server's requests and answers."""
    return Run(run.name, run.requests[place], run.answers[place], run.cache, {})


def _numbers_of(disk: DiskRuns) -> dict[str, str]:
    hits, queries = disk.both.cache.host_hits, disk.both.cache.device_queries
    before, after = disk.before.moved_blocks, disk.after.moved_blocks
    share = f"{hits / queries:.0%}" if queries else "-"
    return {
        "prompt tokens from disk": share,
        "blocks written to disk": f"{before.get(DOWN, 0):,}, {after.get(DOWN, 0):,} after restart",
        "blocks read from disk": f"{before.get(UP, 0):,}, {after.get(UP, 0):,} after restart",
    }


def _values(use: CacheUse) -> Sequence[int]:
    counts: Sequence[int] = list(asdict(use).values())
    return counts
