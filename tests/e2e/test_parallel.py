"""Two ranks, each with its half of the heads, its own host memory and its own reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.scenarios import prompt

OPTIONS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
BLOCKS = 12


PROMPTS = [prompt(1000 + i, BLOCKS * BLOCK_SIZE) for i in range(6)]


def start(checkpoint: Path, extra: dict[str, float] | None) -> EngineProcess:
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
def kvbm(checkpoint: Path, expected: list[list[int]]) -> Iterator[EngineProcess]:
    engine = start(checkpoint, {"cpu_cache_gb": 0.1})
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
