"""The host tier's bytes: one contiguous arena a rank, touched in parallel, page-locked for a GPU.

Lives here: how much memory there is, and one arena of it. Does not live here: which block is
where (see `kvbm_core.pool`).
Invariant: an open arena is backed by real pages; block i is bytes
``[i * block_bytes, (i + 1) * block_bytes)``.
"""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kvbm_core.errors import StorageError

_TOUCH_BYTES = 256 * 2**20
_TOUCH_THREADS = 8
# Limit and use of a container's memory, by version of the control groups.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
_RECLAIMABLE = "inactive_file"


class HostArena:
    """`num_blocks` blocks of `block_bytes` bytes. Owner: the worker, which opens and closes it.

    pinned: page-lock it, so that a GPU copies without staging.
    """

    def __init__(self, num_blocks: int, block_bytes: int, *, pinned: bool) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.pinned = pinned
        self._tensor: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def tensor(self) -> torch.Tensor:
        """The arena as uint8 of shape ``[num_blocks, block_bytes]``. Raises before `open`."""
        if self._tensor is None:
            raise StorageError("the host arena is not open")
        return self._tensor

    def open(self) -> None:
        """Map and touch the memory. Raises StorageError where the machine refuses it."""
        try:
            memory = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise StorageError(
                f"cannot map {self.num_bytes} bytes for {self.num_blocks} host blocks: {error}. "
                "Lower DYN_KVBM_CPU_CACHE_GB."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        with ThreadPoolExecutor(_TOUCH_THREADS) as threads:
            list(threads.map(torch.Tensor.zero_, flat.split(_TOUCH_BYTES)))
        if self.pinned:
            _page_lock(flat)
        self._tensor = flat.view(self.num_blocks, self.block_bytes)

    def close(self) -> None:
        """Give the memory back. Nothing may use the arena any more."""
        if self._tensor is not None and self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._tensor.data_ptr())
        self._tensor = None


def total_bytes() -> int:
    """Memory of this machine or of its container, whichever is less."""
    limits = [_meminfo("MemTotal")]
    limits += [limit for limit, _ in map(_cgroup, _CGROUPS) if limit is not None]
    return min(limits)


def available_bytes() -> int:
    """Memory that can be taken now without swapping, in this machine or its container."""
    free = [_meminfo("MemAvailable")]
    free += [limit - used for limit, used in map(_cgroup, _CGROUPS) if limit is not None]
    return max(0, min(free))


def _page_lock(flat: torch.Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)
    if int(code):
        raise StorageError(
            f"cudaHostRegister of {flat.numel()} bytes failed with code {int(code)}: raise the "
            "locked-memory limit (ulimit -l) or lower DYN_KVBM_CPU_CACHE_GB"
        )


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise StorageError(f"/proc/meminfo has no {field}")


def _cgroup(paths: tuple[str, str]) -> tuple[int | None, int]:
    try:
        limit, used = (Path(path).read_text(encoding="ascii").strip() for path in paths)
    except OSError:
        return None, 0
    if not limit.isdigit():
        return None, 0
    return int(limit), max(0, int(used) - _reclaimable(Path(paths[1]).with_name("memory.stat")))


def _reclaimable(statistics: Path) -> int:
    """Page cache that a container gives up before it runs out of memory, in bytes."""
    try:
        lines = statistics.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    values = dict(line.split(maxsplit=1) for line in lines)
    return int(values.get(f"total_{_RECLAIMABLE}", values.get(_RECLAIMABLE, "0")))
