"""What requests and set-ups may ask of our connector: right tokens, and the hits that are due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbm_core.errors import ConfigError
from tests import disk_faults
from tests.contract.trtllm import harness, kvbm, late
from tests.contract.trtllm.harness import run_without_connector
from tests.contract.trtllm.kvbm import again, serve
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.test_engine import shared_prompts

PROMPT = tuple(range(100, 122))
OTHER = tuple(range(200, 222))
CROWD = shared_prompts(9)
CROWDED = [CROWD, again(CROWD), again(again(CROWD))]
IMAGE = {"multimodal_positions": (9,), "multimodal_lengths": (6,)}


@pytest.fixture(autouse=True)
def _controlled() -> Iterator[None]:
    late.CONTROL.reset()
    disk_faults.CONTROL.reset()
    yield
    late.CONTROL.reset()
    disk_faults.CONTROL.reset()


# Requests


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"cache_salt": "a"}),
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({}, {"lora_task_id": 0}),
        ({"lora_task_id": 1}, {"lora_task_id": 2}),
    ],
)
@pytest.mark.parametrize("flavour", ["1.2", "1.3"])
def test_content_is_found_by_its_own_kind_only(
    flavour: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    waves = [[Request(1, PROMPT, **one)], [Request(2, PROMPT, **other), Request(3, PROMPT, **one)]]
    outcome = serve([[Request(0, OTHER)], *waves], flavour, num_ranks=2)
    assert outcome.matched[2] == (0, 0)
    assert outcome.matched[3] == (0, 20)


def test_an_image_is_part_of_the_blocks_that_it_lies_in_and_all_after() -> None:
    first = Request(1, PROMPT, multimodal_hashes=((1, 2),), **IMAGE)
    moved = replace(first, request_id=3, multimodal_positions=(12,))
    other = replace(first, request_id=4, multimodal_hashes=((3, 4),), multimodal_positions=(0,))
    waves = [[first], [replace(first, request_id=2), moved, other]]
    outcome = serve(waves, "1.3", num_ranks=2)
    assert [outcome.matched[i] for i in (2, 3, 4)] == [(0, 20), (0, 8), (0, 0)]


def test_priorities_say_what_leaves_the_device() -> None:
    requests = [Request(1, PROMPT, priority=60), Request(2, OTHER, priority=10)]
    plain = Request(3, tuple(range(300, 322)))  # of the engine's default, 35
    env = {"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "50"}
    outcome = serve([[*requests, plain], again([*requests, plain])], "1.3", env=env, num_ranks=2)
    assert [outcome.matched[i][1] for i in (1001, 1002, 1003)] == [20, 0, 0]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_short_and_stopped_and_context_only_requests(mode: str, overlap: bool) -> None:
    tokens = run_without_connector([Request(1, PROMPT, max_tokens=6)], num_ranks=2).tokens[1]
    first = [Request(1, PROMPT, max_tokens=1), Request(2, OTHER, context_only=True)]
    second = [
        Request(3, PROMPT, max_tokens=6, stop_token=tokens[2]),
        Request(4, OTHER, context_only=True),
        Request(5, PROMPT[:3]),
    ]
    outcome = serve([first, second], "1.3", mode=mode, overlap=overlap, num_ranks=2)
    assert outcome.tokens[3] == tokens[:3]
    assert [outcome.matched[i][1] for i in (3, 4, 5)] == [20, 20, 0]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    "options",
    [{"graphs": True}, {"kv_factor": 1, "kv_heads": 1, "dtype": "bfloat16"}, {"dtype": "uint8"}],
)
def test_graphs_mla_and_small_types(options: dict[str, Any], mode: str) -> None:
    outcome = serve(CROWDED, "1.3", mode=mode, num_ranks=2, **options)
    assert outcome.num_matched_tokens > 100


# Tiers


@pytest.mark.parametrize("flavour", ["1.1", "1.3"])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("num_host_blocks", [1, 5, 12])
def test_tiers_smaller_than_the_prompts(num_host_blocks: int, mode: str, flavour: str) -> None:
    late.CONTROL.num_polls = 6
    env = {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(num_host_blocks),
        "DYN_KVBM_TRANSFER_ENGINE": late.ENGINE,
    }
    outcome = serve(
        CROWDED,
        flavour,
        mode=mode,
        env=env,
        num_ranks=2,
        num_blocks=14,
        chunk_tokens=8,
        at_end=late.state_of,
    )
    assert outcome.num_matched_tokens


def on_disk(folder: Path, **other: str) -> dict[str, str]:
    return {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "12",
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "256",
        "DYN_KVBM_DISK_CACHE_DIR": str(folder),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
        **other,
    }


def disk_counts(rank: int, scheduler: Any, worker: Any) -> Any:
    disk_faults.CONTROL.gate.set()
    if scheduler is None:
        return None
    kvbm.settle(rank, scheduler, worker)
    return scheduler.leader_side.leader.counters.summary()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_tier_harms_nobody(tmp_path: Path, mode: str) -> None:
    """It is written; an engine that can't wait for a match never has blocks brought up from it."""
    env = on_disk(tmp_path)
    outcome = serve(CROWDED, "1.3", mode=mode, env=env, num_ranks=2, at_end=disk_counts)
    assert "written_blocks=0" not in outcome.states[0]
    assert outcome.num_matched_tokens


