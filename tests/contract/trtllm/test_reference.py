"""A conforming connector passes in every mode of the engine; the hooks' counts are upstream's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.trtllm.harness import Connector, Outcome, check_tokens, run
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.modules import FLAVOURS
from tests.contract.trtllm.test_engine import shared_prompts

REFERENCE = Connector("tests.contract.trtllm.reference", "Leader", "Worker")


def serve(
    folder: Path, waves: Any, flavour: str = "1.2", *, mode: str = "sync", **options: Any
) -> Outcome:
    """Run the reference connector and check every token."""
    env = {"REFERENCE_STORE": str(folder), "REFERENCE_LOAD": mode, "REFERENCE_SAVE": mode}
    outcome = run(REFERENCE, waves, flavour, env=env, between_waves=settle, **options)
    check_tokens(outcome, waves)
    return outcome


def settle(rank: int, scheduler: Any, worker: Any) -> None:
    worker.settle()


def again(requests: list[Request], **changes: Any) -> list[Request]:
    """The same prompts once more, as other requests."""
    fields = [{**vars(r), **changes, "request_id": r.request_id + 1000} for r in requests]
    return [Request(**f) for f in fields]


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_warm_tokens_are_the_cold_ones(
    tmp_path: Path, flavour: str, mode: str, overlap: bool, chunk_tokens: int | None
) -> None:
    requests = shared_prompts(8)
    outcome = serve(
        tmp_path,
        [requests, again(requests)],
        flavour,
        mode=mode,
        num_ranks=2,
        overlap=overlap,
        chunk_tokens=chunk_tokens,
        num_blocks=32,
        seed=3,
    )
    assert len(outcome.tokens) == 16
    assert outcome.num_matched_tokens > 20


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_may_be_processes(tmp_path: Path, mode: str) -> None:
    requests = shared_prompts(6)
    outcome = serve(
        tmp_path,
        [requests, again(requests)],
        mode=mode,
        num_ranks=2,
        ranks_as="processes",
        at_end=rank_and_forwards,
    )
    assert outcome.num_matched_tokens > 20
    assert [rank for rank, _ in outcome.states] == [0, 1]
    assert outcome.states[0][1] == outcome.states[1][1] > 1


def rank_and_forwards(rank: int, scheduler: Any, worker: Any) -> tuple[int, int]:
    assert (scheduler is not None) == (rank == 0)
    return rank, worker.num_forwards


@pytest.mark.parametrize("cancel", ["queued", "unscheduled", "loading", "prefill", "decode"])
@pytest.mark.parametrize("flavour", ["1.1", "1.2rc2", "1.2"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_cancel_in_any_phase_harms_nobody(
    tmp_path: Path, overlap: bool, flavour: str, cancel: str
) -> None:
    requests = shared_prompts(9)
    second = again(requests, max_tokens=6)
    second[1::2] = again(requests[1::2], max_tokens=6, cancel=cancel)
    outcome = serve(
        tmp_path,
        [requests, second, again(again(requests))],
        flavour,
        mode="async",
        num_ranks=2,
        overlap=overlap,
        chunk_tokens=8,
        num_blocks=24,
        late_polls=(0, 2),
    )
    assert len(outcome.tokens) == 27
    if cancel != "unscheduled":
        assert "cancelled" in outcome.ends.values()


@pytest.mark.parametrize("flavour", ["1.1", "1.2rc2", "1.2"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_failed_forward_harms_nobody_else(
    tmp_path: Path, mode: str, overlap: bool, flavour: str
) -> None:
    requests = shared_prompts(9)
    outcome = serve(
        tmp_path,
        [requests, again(requests), again(again(requests))],
        flavour,
        mode=mode,
        overlap=overlap,
        chunk_tokens=8,
        fail_forward=4,
    )
    assert "error" in outcome.ends.values()
    assert "length" in outcome.ends.values()


def test_short_and_stopped_and_context_only_requests(tmp_path: Path) -> None:
    prompt = tuple(range(10, 30))
    plain = Request(1, prompt, max_tokens=6)
    tokens = run(None, [plain]).tokens[1]
    waves = [
        [Request(2, prompt, max_tokens=1), Request(3, prompt[:7], context_only=True)],
        [Request(4, prompt, max_tokens=6, stop_token=tokens[2]), Request(5, prompt[:3])],
    ]
    for overlap in (False, True):
        for mode in ("sync", "async"):
            outcome = serve(tmp_path, waves, mode=mode, overlap=overlap)
            assert outcome.tokens[4] == tokens[:3]
            assert [len(outcome.tokens[i]) for i in (2, 3)] == [1, 1]


def test_graphs_fire_no_layer_hooks_in_decode(tmp_path: Path) -> None:
    requests = [Request(1, tuple(range(9)), max_tokens=5)]
    outcome = serve(tmp_path, requests, graphs=True)
    counts = outcome.counts[0]
    assert counts["save_kv_layer"] == counts["wait_for_layer_load"] == 2
    assert counts["forward_pass_callable"] == counts["wait_for_save"] == 5


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_counts_of_a_plain_request(tmp_path: Path, num_tokens: int, overlap: bool) -> None:
    """As upstream's test_connector_simple and test_connector_async_save."""
    for mode in ("sync", "async"):
        folder = tmp_path / mode
        folder.mkdir()
        requests = [Request(1, (1, 2, 3, 4, 5), max_tokens=num_tokens)]
        outcome = serve(folder, requests, mode=mode, overlap=overlap, num_layers=3)
        counts = outcome.counts[0]
        for name in ("build_connector_meta", "start_load_kv", "wait_for_save"):
            assert counts[name] == num_tokens, name
        assert counts["wait_for_layer_load"] == counts["save_kv_layer"] == 3 * num_tokens
        assert counts["get_num_new_matched_tokens"] == counts["request_finished"] == 1
        assert counts["update_state_after_alloc"] == 1
        assert counts["get_finished"] == num_tokens + overlap
        finished = [call.given for call in outcome.calls_of("get_finished")]
        assert finished[:-1] == [([], [])] * (len(finished) - 1)
        assert finished[-1] == ([1] if mode == "async" else [], [])


