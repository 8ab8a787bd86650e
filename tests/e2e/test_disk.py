"""Blocks that come back from disk, in the same process and after a restart, with equal tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import TINY, write_checkpoint
from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.scenarios import prompt

BLOCKS = 12
LENGTH = BLOCKS * BLOCK_SIZE
HOST_BLOCKS = 30  # two prompts, and some
PROMPTS = [prompt(2000 + i, LENGTH) for i in range(6)]


def options(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "cpu_cache_override_num_blocks": HOST_BLOCKS,
        "disk_cache_override_num_blocks": 200,
        "disk_cache_dir": str(directory),
        "disable_disk_offload_filter": True,
        **more,
    }


@pytest.fixture(scope="module")
def expected(plain: EngineProcess) -> list[list[int]]:
    return [seen.tokens[0] for seen in plain.run(scenarios.one_by_one, PROMPTS)]


@pytest.fixture(scope="module")
def filled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an engine that has computed all prompts and was stopped."""
    directory = tmp_path_factory.mktemp("disk")
    engine = EngineProcess(checkpoint, options(directory))
    try:
        engine.run(scenarios.one_by_one, PROMPTS)
        assert engine.run(scenarios.num_on_disk) == len(PROMPTS) * BLOCKS
    finally:
        engine.close()
    return directory


@pytest.fixture
def run(checkpoint: Path) -> Iterator[Any]:
    """Starts engines that are closed at the end."""
    engines: list[EngineProcess] = []

    def start(extra: dict[str, Any], **kwargs: Any) -> EngineProcess:
        engines.append(EngineProcess(kwargs.pop("model", checkpoint), extra, **kwargs))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def test_prompts_that_left_device_and_host_come_back_from_disk(
    run: Any, tmp_path: Path, expected: list[list[int]]
) -> None:
    engine = run(options(tmp_path))
    cold = engine.run(scenarios.one_by_one, PROMPTS)
    warm = engine.run(scenarios.one_by_one, PROMPTS)
    assert [seen.tokens[0] for seen in cold] == [seen.tokens[0] for seen in warm] == expected
    assert sum(seen.num_written_blocks for seen in cold) == len(PROMPTS) * BLOCKS
    assert [seen.num_promoted_blocks for seen in warm] == [BLOCKS] * len(PROMPTS)
    assert [seen.num_cached_tokens[0] for seen in warm] == [LENGTH] * len(PROMPTS)
    # All at once, in two orders: promotions, evictions and writes in each other's way.
    together = engine.run(scenarios.generate, PROMPTS)
    back = engine.run(scenarios.generate, PROMPTS[::-1])
    assert together.tokens == back.tokens[::-1] == expected
    assert not any((state := engine.run(scenarios.idle_state)).values()), state


def test_a_restart_finds_its_blocks_and_computes_nothing_again(
    run: Any, filled: Path, expected: list[list[int]]
) -> None:
    engine = run(options(filled))
    assert engine.run(scenarios.num_on_disk) == len(PROMPTS) * BLOCKS
    seen = engine.run(scenarios.one_by_one, PROMPTS)
    assert [s.tokens[0] for s in seen] == expected
    assert [s.num_promoted_blocks for s in seen] == [BLOCKS] * len(PROMPTS)
    assert sum(s.num_offloaded_blocks for s in seen) == 0


def test_flipped_bytes_are_found_and_computed_again(
    run: Any, filled: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    copy = copied(filled, tmp_path)
    [data] = copy.glob("*.data")
    content = bytearray(data.read_bytes())
    for start in range(0, len(content), 65536):  # one byte in every page of that size
        content[start + 777] ^= 0x10
    data.write_bytes(content)
    engine = run(options(copy))
    seen = engine.run(scenarios.one_by_one, PROMPTS)
    assert [s.tokens[0] for s in seen] == expected
    assert sum(s.num_bad_blocks for s in seen) == len(PROMPTS) * BLOCKS
    assert sum(s.num_onboarded_blocks for s in seen) == 0
    # What was computed anew is good again.
    again = engine.run(scenarios.one_by_one, PROMPTS)
    assert [s.tokens[0] for s in again] == expected
    assert sum(s.num_promoted_blocks for s in again) == len(PROMPTS) * BLOCKS


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"block_size": 64, "num_gpu_blocks_override": 20}},
        {"options": {"dtype": "bfloat16"}},
        {"model": "other"},
    ],
    ids=["block size", "dtype", "model"],
)
def test_another_cache_is_not_used(
    run: Any, filled: Path, tmp_path: Path, tmp_path_factory: Any, change: dict[str, Any]
) -> None:
    if "model" in change:
        change = {"model": write_checkpoint(tmp_path_factory.mktemp("other"), TINY, seed=1)}
    engine = run(options(copied(filled, tmp_path)), **change)
    assert engine.run(scenarios.num_on_disk) == 0
    assert engine.run(scenarios.generate, PROMPTS[:1]).num_promoted_blocks == 0


def test_by_default_only_what_was_used_again_goes_to_disk(run: Any, tmp_path: Path) -> None:
    extra = options(tmp_path, disable_disk_offload_filter=False)
    engine = run({**extra, "cpu_cache_override_num_blocks": 200})
    once = engine.run(scenarios.one_by_one, PROMPTS)
    assert sum(seen.num_written_blocks for seen in once) == 0
    again = engine.run(scenarios.one_by_one, PROMPTS[:2])
    assert sum(seen.num_written_blocks for seen in again) == 2 * BLOCKS


def test_disk_alone_needs_no_host_tier(run: Any, tmp_path: Path, expected: list[list[int]]) -> None:
    extra = options(tmp_path, disable_disk_offload_filter=False)
    del extra["cpu_cache_override_num_blocks"]
    engine = run(extra)
    engine.run(scenarios.one_by_one, PROMPTS)
    assert engine.run(scenarios.num_on_disk) == len(PROMPTS) * BLOCKS
    engine.run(scenarios.forget_host)
    warm = engine.run(scenarios.one_by_one, PROMPTS)
    assert [seen.tokens[0] for seen in warm] == expected
    assert sum(seen.num_promoted_blocks for seen in warm) == len(PROMPTS) * BLOCKS


def test_a_reset_reaches_the_disk_and_what_comes_after_it_is_not_kept(
    run: Any, filled: Path, tmp_path: Path
) -> None:
    copy = copied(filled, tmp_path)
    engine = run(options(copy))
    assert engine.run(scenarios.reset_all_caches)
    assert engine.run(scenarios.num_on_disk) == 0
    engine.run(scenarios.one_by_one, PROMPTS)
    assert engine.run(scenarios.num_on_disk) == len(PROMPTS) * BLOCKS
    engine.close()
    # The weights may have been other ones: only this process could know.
    assert run(options(copy)).run(scenarios.num_on_disk) == 0


def test_without_persistence_the_files_are_removed(run: Any, tmp_path: Path) -> None:
    engine = run(options(tmp_path, disk_cache_persist=False))
    engine.run(scenarios.generate, PROMPTS[:1])
    assert list(tmp_path.glob("dynamo-kvbm-disk-cache-*.data"))
    engine.run(scenarios.shut_down)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def copied(directory: Path, target: Path) -> Path:
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
