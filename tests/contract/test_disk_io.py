"""One suite over every built-in way of disk I/O: threads, and NIXL with each of its queues."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kvbm_core.build import DISK_ENGINES
from kvbm_core.config import KvbmConfig
from kvbm_core.host_memory import HostArena
from kvbm_core.storage.disk import DiskOptions, DiskStore
from kvbm_core.transfer import disk, nixl_posix
from kvbm_core.transfer.disk import DiskTransferEngine, PreadIo
from kvbm_core.types import BlockHash, BlockId, Blocks, OpResult, Tier, TransferOp, unpack_ids
from kvbm_core.wire import GENERATION_BYTES

NUM_BLOCKS, BLOCK_BYTES = 64, 8192
GENERATION = b"g" * GENERATION_BYTES
WAIT_SECONDS = 60
WAYS = {"threads": "threads", "io_uring": "nixl", "AIO": "nixl"}


def key_of(disk_id: BlockId) -> BlockHash:
    return BlockHash(hashlib.sha256(str(disk_id).encode()).digest())


@dataclass
class Bench:
    """An engine between `host` and `store`; `content` is what host held at first."""

    store: DiskStore
    arena: HostArena
    engine: DiskTransferEngine
    content: torch.Tensor
    num_ops: int = 0
    found: list[OpResult] = field(default_factory=list)

    @property
    def host(self) -> torch.Tensor:
        return self.arena.tensor

    @property
    def data(self) -> Path:
        return self.store.path

    def op(
        self, src: Blocks, dst: Blocks, keys: Callable[[BlockId], BlockHash] = key_of
    ) -> TransferOp:
        self.num_ops += 1
        on_disk = src if src.tier is Tier.DISK else dst
        return TransferOp(self.num_ops, ("r",), src, dst, b"".join(map(keys, on_disk.ids())))

    def down(self, host_ids: Sequence[BlockId], disk_ids: Sequence[BlockId]) -> TransferOp:
        return self.op(Blocks.of(Tier.HOST, host_ids), Blocks.of(Tier.DISK, disk_ids))

    def up(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> TransferOp:
        return self.op(Blocks.of(Tier.DISK, disk_ids), Blocks.of(Tier.HOST, host_ids))

    def submit(self, op: TransferOp) -> int:
        self.engine.submit(op)
        return op.op_id

    def results(self, count: int) -> dict[int, OpResult]:
        while len(self.found) < count:
            self.engine.wait_any(WAIT_SECONDS)
            self.found += self.engine.poll()
        found, self.found = self.found, []
        assert len(found) == count
        return {result.op_id: result for result in found}

    def run(self, op: TransferOp) -> OpResult:
        self.submit(op)
        return self.results(1)[op.op_id]

    def fill(self, disk_ids: Sequence[BlockId]) -> None:
        """Store host block i as disk block i, then forget all of host."""
        assert self.run(self.down(disk_ids, disk_ids)).ok
        self.host.zero_()

    def holds(self, host_ids: Sequence[BlockId], of: Sequence[BlockId]) -> bool:
        return torch.equal(self.host[list(host_ids)], self.content[list(of)])


Maker = Callable[..., Bench]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return request.param == "direct"


@pytest.fixture
def make(
    way: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Maker]:
    if way in nixl_posix._QUEUES:
        monkeypatch.setattr(nixl_posix, "_QUEUES", {way: nixl_posix._QUEUES[way]})
    open_ones: list[Bench] = []

    def bench(
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        num_threads: int = 4,
        piece_blocks: int | None = None,
    ) -> Bench:
        store = DiskStore(
            DiskOptions(tmp_path, direct=direct, zerofill=True),
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            identity="test",
            engine="test",
            rank=0,
            num_ranks=1,
        )
        store.open()
        store.index.begin_anew(GENERATION, persists=True)
        arena = HostArena(num_blocks, block_bytes, pinned=False)
        arena.open()
        arena.tensor.random_(0, 256, generator=torch.Generator().manual_seed(0))
        io = DISK_ENGINES[WAYS[way]](KvbmConfig(), store, arena.tensor)
        engine = DiskTransferEngine(
            store, arena.tensor, io, num_threads=num_threads, piece_blocks=piece_blocks
        )
        engine.open()
        open_ones.append(Bench(store, arena, engine, arena.tensor.clone()))
        return open_ones[-1]

    yield bench
    for one in open_ones:
        one.engine.close()
        assert not one.engine.num_threads_left


@pytest.fixture
def bench(make: Maker) -> Bench:
    return make()


@pytest.mark.parametrize(
    ("disk_ids", "host_ids"),
    [
        ([7], [3]),
        ([4, 5, 6, 7], [20, 21, 22, 23]),
        ([4, 5, 6, 7], [23, 21, 22, 20]),
        ([9, 2, 3, 60, 4, 63, 0], [1, 7, 8, 0, 9, 40, 63]),
        (range(NUM_BLOCKS), range(NUM_BLOCKS - 1, -1, -1)),
    ],
    ids=["one", "neighbours", "neighbours-on-disk-only", "scattered", "all"],
)
def test_blocks_come_back_as_they_went(
    bench: Bench, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]
) -> None:
    written = bench.run(bench.down(host_ids, disk_ids))
    assert (written.ok, written.num_bytes) == (True, len(host_ids) * BLOCK_BYTES)
    bench.host.zero_()
    read = bench.run(bench.up(disk_ids, host_ids))
    assert (read.ok, read.num_bytes) == (True, len(host_ids) * BLOCK_BYTES)
    assert bench.holds(host_ids, host_ids)
    others = sorted(set(range(NUM_BLOCKS)) - set(host_ids))
    assert not bench.host[others].any()


def test_blocks_may_come_to_other_places(bench: Bench) -> None:
    bench.fill([10, 11, 12])
    assert bench.run(bench.up([12, 10, 11], [5, 6, 50])).ok
    assert bench.holds([5, 6, 50], [12, 10, 11])


def test_blocks_with_padding_between_them_come_back(make: Maker) -> None:
    bench = make(block_bytes=5000)
    bench.fill([3, 4, 5, 9])
    assert bench.run(bench.up([3, 4, 5, 9], [3, 4, 5, 9])).ok
    assert bench.holds([3, 4, 5, 9], [3, 4, 5, 9])


def test_an_op_of_many_pieces_is_one_result(make: Maker) -> None:
    bench = make(piece_blocks=3)
    bench.fill(range(NUM_BLOCKS))
    host_ids = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    result = bench.run(bench.up(range(NUM_BLOCKS), host_ids))
    assert (result.ok, result.num_bytes) == (True, NUM_BLOCKS * BLOCK_BYTES)
    assert bench.holds(host_ids, range(NUM_BLOCKS))


def test_a_piece_of_more_blocks_than_a_queue_has_places(make: Maker) -> None:
    count = nixl_posix.POOL_SIZE + 100
    bench = make(num_blocks=2 * count, block_bytes=4096, num_threads=1, piece_blocks=count)
    disk_ids = range(0, 2 * count, 2)
    bench.fill(disk_ids)
    assert bench.run(bench.up(disk_ids, disk_ids)).ok
    assert bench.holds(disk_ids, disk_ids)


def test_both_directions_at_once(make: Maker) -> None:
    bench = make(piece_blocks=2)
    half = NUM_BLOCKS // 2
    bench.fill(range(half))
    bench.host[half:] = bench.content[half:]
    for start in range(0, half, 4):
        below, above = range(start, start + 4), range(half + start, half + start + 4)
        bench.submit(bench.up(below, below))
        bench.submit(bench.down(above, above))
    assert all(result.ok for result in bench.results(half // 2).values())
    assert bench.holds(range(half), range(half))
    bench.host[half:] = 0
    assert bench.run(bench.up(range(half, NUM_BLOCKS), range(half, NUM_BLOCKS))).ok
    assert bench.holds(range(NUM_BLOCKS), range(NUM_BLOCKS))


def test_a_flipped_byte_fails_its_block_and_no_other(bench: Bench) -> None:
    ids = range(8, 16)
    bench.fill(ids)
    flip(bench.data, 10 * BLOCK_BYTES + 77)
    result = bench.run(bench.up(ids, ids))
    assert list(unpack_ids(result.failed)) == [2]
    assert result.error == "disk block 10 has a wrong checksum"
    assert result.num_bytes == 7 * BLOCK_BYTES
    good = [i for i in ids if i != 10]
    assert bench.holds(good, good)


def test_without_the_flipped_byte_no_block_fails(bench: Bench) -> None:
    ids = range(8, 16)
    bench.fill(ids)
    flip(bench.data, 10 * BLOCK_BYTES + 77)
    flip(bench.data, 10 * BLOCK_BYTES + 77)
    assert bench.run(bench.up(ids, ids)).ok


def test_a_block_that_failed_is_not_found_again(bench: Bench) -> None:
    bench.fill([1, 2, 3])
    flip(bench.data, 2 * BLOCK_BYTES)
    bench.run(bench.up([1, 2, 3], [1, 2, 3]))
    assert bench.store.index.get(2) is None
    assert bench.store.index.get(1) is not None


def test_the_record_of_another_key_fails_its_block(bench: Bench) -> None:
    bench.fill([1, 2, 3])
    src, dst = Blocks.of(Tier.DISK, [1, 2, 3]), Blocks.of(Tier.HOST, [1, 2, 3])
    result = bench.run(bench.op(src, dst, lambda i: key_of(99 if i == 3 else i)))
    assert list(unpack_ids(result.failed)) == [2]
    assert result.error == "disk block 3 does not hold what was written there"
    assert bench.holds([1, 2], [1, 2])


def test_a_block_that_was_never_written_fails(bench: Bench) -> None:
    result = bench.run(bench.up([5], [5]))
    assert (result.ok, result.num_bytes) == (False, 0)


def test_blocks_beyond_the_end_of_the_file_fail_and_the_engine_goes_on(bench: Bench) -> None:
    bench.fill(range(NUM_BLOCKS))
    os.truncate(bench.data, 40 * BLOCK_BYTES)
    for _ in range(3):
        result = bench.run(bench.up(range(NUM_BLOCKS), range(NUM_BLOCKS)))
        failed = set(unpack_ids(result.failed)) or set(range(NUM_BLOCKS))
        assert failed >= set(range(40, NUM_BLOCKS))
        good = sorted(set(range(NUM_BLOCKS)) - failed)
        assert bench.holds(good, good)
    bench.host.copy_(bench.content)
    bench.fill(range(NUM_BLOCKS))
    assert bench.run(bench.up(range(NUM_BLOCKS), range(NUM_BLOCKS))).ok
    assert bench.holds(range(NUM_BLOCKS), range(NUM_BLOCKS))


def test_a_descriptor_that_can_only_read_fails_writes(bench: Bench) -> None:
    bench.fill(range(8))
    replace(bench.store.fd, bench.data, os.O_RDONLY)
    bench.host.copy_(bench.content)
    result = bench.run(bench.down(range(8, 16), range(8, 16)))
    assert (result.ok, result.num_bytes, result.failed) == (False, 0, b"")
    assert all(bench.store.index.get(i) is None for i in range(8, 16))
    assert bench.run(bench.up(range(8), range(8))).ok
    assert bench.holds(range(8), range(8))


def test_a_descriptor_that_is_not_open_fails_both_ways(bench: Bench) -> None:
    bench.fill(range(8))
    replace(bench.store.fd, bench.data, os.O_PATH)  # EBADF, without a number that others may get
    down, up = bench.down(range(8, 16), range(8, 16)), bench.up(range(8), range(8))
    bench.submit(down)
    bench.submit(up)
    results = bench.results(2)
    assert not any(result.ok or result.num_bytes for result in results.values())


def test_an_op_out_of_range_fails_alone(bench: Bench) -> None:
    size = bench.data.stat().st_size
    bad = [
        bench.submit(bench.down([0], [NUM_BLOCKS])),
        bench.submit(bench.down([NUM_BLOCKS], [0])),
        bench.submit(bench.up([NUM_BLOCKS], [0])),
    ]
    good = bench.submit(bench.down([1], [1]))
    results = bench.results(4)
    assert [results[op_id].ok for op_id in (*bad, good)] == [False, False, False, True]
    assert bench.data.stat().st_size == size
    assert bench.store.index.get(1) is not None


def test_closing_ends_every_op_exactly_once(make: Maker) -> None:
    bench = make(piece_blocks=1)
    bench.fill(range(NUM_BLOCKS))
    wanted = [bench.submit(bench.up(range(32), range(32))) for _ in range(50)]
    wanted += [bench.submit(bench.down(range(32, 64), range(32, 64))) for _ in range(50)]
    bench.engine.close()
    ended = [result.op_id for result in bench.engine.poll()]
    assert sorted(ended) == sorted(wanted)
    assert bench.engine.poll() == []


def test_an_op_without_blocks_ends_well(bench: Bench) -> None:
    assert bench.run(bench.up([], [])).ok


def test_closing_gives_back_descriptors(make: Maker) -> None:
    bench = make()  # the first one may load what stays
    bench.fill(range(8))
    bench.engine.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    bench = make()
    bench.fill(range(8))
    bench.engine.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closing_waits_for_hanging_threads_once_not_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    gate, hanging = threading.Event(), threading.Semaphore(0)
    join = threading.Thread.join

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        assert timeout is not None
        waited.append(timeout)
        join(thread, timeout)

    class Hanging(PreadIo):
        def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
            hanging.release()
            gate.wait()
            return super().read(disk_ids, host_ids)

    monkeypatch.setattr(disk, "JOIN_SECONDS", 0.2)
    monkeypatch.setattr(threading.Thread, "join", joined)
    store = DiskStore(
        DiskOptions(tmp_path),
        num_blocks=8,
        block_bytes=4096,
        identity="test",
        engine="test",
        rank=0,
        num_ranks=1,
    )
    store.open()
    host = torch.zeros((8, 4096), dtype=torch.uint8)
    engine = DiskTransferEngine(store, host, Hanging(store, host), num_threads=4, piece_blocks=1)
    engine.open()
    engine.submit(
        TransferOp(
            1, (), Blocks.of(Tier.DISK, range(4)), Blocks.of(Tier.HOST, range(4)), bytes(128)
        )
    )
    for _ in range(4):
        hanging.acquire()
    engine.close()
    assert engine.num_threads_left >= 4
    assert store.fd >= 0
    assert sum(waited[:4]) <= 2 * disk.JOIN_SECONDS
    gate.set()
    for thread in engine._threads:
        join(thread)
    store.close()


def flip(path: Path, offset: int) -> None:
    """Change one byte, on the disk too."""
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0xFF]), offset)
    os.fsync(fd)
    os.close(fd)


def replace(fd: int, path: Path, flags: int) -> None:
    """Put another description behind the number."""
    other = os.open(path, flags)
    os.dup2(other, fd, inheritable=False)
    os.close(other)
