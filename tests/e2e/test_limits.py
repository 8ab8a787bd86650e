"""A host tier far too small, and keys of our own."""

from __future__ import annotations

from pathlib import Path

from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.lora import write_adapter
from tests.e2e.scenarios import prompt

HOST_BLOCKS = 8
LENGTH = 12 * BLOCK_SIZE


def test_of_a_prompt_longer_than_the_host_tier_the_leading_part_is_kept(
    plain: EngineProcess, small: EngineProcess
) -> None:
    first = prompt(900, LENGTH)
    cold = small.run(scenarios.generate, [first])
    assert cold.num_offloaded_blocks == HOST_BLOCKS
    assert cold.num_refused_blocks > 0
    assert small.run(scenarios.reset_device_cache)
    warm = small.run(scenarios.generate, [first])
    assert warm.num_onboarded_blocks == HOST_BLOCKS
    assert cold.tokens == warm.tokens == plain.run(scenarios.generate, [first]).tokens


def test_a_newer_prompt_takes_the_place_of_an_older_one(
    plain: EngineProcess, small: EngineProcess
) -> None:
    older, newer = prompt(910, 6 * BLOCK_SIZE), prompt(911, 6 * BLOCK_SIZE)
    small.run(scenarios.one_by_one, [older, newer])
    assert small.run(scenarios.reset_device_cache)
    hit = small.run(scenarios.generate, [newer])
    assert hit.num_onboarded_blocks == 6
    assert hit.tokens == plain.run(scenarios.generate, [newer]).tokens


def test_our_own_keys_isolate_by_salt(plain: EngineProcess, small: EngineProcess) -> None:
    first = prompt(920, 6 * BLOCK_SIZE)
    small.run(scenarios.generate, [first], 8, ["tenant a"])
    assert small.run(scenarios.reset_device_cache)
    assert small.run(scenarios.generate, [first], 8, ["tenant b"]).num_matched_blocks == 0
    assert not any(small.run(scenarios.idle_state).values())


def test_a_lora_adapter_isolates(small: EngineProcess, tmp_path: Path) -> None:
    first, adapter = prompt(930, 6 * BLOCK_SIZE), str(write_adapter(tmp_path / "adapter"))
    base = small.run(scenarios.generate, [first])
    assert small.run(scenarios.reset_device_cache)
    cold = small.run(scenarios.generate, [first], adapter=adapter)
    assert (cold.num_matched_blocks, cold.num_offloaded_blocks) == (0, 6)
    assert cold.tokens != base.tokens
    assert small.run(scenarios.reset_device_cache)
    warm = small.run(scenarios.generate, [first], adapter=adapter)
    assert (warm.num_onboarded_blocks, warm.tokens) == (6, cold.tokens)
