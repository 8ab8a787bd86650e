"""Our connector conforms in every mode of the engine: right tokens, host hits, nothing left."""

from __future__ import annotations

import pytest

from tests.contract.trtllm.kvbm import again, serve
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.modules import FLAVOURS
from tests.contract.trtllm.test_engine import shared_prompts


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_cold_device_is_filled_from_host_with_the_right_bytes(
    flavour: str, mode: str, overlap: bool, chunk_tokens: int | None, num_ranks: int, seed: int
) -> None:
    requests = shared_prompts(8)
    outcome = serve(
        [requests, again(requests)],
        flavour,
        mode=mode,
        num_ranks=num_ranks,
        overlap=overlap,
        chunk_tokens=chunk_tokens,
        num_blocks=32,
        seed=seed,
    )
    assert len(outcome.tokens) == 16
    assert outcome.num_matched_tokens > 20


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_may_be_processes(mode: str) -> None:
    requests = shared_prompts(6)
    outcome = serve([requests, again(requests)], mode=mode, num_ranks=2, ranks_as="processes")
    assert outcome.num_matched_tokens > 20


@pytest.mark.parametrize("cancel", ["queued", "unscheduled", "loading", "prefill", "decode"])
@pytest.mark.parametrize("flavour", ["1.1", "1.2rc2", "1.2"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_cancel_in_any_phase_harms_nobody(overlap: bool, flavour: str, cancel: str) -> None:
    requests = shared_prompts(9)
    second = again(requests, max_tokens=6)
    second[1::2] = again(requests[1::2], max_tokens=6, cancel=cancel)
    outcome = serve(
        [requests, second, again(again(requests))],
        flavour,
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
@pytest.mark.parametrize("fail_forward", [1, 2])
def test_a_failed_forward_harms_nobody_else(
    mode: str, overlap: bool, flavour: str, fail_forward: int
) -> None:
    """Nor is what the failed forward was to compute kept: the third wave would load it."""
    requests = shared_prompts(6)
    waves = [requests, again(requests), again(again(requests))]
    outcome = serve(waves, flavour, mode=mode, overlap=overlap, fail_forward=fail_forward)
    assert "error" in outcome.ends.values()
    assert outcome.num_matched_tokens


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_parts_of_blocks_may_be_reused_by_the_engine(mode: str, flavour: str) -> None:
    requests = shared_prompts(8)
    outcome = serve(
        [requests, again(requests), again(again(requests))],
        flavour,
        mode=mode,
        num_ranks=2,
        num_blocks=24,
        llm_args={"kv_cache_config.enable_partial_reuse": True},
    )
    assert outcome.num_matched_tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_counts_of_a_plain_request_are_upstreams(num_tokens: int, overlap: bool) -> None:
    """As test_connector_simple there, where nothing is saved behind the request's back."""
    requests = [Request(1, (1, 2, 3, 4, 5), max_tokens=num_tokens)]
    outcome = serve(requests, overlap=overlap, num_layers=3)
    counts = outcome.counts[0]
    for name in ("build_connector_meta", "start_load_kv", "wait_for_save"):
        assert counts[name] == num_tokens, name
    assert counts["wait_for_layer_load"] == counts["save_kv_layer"] == 3 * num_tokens
    assert counts["get_num_new_matched_tokens"] == counts["request_finished"] == 1
    assert counts["update_state_after_alloc"] == 1
    assert counts["get_finished"] == num_tokens + overlap
    assert all(call.given == ([], []) for call in outcome.calls_of("get_finished"))


@pytest.mark.parametrize("overlap", [False, True])
def test_counts_of_a_load_outside_the_batch_are_upstreams(overlap: bool) -> None:
    """As test_connector_async_onboard there: one poll more, the first with the load's id."""
    prompt, last = tuple(range(20)), Request(2, tuple(range(20)), max_tokens=8)
    outcome = serve([[Request(1, prompt, max_tokens=1)], [last]], "1.3", overlap=overlap)
    before = serve([[Request(1, prompt, max_tokens=1)]], "1.3", overlap=overlap)
    polls = outcome.calls_of("get_finished")[before.counts[0]["get_finished"] :]
    assert outcome.matched[2] == (0, 16)
    assert polls[0].given == ([], [2])
    num_waiting = next(i for i, call in enumerate(polls) if call.answer[1])
    assert len(polls) - num_waiting == 8 + 1 + overlap
    num_built = outcome.counts[0]["build_connector_meta"]
    assert num_built - before.counts[0]["build_connector_meta"] == 8 + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_load_in_step_costs_no_hook(overlap: bool) -> None:
    waves = [[Request(1, tuple(range(20)))], [Request(2, tuple(range(20)))]]
    outcome = serve(waves, "1.3", mode="sync", overlap=overlap)
    assert outcome.matched[2] == (0, 16)
    assert outcome.counts[0]["build_connector_meta"] == 2 * 4
    assert outcome.counts[0]["get_finished"] == 2 * (4 + overlap)
