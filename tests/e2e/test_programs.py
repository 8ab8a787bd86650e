"""The demo and the benchmarks run to their end, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, seconds: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(660)
def test_the_demo_shows_host_hits_with_the_same_tokens(tmp_path: Path) -> None:
    """Its exit status says whether tokens agreed and host hits happened."""
    out = run("examples.prefix_reuse", "--quick", "--out", str(tmp_path), seconds=600)
    assert "back after eviction from the device" in out
    assert (tmp_path / "prefix_reuse.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "prefix_reuse.json").read_text())


def test_the_benchmarks_of_copies_and_decisions_write_their_figures(tmp_path: Path) -> None:
    run("benchmarks", "--quick", "--only", "copies,leader", "--out", str(tmp_path), seconds=300)
    for name in ("copies", "leader"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["ratios"]