@pytest.mark.parametrize("overlap", [False, True])
def test_counts_of_an_asynchronous_load(tmp_path: Path, overlap: bool) -> None:
    """As upstream's test_connector_async_onboard: one poll more, the first with the load's id."""
    prompt = tuple(range(20))
    cold = [Request(1, prompt, max_tokens=8)]
    serve(tmp_path, cold, overlap=overlap)
    outcome = serve(tmp_path, cold, mode="async", overlap=overlap)
    polls = outcome.calls_of("get_finished")
    assert outcome.matched[1] == (0, 16)
    assert polls[0].given == ([], [1])
    num_waiting = next(i for i, call in enumerate(polls) if call.answer[1])
    assert len(polls) - num_waiting == 8 + 1 + overlap
    assert outcome.counts[0]["build_connector_meta"] == 8 + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_what_the_scheduler_output_says(tmp_path: Path, overlap: bool) -> None:
    """As upstream's test_connector_scheduler_output, scaled to blocks of 4."""
    outcome = serve(tmp_path, [Request(1, tuple(range(6)), max_tokens=8)], overlap=overlap)
    for i, call in enumerate(outcome.calls_of("build_connector_meta")):
        output = call.given
        if i == 0:
            (data,) = output.new_requests
            assert not output.cached_requests
            assert (len(data.new_tokens), len(data.new_block_ids)) == (6, 2)
            assert (data.computed_position, data.num_scheduled_tokens) == (0, 6)
            continue
        (data,) = output.cached_requests
        assert not output.new_requests
        assert data.num_scheduled_tokens == 1
        assert len(data.new_tokens) == (0 if overlap and i == 1 else 1)
        assert len(data.new_block_ids) == ((data.computed_position + overlap) % 4 == 0)
    (finished,) = outcome.calls_of("request_finished")
    assert len(finished.given[1]) == 4


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_chunked_prefill_says(tmp_path: Path, overlap: bool) -> None:
    """As upstream's test_connector_scheduler_output_chunked_context."""
    requests = [Request(1, tuple(range(32)), max_tokens=4)]
    outcome = serve(tmp_path, requests, overlap=overlap, chunk_tokens=16)
    first, second, third, *_ = outcome.calls_of("build_connector_meta")
    (data,) = first.given.new_requests
    assert (data.computed_position, data.num_scheduled_tokens) == (0, 16)
    assert (len(data.new_tokens), len(data.new_block_ids)) == (32, 8)
    (data,) = second.given.cached_requests
    assert (data.computed_position, data.num_scheduled_tokens) == (16, 16)
    assert (data.new_tokens, data.new_block_ids) == ([], [])
    (data,) = third.given.cached_requests
    assert len(data.new_tokens) == (0 if overlap else 1)


def test_positions_of_matched_requests(tmp_path: Path) -> None:
    """A sync match is not in the first position; an async one is, when the request comes back."""
    prompt = tuple(range(20))
    serve(tmp_path, [Request(1, prompt)])
    for mode, position in (("sync", 0), ("async", 16)):
        outcome = serve(tmp_path, [Request(1, prompt)], mode=mode)
        outputs = [call.given for call in outcome.calls_of("build_connector_meta")]
        (data,) = next(o.new_requests for o in outputs if o.new_requests)
        assert (data.computed_position, data.num_scheduled_tokens) == (position, 4)
        assert outcome.counts[0]["get_num_new_matched_tokens"] == 1
        assert outcome.counts[0]["update_state_after_alloc"] == 1
