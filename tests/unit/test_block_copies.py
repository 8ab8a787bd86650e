"""Blocks on their way between the device and host memory."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Collection
from typing import Any

import pytest

from kvbm_core import BlockManager
from kvbm_core.blocks import manager as manager_module
from kvbm_core.blocks.block import BlockList
from kvbm_core.blocks.state import BlockState
from kvbm_core.build import cpu_engine
from kvbm_core.errors import BlocksUnavailable, IllegalTransition, StorageError
from kvbm_core.types import Blocks, OpId, Tier
from tests.unit.blocks import manager_of, numbers, registered, write

TOKENS = list(range(12))


def device_blocks(manager: BlockManager, count: int = 3) -> BlockList:
    blocks = manager.allocate_device_blocks_blocking(count)
    for index, block in enumerate(blocks):
        write(block, index + 1)
    return blocks


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_blocks_go_down_and_come_back_with_their_bytes(dtype: str) -> None:
    manager = manager_of(dtype=dtype)
    blocks = device_blocks(manager)
    stored = manager.offload_blocking(blocks)
    assert numbers(stored) == [1, 2, 3]
    blocks.release()
    other = device_blocks(manager, 4)
    for block in other:
        write(block, 9)
    other.release()
    del block
    assert numbers(manager.onboard_blocking(stored)) == [1, 2, 3]
    assert [block.state for block in stored] == [BlockState.RESET] * 3


def test_copies_have_the_states_and_tokens_of_their_sources() -> None:
    manager = manager_of()
    blocks = device_blocks(manager)
    blocks.fill(TOKENS[:8])
    blocks[:1].register()
    stored = manager.offload_blocking(blocks)
    assert [block.state for block in stored] == [block.state for block in blocks]
    assert [block.tokens for block in stored] == [TOKENS[:4], TOKENS[4:8], []]
    assert manager.match_host_blocks(TOKENS).block_ids == stored.block_ids[:1]
    stored[1:2].register()
    assert manager.match_host_blocks(TOKENS).block_ids == stored.block_ids[:2]


def test_what_is_registered_there_is_found_and_not_copied() -> None:
    manager = manager_of()
    there = registered(manager, TOKENS[:8], first_number=50)
    blocks = device_blocks(manager)
    blocks.fill(TOKENS)
    stored = manager.offload_blocking(blocks.register())
    assert stored.block_ids[:2] == there.block_ids
    assert numbers(stored) == [50, 51, 3]
    assert len(manager.match_host_blocks(TOKENS)) == 3


def test_a_copy_without_room_takes_nothing() -> None:
    manager = manager_of(host_num_blocks=2)
    with pytest.raises(BlocksUnavailable, match="requested: 3, available: 2"):
        manager.offload_blocking(device_blocks(manager))
    assert manager.num_available_host_blocks == 2


def test_blocks_that_cannot_be_copied_are_refused() -> None:
    manager = manager_of()
    blocks = device_blocks(manager)
    blocks[0].init_sequence()
    with pytest.raises(IllegalTransition, match="is partial"):
        manager.offload_blocking(blocks)
    with pytest.raises(IllegalTransition, match="is of device or of another manager"):
        manager.onboard_blocking(blocks)
    with pytest.raises(IllegalTransition, match="another manager"):
        manager_of().offload_blocking(blocks)
    blocks[1].release()
    with pytest.raises(IllegalTransition, match="was released"):
        manager.offload_blocking(blocks[1:])
    with pytest.raises(BlocksUnavailable, match="no host blocks"):
        manager_of(host_num_blocks=None).offload_blocking(blocks)
    assert manager.num_available_host_blocks == 4


def test_no_blocks_are_copied_at_once() -> None:
    manager = manager_of()
    assert len(manager.offload_blocking(manager.allocate_device_blocks_blocking(0))) == 0


class Gate:
    """An engine's copies wait in front of it, and fail where it stays shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_seconds: float = 30) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()

        def make(*arguments: Any) -> Any:
            engine, gate = cpu_engine(*arguments), self
            wait = engine.wait

            def waits(op_ids: Collection[OpId]) -> None:
                gate.is_reached.set()
                if not gate.is_open.wait(timeout_seconds):
                    raise TimeoutError("the gate stayed shut")
                wait(op_ids)

            engine.wait = waits  # type: ignore[method-assign]
            return engine

        monkeypatch.setattr(manager_module, "ENGINES", {"cpu": make})


