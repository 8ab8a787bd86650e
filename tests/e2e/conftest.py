"""Engines shared by the end-to-end tests: they start side by side, each once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoint import TINY, write_checkpoint
from tests.e2e.engine import EngineProcess

FAULTS = {"transfer_engine": "tests.faults:faulty_engine"}
HOST_BLOCKS = {"cpu_cache_override_num_blocks": 400}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY)


@pytest.fixture(scope="session")
def engines(checkpoint: Path) -> Iterator[dict[str, EngineProcess]]:
    """plain: no connector. kvbm: defaults. faulty: faults on command. small: a host tier of
    eight blocks, and our own block keys."""
    started = {
        "plain": EngineProcess(checkpoint, None),
        "kvbm": EngineProcess(checkpoint, HOST_BLOCKS),
        "small": EngineProcess(
            checkpoint, {"cpu_cache_override_num_blocks": 8, "block_keys": "chain"}
        ),
        "faulty": EngineProcess(checkpoint, {**HOST_BLOCKS, **FAULTS}),
    }
    yield started
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="session")
def plain(engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines["plain"].wait_ready()


@pytest.fixture(scope="session")
def kvbm(engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines["kvbm"].wait_ready()


@pytest.fixture(scope="session")
def faulty(engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines["faulty"].wait_ready()


@pytest.fixture(scope="session")
def small(engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines["small"].wait_ready()