def test_no_hook_waits_for_a_disk_that_hangs(tmp_path: Path) -> None:
    """Its I/O stands still from the second wave on, until all tokens are there."""
    is_held: list[bool] = []

    def hold(rank: int, scheduler: Any, worker: Any) -> None:
        if disk_faults.CONTROL.gate.is_set():
            kvbm.settle(rank, scheduler, worker)
            disk_faults.CONTROL.gate.clear()

    def release(rank: int, scheduler: Any, worker: Any) -> Any:
        is_held.append(not disk_faults.CONTROL.gate.is_set())
        return disk_counts(rank, scheduler, worker)

    env = on_disk(tmp_path, DYN_KVBM_DISK_ENGINE="tests.disk_faults:faulty_io")
    outcome = serve(CROWDED, "1.3", env=env, between_waves=hold, at_end=release)
    assert is_held == [True]
    assert len(outcome.calls_of("get_num_new_matched_tokens")) == len(outcome.tokens) == 27


# Refusals

REFUSED = {
    "pipeline_parallel_size": 2,
    "context_parallel_size": 2,
    "enable_attention_dp": True,
    "max_beam_width": 2,
    "speculative_config": object(),
    "kv_cache_config.enable_block_reuse": False,
    "kv_cache_config.host_cache_size": 2**30,
    "kv_cache_config.max_attention_window": [128, 4096],
}


@pytest.mark.parametrize("option", REFUSED)
def test_every_rank_refuses_what_it_can_not_do(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    combine = harness._combine
    monkeypatch.setattr(harness, "_combine", lambda s, r: (found.extend(r), combine(s, r))[1])
    with pytest.raises(ConfigError, match=option.replace(".", r"\.")):
        serve([Request(1, PROMPT)], num_ranks=2, llm_args={option: REFUSED[option]})
    assert [type(error) for error in found] == [ConfigError, ConfigError]


def test_ranks_on_several_machines_need_to_know_where_the_leader_is() -> None:
    with pytest.raises(ConfigError, match="DYN_KVBM_LEADER_ZMQ_HOST"):
        serve([Request(1, PROMPT)], num_ranks=2, llm_args={"gpus_per_node": 1})
    serve(
        [CROWD],
        num_ranks=2,
        llm_args={"gpus_per_node": 1},
        env={
            "DYN_KVBM_LEADER_ZMQ_HOST": "127.0.0.1",
            "DYN_KVBM_LEADER_ZMQ_PUB_PORT": "0",
            "DYN_KVBM_LEADER_ZMQ_ACK_PORT": "0",
        },
    )
