"""The CPU engine over a copier whose copies begin and end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from kvbm_core.transfer import cpu
from kvbm_core.transfer.cpu import CpuTransferEngine
from kvbm_core.types import KEY_BYTES, BlockId, Blocks, OpResult, Tier, TransferOp

PATIENCE_SECONDS = 20.0  # how long a test waits before it fails; never a measure


class GatedCopier:
    """Records copies; while `gate` is closed each waits. `bad` ids make a copy raise."""

    block_bytes = 10

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.copies: list[tuple[list[BlockId], list[BlockId], bool]] = []
        self.bad: set[BlockId] = set()

    def copy(
        self, device_ids: Sequence[BlockId], host_ids: Sequence[BlockId], *, to_host: bool
    ) -> None:
        self.copies.append((list(device_ids), list(host_ids), to_host))
        self.begun.release()
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.bad & set(device_ids):
            raise ValueError("planned failure")

    def wait_begun(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.begun.acquire(timeout=PATIENCE_SECONDS)


@pytest.fixture
def copier() -> GatedCopier:
    return GatedCopier()


class Engines:
    """Makes engines, and closes them when the test is over."""

    def __init__(self, copier: GatedCopier) -> None:
        self._copier = copier
        self.made: list[CpuTransferEngine] = []

    def __call__(self, num_threads: int = 1, piece_blocks: int | None = None) -> CpuTransferEngine:
        engine = CpuTransferEngine(self._copier, num_threads=num_threads, piece_blocks=piece_blocks)
        engine.open()
        self.made.append(engine)
        return engine


@pytest.fixture
def open_engine(copier: GatedCopier) -> Iterator[Engines]:
    engines = Engines(copier)
    yield engines
    copier.gate.set()
    for engine in engines.made:
        engine.close()


def load(op_id: int, *ids: int) -> TransferOp:
    return TransferOp(op_id, ("r",), Blocks.of(Tier.HOST, ids), Blocks.of(Tier.DEVICE, ids))


def offload(op_id: int, *ids: int) -> TransferOp:
    return TransferOp(op_id, ("r",), Blocks.of(Tier.DEVICE, ids), Blocks.of(Tier.HOST, ids))


def results_of(engine: CpuTransferEngine, *op_ids: int) -> dict[int, OpResult]:
    engine.wait(op_ids)
    results = engine.poll()
    assert len({result.op_id for result in results}) == len(results)
    return {result.op_id: result for result in results}


def test_an_op_ends_with_its_bytes_and_is_handed_out_once(
    copier: GatedCopier, open_engine: Engines
) -> None:
    copier.gate.set()
    engine = open_engine()
    engine.submit(load(1, 3, 4))
    result = results_of(engine, 1)[1]
    assert (result.ok, result.num_bytes, result.seconds >= 0) == (True, 20, True)
    assert engine.poll() == []


def test_submit_and_poll_do_not_wait(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.wait_begun()
    engine.submit(offload(2, 1))
    assert engine.poll() == []


def test_the_direction_and_ids_are_those_of_the_op(
    copier: GatedCopier, open_engine: Engines
) -> None:
    copier.gate.set()
    engine = open_engine()
    engine.submit(TransferOp(1, ("r",), Blocks.of(Tier.HOST, [7]), Blocks.of(Tier.DEVICE, [3])))
    results_of(engine, 1)
    engine.submit(TransferOp(2, ("r",), Blocks.of(Tier.DEVICE, [4]), Blocks.of(Tier.HOST, [8])))
    results_of(engine, 2)
    assert copier.copies == [([3], [7], False), ([4], [8], True)]


def test_onboards_overtake_offloads_that_have_not_begun(
    copier: GatedCopier, open_engine: Engines
) -> None:
    engine = open_engine()
    engine.submit(offload(1, 1))
    copier.wait_begun()
    engine.submit(offload(2, 2))
    engine.submit(load(3, 3))
    copier.gate.set()
    results: list[OpResult] = []
    while len(results) < 3:
        engine.wait_any(PATIENCE_SECONDS)
        results += engine.poll()
    assert [ids for ids, _, _ in copier.copies] == [[1], [3], [2]]


def test_an_offload_that_is_waited_for_overtakes_onboards(
    copier: GatedCopier, open_engine: Engines
) -> None:
    engine = open_engine()
    engine.submit(load(1, 1))
    copier.wait_begun()
    engine.submit(load(2, 2))
    engine.submit(offload(3, 3))
    waiting = threading.Thread(target=engine.wait, args=({3},))
    waiting.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: not engine._down, PATIENCE_SECONDS)
    copier.gate.set()
    waiting.join(PATIENCE_SECONDS)
    results_of(engine, 1, 2)
    assert [ids for ids, _, _ in copier.copies] == [[1], [3], [2]]


def test_several_ops_are_in_flight_at_once(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine(num_threads=3)
    for op_id in (1, 2, 3):
        engine.submit(load(op_id, op_id))
    copier.wait_begun(3)
    copier.gate.set()
    assert set(results_of(engine, 1, 2, 3)) == {1, 2, 3}


def test_an_op_is_cut_into_pieces_that_cover_it_once(
    copier: GatedCopier, open_engine: Engines
) -> None:
    copier.gate.set()
    engine = open_engine(piece_blocks=3)
    engine.submit(load(1, *range(8)))
    assert results_of(engine, 1)[1].num_bytes == 80
    assert [ids for ids, _, _ in copier.copies] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_an_op_is_shared_among_the_threads(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine(num_threads=2)
    engine.submit(load(1, *range(4)))
    copier.wait_begun(2)
    copier.gate.set()
    results_of(engine, 1)
    assert sorted(ids for ids, _, _ in copier.copies) == [[0, 1], [2, 3]]


def test_pieces_are_sized_by_bytes_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PIECE_BYTES", 25)
    copier = GatedCopier()
    copier.gate.set()
    engine = CpuTransferEngine(copier, num_threads=1)
    engine.open()
    engine.submit(load(1, *range(4)))
    results_of(engine, 1)
    engine.close()
    assert [len(ids) for ids, _, _ in copier.copies] == [2, 2]


def test_a_copy_that_raises_fails_its_op_once_and_not_the_engine(
    copier: GatedCopier, open_engine: Engines
) -> None:
    copier.gate.set()
    copier.bad = {0, 5}
    engine = open_engine(num_threads=2, piece_blocks=1)
    engine.submit(load(1, *range(6)))
    result = results_of(engine, 1)[1]
    assert (result.error, result.num_bytes) == (
        "ValueError: planned failure",
        4 * copier.block_bytes,
    )
    copier.bad = set()
    engine.submit(load(2, 1))
    assert results_of(engine, 2)[2].ok


def test_a_failed_op_ends_only_after_its_last_piece(
    copier: GatedCopier, open_engine: Engines
) -> None:
    """Until then a thread may still write its blocks."""
    copier.bad = {0}
    engine = open_engine(num_threads=2, piece_blocks=1)
    engine.submit(load(1, 0, 1))
    copier.wait_begun(2)
    assert engine.poll() == []
    copier.gate.set()
    assert not results_of(engine, 1)[1].ok


def test_an_op_without_blocks_ends_at_once(open_engine: Engines) -> None:
    engine = open_engine()
    engine.submit(load(1))
    assert [(r.op_id, r.ok, r.num_bytes) for r in engine.poll()] == [(1, True, 0)]


def test_wait_does_not_wait_for_others(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.wait_begun()
    engine.wait([])
    engine.wait([99])
    assert engine.poll() == []


def test_wait_returns_when_the_op_has_ended_and_leaves_its_result(
    copier: GatedCopier, open_engine: Engines
) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.wait_begun()
    opener = threading.Timer(0, copier.gate.set)
    opener.start()
    engine.wait([1])
    assert [result.op_id for result in engine.poll()] == [1]
    opener.join()


def test_wait_any_returns_with_the_first_result(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.gate.set()
    engine.wait_any(PATIENCE_SECONDS)
    assert [result.op_id for result in engine.poll()] == [1]


def test_wait_any_returns_with_nothing_in_flight(open_engine: Engines) -> None:
    open_engine().wait_any(PATIENCE_SECONDS)


def test_wait_any_returns_after_its_time(copier: GatedCopier, open_engine: Engines) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.wait_begun()
    engine.wait_any(0.0)
    assert engine.poll() == []


def test_close_ends_what_has_begun_and_fails_what_has_not(
    copier: GatedCopier, open_engine: Engines
) -> None:
    engine = open_engine()
    engine.submit(load(1, 0))
    copier.wait_begun()
    engine.submit(load(2, 1))
    closing = threading.Thread(target=engine.close)
    closing.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine._is_closing, PATIENCE_SECONDS)
    copier.gate.set()
    closing.join(PATIENCE_SECONDS)
    assert not closing.is_alive()
    assert [ids for ids, _, _ in copier.copies] == [[0]]
    assert {result.op_id: result.ok for result in engine.poll()} == {1: True, 2: False}
    engine.wait([1, 2])


def test_close_may_be_called_again(open_engine: Engines) -> None:
    engine = open_engine()
    engine.close()
    engine.close()


def test_an_op_between_host_and_disk_fails_where_there_is_no_disk(
    copier: GatedCopier, open_engine: Engines
) -> None:
    engine = open_engine(num_threads=1)
    blocks = Blocks.of(Tier.DISK, [0]), Blocks.of(Tier.HOST, [0])
    engine.submit(TransferOp(1, (), *blocks, bytes(KEY_BYTES)))
    assert "without a disk tier" in results_of(engine, 1)[1].error
    assert not copier.copies
