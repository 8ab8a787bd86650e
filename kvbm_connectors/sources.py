"""Which files a name stands for: what a cache that outlives its process knows of weights.

Lives here: what every engine's models and adapters have in common. Does not live here: an engine's
configuration.
Invariant: a name is not enough, since somebody may train on in the same folder. Local files count
with name, size and time of change, models of a hub with their commit; what can't be identified
gets a name that no other process will have, so that its blocks are never taken for somebody else's.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from pathlib import Path

logger = logging.getLogger(__name__)

THIS_PROCESS = os.urandom(16).hex()
COMMIT = re.compile("[0-9a-f]{40}")
_START_UP_SECONDS = 1.0
_unknown: set[str] = set()


def source_of(name: str, commit: str) -> str:
    """What is equal where a model or adapter of that name has the same weights. commit: of a hub;
    empty where it is not known."""
    path = Path(name)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    if any(max(stat.st_mtime_ns, stat.st_ctime_ns) > _last_load_ns() for _, stat in stats):
        return _unidentified(name)
    if stats:
        return repr([(found, stat.st_size, stat.st_mtime_ns) for found, stat in stats])
    if commit:
        return f"{name}@{commit}"
    return _unidentified(name)


def _unidentified(name: str) -> str:
    if name not in _unknown:
        _unknown.add(name)
        logger.warning(
            "%s has no commit, and no files older than this process: no restart uses its blocks",
            name,
        )
    return THIS_PROCESS


@functools.cache
def _last_load_ns() -> int:
    """A moment after this process began and before it can have read any weights: files that were
    changed later may not be those that were read."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    began_seconds = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began_seconds
    return time.time_ns() - int((age_seconds - _START_UP_SECONDS) * 1e9)
