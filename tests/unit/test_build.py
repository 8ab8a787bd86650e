from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvbm_core import host_memory
from kvbm_core.build import (
    DISK_ENGINES,
    ENGINES,
    DiskPlace,
    build_leader,
    build_worker,
    count_disk_blocks,
    count_host_blocks,
    named,
)
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ConfigError
from kvbm_core.eviction import POLICIES, Lru
from kvbm_core.leader import Leader
from kvbm_core.transfer import disk_probe
from kvbm_core.transfer.cpu import CpuTransferEngine
from kvbm_core.types import KEY_BYTES, BlockHash, Blocks, Tier, TransferOp
from kvbm_core.wire import GENERATION_BYTES, DiskInventory, StepPlan
from tests.unit.tensors import NUM_BLOCKS, cpu

GB = 10**9


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GB with 8 GB free."""
    monkeypatch.setattr(host_memory, "total_bytes", lambda: 16 * GB)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 8 * GB)


def count(block_bytes: int = 10**6, num_ranks: int = 1, **options: Any) -> int:
    config = KvbmConfig.load(env={}, options=options)
    return count_host_blocks(
        config, block_bytes=block_bytes, num_ranks=num_ranks, ranks_per_node=num_ranks
    )


def test_a_built_in_is_found_by_name() -> None:
    assert named(POLICIES, "lru", "eviction_policy") is Lru


def test_anything_is_found_by_its_path() -> None:
    found = named(POLICIES, "kvbm_core.transfer.cpu:CpuTransferEngine", "transfer_engine")
    assert found is CpuTransferEngine


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lrru", "no built-in of that name"),
        ("no_such_module:Lru", "cannot be imported"),
        ("kvbm_core.eviction:NoSuchPolicy", "cannot be imported"),
    ],
)
def test_a_name_of_nothing_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        named(POLICIES, name, "eviction_policy")
    assert "Give one of lru, or module:Name." in str(caught.value)


@pytest.mark.parametrize("name", [":Lru", "kvbm_core.eviction:"])
def test_half_a_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        named(POLICIES, name, "eviction_policy")


@pytest.mark.usefixtures("memory")
def test_a_size_is_shared_by_all_ranks() -> None:
    assert count(cpu_cache_gb=4) == 4000
    assert count(cpu_cache_gb=4, num_ranks=4) == 1000


@pytest.mark.usefixtures("memory")
def test_a_number_of_blocks_wins_over_a_size() -> None:
    assert count(cpu_cache_gb=4, cpu_cache_override_num_blocks=7) == 7


@pytest.mark.usefixtures("memory")
def test_without_a_size_a_share_of_free_memory_is_taken() -> None:
    assert count() == 2000
    assert count(num_ranks=2) == 1000


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("options", [{"cpu_cache_gb": 9}, {"cpu_cache_override_num_blocks": 8001}])
def test_more_than_the_machine_has_is_refused_with_both_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"16\.00 GB, of which 8\.00 GB are free") as caught:
        count(**options)
    assert caught.value.option == next(iter(options))


@pytest.mark.usefixtures("memory")
def test_ranks_that_fit_one_by_one_but_not_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 24\.00 GB"):
        count(cpu_cache_gb=24, num_ranks=4)


@pytest.mark.usefixtures("memory")
def test_less_than_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="less than one block of 1000000 bytes"):
        count(cpu_cache_gb=0.0005)


def test_a_leader_is_built_as_the_config_says() -> None:
    leader = build_leader(
        KvbmConfig(), num_host_blocks=5, block_size=4, block_bytes=64, num_ranks=3
    )
    assert (leader.pool.num_blocks, leader.pool.tier, leader.num_ranks) == (5, Tier.HOST, 3)


def test_an_unknown_policy_or_engine_is_refused_when_built() -> None:
    with pytest.raises(ConfigError, match="eviction_policy"):
        build_leader(
            KvbmConfig(eviction_policy="none"),
            num_host_blocks=1,
            block_size=4,
            block_bytes=64,
            num_ranks=1,
        )
    cache = cpu()
    with pytest.raises(ConfigError, match="transfer_engine"):
        build_worker(
            KvbmConfig(transfer_engine="none"),
            cache.layout,
            cache.regions,
            rank=0,
            num_host_blocks=2,
        )


def test_every_built_in_engine_is_for_a_kind_of_device() -> None:
    assert set(ENGINES) == {"cpu", "cuda"}


def test_a_built_worker_moves_real_bytes_there_and_back() -> None:
    cache = cpu()
    before = [layer.clone() for layer in cache.layers]
    worker = build_worker(
        KvbmConfig(), cache.layout, cache.regions, rank=0, num_host_blocks=NUM_BLOCKS
    )
    device, host = Blocks.of(Tier.DEVICE, [0, 5]), Blocks.of(Tier.HOST, [3, 1])
    _run(worker, TransferOp(1, ("r",), device, host))
    for layer in cache.layers:
        layer[[0, 5]] = 0
    _run(worker, TransferOp(2, ("r",), host, device))
    worker.close()
    assert all(map(torch.equal, cache.layers, before))


def _run(worker: Any, op: TransferOp) -> None:
    worker.begin(StepPlan(ops=(op,)))
    worker.submit_onboards()
    worker.submit_offloads()
    worker.begin(StepPlan(fences=(op.op_id,)))
    worker.poll()
    report = worker.take_report()
    assert [result.op_id for result in report.results if result.ok] == [op.op_id]


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_an_engine_for_another_device_is_refused(engine: str) -> None:
    cache = cpu()
    elsewhere = [torch.empty(region.numel(), device="meta") for region in cache.regions]
    with pytest.raises(ConfigError, match="which is on meta"):
        ENGINES[engine](KvbmConfig(), cache.layout, elsewhere, torch.empty(1))


def count_disk(**options: Any) -> int:
    config = KvbmConfig.load(env={}, options=options)
    return count_disk_blocks(config, block_bytes=10**6, num_ranks=2)


def test_a_disk_in_gb_is_summed_over_ranks_in_aligned_blocks() -> None:
    extent_bytes = -(-(10**6) // 4096) * 4096
    assert count_disk(disk_cache_gb=4) == 2 * GB // extent_bytes
    assert count_disk(disk_cache_gb=4, disk_cache_override_num_blocks=7) == 7
    assert count_disk() == 0


def test_a_disk_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"disk_cache_gb.*less than one block"):
        count_disk(disk_cache_gb=0.001)


def test_disk_alone_passes_through_little_host_memory(memory: None) -> None:
    assert count(disk_cache_gb=100) == 800  # a tenth of what is free, below 1 GiB
    assert count(disk_cache_override_num_blocks=5) == 5  # no more than the disk holds
    assert count(num_ranks=4, disk_cache_gb=100) == 2**30 // 4 // 10**6


def inventory(generation: bytes, *block_ids: int) -> DiskInventory:
    keys = [BlockHash(bytes([i]) * KEY_BYTES) for i in block_ids]
    return DiskInventory.of(10, generation, list(zip(keys, block_ids, strict=True)))


def leader_of(*inventories: DiskInventory, **options: Any) -> Leader:
    config = KvbmConfig.load(env={}, options={"disk_cache_gb": 1, **options})
    return build_leader(
        config,
        num_host_blocks=5,
        block_size=4,
        block_bytes=64,
        num_ranks=len(inventories),
        inventories=inventories,
    )


def test_what_all_ranks_have_is_restored() -> None:
    generation = b"g" * GENERATION_BYTES
    leader = leader_of(inventory(generation, 1, 2, 3), inventory(generation, 2, 3, 4))
    assert leader.cascade is not None
    assert leader.cascade.disk.num_ready == 2
    assert leader.take_plan().disk_reset is None


@pytest.mark.parametrize("persist", [True, False])
def test_ranks_that_disagree_begin_anew(persist: bool) -> None:
    first, second = b"g" * GENERATION_BYTES, b"h" * GENERATION_BYTES
    leader = leader_of(inventory(first, 1), inventory(second, 1), disk_cache_persist=persist)
    reset = leader.take_plan().disk_reset
    assert leader.cascade is not None
    assert leader.cascade.disk.num_ready == 0
    assert reset is not None
    assert reset.persists == persist
    assert reset.generation not in (first, second)


def test_without_persistence_nothing_is_restored() -> None:
    generation = b"g" * GENERATION_BYTES
    leader = leader_of(inventory(generation, 1), disk_cache_persist=False)
    assert leader.cascade is not None
    assert leader.cascade.disk.num_ready == 0


@pytest.mark.parametrize("option", ["disk_offload_filter", "host_offload_filter", "disk_engine"])
def test_an_unknown_filter_or_disk_engine_is_refused_when_built(
    option: str, tmp_path: Path
) -> None:
    sizes = {"disk_cache_gb": 1, "cpu_cache_gb": 1, "disk_cache_dir": str(tmp_path)}
    config = KvbmConfig.load(env={}, options={**sizes, option: "none"})
    cache = cpu()
    with pytest.raises(ConfigError, match=option):
        build_leader(
            config,
            num_host_blocks=1,
            block_size=4,
            block_bytes=64,
            num_ranks=1,
            inventories=[inventory(b"")],
        )
        place = DiskPlace(4, "test", "test", 1)
        build_worker(config, cache.layout, cache.regions, rank=0, num_host_blocks=2, disk=place)


@pytest.mark.parametrize("choice", ["auto", "nixl"])
def test_an_engine_that_fails_on_the_file_itself_is_left_only_where_it_was_not_asked_for(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> Any:
        raise ConfigError("disk_engine", "nixl", "does not work here", "Give threads.")

    monkeypatch.setitem(DISK_ENGINES, "nixl", failing)
    monkeypatch.setattr(disk_probe, "fastest", lambda *_, **__: "nixl")
    options = {"disk_cache_gb": 1, "disk_cache_dir": str(tmp_path), "disk_engine": choice}
    config = KvbmConfig.load(env={}, options=options)
    cache = cpu()
    place = DiskPlace(4, "test", "test", 1)

    def build() -> None:
        build_worker(
            config, cache.layout, cache.regions, rank=0, num_host_blocks=2, disk=place
        ).close()

    if choice == "nixl":
        with pytest.raises(ConfigError, match="does not work here"):
            build()
    else:
        build()
        assert "disk engine threads, since nixl failed" in caplog.text
