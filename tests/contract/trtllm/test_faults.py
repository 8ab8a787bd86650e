"""Each fault planted in our connector is noticed, and the same run without the fault passes."""

from __future__ import annotations

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
GIVEN_UP = [CROWD, again(CROWD, cancel="loading", max_tokens=6), again(again(CROWD))]
CANCELLED = [again(CROWD, cancel="decode", max_tokens=8), CROWD, again(again(CROWD))]
GENERATED = expected_tokens([Request(1, PROMPT[:9], max_tokens=12)])[1]
CONTINUED = [  # the second prompt reads what was generated under the first
    [Request(1, PROMPT[:9], max_tokens=12)],
    [Request(2, (*PROMPT[:9], *GENERATED, 1, 2))],
]
SCARCE = {"num_blocks": 20}


@pytest.fixture(autouse=True)
def _controlled() -> Iterator[None]:
    late.CONTROL.reset()
    yield
    late.CONTROL.reset()


def serve(
    waves: Any, leader: str = LEADER, worker: str = WORKER, *, num_polls: int = 8, **options: Any
) -> Outcome:
    """Run a mutant, or our connector itself, over an engine that copies late."""
    late.CONTROL.num_polls = num_polls
    connector = Connector("tests.contract.trtllm.kvbm_mutants", leader, worker)
    env = {"DYN_KVBM_TRANSFER_ENGINE": late.ENGINE, **options.pop("env", {})}
    packages = ("kvbm_connectors.trtllm",)
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
        return self.leader if self.worker == WORKER else self.worker


def identities(**other: Any) -> list[list[Request]]:
    return [[Request(1, PROMPT)], [Request(2, PROMPT, **other)]]


IMAGE = {
    "multimodal_hashes": ((1, 2),),
    "multimodal_positions": (0,),
    "multimodal_lengths": (6,),
}
PARTIAL = {"llm_args": {"kv_cache_config.enable_partial_reuse": True}, **SCARCE}
WRONG_TOKENS = [
    Fault(worker="SkipsFences", waves=CROWDED, options=SCARCE),
    Fault(worker="SkipsFences", waves=GIVEN_UP, options=SCARCE),
    Fault(worker="SkipsFences", waves=CANCELLED, options={"mode": "sync", **SCARCE}),
    Fault(worker="ReportsLoadsEarly"),
    Fault(worker="StartsForwardsBeforeTheirLoads", options={"mode": "sync"}),
    Fault(worker="CopiesPartsUnderOffloads", waves=CROWDED, options=PARTIAL),
    Fault(worker="KeepsFailedForwards", waves=CROWDED, options={"fail_forward": 1}),
    Fault(worker="OffloadsBeforeTheForward", options={"num_polls": 0}),
    Fault("CountsOneBlockTooMuch", waves=CONTINUED, options={"num_polls": 0}),
    Fault("TakesAllChunksForComputed", options={"chunk_tokens": 8, "num_polls": 0}),
    Fault("ForgetsGrownBlocks", waves=CROWDED, options=SCARCE),
    Fault("IgnoresUnfollowed", waves=CROWDED, options=SCARCE, sound="FencesUnfollowed"),
    Fault("LoadsOneBlockAhead"),
    Fault("MixesSalts", waves=identities(cache_salt="a")),
    Fault("MixesSalts", waves=identities(cache_salt="a"), options={"flavour": "1.3"}),
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
