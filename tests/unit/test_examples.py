"""Examples that need no engine run to their end, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_block_manager_example_gets_its_blocks_back() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.block_manager"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on the device now     0 of 3 blocks" in run.stdout
    assert "first tokens [0, 16, 32]" in run.stdout
