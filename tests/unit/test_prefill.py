from __future__ import annotations

from kvbm_core.prefill import PREFILL_TOKENS, PrefillRate

CHUNK = 1000


def rate_after(*steps: tuple[int, float]) -> float | None:
    rate = PrefillRate()
    for num_tokens, now_seconds in steps:
        rate.step(num_tokens, now_seconds)
    return rate.tokens_per_second


def test_nothing_is_known_before_a_prompt_was_computed() -> None:
    assert rate_after() is None
    assert rate_after((CHUNK, 0.0)) is None


def test_steps_that_only_decode_say_nothing() -> None:
    assert rate_after(*((PREFILL_TOKENS - 1, i / 100) for i in range(200))) is None


def test_a_steady_prefill_has_its_rate_or_a_little_less() -> None:
    rate = rate_after(*((CHUNK, i / 10) for i in range(40)))
    assert rate is not None
    assert 7_900 < rate <= 10_000


def test_the_newest_step_does_not_count_since_it_may_not_have_run() -> None:
    assert rate_after((CHUNK, 0.0), (9 * CHUNK, 1.0)) is None
    assert rate_after((CHUNK, 0.0), (9 * CHUNK, 1.0), (9 * CHUNK, 2.0)) == CHUNK / 2


def test_an_engine_that_plans_ahead_is_not_taken_for_a_faster_one() -> None:
    """Two steps are planned at once, then each when the one before it has run."""
    rate = rate_after((CHUNK, 0.0), *((CHUNK, i / 10) for i in range(40)))
    assert rate is not None
    assert rate <= 1.01 * 10_000


def test_a_single_prompt_is_measured_when_decoding_follows() -> None:
    rate = rate_after((CHUNK, 0.0), (1, 0.1), (1, 0.11))
    assert rate is not None
    assert rate <= CHUNK / 0.1 * 1.01


def test_a_later_rate_is_followed_gradually() -> None:
    fast = [(CHUNK, i / 10) for i in range(40)]
    slow = [(CHUNK, 4.0 + i) for i in range(2)]
    rate = rate_after(*fast, *slow)
    assert rate is not None
    assert 1000 < rate < 10_000
    rate = rate_after(*fast, *((CHUNK, 4.0 + i) for i in range(60)))
    assert rate is not None
    assert rate < 1100


def test_steps_at_the_same_time_divide_by_nothing() -> None:
    assert rate_after(*((CHUNK, 0.0) for _ in range(5)), (1, 0.0), (1, 0.0)) is None


def test_a_pause_between_prompts_does_not_make_them_slow() -> None:
    prompt = [(CHUNK, 0.0), (CHUNK, 0.1), (1, 0.2), (1, 0.21), (1, 0.22)]
    later = [(n, seconds + 1000.0) for n, seconds in prompt]
    first, both = rate_after(*prompt), rate_after(*prompt, *later)
    assert first is not None
    assert both is not None
    assert abs(both - first) < 0.01 * first


def test_an_engine_that_rests_in_between_is_not_taken_for_a_slow_one() -> None:
    rate = PrefillRate()
    rate.step(CHUNK, 0.0)
    rate.step(CHUNK, 0.1)
    rate.rest()
    rate.step(CHUNK, 1000.0)
    assert rate.tokens_per_second is None
    rate.step(CHUNK, 1000.1)
    rate.step(CHUNK, 1000.6)
    assert rate.tokens_per_second is not None
    assert rate.tokens_per_second > 1000
