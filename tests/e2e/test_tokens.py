"""Tokens are the same with and without the connector, wherever the blocks come from."""

from __future__ import annotations

from tests.e2e import scenarios
from tests.e2e.engine import BLOCK_SIZE, EngineProcess
from tests.e2e.scenarios import prompt

BLOCKS = 12
LENGTH = BLOCKS * BLOCK_SIZE


def assert_idle(engine: EngineProcess) -> None:
    assert not any((state := engine.run(scenarios.idle_state)).values()), state


def test_cold_device_host_and_mixed_hits_give_the_tokens_of_plain_vllm(
    plain: EngineProcess, kvbm: EngineProcess
) -> None:
    first = prompt(100, LENGTH)
    longer = first + prompt(105, 50)
    cold, device = kvbm.run(scenarios.one_by_one, [first, first])
    assert kvbm.run(scenarios.reset_device_cache)
    host, mixed = kvbm.run(scenarios.one_by_one, [first, longer])
    expected = plain.run(scenarios.one_by_one, [first, longer])
    assert cold.tokens == device.tokens == host.tokens == expected[0].tokens
    assert mixed.tokens == expected[1].tokens
    assert (cold.num_matched_blocks, device.num_matched_blocks) == (0, 1)
    assert (host.num_onboarded_blocks, host.num_offloaded_blocks) == (BLOCKS, 0)
    assert_idle(kvbm)


def test_a_hit_that_starts_on_the_device_goes_on_in_host(
    plain: EngineProcess, kvbm: EngineProcess
) -> None:
    first, filler = prompt(110, LENGTH), prompt(111, 31 * BLOCK_SIZE)
    kvbm.run(scenarios.reset_device_cache)
    kvbm.run(scenarios.generate, [first])
    kvbm.run(scenarios.generate, [filler], 1)
    mixed = kvbm.run(scenarios.generate, [first])
    assert mixed.tokens == plain.run(scenarios.generate, [first]).tokens
    assert 0 < mixed.num_onboarded_blocks < BLOCKS
    assert mixed.num_cached_tokens == [LENGTH]


def test_after_evicting_n_blocks_a_hit_onboards_n_and_recomputes_one_token(
    kvbm: EngineProcess,
) -> None:
    first = prompt(120, LENGTH)
    kvbm.run(scenarios.generate, [first])
    assert kvbm.run(scenarios.reset_device_cache)
    hit = kvbm.run(scenarios.generate, [first])
    assert hit.num_onboarded_blocks == BLOCKS
    assert hit.num_onboard_ops == 1
    assert hit.num_cached_tokens == [LENGTH]  # vLLM computes the last of these again
    assert hit.num_offloaded_blocks == 0


def test_sixteen_requests_with_a_device_cache_for_three(
    plain: EngineProcess, kvbm: EngineProcess
) -> None:
    prompts = [prompt(200 + i, LENGTH + 7 * i) for i in range(16)]
    expected = plain.run(scenarios.generate, prompts, 40)
    cold = kvbm.run(scenarios.generate, prompts, 40)
    warm = kvbm.run(scenarios.generate, prompts, 40)
    assert cold.tokens == expected.tokens
    assert warm.tokens == expected.tokens
    assert warm.num_onboarded_blocks > 12 * BLOCKS
    assert_idle(kvbm)


def test_preempted_requests_come_back_from_host(plain: EngineProcess, kvbm: EngineProcess) -> None:
    prompts = [prompt(300 + i, 6 * BLOCK_SIZE + i) for i in range(6)]
    expected = plain.run(scenarios.generate, prompts, 200)
    seen = kvbm.run(scenarios.generate, prompts, 200)
    assert seen.num_preemptions > 0
    assert seen.tokens == expected.tokens
    assert seen.num_onboarded_blocks > 0
    assert_idle(kvbm)


def test_generated_blocks_are_kept_too(plain: EngineProcess, kvbm: EngineProcess) -> None:
    first = prompt(400, 2 * BLOCK_SIZE)
    answer = kvbm.run(scenarios.generate, [first], 3 * BLOCK_SIZE + 1)
    assert answer.num_offloaded_blocks == 5
    assert kvbm.run(scenarios.reset_device_cache)
    turn = first + answer.tokens[0] + prompt(401, 10)
    follow_up = kvbm.run(scenarios.generate, [turn])
    assert follow_up.num_onboarded_blocks == 5
    assert follow_up.tokens == plain.run(scenarios.generate, [turn]).tokens


def test_the_same_prompt_twice_in_one_step_is_copied_once(
    plain: EngineProcess, kvbm: EngineProcess
) -> None:
    twin = prompt(500, 4 * BLOCK_SIZE)
    cold = kvbm.run(scenarios.generate, [twin, twin])
    assert cold.num_offloaded_blocks == 4
    assert kvbm.run(scenarios.reset_device_cache)
    warm = kvbm.run(scenarios.generate, [twin, twin])
    # The second waits for the first one's load, then hits on the device but for its last block.
    assert warm.num_onboarded_blocks <= 4 + 1
    assert warm.tokens == cold.tokens == plain.run(scenarios.generate, [twin, twin]).tokens


def test_a_cache_salt_isolates(plain: EngineProcess, kvbm: EngineProcess) -> None:
    first = prompt(600, LENGTH)
    expected = plain.run(scenarios.generate, [first])
    kvbm.run(scenarios.generate, [first], 8, ["tenant a"])
    kvbm.run(scenarios.reset_device_cache)
    other = kvbm.run(scenarios.generate, [first], 8, ["tenant b"])
    own = kvbm.run(scenarios.generate, [first], 8, ["tenant a"])
    assert other.num_matched_blocks == 0
    assert own.num_matched_blocks == BLOCKS or own.num_cached_tokens == [LENGTH]
    assert other.tokens == own.tokens == expected.tokens


def test_the_caches_can_be_reset_right_after_an_offline_generate(kvbm: EngineProcess) -> None:
    first = prompt(690, LENGTH)
    assert kvbm.run(scenarios.reset_right_after_generate, first) == [True, True, True]
    assert_idle(kvbm)


def test_reset_cache_forgets_host_blocks(kvbm: EngineProcess) -> None:
    first = prompt(700, LENGTH)
    kvbm.run(scenarios.generate, [first])
    assert kvbm.run(scenarios.reset_all_caches)
    assert kvbm.run(scenarios.num_ready) == 0
    again = kvbm.run(scenarios.generate, [first])
    assert (again.num_matched_blocks, again.num_offloaded_blocks) == (0, BLOCKS)