async def _open_beside(gate: Gate, copy: Any) -> BlockList:
    """Await a copy whose gate this same event loop opens."""
    task = asyncio.create_task(copy)
    while not gate.is_reached.is_set():
        await asyncio.sleep(0)
    gate.is_open.set()
    return await task


def test_an_awaited_copy_leaves_the_event_loop_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    manager = manager_of()
    stored = asyncio.run(_open_beside(gate, manager.offload(device_blocks(manager))))
    assert numbers(stored) == [1, 2, 3]
    assert numbers(asyncio.run(manager.onboard(stored[:1]))) == [1]


def test_the_check_notices_a_copy_that_keeps_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch, timeout_seconds=0.1)
    manager = manager_of()

    async def blocks_the_loop() -> BlockList:
        return manager.offload_blocking(device_blocks(manager))

    with pytest.raises(TimeoutError, match="stayed shut"):
        asyncio.run(_open_beside(gate, blocks_the_loop()))


def test_a_cancelled_copy_keeps_its_blocks_until_the_bytes_have_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)
    manager = manager_of()

    async def cancel() -> None:
        task = asyncio.create_task(manager.offload(device_blocks(manager)))
        while not gate.is_reached.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert (manager.num_available_host_blocks, manager.num_available_device_blocks) == (1, 1)
    gate.is_open.set()
    manager.offload_blocking(device_blocks(manager, 1)).release()  # one after another: it is over
    assert (manager.num_available_host_blocks, manager.num_available_device_blocks) == (4, 4)


def test_a_copy_lets_its_blocks_go_before_its_caller_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)
    manager = manager_of()
    assert manager._copies is not None
    none_left: list[bool] = []
    held = threading.Event()  # anything that can be watched
    there = weakref.ref(held)
    empty = Blocks.of(Tier.DEVICE, []), Blocks.of(Tier.HOST, [])
    done = manager._copies.start(*empty, [held])
    del held
    assert there() is not None
    done.add_done_callback(lambda _: none_left.append(there() is None))
    gate.is_open.set()
    done.result(timeout=30)
    manager.close()
    assert none_left == [True]


def test_a_copy_that_fails_raises_and_gives_its_blocks_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(*arguments: Any) -> Any:
        raise OSError("no engine")

    monkeypatch.setattr(manager_module, "ENGINES", {"cpu": make})
    manager = manager_of()
    with pytest.raises(OSError, match="no engine"):
        manager.offload_blocking(device_blocks(manager))
    monkeypatch.setattr(manager_module, "ENGINES", {"cpu": _failing})
    with pytest.raises(StorageError, match="device_to_host copy of 3 blocks: RuntimeError: torn"):
        manager.offload_blocking(device_blocks(manager))
    assert manager.num_available_host_blocks == 4


def _failing(*arguments: Any) -> Any:
    engine = cpu_engine(*arguments)

    def run(_: object) -> dict[int, str]:
        raise RuntimeError("torn")

    engine._work.run = run
    return engine


def test_a_closed_manager_lets_copies_in_flight_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    manager = manager_of()
    blocks = device_blocks(manager)
    closer = threading.Thread(target=manager.close)

    async def copy() -> None:
        task = asyncio.create_task(manager.offload(blocks))
        while not gate.is_reached.is_set():
            await asyncio.sleep(0)
        closer.start()
        gate.is_open.set()
        closer.join()
        with pytest.raises(IllegalTransition, match="closed"):
            await task

    asyncio.run(copy())
    with pytest.raises(IllegalTransition, match="closed"):
        manager.offload_blocking(blocks)
