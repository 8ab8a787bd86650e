"""Bandwidth of the disk tier's engines, beside plain reads and writes of the same bytes.

An engine does all that it does in service: checksums, records in the index, its own threads. Host
blocks are shuffled; on disk they are neighbours, as the pool hands them out, and in one more column
shuffled too. The plain loop has neither: 1, 2 or 4 threads, each over one contiguous part of the
same file and memory, with the same alignment and flags, in calls as large as an engine's pieces.

Buffered writes go to the page cache and are brought to disk outside the timed part; buffered reads
begin with the file out of the page cache.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Figure, Ratio, Result, at_least, rate_figure, text_table
from benchmarks.timing import Timed, interleaved, wall_clock
from kvbm_core.build import DISK_ENGINES
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ConfigError, StorageError
from kvbm_core.host_memory import HostArena
from kvbm_core.storage.disk import DiskOptions, DiskStore
from kvbm_core.transfer.disk import PIECE_BYTES, DiskTransferEngine
from kvbm_core.types import KEY_BYTES, Blocks, Tier, TransferOp
from kvbm_core.wire import GENERATION_BYTES

TOTAL_BYTES = 2**27
BLOCK_KIB = (16, 64, 256, 1024, 4096)
PLAIN_THREADS = (1, 2, 4)
ROUNDS, QUICK_ROUNDS = 7, 1
GB = 1e9
AIM = at_least(0.9)
SHUFFLED = ", shuffled on disk"

_op_ids = itertools.count(1)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    block_kib: int
    is_write: bool
    is_direct: bool

    @property
    def file(self) -> str:
        return "O_DIRECT" if self.is_direct else "buffered"

    def __str__(self) -> str:
        return f"{self.block_kib} KiB, {'write' if self.is_write else 'read'}, {self.file}"


@dataclass(frozen=True)
class Place:
    """An engine with its file and its host memory. keys: of the blocks, one after another."""

    store: DiskStore
    engine: DiskTransferEngine
    host: torch.Tensor
    keys: bytes

    @property
    def num_blocks(self) -> int:
        return self.store.num_blocks


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure every case in a folder below `scratch`."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    scratch.mkdir(parents=True, exist_ok=True)
    settings = {"total_bytes": TOTAL_BYTES, "rounds": rounds, "filesystem": _filesystem(scratch)}
    result = Result("disk", settings)
    absent: dict[str, str] = {}
    rows: list[list[str]] = []
    for case, seconds in _measure(absent, rounds, scratch):
        figures = {name: _figure(case, name, taken) for name, taken in seconds.items()}
        result.figures += figures.values()
        for name in (name for name in DISK_ENGINES if name in figures):
            found = list(_ratios(case, figures, name))
            result.ratios += found
            rows.append(_row(case, name, figures, found))
    result.settings["left out"] = absent
    result.table = "\n".join([text_table(_header(), rows), *_notes(absent)])
    return result


def _measure(
    absent: dict[str, str], rounds: int, scratch: Path
) -> Iterator[tuple[Case, dict[str, list[float]]]]:
    """Each case with the seconds of each method; adds to `absent` what does not work here."""
    for block_kib, is_direct in itertools.product(BLOCK_KIB, (True, False)):
        with ExitStack() as stack:
            first = Case(block_kib, is_write=True, is_direct=is_direct)
            places = _places(first, absent, scratch, stack)
            if not places:
                continue
            for place in places.values():
                _check(place)
            threads = stack.enter_context(ThreadPoolExecutor(max(PLAIN_THREADS)))
            for case in (first, Case(block_kib, is_write=False, is_direct=is_direct)):
                yield case, interleaved(_methods(case, places, threads), rounds)


def _places(
    case: Case, absent: dict[str, str], scratch: Path, stack: ExitStack
) -> dict[str, Place]:
    """Every engine that works here on such a file."""
    places: dict[str, Place] = {}
    for name in DISK_ENGINES:
        try:
            places[name] = stack.enter_context(_place(name, case, scratch))
        except (ConfigError, StorageError, ImportError) as problem:
            absent[f"{name}, {case.file}"] = str(problem)
    return places


@contextmanager
def _place(engine: str, case: Case, scratch: Path) -> Iterator[Place]:
    """An open engine over a file and host memory of TOTAL_BYTES of random bytes."""
    block_bytes = case.block_kib * 1024
    num_blocks = TOTAL_BYTES // block_bytes
    config = KvbmConfig(disk_engine=engine)
    arena = HostArena(num_blocks, block_bytes, pinned=False)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix="disk-"))
        arena.open()
        stack.callback(arena.close)
        arena.tensor.view(-1).view(torch.int64).random_()
        store = _store(Path(directory), num_blocks, block_bytes, direct=case.is_direct)
        stack.callback(store.close)
        if case.is_direct and not store.is_direct:
            raise StorageError("the filesystem has no O_DIRECT")
        threads = config.max_concurrent_transfers
        io = DISK_ENGINES[engine](config, store, arena.tensor)
        disk = DiskTransferEngine(store, arena.tensor, io, num_threads=threads)
        disk.open()
        stack.callback(disk.close)
        keys = random.Random(0).randbytes(num_blocks * KEY_BYTES)
        yield Place(store, disk, arena.tensor, keys)


def _store(directory: Path, num_blocks: int, block_bytes: int, *, direct: bool) -> DiskStore:
    store = DiskStore(
        DiskOptions(directory, direct=direct, persist=False),
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        identity="benchmark",
        engine="benchmark",
        rank=0,
        num_ranks=1,
    )
    store.open()
    store.index.begin_anew(bytes(GENERATION_BYTES), persists=False)
    return store


def _methods(case: Case, places: dict[str, Place], threads: ThreadPoolExecutor) -> dict[str, Timed]:
    """Method → one write or read of TOTAL_BYTES by it."""
    methods: dict[str, Timed] = {}
    first = next(iter(places.values()))
    for count in PLAIN_THREADS:
        methods[_plain(count)] = _timed(case, first, _plain_loop(case, first, threads, count))
    for name, place in places.items():
        neighbours = list(range(place.num_blocks))
        shuffled = random.Random(1).sample(neighbours, place.num_blocks)
        methods[name] = _timed(case, place, _through_engine(case, place, neighbours))
        methods[name + SHUFFLED] = _timed(case, place, _through_engine(case, place, shuffled))
    return methods


def _timed(case: Case, place: Place, prepare: Callable[[], Callable[[], object]]) -> Timed:
    """Seconds of what `prepare` returns; the page cache is made ready before, and clean after."""

    def once() -> float:
        action = prepare()
        if not case.is_direct and not case.is_write:
            os.posix_fadvise(place.store.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        start = wall_clock()
        action()
        seconds = wall_clock() - start
        os.fdatasync(place.store.fd)
        return seconds

    return once


def _plain_loop(
    case: Case, place: Place, threads: ThreadPoolExecutor, num_threads: int
) -> Callable[[], Callable[[], object]]:
    """pread or pwrite in as many contiguous parts as threads, PIECE_BYTES a call."""
    memory = memoryview(place.host.numpy()).cast("B")
    call = os.pwritev if case.is_write else os.preadv
    part_bytes = TOTAL_BYTES // num_threads

    def part(start: int) -> None:
        for at in range(start, start + part_bytes, PIECE_BYTES):
            end = min(at + PIECE_BYTES, start + part_bytes)
            if call(place.store.fd, [memory[at:end]], at) != end - at:
                raise RuntimeError("the plain loop moved fewer bytes than asked for")

    starts = range(0, TOTAL_BYTES, part_bytes)
    return lambda: lambda: list(threads.map(part, starts))


def _through_engine(
    case: Case, place: Place, disk_ids: list[int]
) -> Callable[[], Callable[[], object]]:
    """All blocks in one op. A read is prepared by a write to the same places, which is untimed."""
    host_ids = random.Random(2).sample(range(place.num_blocks), place.num_blocks)

    def prepare() -> Callable[[], object]:
        if not case.is_write:
            _move(place, host_ids, disk_ids, is_write=True)
            os.fdatasync(place.store.fd)
        return lambda: _move(place, host_ids, disk_ids, is_write=case.is_write)

    return prepare


def _move(place: Place, host_ids: list[int], disk_ids: list[int], *, is_write: bool) -> None:
    host, disk = Blocks.of(Tier.HOST, host_ids), Blocks.of(Tier.DISK, disk_ids)
    src, dst = (host, disk) if is_write else (disk, host)
    op = TransferOp(next(_op_ids), (), src, dst, place.keys)
    place.engine.submit(op)
    place.engine.wait([op.op_id])
    (result,) = place.engine.poll()
    if not result.ok:
        raise RuntimeError(f"the engine's transfer failed: {result.error}")


def _check(place: Place) -> None:
    """Raise where the engine does not bring back what it stored."""
    before = place.host.clone()
    order = list(range(place.num_blocks))
    _move(place, order, order, is_write=True)
    place.host.zero_()
    _move(place, order, order, is_write=False)
    if not torch.equal(place.host, before):
        raise RuntimeError("blocks came back from disk with other bytes")


def _filesystem(directory: Path) -> str:
    """Type of the filesystem that holds the directory; empty where the system does not say."""
    mounts = Path("/proc/self/mounts")
    found = ("", "")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, mount, kind, *_ = line.split()
        if directory.resolve().is_relative_to(mount) and len(mount) >= len(found[0]):
            found = mount, kind
    return found[1]


def _plain(num_threads: int) -> str:
    return f"plain, {num_threads} thread{'s' if num_threads > 1 else ''}"


def _figure(case: Case, method: str, seconds: list[float]) -> Figure:
    return rate_figure(f"{case}: {method}", "GB/s", TOTAL_BYTES / GB, seconds)


def _ratios(case: Case, figures: dict[str, Figure], engine: str) -> Iterator[Ratio]:
    """The engine to the best plain loop, by best and by median; the first has the aim."""
    plain = [figures[_plain(count)] for count in PLAIN_THREADS]
    best, median = max(f.best for f in plain), max(f.median for f in plain)
    name = f"{case}: {engine}/plain"
    yield Ratio(name, figures[engine].best / best, AIM)
    yield Ratio(f"{name}, median", figures[engine].median / median)
    shuffled = figures[engine + SHUFFLED]
    yield Ratio(f"{name}{SHUFFLED}", shuffled.best / best)
    yield Ratio(f"{name}{SHUFFLED}, median", shuffled.median / median)


def _header() -> list[str]:
    columns = [f"plain x{count} GB/s" for count in PLAIN_THREADS]
    columns += ["engine", "shuffled", "engine/best plain", "median", "aim", "met"]
    return ["block, direction, file, engine", *columns, "shuffled/plain", "median"]


def _row(case: Case, engine: str, figures: dict[str, Figure], ratios: list[Ratio]) -> list[str]:
    names = [*map(_plain, PLAIN_THREADS), engine, engine + SHUFFLED]
    speeds = [f"{figures[name].best:.2f}" for name in names]
    best, median, shuffled, shuffled_median = (f"{ratio.value:.2f}" for ratio in ratios)
    cells = [best, median, str(AIM), ratios[0].verdict, shuffled, shuffled_median]
    return [f"{case}, {engine}", *speeds, *cells]


def _notes(absent: dict[str, str]) -> Iterator[str]:
    for name, problem in absent.items():
        yield f"{name}: left out, {problem}"
