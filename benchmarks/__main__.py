"""Run benchmarks, print their tables, write their JSON.

python -m benchmarks --out bench-results [--only copies,leader,ttft,throughput] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.report import Result

BENCHMARKS = ("copies", "leader", "ttft", "throughput")
"""Modules of this package, each with ``run(*, quick: bool, scratch: Path) -> Result``."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        before = machine.describe()
        result = _run(name, quick=options.quick, scratch=options.out / "scratch")
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
    parser.add_argument("--quick", action="store_true", help="a few rounds: does it run at all?")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(BENCHMARKS):
        raise argparse.ArgumentTypeError(f"no benchmark is named {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    main()
