"""No fault of a transfer, a hook or an abort yields a wrong token or leaves anything behind."""

from __future__ import annotations

import pytest

from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.scenarios import prompt

BLOCKS = 12
LENGTH = BLOCKS * BLOCK_SIZE


@pytest.fixture(autouse=True)
def fresh(faulty: EngineProcess) -> None:
    faulty.run(scenarios.control)
    assert faulty.run(scenarios.reset_all_caches)


def assert_idle(engine: EngineProcess) -> None:
    assert not any((state := engine.run(scenarios.idle_state)).values()), state


def offloaded(engine: EngineProcess, tokens: list[int]) -> list[int]:
    """Have the prompt in host and not on the device; the tokens that follow it."""
    cold = engine.run(scenarios.generate, [tokens])
    assert cold.num_offloaded_blocks == len(tokens) // BLOCK_SIZE
    assert engine.run(scenarios.reset_device_cache)
    return cold.tokens[0]


def test_poisoned_host_blocks_change_the_tokens(faulty: EngineProcess) -> None:
    """The control run: the comparison of tokens in these tests has teeth."""
    first = prompt(800, LENGTH)
    expected = offloaded(faulty, first)
    faulty.run(scenarios.poison)
    poisoned = faulty.run(scenarios.generate, [first])
    assert poisoned.num_onboarded_blocks == BLOCKS
    assert poisoned.tokens[0] != expected


def test_a_failed_load_is_recomputed_and_its_blocks_dropped(faulty: EngineProcess) -> None:
    first = prompt(810, LENGTH)
    expected = offloaded(faulty, first)
    faulty.run(scenarios.poison)
    faulty.run(scenarios.control, num_onboards_to_fail=1)
    failed = faulty.run(scenarios.generate, [first])
    assert failed.tokens[0] == expected
    assert (failed.num_failed_ops, failed.num_dropped_blocks) == (1, BLOCKS)
    assert failed.num_offloaded_blocks == BLOCKS
    assert faulty.run(scenarios.reset_device_cache)
    again = faulty.run(scenarios.generate, [first])
    assert (again.num_onboarded_blocks, again.tokens[0]) == (BLOCKS, expected)
    assert_idle(faulty)


def test_a_failed_load_behind_a_device_hit_keeps_the_hit(
    plain: EngineProcess, faulty: EngineProcess
) -> None:
    first = prompt(820, LENGTH)
    longer = first + prompt(821, 3 * BLOCK_SIZE)
    offloaded(faulty, longer)
    faulty.run(scenarios.generate, [first], 1)
    faulty.run(scenarios.control, num_onboards_to_fail=1)
    seen = faulty.run(scenarios.generate, [longer])
    assert seen.num_failed_ops == 1
    assert seen.tokens == plain.run(scenarios.generate, [longer]).tokens
    assert_idle(faulty)


def test_failed_offloads_are_not_cached(faulty: EngineProcess) -> None:
    first = prompt(830, LENGTH)
    faulty.run(scenarios.control, num_offloads_to_fail=99)
    cold = faulty.run(scenarios.generate, [first])
    faulty.run(scenarios.control)
    assert (cold.num_offloaded_blocks, faulty.run(scenarios.num_ready)) == (0, 0)
    assert faulty.run(scenarios.reset_device_cache)
    assert faulty.run(scenarios.generate, [first]).tokens == cold.tokens
    assert_idle(faulty)


def test_results_in_any_order(plain: EngineProcess, faulty: EngineProcess) -> None:
    faulty.run(scenarios.control, reverse=True)
    prompts = [prompt(840 + i, LENGTH) for i in range(6)]
    expected = plain.run(scenarios.generate, prompts)
    assert faulty.run(scenarios.generate, prompts).tokens == expected.tokens
    assert faulty.run(scenarios.reset_device_cache)
    assert faulty.run(scenarios.generate, prompts).tokens == expected.tokens
    assert_idle(faulty)


@pytest.mark.parametrize("phase", ["waiting", "loading", "prefilling", "decoding", "offloading"])
def test_an_abort_in_any_phase_leaves_nothing(faulty: EngineProcess, phase: str) -> None:
    first = prompt(850, 20 * BLOCK_SIZE)
    if phase == "loading":
        offloaded(faulty, first)
        faulty.run(scenarios.control, hold_onboards=True)
    if phase == "offloading":
        faulty.run(scenarios.control, hold_offloads=True)
    left = faulty.run(scenarios.abort_in, phase, first)
    assert not any(left.values()), left


def test_device_blocks_are_not_rewritten_under_an_offload(
    plain: EngineProcess, faulty: EngineProcess
) -> None:
    first, second = prompt(860, LENGTH), prompt(861, 30 * BLOCK_SIZE)
    seen = faulty.run(scenarios.reuse_under_an_offload, first, second)
    assert seen.num_fences > 0
    assert seen.tokens == plain.run(scenarios.generate, [second], 1).tokens
    assert faulty.run(scenarios.reset_device_cache)
    hit = faulty.run(scenarios.generate, [first])
    assert hit.num_onboarded_blocks == BLOCKS
    assert hit.tokens == plain.run(scenarios.generate, [first]).tokens
    assert_idle(faulty)


@pytest.mark.parametrize("hook", ["match", "allocated", "note_progress", "apply", "finish"])
def test_a_hook_that_raises_costs_only_time(
    plain: EngineProcess, faulty: EngineProcess, hook: str
) -> None:
    first = prompt(870, LENGTH)
    offloaded(faulty, first)
    expected = plain.run(scenarios.generate, [first]).tokens
    for seen in faulty.run(scenarios.generate_with_broken_hook, hook, first):
        assert seen.tokens == expected
    assert_idle(faulty)
