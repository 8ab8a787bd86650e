"""Which way of disk I/O is the fastest on this disk: each is tried out for a moment at start-up.

Lives here: the measurement and the choice. Does not live here: what can be chosen (see
`kvbm_core.build`).
Invariant: neither the store's blocks nor the arena are touched: what is moved goes between memory
and a file of the probe's own, which has no name any more once it is open.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvbm_core.storage.claim import PREFIX
from kvbm_core.storage.disk import DiskStore, fallocate
from kvbm_core.transfer.disk import BlockFile, BlockIo, lanes_of
from kvbm_core.transfer.threads import Piece, ThreadEngine
from kvbm_core.types import Blocks, Tier, TransferOp

logger = logging.getLogger(__name__)

REFERENCE = "threads"
MIN_GAIN = 1.1
CANDIDATE_SECONDS = 0.3
ROUND_BYTES = 4 * 2**20
MAX_ROUNDS = 8
ANSWER_SECONDS = 5.0

_Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
IoFactory = Callable[[BlockFile, torch.Tensor], BlockIo]


def fastest(
    candidates: Mapping[str, IoFactory],
    store: DiskStore,
    *,
    num_threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """The candidate to use: REFERENCE, which must be one, unless another gains enough.

    Rounds are interleaved and the best one of each direction counts. A candidate that fails, hangs
    or brings other bytes is out.
    """
    try:
        with _scratch_file(store) as file:
            seconds = _measure(candidates, file, num_threads, clock)
    except OSError as error:
        logger.warning("kvbm: disk engine %s, unmeasured: %s", REFERENCE, error)
        return REFERENCE
    best = min(seconds, key=lambda name: sum(seconds[name]), default=REFERENCE)
    if REFERENCE in seconds and sum(seconds[REFERENCE]) < MIN_GAIN * sum(seconds[best]):
        best = REFERENCE
    megabytes = _num_blocks(store) * store.block_bytes / 1e6
    measured = (
        f"{name} writes {megabytes / down:.0f}, reads {megabytes / up:.0f} MB/s"
        for name, (down, up) in seconds.items()
    )
    logger.info("kvbm: disk engine %s (%s)", best, "; ".join(measured))
    return best


@dataclass
class _Scratch:
    """A BlockFile. is_in_use: by a thread that hangs."""

    fd: int
    extent_bytes: int
    block_bytes: int
    is_in_use: bool = False


class _Trial:
    """One candidate at work between a scratch file and memory of its own."""

    def __init__(self, make: IoFactory, file: _Scratch, num_threads: int, count: int) -> None:
        self._file = file
        memory = torch.frombuffer(mmap.mmap(-1, count * file.block_bytes), dtype=torch.uint8)
        self._rows: _Bytes = memory.numpy().reshape(count, -1)
        self._io = make(file, memory.view(count, -1))
        self._engine = ThreadEngine(
            _Pieces(self._io, file.block_bytes),
            lanes_of(num_threads),
            piece_blocks=count,
            name="disk-probe",
            join_seconds=ANSWER_SECONDS,
        )
        self._engine.open()
        self._host = Blocks.of(Tier.HOST, range(count))
        # Every other one: a cache that is in use has few neighbours.
        self._disk = Blocks.of(Tier.DISK, range(0, 2 * count, 2))

    def round(self, content: _Bytes, clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds to write and to read. Raises OSError where the content isn't what comes back."""
        self._rows[:] = content  # by numpy: torch's own threads would wait for busy cores
        down = self._run(TransferOp(1, (), self._host, self._disk), clock)
        self._rows[:] = 0
        up = self._run(TransferOp(2, (), self._disk, self._host), clock)
        if not np.array_equal(self._rows, content):
            raise OSError("other bytes came back than were written")
        return down, up

    def close(self) -> None:
        """A thread that hangs keeps the memory and its I/O."""
        self._engine.close()
        if self._engine.num_threads_left:
            self._file.is_in_use = True
        else:
            self._io.close()

    def _run(self, op: TransferOp, clock: Callable[[], float]) -> float:
        start = clock()
        self._engine.submit(op)
        self._engine.wait_any(ANSWER_SECONDS)
        results = self._engine.poll()
        if not results:
            raise OSError(f"no answer within {ANSWER_SECONDS:.0f} s")
        if results[0].error:
            raise OSError(results[0].error)
        return clock() - start


class _Pieces:
    """PieceWork: bare I/O."""

    def __init__(self, io: BlockIo, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self._io = io

    def order(self, op: TransferOp) -> Sequence[int]:
        return range(len(op.src))

    def run(self, piece: Piece) -> dict[int, str]:
        move = self._io.read if piece.op.is_upward else self._io.write
        return move(*_disk_first(piece))


def _disk_first(piece: Piece) -> tuple[Sequence[int], Sequence[int]]:
    if piece.op.is_upward:
        return piece.src_ids, piece.dst_ids
    return piece.dst_ids, piece.src_ids


def _measure(
    candidates: Mapping[str, IoFactory],
    file: _Scratch,
    num_threads: int,
    clock: Callable[[], float],
) -> dict[str, tuple[float, float]]:
    """Best seconds to write and to read, of those that work."""
    count = _num_blocks(file)
    content: _Bytes = np.frombuffer(os.urandom(count * file.block_bytes), np.uint8).copy()
    content = content.reshape(count, -1)
    best: dict[str, tuple[float, float]] = {}
    trials = _start(candidates, file, num_threads, count)
    spent = dict.fromkeys(trials, 0.0)
    try:
        for _ in range(MAX_ROUNDS):
            for name in [name for name in trials if spent[name] < CANDIDATE_SECONDS]:
                content += 1  # what another one wrote before doesn't count
                start = clock()
                try:
                    down, up = trials[name].round(content, clock)
                except OSError as error:
                    _rule_out(name, error)
                    best.pop(name, None)
                    spent[name] = CANDIDATE_SECONDS
                    continue
                spent[name] += clock() - start
                known = best.get(name, (down, up))
                best[name] = min(known[0], down), min(known[1], up)
    finally:
        for trial in trials.values():
            trial.close()
    return best


def _start(
    candidates: Mapping[str, IoFactory], file: _Scratch, num_threads: int, count: int
) -> dict[str, _Trial]:
    trials = {}
    for name, make in candidates.items():
        try:
            trials[name] = _Trial(make, file, num_threads, count)
        except Exception as error:  # noqa: BLE001  whatever is wrong with it, others serve
            _rule_out(name, error)
    return trials


def _rule_out(name: str, error: Exception) -> None:
    level = logging.WARNING if name == REFERENCE else logging.INFO
    logger.log(level, "kvbm: disk engine %s is out: %s: %s", name, type(error).__name__, error)


def _num_blocks(file: BlockFile) -> int:
    return max(1, ROUND_BYTES // file.extent_bytes)


@contextlib.contextmanager
def _scratch_file(store: DiskStore) -> Iterator[_Scratch]:
    """On the store's filesystem and opened like its data."""
    path = store.path.parent / f"{PREFIX}probe-{os.getpid()}-{secrets.token_hex(4)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    scratch = None
    fd = os.open(path, flags | (os.O_DIRECT if store.is_direct else 0), 0o600)
    try:
        path.unlink()
        size = 2 * _num_blocks(store) * store.extent_bytes
        os.ftruncate(fd, size)
        with contextlib.suppress(OSError):  # the first round then makes the room
            fallocate(fd, size)
        scratch = _Scratch(fd, store.extent_bytes, store.block_bytes)
        yield scratch
    finally:
        if scratch is None or not scratch.is_in_use:
            os.close(fd)
