"""The harness's engine on its own: its tokens depend on the request and on nothing else."""

from __future__ import annotations

import random

import pytest

from tests.contract.trtllm.harness import check_tokens, expected_tokens, run_without_connector
from tests.contract.trtllm.llm_request import Request


def shared_prompts(count: int, seed: int = 1) -> list[Request]:
    """Prompts with common beginnings, and tails of their own."""
    rng = random.Random(seed)
    base = [rng.randrange(1000) for _ in range(40)]
    return [
        Request(
            i,
            tuple(base[: rng.randrange(4, 40)] + [rng.randrange(1000) for _ in range(3)]),
            max_tokens=rng.randrange(1, 9),
            arrival=i // 3,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tokens_do_not_depend_on_how_the_engine_runs(
    num_ranks: int, overlap: bool, chunk_tokens: int | None, partial: bool
) -> None:
    requests = shared_prompts(10)
    outcome = run_without_connector(
        [requests[:5], requests[5:]],
        num_ranks=num_ranks,
        overlap=overlap,
        chunk_tokens=chunk_tokens,
        num_blocks=16,  # so that requests queue and blocks are evicted
        llm_args={"kv_cache_config.enable_partial_reuse": partial},
        cold=False,
    )
    assert len(outcome.tokens) == 10
    assert sum(local for local, _ in outcome.matched.values()) > 100
    check_tokens(outcome, requests)


def test_a_stop_token_ends_generation_early() -> None:
    request = Request(1, tuple(range(9)), max_tokens=8)
    tokens = expected_tokens([request])[1]
    stopping = Request(1, request.prompt, max_tokens=8, stop_token=tokens[3])
    for overlap in (False, True):
        outcome = run_without_connector([stopping], overlap=overlap)
        assert outcome.tokens[1] == tokens[:4]
        assert outcome.ends[1] == "stop"


def test_tokens_depend_on_the_number_of_ranks_and_on_the_identity() -> None:
    request = Request(1, tuple(range(9)))
    salted = Request(1, request.prompt, cache_salt="a")
    adapted = Request(1, request.prompt, lora_task_id=1)
    tokens = [expected_tokens([r])[1] for r in (request, salted, adapted)]
    tokens.append(expected_tokens([request], num_ranks=2)[1])
    assert len(set(tokens)) == 4
