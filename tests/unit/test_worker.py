"""A worker over an engine whose ops end when the test says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbm_core.storage.disk import DiskOptions, DiskStore
from kvbm_core.storage.index import DiskIndex
from kvbm_core.types import KEY_BYTES, BlockHash, Blocks, Tier, TransferOp
from kvbm_core.wire import GENERATION_BYTES, DiskReset, StepPlan
from kvbm_core.worker import Worker
from tests.property.cluster import ModelTransfer
from tests.property.model_disk import ModelDisk


def load(op_id: int, name: str = "a", *device_ids: int) -> TransferOp:
    return TransferOp(
        op_id, (name,), Blocks.of(Tier.HOST, device_ids), Blocks.of(Tier.DEVICE, device_ids)
    )


def offload(op_id: int, name: str = "a", *device_ids: int) -> TransferOp:
    return TransferOp(
        op_id, (name,), Blocks.of(Tier.DEVICE, device_ids), Blocks.of(Tier.HOST, device_ids)
    )


def write(op_id: int, name: str = "a", *ids: int) -> TransferOp:
    keys = bytes(KEY_BYTES * len(ids))
    return TransferOp(op_id, (name,), Blocks.of(Tier.HOST, ids), Blocks.of(Tier.DISK, ids), keys)


def promotion(op_id: int, name: str = "a", *ids: int) -> TransferOp:
    keys = bytes(KEY_BYTES * len(ids))
    return TransferOp(op_id, (name,), Blocks.of(Tier.DISK, ids), Blocks.of(Tier.HOST, ids), keys)


def started(*ops: TransferOp) -> tuple[Worker, ModelTransfer]:
    transfer = ModelTransfer()
    worker = Worker(0, transfer)
    step(worker, StepPlan(ops=ops))
    return worker, transfer


def step(worker: Worker, plan: StepPlan) -> None:
    worker.begin(plan)
    worker.submit_onboards()
    worker.submit_offloads()
    worker.poll()


def test_onboards_and_offloads_are_submitted_when_each_is_called_for() -> None:
    transfer = ModelTransfer()
    worker = Worker(0, transfer)
    worker.begin(StepPlan(ops=(offload(1, "a", 1), load(2, "b", 2))))
    assert transfer.op_ids == []
    worker.submit_onboards()
    assert transfer.op_ids == [2]
    worker.submit_offloads()
    assert transfer.op_ids == [2, 1]


def test_an_offload_fenced_in_its_own_plan_is_submitted_before_the_forward() -> None:
    transfer = ModelTransfer()
    worker = Worker(0, transfer)
    worker.begin(StepPlan(ops=(offload(1, "a", 1), offload(2, "b", 2)), fences=(2,)))
    # The fence has ended it; the other waits for the forward.
    assert [result.op_id for result in transfer.poll()] == [2]
    assert transfer.op_ids == []
    worker.submit_offloads()
    assert transfer.op_ids == [1]


def test_nothing_is_reported_before_an_op_ended() -> None:
    worker, _ = started(load(1, "a", 1))
    assert worker.take_report() is None
    assert worker.take_received() == set()


def test_an_ended_op_is_reported_once() -> None:
    worker, transfer = started(load(1, "a", 1))
    transfer.move(1, 1)
    worker.poll()
    report = worker.take_report()
    assert report is not None
    assert [result.op_id for result in report.results] == [1]
    assert worker.take_report() is None


def test_a_load_that_ended_is_received_once() -> None:
    worker, transfer = started(load(1, "a", 1))
    transfer.move(1, 1)
    worker.poll()
    assert (worker.take_received(), worker.take_received()) == ({"a"}, set())
    assert worker.take_load_errors() == set()


def test_a_failed_load_is_received_with_its_blocks_as_errors() -> None:
    worker, transfer = started(load(1, "a", 4, 5))
    transfer.fail(1)
    worker.poll()
    assert worker.take_load_errors() == {4, 5}
    assert worker.take_load_errors() == set()
    assert worker.take_received() == {"a"}


def test_a_failed_offload_leaves_no_load_errors() -> None:
    worker, transfer = started(offload(1, "a", 4))
    transfer.fail(1)
    worker.poll()
    assert (worker.take_load_errors(), worker.take_received()) == (set(), set())


def test_fences_have_ended_when_the_step_begins() -> None:
    worker, transfer = started(offload(1, "a", 4), offload(2, "b", 5))
    worker.begin(StepPlan(fences=(1,)))
    assert transfer.op_ids == [2]


def test_a_request_is_drained_when_its_last_offload_ended() -> None:
    worker, transfer = started(offload(1, "a", 4), offload(2, "a", 5))
    step(worker, StepPlan(drain=("a",)))
    transfer.move(1, 1)
    worker.poll()
    assert worker.take_drained() == set()
    transfer.fail(2)
    worker.poll()
    assert (worker.take_drained(), worker.take_drained()) == ({"a"}, set())


def test_a_request_whose_offload_comes_with_its_drain_is_not_drained_before() -> None:
    worker, transfer = started()
    step(worker, StepPlan(ops=(offload(1, "a", 4),), drain=("a",)))
    assert worker.take_drained() == set()
    transfer.move(1, 1)
    worker.poll()
    assert worker.take_drained() == {"a"}


def test_a_request_without_offloads_is_drained_at_once() -> None:
    worker, _ = started(load(1, "a", 4))
    step(worker, StepPlan(drain=("a",)))
    assert worker.take_drained() == {"a"}


def test_a_request_that_nobody_waits_for_is_not_drained() -> None:
    worker, transfer = started(offload(1, "a", 4))
    transfer.move(1, 1)
    worker.poll()
    assert worker.take_drained() == set()


def test_a_plan_is_executed_once() -> None:
    worker, transfer = started(offload(1, "a", 4))
    transfer.move(1, 1)
    step(worker, StepPlan())
    assert transfer.op_ids == []


def test_a_load_that_no_op_will_do_can_be_failed() -> None:
    worker, _ = started()
    worker.fail_load("a", [1, 2])
    assert (worker.take_received(), worker.take_load_errors()) == ({"a"}, {1, 2})


def test_close_ends_the_engine_before_the_memory_goes() -> None:
    order: list[str] = []

    class Watched(ModelTransfer):
        def close(self) -> None:
            order.append("engine")

    Worker(0, Watched(), lambda: order.append("memory")).close()
    assert order == ["engine", "memory"]


def test_disk_ops_are_submitted_when_the_step_begins_and_only_then() -> None:
    transfer = ModelTransfer()
    worker = Worker(0, transfer)
    worker.begin(StepPlan(ops=(write(1, "", 1), promotion(2, "b", 2), offload(3, "a", 3))))
    assert transfer.op_ids == [1, 2]
    worker.submit_onboards()
    worker.submit_offloads()
    step(worker, StepPlan())
    assert transfer.op_ids == [1, 2, 3]


def test_a_drained_request_is_not_held_up_by_the_disk() -> None:
    worker, _ = started(write(1, "a", 1), promotion(2, "a", 2))
    step(worker, StepPlan(drain=("a",)))
    assert worker.take_drained() == {"a"}


def test_a_promotion_that_failed_is_reported_and_no_load_of_its_request() -> None:
    disk = ModelDisk(num_blocks=2, make_index=DiskIndex)
    disk.open()
    transfer = ModelTransfer(disk)
    worker = Worker(0, transfer)
    worker.begin(StepPlan(ops=(promotion(1, "a", 1),)))
    transfer.fail(1)
    worker.poll()
    assert (worker.take_received(), worker.take_load_errors()) == (set(), set())
    report = worker.take_report()
    assert report is not None
    assert [(result.op_id, result.ok) for result in report.results] == [(1, False)]
    disk.close()


@pytest.fixture
def disk(tmp_path: Path) -> DiskStore:
    """A store with one block written in a generation that persists."""
    store = DiskStore(
        DiskOptions(tmp_path, zerofill=True, direct=False),
        num_blocks=2,
        block_bytes=4096,
        identity="test",
        engine="test",
        rank=0,
        num_ranks=1,
    )
    store.open()
    store.index.begin_anew(bytes(GENERATION_BYTES), persists=True)
    store.index.put([0], [BlockHash(bytes(KEY_BYTES))], [7], bytes(GENERATION_BYTES))
    return store


def test_a_reset_of_the_disk_comes_before_the_ops_of_its_plan(disk: DiskStore) -> None:
    found_at_submit = []

    class Watched(ModelTransfer):
        def submit(self, op: TransferOp) -> None:
            found_at_submit.append(disk.index.get(0))

    worker = Worker(0, Watched(), disk=disk)
    assert disk.index.get(0) is not None
    reset = DiskReset(b"g" * GENERATION_BYTES, persists=False)
    worker.begin(StepPlan(ops=(write(1, "", 1),), disk_reset=reset))
    assert found_at_submit == [None]
    assert (disk.index.generation, disk.index.persists) == (b"g" * GENERATION_BYTES, False)
    disk.close()


def test_a_plan_without_a_reset_voids_nothing(disk: DiskStore) -> None:
    worker = Worker(0, ModelTransfer(), disk=disk)
    step(worker, StepPlan(ops=(write(1, "", 1),)))
    assert disk.index.get(0) is not None
    disk.close()


def test_a_rank_without_a_disk_has_nothing_to_reset() -> None:
    transfer = ModelTransfer()
    reset = DiskReset(bytes(GENERATION_BYTES), persists=True)
    step(Worker(0, transfer), StepPlan(ops=(offload(1, "a", 1),), disk_reset=reset))
    assert transfer.op_ids == [1]


def test_an_op_is_refused_while_one_from_before_a_reset_still_writes_its_host_blocks() -> None:
    """A leader that had lost this rank does not know of the promotion any more."""
    disk = ModelDisk(num_blocks=8, make_index=DiskIndex)
    disk.open()
    transfer = ModelTransfer(disk)
    worker = Worker(0, transfer)
    worker.begin(StepPlan(ops=(promotion(1, "a", 5),)))
    step(worker, StepPlan(disk_reset=DiskReset(bytes(GENERATION_BYTES), persists=False)))
    step(worker, StepPlan(ops=(offload(2, "b", 5), load(3, "c", 5), offload(4, "d", 6))))
    assert transfer.op_ids == [1, 4]
    report = worker.take_report()
    assert report is not None
    assert [(result.op_id, result.ok) for result in report.results] == [(2, False), (3, False)]
    assert (worker.take_received(), worker.take_load_errors()) == ({"c"}, {5})
    transfer.fail(1)
    worker.poll()
    step(worker, StepPlan(ops=(offload(6, "b", 5),)))
    assert transfer.op_ids == [4, 6]
    disk.close()
