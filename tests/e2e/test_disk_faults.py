"""No fault of a disk, and no kill, yields a wrong token, stops serving or hangs a request."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import disk_faults
from tests.e2e import scenarios
from tests.e2e.engine import EngineProcess
from tests.e2e.test_disk import BLOCKS, PROMPTS, options

NUM_KILLS = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faulty-disk")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, directory: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(
        checkpoint, options(directory, disk_engine="tests.disk_faults:faulty_io")
    )
    try:
        yield engine.wait_ready()
    finally:
        engine.run(scenarios.control_disk)
        engine.close()


@pytest.fixture(autouse=True)
def healthy(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.run(scenarios.control_disk)
        engine.run(scenarios.end_pause)
        assert engine.run(scenarios.reset_all_caches)


@pytest.fixture(scope="module")
def expected(plain: EngineProcess) -> list[list[int]]:
    return [seen.tokens[0] for seen in plain.run(scenarios.one_by_one, PROMPTS)]


def assert_idle(engine: EngineProcess) -> None:
    assert not any((state := engine.run(scenarios.idle_state)).values()), state


def test_blocks_that_cannot_be_read_are_computed_again(
    engine: EngineProcess, expected: list[list[int]]
) -> None:
    engine.run(scenarios.one_by_one, PROMPTS)
    engine.run(scenarios.control_disk, read_errno=disk_faults.IO_ERROR)
    failed = engine.run(scenarios.one_by_one, PROMPTS)
    assert [seen.tokens[0] for seen in failed] == expected
    assert sum(seen.num_bad_blocks for seen in failed) > 0
    assert sum(seen.num_promoted_blocks for seen in failed) == 0
    assert_idle(engine)


def test_a_full_disk_stores_nothing_and_serving_goes_on(
    engine: EngineProcess, expected: list[list[int]]
) -> None:
    engine.run(scenarios.control_disk, write_errno=disk_faults.NO_SPACE)
    seen = engine.run(scenarios.one_by_one, PROMPTS)
    again = engine.run(scenarios.one_by_one, PROMPTS)
    assert [s.tokens[0] for s in seen] == [s.tokens[0] for s in again] == expected
    assert engine.run(scenarios.num_on_disk) == 0
    # After some failures in a row it is left alone, and host is free to evict.
    assert 0 < sum(s.num_failed_ops for s in [*seen, *again]) <= 6
    assert sum(s.num_offloaded_blocks for s in again) > 0
    assert_idle(engine)


def test_a_hanging_disk_delays_a_request_no_longer_than_computing_it(
    engine: EngineProcess, expected: list[list[int]]
) -> None:
    engine.run(scenarios.one_by_one, PROMPTS)
    engine.run(scenarios.close_gate)
    seen = engine.run(scenarios.generate, PROMPTS[:1], drained=False)
    assert seen.tokens == expected[:1]
    assert (seen.num_late_promotions, seen.num_promoted_blocks) == (1, 0)
    # The next one does not wait at all.
    next_one = engine.run(scenarios.generate, PROMPTS[1:2], drained=False)
    assert next_one.tokens == expected[1:2]
    assert next_one.num_late_promotions == 0
    engine.run(scenarios.open_gate)
    engine.run(scenarios.end_pause)
    back = engine.run(scenarios.one_by_one, PROMPTS[2:])
    assert [s.tokens[0] for s in back] == expected[2:]
    assert sum(s.num_promoted_blocks for s in back) > 0
    assert_idle(engine)


def test_truncated_and_deleted_files_cost_only_time(
    engine: EngineProcess, directory: Path, expected: list[list[int]]
) -> None:
    engine.run(scenarios.one_by_one, PROMPTS)
    [data] = directory.glob("*.data")
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 8)
    truncated = engine.run(scenarios.one_by_one, PROMPTS)
    assert [seen.tokens[0] for seen in truncated] == expected
    assert sum(seen.num_bad_blocks for seen in truncated) > 0
    for path in directory.iterdir():
        path.unlink()
    deleted = engine.run(scenarios.one_by_one, PROMPTS)
    assert [seen.tokens[0] for seen in deleted] == expected
    assert sum(seen.num_promoted_blocks for seen in deleted) > 0
    assert_idle(engine)


def test_a_directory_that_is_not_there_is_a_start_up_error_with_its_remedy(
    checkpoint: Path, tmp_path: Path
) -> None:
    engine = EngineProcess(checkpoint, options(tmp_path / "missing"))
    try:
        with pytest.raises(AssertionError, match=r"disk_cache_dir.*is no directory.*Make it"):
            engine.wait_ready()
    finally:
        engine.close()


def test_a_killed_server_finds_its_blocks_again(
    checkpoint: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    extra = options(tmp_path)
    num_known = 0
    for attempt in range(NUM_KILLS):
        engine = EngineProcess(checkpoint, extra)
        try:
            assert engine.run(scenarios.num_on_disk) >= num_known
            part = PROMPTS[: 2 * attempt + 2]
            seen = engine.run(scenarios.one_by_one, part)
            assert [s.tokens[0] for s in seen] == expected[: len(part)]
            assert sum(s.num_bad_blocks for s in seen) == 0
            num_known = engine.run(scenarios.num_on_disk)
            assert num_known >= len(part) * BLOCKS
            engine.send(scenarios.one_by_one, [*PROMPTS, *PROMPTS])
            # When it dies is what is random here; nothing waits for this time.
            time.sleep(random.Random(attempt).uniform(0.0, 0.5))
        finally:
            engine.kill()
    engine = EngineProcess(checkpoint, extra)
    try:
        assert engine.run(scenarios.num_on_disk) >= num_known
        seen = engine.run(scenarios.one_by_one, PROMPTS)
        assert [s.tokens[0] for s in seen] == expected
    finally:
        engine.close()
