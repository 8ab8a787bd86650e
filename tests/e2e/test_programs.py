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


@pytest.mark.timeout(960)
def test_the_demo_shows_host_and_disk_hits_with_the_same_tokens(tmp_path: Path) -> None:
    """Its exit status says whether tokens agreed, and whether host and disk hits happened."""
    out = run("examples.prefix_reuse", "--quick", "--out", str(tmp_path), seconds=900)
    assert "back after eviction from the device" in out
    assert "back after the server's restart" in out
    assert (tmp_path / "prefix_reuse.png").stat().st_size > 10_000
    after = json.loads((tmp_path / "prefix_reuse.json").read_text())["disk"]["after_restart"]
    assert (
        after["moved_blocks"]["disk_to_host"]
        == sum(request["cached_tokens"] for request in after["requests"]) // 128
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("disk-cache")]


def test_the_benchmarks_of_copies_and_decisions_write_their_figures(tmp_path: Path) -> None:
    names = ("copies", "leader", "leader_trtllm")
    options = ("--quick", "--only", ",".join(names), "--out", str(tmp_path))
    run("benchmarks", *options, seconds=300)
    for name in names:
        assert json.loads((tmp_path / f"{name}.json").read_text())["ratios"]


def test_the_benchmark_of_disk_engines_writes_its_figures_and_removes_its_files(
    tmp_path: Path,
) -> None:
    out = run("benchmarks", "--quick", "--only", "disk", "--out", str(tmp_path), seconds=300)
    assert "4096 KiB, read, buffered, threads" in out
    assert json.loads((tmp_path / "disk.json").read_text())["ratios"]
    assert not list((tmp_path / "scratch").iterdir())


def test_the_benchmark_of_admission_replays_a_trace_and_is_skipped_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVBM_TRACE", raising=False)
    arguments = "benchmarks", "--quick", "--only", "admission", "--out", str(tmp_path)
    assert "skipped: needs a trace" in run(*arguments, seconds=120)
    trace = tmp_path / "trace.jsonl"
    requests = [{"timestamp": 1000 * i, "hash_ids": [0, i, 1000 + i]} for i in range(1, 100)]
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
    assert "frequency filter" in run(*arguments, "--trace", str(trace), seconds=120)
    assert json.loads((tmp_path / "admission.json").read_text())["ratios"]
