"""Plain counters that tests read, logs summarise and exporters publish.

Lives here: numbers and their names. Does not live here: publishing.
Invariant: counters only grow.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class RouteCounters:
    """What moved along one route, such as ``host_to_device``; bytes are summed over ranks."""

    num_ops: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    num_failed_ops: int = 0


@dataclass
class Counters:
    """One leader's counters; blocks are counted once, whatever the number of ranks.

    num_queried_blocks: asked for at admission, beyond the engine's own cache.
    num_matched_blocks: of these, found and claimed. num_refused_blocks: not offloaded because
    the tier was full. num_evicted_blocks, num_dropped_blocks: left host to make room, or
    because a load failed or the cache was reset. num_fences: ops the engine had to wait for.
    num_hook_errors: unexpected exceptions turned into "no hit". num_filtered_blocks: not offloaded
    because the offload filter said no. num_disk_evicted_blocks: left disk to make room.
    num_bad_blocks: could not be read back from disk, or not with the bytes that were written.
    num_late_promotions: requests that stopped waiting for disk.
    """

    num_queried_blocks: int = 0
    num_matched_blocks: int = 0
    num_evicted_blocks: int = 0
    num_dropped_blocks: int = 0
    num_refused_blocks: int = 0
    num_filtered_blocks: int = 0
    num_disk_evicted_blocks: int = 0
    num_bad_blocks: int = 0
    num_late_promotions: int = 0
    num_fences: int = 0
    num_bad_reports: int = 0
    num_hook_errors: int = 0
    routes: defaultdict[str, RouteCounters] = field(
        default_factory=lambda: defaultdict(RouteCounters)
    )

    @property
    def num_onboarded_blocks(self) -> int:
        return self.routes["host_to_device"].num_blocks

    @property
    def num_offloaded_blocks(self) -> int:
        return self.routes["device_to_host"].num_blocks

    @property
    def num_failed_ops(self) -> int:
        return sum(route.num_failed_ops for route in self.routes.values())

    def summary(self) -> str:
        """One line of ``key=value`` pairs."""
        up, down = self.routes["host_to_device"], self.routes["device_to_host"]
        promoted, written = self.routes["disk_to_host"], self.routes["host_to_disk"]
        pairs = {
            "queried_blocks": self.num_queried_blocks,
            "matched_blocks": self.num_matched_blocks,
            "onboarded_blocks": up.num_blocks,
            "offloaded_blocks": down.num_blocks,
            "evicted_blocks": self.num_evicted_blocks,
            "dropped_blocks": self.num_dropped_blocks,
            "refused_blocks": self.num_refused_blocks,
            "filtered_blocks": self.num_filtered_blocks,
            "promoted_blocks": promoted.num_blocks,
            "written_blocks": written.num_blocks,
            "disk_evicted_blocks": self.num_disk_evicted_blocks,
            "bad_blocks": self.num_bad_blocks,
            "late_promotions": self.num_late_promotions,
            "failed_ops": self.num_failed_ops,
            "fences": self.num_fences,
            "hook_errors": self.num_hook_errors,
            "onboarded_bytes": up.num_bytes,
            "onboard_seconds": f"{up.seconds:.3f}",
            "offloaded_bytes": down.num_bytes,
            "offload_seconds": f"{down.seconds:.3f}",
            "promoted_bytes": promoted.num_bytes,
            "promotion_seconds": f"{promoted.seconds:.3f}",
            "written_bytes": written.num_bytes,
            "write_seconds": f"{written.seconds:.3f}",
        }
        return " ".join(f"{key}={value}" for key, value in pairs.items())
