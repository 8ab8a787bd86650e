"""Two ranks, each with its half of the heads, its own host memory and its own reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.scenarios import prompt

OPTIONS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
BLOCKS = 12


PROMPTS = [prompt(1000 + i, BLOCKS * BLOCK_SIZE) for i in range(6)]


def start(checkpoint: Path, extra: dict[str, Any] | None) -> EngineProcess:
    return EngineProcess(checkpoint, extra, options=OPTIONS, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Tokens of two ranks without the connector; two such engines at once starve each other."""
    engine = start(checkpoint, None)
    try:
        return list(engine.run(scenarios.generate, PROMPTS).tokens)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "cpu_cache_gb": 0.1,
        "disk_cache_gb": 0.1,
        "disk_cache_dir": str(tmp_path_factory.mktemp("disk")),
        "disable_disk_offload_filter": True,
    }


@pytest.fixture(scope="module")
def kvbm(
    checkpoint: Path, expected: list[list[int]], extra: dict[str, Any]
) -> Iterator[EngineProcess]:
    engine = start(checkpoint, extra)
    yield engine
    engine.close()


def test_both_ranks_load_what_both_ranks_stored(
    kvbm: EngineProcess, expected: list[list[int]]
) -> None:
    assert kvbm.run(scenarios.set_up)["num_ranks"] == 2
    cold = kvbm.run(scenarios.generate, PROMPTS)
    assert kvbm.run(scenarios.reset_device_cache)
    warm = kvbm.run(scenarios.generate, PROMPTS)
    assert cold.tokens == warm.tokens == expected
    assert cold.num_offloaded_blocks == warm.num_onboarded_blocks == 6 * BLOCKS
    assert not any((state := kvbm.run(scenarios.idle_state)).values()), state


def test_cpu_cache_gb_is_summed_over_ranks(kvbm: EngineProcess) -> None:
    block_bytes = BLOCK_SIZE * 2 * 2 * 2 * 64 * 4  # tokens, layers, k and v, heads, dim, float32
    assert kvbm.run(scenarios.num_host_blocks) == int(0.1e9 / 2) // (block_bytes // 2)


def test_a_restart_with_as_many_ranks_finds_the_blocks_of_all_and_another_number_none(
    checkpoint: Path, kvbm: EngineProcess, expected: list[list[int]], extra: dict[str, Any]
) -> None:
    kvbm.run(scenarios.generate, PROMPTS)
    kvbm.close()
    again = start(checkpoint, extra)
    try:
        assert again.run(scenarios.num_on_disk) >= 6 * BLOCKS
        warm = again.run(scenarios.generate, PROMPTS)
        assert warm.tokens == expected
        assert warm.num_promoted_blocks == warm.num_onboarded_blocks == 6 * BLOCKS
        assert not any((state := again.run(scenarios.idle_state)).values()), state
    finally:
        again.close()
    directory = Path(extra["disk_cache_dir"])
    assert list(directory.glob("*-r1.data"))
    alone = EngineProcess(checkpoint, extra)
    try:
        assert alone.run(scenarios.num_on_disk) == 0
        assert not list(directory.glob("*-r1.*")), "space of a rank that is no more"
    finally:
        alone.close()
