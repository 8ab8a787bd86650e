"""What a benchmark found: figures, ratios and their aims; how they are printed and kept.

A figure's absolute value holds for one machine on one day. A ratio compares two things measured in
turn in one run, and is what to quote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

HIGHER_IS_BETTER = frozenset({"GB/s", "tokens/s", "blocks hit"})


class Skipped(Exception):
    """A benchmark can't run here; the message says what it needs."""


@dataclass(frozen=True)
class Aim:
    """A bound that a ratio is meant to keep; missing it fails nothing."""

    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def at_least(bound: float) -> Aim:
    return Aim(bound, at_least=True)


def at_most(bound: float) -> Aim:
    return Aim(bound, at_least=False)


@dataclass(frozen=True)
class Figure:
    """One thing that was measured; `name` is unique within its benchmark."""

    name: str
    unit: str
    best: float
    median: float
    num_samples: int


@dataclass(frozen=True)
class Ratio:
    """Two figures of one run; `name` is unique within its benchmark."""

    name: str
    value: float
    aim: Aim | None = None

    @property
    def verdict(self) -> str:
        """``yes`` or ``no``; empty without an aim."""
        if self.aim is None:
            return ""
        return "yes" if self.aim.is_met(self.value) else "no"


@dataclass
class Result:
    """One benchmark's outcome. settings: what was run; tables: the text that was printed."""

    benchmark: str
    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    table: str = ""

    def write(self, directory: Path, machine: dict[str, Any]) -> Path:
        """Keep it as ``<benchmark>.json``; returns the file."""
        content = {
            "benchmark": self.benchmark,
            "machine": machine,
            "settings": self.settings,
            "figures": [asdict(figure) for figure in self.figures],
            "ratios": [_ratio_as_json(ratio) for ratio in self.ratios],
        }
        path = directory / f"{self.benchmark}.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def time_figure(name: str, unit: str, seconds: Sequence[float]) -> Figure:
    """Figure of durations in ``ms`` or ``µs``; best is the shortest."""
    scale = {"ms": 1e3, "µs": 1e6}[unit]
    return Figure(name, unit, min(seconds) * scale, median(seconds) * scale, len(seconds))


def rate_figure(name: str, unit: str, amount: float, seconds: Sequence[float]) -> Figure:
    """Figure of `amount` a duration; best is the highest."""
    return Figure(name, unit, amount / min(seconds), amount / median(seconds), len(seconds))


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [_line(line, widths) for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first, *others]).rstrip()


def _ratio_as_json(ratio: Ratio) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": ratio.name, "value": ratio.value}
    if ratio.aim is not None:
        entry |= {"aim": str(ratio.aim), "met": ratio.aim.is_met(ratio.value)}
    return entry
