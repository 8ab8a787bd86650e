"""Each planted fault is noticed, by a wrong token or by the rule that it breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.trtllm.harness import Connector, check_tokens, expected_tokens, run
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.manager import ConformanceError
from tests.contract.trtllm.mpi import CollectiveError
from tests.contract.trtllm.test_engine import shared_prompts
from tests.contract.trtllm.test_reference import again, settle

PROMPT = tuple(range(100, 122))
TWICE = [[Request(1, PROMPT)], [Request(2, PROMPT)]]
LONGER = [[Request(1, PROMPT[:10])], [Request(2, PROMPT)], [Request(3, PROMPT)]]
GENERATED = expected_tokens([Request(1, PROMPT[:9], max_tokens=3)])[1]
CONTINUED = [
    [Request(1, PROMPT[:9], max_tokens=3)],
    [Request(2, PROMPT[5:])],
    [Request(3, (*PROMPT[:9], *GENERATED, 1, 2))],
]
SHORT_FIRST = [  # the device has the beginning, the connector the rest
    [Request(1, (*PROMPT, 1, 2))],
    [Request(2, (*PROMPT[:10], 3, 4)), Request(3, (*PROMPT, 1, 2), arrival=6)],
]
CROWD = shared_prompts(9)
CROWDED = [CROWD, again(CROWD), again(again(CROWD))]
CANCELLED = [again(CROWD, cancel="decode", max_tokens=8), CROWD]
SCARCE = {  # freed blocks are handed out again at once
    "mode": "async",
    "num_blocks": 24,
    "llm_args": {"kv_cache_config.enable_block_reuse": False},
}
PARTIAL = {"llm_args": {"kv_cache_config.enable_partial_reuse": True}}


def pair(leader: str = "Leader", worker: str = "Worker") -> Connector:
    return Connector("tests.contract.trtllm.mutants", leader, worker)


def serve(
    folder: Path,
    connector: Connector,
    waves: Any = TWICE,
    flavour: str = "1.3",
    *,
    mode: str = "sync",
    **options: Any,
) -> None:
    env = {"REFERENCE_STORE": str(folder), "REFERENCE_LOAD": mode, "REFERENCE_SAVE": mode}
    outcome = run(
        connector,
        waves,
        flavour,
        env=env,
        connector_packages=("tests.contract.trtllm.reference",),
        between_waves=settle,
        **options,
    )
    check_tokens(outcome, waves)


def identities(**other: Any) -> list[list[Request]]:
    return [[Request(1, PROMPT)], [Request(2, PROMPT, **other)]]


WRONG_TOKENS: list[tuple[Connector, Any, dict[str, Any]]] = [
    (pair("LoadsNeighbours"), TWICE, {}),
    (pair("SavesNeighbours"), TWICE, {}),
    (pair("SavesUncomputedChunks"), TWICE, {"chunk_tokens": 8}),
    (pair("SavesTheLastToken"), CONTINUED, {}),
    (pair("CountsTheMatchTwice"), LONGER, {"chunk_tokens": 4}),
    (pair("LoadsOneBlockLess"), TWICE, {}),
    (pair("ForgetsLocalLength"), SHORT_FIRST, {}),
    (pair("MatchesUnalignedLocal"), SHORT_FIRST, PARTIAL),
    (pair("MixesSalts"), identities(cache_salt="a"), {}),
    (pair("MixesAdapters"), identities(lora_task_id=7), {}),
    (pair("MixesImages"), identities(multimodal_hashes=((1, 2),)), {}),
    (pair("ForgetsTheParent"), [[Request(1, PROMPT)], [Request(2, PROMPT[4:])]], {}),
    (pair(worker="SavesBeforeTheForward"), TWICE, {}),
    (pair(worker="LoadsAfterTheForward"), TWICE, {}),
    (pair(worker="LoadsOneLayer"), TWICE, {}),
    (pair(worker="ForgetsOneByte"), TWICE, {}),
    (pair(worker="LoadsOtherRanks"), TWICE, {"num_ranks": 2}),
    (pair(worker="WritesOverOthers"), CROWDED, {"num_blocks": 24}),
    (pair(worker="LoadsEarly"), TWICE, {"mode": "async"}),
    (pair(worker="SavesEarly"), CROWDED, {"flavour": "1.1", **SCARCE}),
    (pair(worker="SkipsFences"), CANCELLED, SCARCE),
    (pair("NeverWaitsForSaves", "LateWorker"), CROWDED, SCARCE),
]


def name_of(value: Any) -> str | None:
    if not isinstance(value, Connector):
        return ""
    names = (value.connector_scheduler_class, value.connector_worker_class)
    return "-".join(n for n in names if n not in ("Leader", "Worker"))


@pytest.mark.parametrize(("connector", "waves", "options"), WRONG_TOKENS, ids=name_of)
def test_wrong_bytes_are_wrong_tokens(
    tmp_path: Path, connector: Connector, waves: Any, options: dict[str, Any]
) -> None:
    for worker in ("Worker", "LateWorker"):
        serve(_made(tmp_path / worker), pair(worker=worker), waves, **options)
    with pytest.raises(ConformanceError, match="tokens"):
        serve(_made(tmp_path / "wrong"), connector, waves, **options)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


BROKEN_RULES: list[tuple[Connector, dict[str, Any], str]] = [
    (pair("MatchesAll"), {}, "one must be left to compute"),
    (pair("LoadsNothingLater"), {}, r"\(0, True\)"),
    (pair("RaisesAtMatch"), {}, "get_num_new_matched_tokens raised"),
    (pair("ReadsPythonRequest"), {}, "py_request_id"),
    (pair("MarksRequests"), {}, "kvbm_slot"),
    (pair("SendsCallables"), {}, "pickled"),
    (pair("AnswersNothingAtTheEnd"), {}, "not a bool"),
    (pair(worker="ReportsTwice"), {"mode": "async"}, "KeyError"),
    (pair(worker="ReportsUnknown"), {}, "KeyError"),
    (pair(worker="NeverReports"), {"mode": "async", "deadline_seconds": 1.0}, "nothing happened"),
    (pair(worker="RaisesOnOneRank"), {"num_ranks": 2}, "rank 1: wait_for_save raised"),
    (pair(worker="NeedsThePoolInTheCallable"), {}, "warm_up_callable raised"),
]


@pytest.mark.parametrize(("connector", "options", "message"), BROKEN_RULES, ids=name_of)
def test_a_broken_rule_is_named(
    tmp_path: Path, connector: Connector, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConformanceError, match=message):
        serve(tmp_path, connector, **options)


@pytest.mark.parametrize("ranks_as", ["threads", "processes"])
def test_ranks_that_do_not_meet_are_an_error_and_no_hang(tmp_path: Path, ranks_as: str) -> None:
    with pytest.raises(CollectiveError, match="different collectives"):
        serve(
            tmp_path,
            pair(worker="SkipsACollective"),
            num_ranks=2,
            ranks_as=ranks_as,
            deadline_seconds=5.0,
        )
