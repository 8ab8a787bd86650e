"""Engines shared by the end-to-end tests: each starts once a session, when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.checkpoint import TINY, write_checkpoint
from tests.e2e.engine import EngineProcess
from tests.e2e.lora import RANK

FAULTS = {"transfer_engine": "tests.faults:faulty_engine"}
HOST_BLOCKS = {"cpu_cache_override_num_blocks": 400}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY)


def started(engine: EngineProcess) -> Iterator[EngineProcess]:
    try:
        yield engine.wait_ready()
    finally:
        engine.close()


@pytest.fixture(scope="session")
def plain(checkpoint: Path) -> Iterator[EngineProcess]:
    """No connector: what the tokens must be."""
    yield from started(EngineProcess(checkpoint, None))


@pytest.fixture(scope="session")
def kvbm(checkpoint: Path) -> Iterator[EngineProcess]:
    yield from started(EngineProcess(checkpoint, HOST_BLOCKS))


@pytest.fixture(scope="session")
def faulty(checkpoint: Path) -> Iterator[EngineProcess]:
    """Faults on command."""
    yield from started(EngineProcess(checkpoint, {**HOST_BLOCKS, **FAULTS}))


@pytest.fixture(scope="session")
def small(checkpoint: Path) -> Iterator[EngineProcess]:
    """A host tier of eight blocks, our own block keys, and LoRA."""
    extra = {"cpu_cache_override_num_blocks": 8, "block_keys": "chain"}
    options = {"enable_lora": True, "max_lora_rank": RANK}
    yield from started(EngineProcess(checkpoint, extra, options=options))
