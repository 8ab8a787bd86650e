"""The scheduler's half against requests that another connector or a fault meddles with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvbm_connectors.vllm.metadata import KvbmHandshake
from kvbm_connectors.vllm.scheduler_side import SchedulerSide
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import LayoutMismatch
from kvbm_core.hashing import CacheNamespace, chain_hashes
from kvbm_core.wire import DiskInventory, decode_plan

SIZE, BLOCKS = 4, 3
KEYS = chain_hashes(b"root", list(range(40)), SIZE)
TABLE = [10, 11, 12]


def side_of(*, engine_keys: bool = True, is_open: bool = True) -> SchedulerSide:
    side = SchedulerSide(
        KvbmConfig(),
        block_size=SIZE,
        num_ranks=1,
        namespace=CacheNamespace("m", "", "bf16", "vllm", SIZE, "tp1.pp1"),
        engine_keys=engine_keys,
    )
    if is_open:
        side.open([KvbmHandshake(0, 8, 64, 16, "layout")])
    return side


def request(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "request_id": "a",
            "block_hashes": KEYS[:BLOCKS],
            "num_prompt_tokens": BLOCKS * SIZE,
            "num_computed_tokens": 0,
            "skip_reading_prefix_cache": False,
            "priority": 0,
            "kv_transfer_params": None,
            **fields,
        }
    )


def blocks(ids: list[int]) -> SimpleNamespace:
    return SimpleNamespace(get_block_ids=lambda: (ids,))


def output(scheduled: dict[str, int] | None = None) -> SimpleNamespace:
    """A step of requests that are scheduled for the first time."""
    scheduled = scheduled or {}
    new = [
        SimpleNamespace(req_id=name, num_computed_tokens=0, block_ids=(TABLE,))
        for name in scheduled
    ]
    cached = SimpleNamespace(
        req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set()
    )
    return SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (TABLE,)),
    )


def test_blocks_that_another_connector_was_still_loading_are_not_kept() -> None:
    """vLLM counts a load's tokens as computed before a byte of it has arrived."""
    side, loading = side_of(), request()
    assert side.match(loading, 0) == (0, False)
    side.allocated(loading, blocks(TABLE), 0)
    loading.num_computed_tokens = BLOCKS * SIZE
    side.finish(loading, TABLE)
    assert side.build_metadata(output()).plan == b""
    assert not side.leader.has_work()


def test_a_load_that_could_not_start_blames_only_blocks_it_would_have_written() -> None:
    side, stranded = side_of(), request()
    side.leader.pool.reserve(KEYS[:BLOCKS])
    side.leader.pool.commit(KEYS[:BLOCKS])
    assert side.match(stranded, SIZE) == (2 * SIZE, True)
    side.leader.pool.drop(KEYS[2:3])
    side.allocated(stranded, blocks(TABLE), 2 * SIZE)
    assert side.is_off
    assert side.build_metadata(output()).failed_loads == (("a", (11, 12)),)


def test_a_request_whose_keys_cannot_be_computed_costs_only_itself() -> None:
    side = side_of(engine_keys=False)
    odd = request(
        prompt_embeds=None,
        resumable=False,
        lora_request=None,
        cache_salt=None,
        mm_features=[],
        all_token_ids=[-1] * 12,
    )
    assert side.match(odd, 0) == (0, False)
    side.allocated(odd, blocks(TABLE), 0)
    assert side.build_metadata(output({"a": 12})).plan == b""
    assert not side.is_off


def test_a_plan_that_cannot_be_made_switches_off_and_kills_nothing() -> None:
    side = side_of()
    side.leader.take_plan = lambda **_: 1 / 0  # type: ignore[assignment]
    assert side.build_metadata(output()).plan == b""
    assert side.is_off


def test_a_stranded_load_is_reported_once_though_no_plan_can_be_made() -> None:
    side, stranded = side_of(), request()
    side.leader.pool.reserve(KEYS[:BLOCKS])
    side.leader.pool.commit(KEYS[:BLOCKS])
    side.match(stranded, 0)
    side.leader.pool.drop(KEYS[2:3])
    side.allocated(stranded, blocks(TABLE), BLOCKS * SIZE)
    side.leader.take_plan = lambda **_: 1 / 0  # type: ignore[assignment]
    reports = [side.build_metadata(output()).failed_loads for _ in range(2)]
    assert reports == [(("a", tuple(TABLE)),), ()]
    assert not side.has_work()


def test_before_the_workers_have_announced_themselves_there_is_nothing_to_do() -> None:
    side = side_of(is_open=False)
    assert side.build_metadata(output()).plan == b""
    assert side.match(request(), 0) == (0, False)


def test_the_handshake_of_another_connector_is_refused_with_a_remedy() -> None:
    with pytest.raises(LayoutMismatch, match="Make DynamoConnector the first child"):
        side_of(is_open=False).open([SimpleNamespace(agent_metadata=b"")])  # type: ignore[list-item]


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(LayoutMismatch, match=r"1 ranks are expected, \[1\]"):
        side_of(is_open=False).open([KvbmHandshake(1, 8, 64, 16, "layout")])


def test_a_step_that_completes_blocks_plans_one_offload() -> None:
    side, plain = side_of(), request()
    side.match(plain, 0)
    side.allocated(plain, blocks(TABLE), 0)
    (op,) = decode_plan(side.build_metadata(output({"a": 12})).plan).ops
    assert (list(op.src.ids()), op.request_ids) == (TABLE, ("a",))


@pytest.mark.parametrize("num_disk_blocks", [None, 8])
def test_ranks_that_disagree_with_the_scheduler_on_a_disk_are_refused(
    num_disk_blocks: int | None,
) -> None:
    config = KvbmConfig(disk_cache_override_num_blocks=None if num_disk_blocks else 8)
    side = SchedulerSide(
        config,
        block_size=SIZE,
        num_ranks=1,
        namespace=CacheNamespace("m", "", "bf16", "vllm", SIZE, "tp1.pp1"),
        engine_keys=False,
    )
    disk = None if num_disk_blocks is None else DiskInventory(num_disk_blocks)
    with pytest.raises(LayoutMismatch, match="disk tier"):
        side.open([KvbmHandshake(0, 8, 64, 16, "layout", disk)])
