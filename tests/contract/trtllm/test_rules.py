"""The engine's rules that a connector meets: order, threads, ends, pins, queues, poison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.trtllm.harness import ConformanceError, Connector, Outcome, check_tokens, run
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.test_engine import shared_prompts
from tests.contract.trtllm.test_mutants import pair
from tests.contract.trtllm.test_reference import again, settle

PROMPT = tuple(range(100, 122))


def serve(
    folder: Path,
    waves: Any,
    flavour: str = "1.2",
    *,
    connector: Connector | None = None,
    **other: Any,
) -> Outcome:
    mode = other.pop("mode", "async")
    env = {"REFERENCE_STORE": str(folder), "REFERENCE_LOAD": mode, "REFERENCE_SAVE": mode}
    outcome = run(
        connector or pair(),
        waves,
        flavour,
        env=env,
        connector_packages=("tests.contract.trtllm.reference",),
        between_waves=settle,
        **other,
    )
    check_tokens(outcome, waves)
    return outcome


def test_the_order_of_one_iteration(tmp_path: Path) -> None:
    outcome = serve(tmp_path, [Request(1, PROMPT, max_tokens=1)], "1.3", overlap=False)
    names = [call.name for call in outcome.calls[0]]
    assert names == [
        "register_forward_pass_callable",
        "warm_up_callable",
        "register_kv_caches",
        "wait_for_initialization",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "bind_connector_meta",
        "start_load_kv",
        *["wait_for_layer_load", "save_kv_layer"] * 2,
        "forward_pass_callable",
        "wait_for_save",
        "request_finished",
        "get_finished",
        "close",
    ]
    threads = {call.thread for call in outcome.calls[0][4:]}
    assert threads == {"event-loop-0"}
    assert {call.thread for call in outcome.calls[0][:4]} == {"rank-0"}


def test_a_connector_without_an_end_is_dropped(tmp_path: Path) -> None:
    outcome = serve(tmp_path, [Request(1, PROMPT)], shuts_down=False, mode="sync")
    assert outcome.counts[0]["close"] == 0


@pytest.mark.parametrize("flavour", ["1.2", "1.3"])
def test_when_blocks_are_told(tmp_path: Path, flavour: str) -> None:
    """Newer versions match all new requests of a batch before they tell any blocks."""
    outcome = serve(tmp_path, [Request(1, PROMPT), Request(2, PROMPT[::-1])], flavour)
    hooks = ("get_num_new_matched_tokens", "update_state_after_alloc")
    names = [call.name for call in outcome.calls[0] if call.name in hooks]
    assert names == (sorted(hooks * 2) if flavour == "1.3" else list(hooks * 2))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("flavour", "is_told"), [("1.1", True), ("1.2rc2", True), ("1.2", False)])
def test_who_hears_of_a_cancel(tmp_path: Path, flavour: str, is_told: bool, overlap: bool) -> None:
    requests = [Request(1, PROMPT, max_tokens=9, cancel="decode"), Request(2, PROMPT[3:])]
    outcome = serve(tmp_path, requests, flavour, overlap=overlap)
    assert outcome.ends == {1: "cancelled", 2: "length"}
    told = {call.given[0] for call in outcome.calls_of("request_finished")}
    assert told == ({1, 2} if is_told else {2})


@pytest.mark.parametrize(("flavour", "is_told"), [("1.1", True), ("1.2rc2", True), ("1.2", False)])
def test_who_hears_of_an_error(tmp_path: Path, flavour: str, is_told: bool) -> None:
    waves = [[Request(1, PROMPT, max_tokens=9)], [Request(2, PROMPT[3:])]]
    outcome = serve(tmp_path, waves, flavour, fail_forward=3)
    assert outcome.ends == {1: "error", 2: "length"}
    assert len(outcome.tokens[1]) < 9
    told = {call.given[0] for call in outcome.calls_of("request_finished")}
    assert told == ({1, 2} if is_told else {2})
    assert outcome.counts[0]["start_load_kv"] == outcome.counts[0]["wait_for_save"] + 1


def test_a_request_that_never_had_blocks_is_not_spoken_of(tmp_path: Path) -> None:
    requests = [
        Request(1, PROMPT, max_tokens=8),
        Request(2, PROMPT[1:], max_tokens=8, cancel="unscheduled"),
        Request(3, PROMPT[2:], cancel="queued"),
    ]
    for flavour in ("1.1", "1.2rc2", "1.2"):
        outcome = serve(tmp_path, requests, flavour, num_blocks=10)
        assert outcome.ends == {1: "length", 2: "cancelled", 3: "cancelled"}
        assert {call.given[0] for call in outcome.calls_of("request_finished")} == {1}
        assert outcome.counts[0]["get_num_new_matched_tokens"] == 1


def test_blocks_under_a_save_are_not_given_away(tmp_path: Path) -> None:
    """As upstream's test_connector_multi_request: the third waits for the first two's saves."""
    requests = [Request(i, tuple(range(i, i + 20))) for i in (100, 200, 300)]
    for flavour in ("1.1", "1.2rc2", "1.2"):
        outcome = serve(
            tmp_path, requests, flavour, connector=pair(worker="LateWorker"), num_blocks=12
        )
        assert set(outcome.ends.values()) == {"length"}
        assert len(outcome.tokens) == 3


def test_an_idle_engine_polls_nothing(tmp_path: Path) -> None:
    """The last save is reported when the next request comes, not before."""
    waves = [[Request(1, PROMPT)], [Request(2, PROMPT[::-1])]]
    (tmp_path / "alone").mkdir()
    alone = serve(tmp_path / "alone", waves[:1], connector=pair(worker="LateWorker"))
    assert alone.num_open_saves == 1
    both = serve(tmp_path, waves, connector=pair(worker="LateWorker"))
    first = both.calls_of("get_finished")[alone.counts[0]["get_finished"]]
    assert first.answer == ([1], [])


def test_block_ids_are_in_no_order(tmp_path: Path) -> None:
    outcome = serve(tmp_path, [Request(1, PROMPT)], seed=5)
    (call,) = outcome.calls_of("update_state_after_alloc")
    ids = call.given[1]
    assert len(set(ids)) == 6
    assert ids != sorted(ids)


@pytest.mark.parametrize("late_polls", [(0, 3), (3, 0)])
def test_a_load_is_done_when_every_rank_says_so(tmp_path: Path, late_polls: Any) -> None:
    waves = [[Request(1, PROMPT)], [Request(2, PROMPT)]]
    outcome = serve(tmp_path, waves, num_ranks=2, late_polls=late_polls)
    assert outcome.matched[2] == (0, 20)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_cancelled_load_writes_into_nobodys_blocks(tmp_path: Path, overlap: bool) -> None:
    crowd = shared_prompts(9)
    second = again(crowd, cancel="loading", max_tokens=4)
    third = [
        Request(r.request_id + 5000, tuple(t + 1 for t in r.prompt), r.max_tokens, arrival=i)
        for i, r in enumerate(crowd)
    ]
    waves = [crowd, [*third[:3], *second, *third[3:]], again(third)]
    options: Any = {
        "overlap": overlap,
        "num_blocks": 24,
        "llm_args": {"kv_cache_config.enable_block_reuse": False},
    }
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir()
    wrong.mkdir()
    outcome = serve(right, waves, connector=pair(worker="LateWorker"), **options)
    assert "cancelled" in outcome.ends.values()
    with pytest.raises(ConformanceError, match="tokens"):
        serve(wrong, waves, connector=pair(worker="SkipsFences"), **options)


def test_partial_reuse_gives_unaligned_lengths(tmp_path: Path) -> None:
    crowd = shared_prompts(9)
    outcome = serve(
        tmp_path,
        [crowd, again(crowd)],
        llm_args={"kv_cache_config.enable_partial_reuse": True},
        cold=False,
        num_blocks=24,
    )
    local = [call.given[1] for call in outcome.calls_of("get_num_new_matched_tokens")]
    assert any(num_tokens % 4 for num_tokens in local)


@pytest.mark.parametrize(
    "shape",
    [
        {"kv_factor": 1, "kv_heads": 1, "num_layers": 3},
        {"dtype": "bfloat16", "tokens_per_block": 8},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "float32", "num_layers": 1},
    ],
)
def test_other_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    waves = [[Request(1, PROMPT)], [Request(2, PROMPT)]]
    assert serve(tmp_path, waves, num_ranks=2, **shape).num_matched_tokens >= 16


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_refusal_at_start_is_raised_as_it_is(tmp_path: Path, num_ranks: int) -> None:
    for connector in (pair("RefusesTheArguments"), pair(worker="RefusesThePool")):
        with pytest.raises(PermissionError, match="refused"):
            serve(tmp_path, [Request(1, PROMPT)], connector=connector, num_ranks=num_ranks)


def test_a_hook_that_hangs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match="hangs"):
        serve(
            tmp_path,
            [Request(1, PROMPT)],
            connector=pair(worker="NeverComesBack"),
            mode="sync",
            deadline_seconds=0.2,
        )
