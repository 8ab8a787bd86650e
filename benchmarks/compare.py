"""Compare two folders of results: python -m benchmarks.compare OLD NEW

Figures are comparable only where both folders come from one machine in one state; ratios, whose
parts were measured in turn, more widely.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import HIGHER_IS_BETTER, text_table

NOTABLE = 0.1
"""Changes of a figure below this share are not marked."""

Row = tuple[str, str, str, str, str]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    for name in sorted(old.keys() & new.keys()):
        print(f"\n{name}\n\n{comparison(old[name], new[name])}")
    for name in sorted(old.keys() ^ new.keys()):
        print(f"\n{name}: only in {options.old if name in old else options.new}")


def load(directory: Path) -> dict[str, dict[str, Any]]:
    """Benchmark → content of its file. Raises SystemExit on a folder without results."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*.json")]
    found = {content["benchmark"]: content for content in contents}
    if not found:
        raise SystemExit(f"{directory} holds no results")
    return found


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """One benchmark's table, with the differences of machine and settings above it."""
    rows = [*_figure_rows(old, new), *_ratio_rows(old, new)]
    table = text_table(("", "old", "new", "new/old", ""), rows)
    return "\n".join([*_differences(old, new), table])


def _figure_rows(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Row]:
    for before, after in _pairs(old["figures"], new["figures"]):
        change = after["best"] / before["best"]
        name = f"{after['name']} [{after['unit']}]"
        mark = _mark(change, after["unit"] in HIGHER_IS_BETTER)
        yield name, f"{before['best']:.4g}", f"{after['best']:.4g}", f"{change:.2f}", mark


def _ratio_rows(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Row]:
    for before, after in _pairs(old["ratios"], new["ratios"]):
        change = after["value"] / before["value"]
        mark = f"aim {after['aim']}" if "aim" in after else ""
        if before.get("met") != after.get("met"):
            mark += ", now met" if after.get("met") else ", no longer met"
        values = f"{before['value']:.3f}", f"{after['value']:.3f}", f"{change:.2f}"
        yield f"{after['name']} [ratio]", *values, mark


def _pairs(
    old: list[dict[str, Any]], new: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries of the same name, in the order of the new ones."""
    by_name = {entry["name"]: entry for entry in old}
    for entry in new:
        if entry["name"] in by_name:
            yield by_name[entry["name"]], entry


def _mark(change: float, higher_is_better: bool) -> str:
    if abs(change - 1) < NOTABLE:
        return ""
    return "better" if (change > 1) is higher_is_better else "worse"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for part in ("machine", "settings"):
        for key in old[part].keys() | new[part].keys():
            before, after = old[part].get(key), new[part].get(key)
            if before != after:
                yield f"{part}.{key}: {before} → {after}"


if __name__ == "__main__":
    main()
