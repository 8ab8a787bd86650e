"""Each fault planted in our connector is noticed, and the same run without the fault passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.contract.trtllm import kvbm, late
from tests.contract.trtllm.harness import Connector, Outcome, expected_tokens
from tests.contract.trtllm.kvbm import again
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.manager import ConformanceError
from tests.contract.trtllm.test_engine import shared_prompts

LEADER, WORKER = "Leader", "Worker"
PROMPT = tuple(range(100, 122))
TWICE = [[Request(1, PROMPT)], [Request(2, PROMPT)]]
CROWD = shared_prompts(9)
CROWDED = [CROWD, again(CROWD), again(again(CROWD))]
CANCELLED = [again(CROWD, cancel="decode", max_tokens=8), CROWD, again(again(CROWD))]
GROWING = [Request(i, PROMPT[i : i + 6], max_tokens=22) for i in range(8)]
GROWN = [
    Request(100 + r.request_id, (*r.prompt, *tokens, 1))
    for r, tokens in zip(GROWING, expected_tokens(GROWING).values(), strict=True)
]


def own(request_id: int, num_tokens: int, **other: Any) -> Request:
    """A prompt that shares nothing."""
    first = 1000 + 50 * request_id
    return Request(request_id, tuple(range(first, first + num_tokens)), **other)


def sharing_a_part(request_id: int, **other: Any) -> Request:
    """A prompt that ends in the middle of a block of PROMPT."""
    return Request(request_id, (*PROMPT[:6], request_id, request_id, request_id), **other)


def mixed(count: int) -> list[Request]:
    rng = random.Random(0)
    kinds = rng.choices((lambda i, **other: own(i, 10, **other), sharing_a_part), (2, 3), k=count)
    return [kind(i, arrival=3 * i) for i, kind in enumerate(kinds)]


GIVEN_UP = [  # loads are given up while one request runs, and their blocks go to others
    [own(i, 14) for i in range(3)],
    [
        Request(50, PROMPT[:9], max_tokens=26),
        *[own(i, 14, arrival=2, cancel="loading") for i in range(3)],
        *[sharing_a_part(60 + i, arrival=5 + i // 3, max_tokens=10) for i in range(7)],
    ],
]
GIVEN_UP[1][1:4] = again(GIVEN_UP[1][1:4])
MIXED = [mixed(24), again(mixed(24))]
ROOMY = {"num_blocks": 26, "num_polls": 8}
SCARCE = {"num_blocks": 14}  # freed blocks are handed out again at once


@pytest.fixture(autouse=True)
def _controlled() -> Iterator[None]:
    late.CONTROL.reset()
    yield
    late.CONTROL.reset()


def serve(
    waves: Any, leader: str = LEADER, worker: str = WORKER, *, num_polls: int = 40, **options: Any
) -> Outcome:
    """Run a mutant, or our connector itself, over an engine that copies late."""
    late.CONTROL.num_polls = num_polls
    connector = Connector("tests.contract.trtllm.kvbm_mutants", leader, worker)
    env = {"DYN_KVBM_TRANSFER_ENGINE": late.ENGINE, **options.pop("env", {})}
    packages = ("kvbm_connectors.trtllm",)
    options = {"flavour": "1.3", "between_waves": late.settle, "at_end": late.state_of, **options}
    return kvbm.serve(waves, connector=connector, connector_packages=packages, env=env, **options)


@dataclass
class Fault:
    """sound: what takes the leader's place in the run that must pass."""

    leader: str = LEADER
    worker: str = WORKER
    waves: Any = field(default_factory=lambda: TWICE)
    options: dict[str, Any] = field(default_factory=dict)
    sound: str = LEADER

    def __str__(self) -> str:
        return "-".join(n for n in (self.leader, self.worker) if n not in (LEADER, WORKER))


def identities(**other: Any) -> list[list[Request]]:
    return [[Request(1, PROMPT)], [Request(2, PROMPT, **other)]]


IMAGE = {
    "multimodal_hashes": ((1, 2),),
    "multimodal_positions": (0,),
    "multimodal_lengths": (6,),
}
PARTIAL = {"llm_args": {"kv_cache_config.enable_partial_reuse": True}, "num_blocks": 12}
WRONG_TOKENS = [
    Fault(worker="SkipsFences", waves=CROWDED, options=SCARCE),
    Fault(worker="SkipsFences", waves=GIVEN_UP, options=ROOMY),
    Fault(worker="SkipsFences", waves=CANCELLED, options={"mode": "sync", **SCARCE}),
    Fault(worker="ReportsLoadsEarly"),
    Fault(worker="WaitsForNoLoad", options={"mode": "sync"}),
    Fault(worker="CopiesPartsUnderOffloads", waves=MIXED, options=PARTIAL),
    Fault("LoadsBehind", "WaitsForNoLoad", GIVEN_UP, {**PARTIAL, **ROOMY}),
    Fault(worker="KeepsFailedForwards", waves=CROWDED, options={"fail_forward": 1}),
    Fault(worker="OffloadsBeforeTheForward", options={"num_polls": 0}),
    Fault("CountsOneBlockTooMuch", options={"chunk_tokens": 8, "num_polls": 0}),
    Fault("ForgetsGrownBlocks", waves=[GROWING, GROWN], options=SCARCE),
    Fault("IgnoresUnfollowed", waves=CROWDED, options=SCARCE, sound="FencesUnfollowed"),
    Fault("LoadsOneBlockAhead"),
    Fault("MixesSalts", waves=identities(cache_salt="a")),
    Fault("MixesSalts", waves=identities(cache_salt="a"), options={"flavour": "1.2"}),
    Fault("MixesAdapters", waves=identities(lora_task_id=7)),
    Fault("MixesImages", waves=identities(**IMAGE)),
]


@pytest.mark.parametrize("fault", WRONG_TOKENS, ids=str)
def test_a_fault_is_a_wrong_token(fault: Fault) -> None:
    serve(fault.waves, fault.sound, **fault.options)
    with pytest.raises(ConformanceError, match="tokens"):
        serve(fault.waves, fault.leader, fault.worker, **fault.options)


def test_a_match_of_the_whole_prompt_is_refused() -> None:
    waves = [[Request(1, PROMPT[:20])], [Request(2, PROMPT[:20])]]
    serve(waves)
    with pytest.raises(ConformanceError, match="one must be left to compute"):
        serve(waves, "MatchesAll")


def test_requests_that_nobody_says_are_over_are_noticed() -> None:
    serve(CANCELLED)
    with pytest.raises(AssertionError):
        serve(CANCELLED, "ForgetsNobody")


def test_a_prompt_loaded_in_step_is_offloaded_in_the_same_step() -> None:
    """The engine's first position excludes the match: who trusts it keeps less."""
    matched = {
        leader: serve(
            [
                [Request(1, PROMPT[:9], max_tokens=1)],
                [Request(2, PROMPT, max_tokens=1)],
                [Request(3, PROMPT, max_tokens=1)],
            ],
            leader,
            mode="sync",
            overlap=False,
        ).matched[3]
        for leader in (LEADER, "ForgetsTheMatch")
    }
    assert matched[LEADER] == (0, 20)
    assert matched["ForgetsTheMatch"][1] < 20
