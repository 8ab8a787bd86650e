"""Our connector conforms in every mode of the engine: right tokens, host hits, nothing left."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.trtllm.kvbm import again, serve
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


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_hooks_are_called_as_often_as_upstream_asserts(mode: str) -> None:
    """One request, alone: see the facts that upstream's own tests assert."""
    num_tokens, layers = 5, 2
    requests = shared_prompts(1)
    first = again(requests, max_tokens=num_tokens)
    outcome: Any = serve(
        [requests, first], mode=mode, num_layers=layers, overlap=False, num_blocks=32
    )
    counts = outcome.counts[0]
    assert counts["build_connector_meta"] >= num_tokens
    assert counts["start_load_kv"] == counts["build_connector_meta"]


def test_salts_adapters_and_images_keep_to_themselves() -> None:
    """The toy model's tokens depend on salt: content that crosses over would differ."""
    requests = shared_prompts(4)
    salted = again(requests, cache_salt="tenant")
    outcome = serve([requests, salted, again(salted)], num_ranks=2)
    assert all(outcome.matched[r.request_id] == (0, 0) for r in salted[:1])
    assert outcome.num_matched_tokens
