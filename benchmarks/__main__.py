"""Run benchmarks, print their tables, write their JSON.

python -m benchmarks --out bench-results [--only copies,disk,...] [--trace PATH] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.admission import TRACE_VARIABLE
from benchmarks.report import Result, Skipped

BENCHMARKS = (
    *("copies", "disk", "leader", "leader_trtllm"),
    *("admission", "ttft", "ttft_disk", "throughput"),
)
"""Modules of this package, each with ``run(*, quick: bool, scratch: Path) -> Result``."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # remove what is large
    if options.trace:
        os.environ[TRACE_VARIABLE] = str(options.trace)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        before = machine.describe()
        try:
            result = _run(name, quick=options.quick, scratch=options.out / "scratch")
        except Skipped as reason:
            print(f"\n{name}\n\nskipped: {reason}", flush=True)
            continue
        path = result.write(options.out, before)
        print(f"\n{name}\n\n{result.table}\n\n{path}", flush=True)


def _run(name: str, *, quick: bool, scratch: Path) -> Result:
    result: Result = importlib.import_module(f"benchmarks.{name}").run(quick=quick, scratch=scratch)
    result.settings["quick"] = quick
    return result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--only",
        type=_names,
        default=BENCHMARKS,
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(BENCHMARKS)}; default: all",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        help=f"requests to replay, for admission; default: the variable {TRACE_VARIABLE}",
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds: does it run at all?")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(BENCHMARKS):
        raise argparse.ArgumentTypeError(f"no benchmark is named {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    main()
