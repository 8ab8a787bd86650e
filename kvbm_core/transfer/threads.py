"""Threads that carry out ops piece by piece, behind submit and poll.

Lives here: queues, lanes of threads, how an op is cut and how its pieces become one result. Does
not live here: what a piece does (see `PieceWork`).
Invariant: in a lane, upward pieces start before any downward piece that has not started, save those
somebody waits for; an op's result appears after its last piece, and only once; a piece that
raises fails its op, never its thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvbm_core.types import BlockId, OpId, OpResult, TransferOp, pack_ids


@dataclass(eq=False)
class _OpInFlight:
    op: TransferOp
    started_seconds: float
    num_pieces_left: int
    context: bytes
    error: str = ""
    failed: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Piece:
    """Some blocks of an op. positions: in the op, of each block of the piece."""

    of: _OpInFlight
    positions: Sequence[int]
    src_ids: Sequence[BlockId]
    dst_ids: Sequence[BlockId]

    @property
    def op(self) -> TransferOp:
        return self.of.op

    @property
    def context(self) -> bytes:
        """See `ThreadEngine.context`."""
        return self.of.context


class PieceWork(Protocol):
    """What the threads do; called from several at once, with no two pieces sharing blocks they
    write."""

    block_bytes: int

    def order(self, op: TransferOp) -> Sequence[int]:
        """Positions of the op's blocks, in the order in which they are best cut into pieces."""

    def run(self, piece: Piece) -> dict[int, str]:
        """Do it; the positions that failed, and why. Raising fails all of the piece."""


@dataclass(frozen=True)
class Lane:
    """A number of threads for ops that go up, down, or (None) both."""

    num_threads: int
    is_upward: bool | None = None

    def takes(self, op: TransferOp) -> bool:
        return self.is_upward is None or self.is_upward == op.is_upward


class ThreadEngine:
    """A TransferEngine of threads.

    piece_blocks: the most blocks in a piece; an op is cut at least into as many pieces as its lane
    has threads. join_seconds: how long `close` waits for threads that do not come back.
    """

    def __init__(
        self,
        work: PieceWork,
        lanes: Sequence[Lane],
        *,
        piece_blocks: int,
        name: str,
        join_seconds: float | None = None,
    ) -> None:
        self._work = work
        self._lanes = lanes
        self._piece_blocks = piece_blocks
        self._name = name
        self._join_seconds = join_seconds
        self._up: deque[Piece] = deque()
        self._down: deque[Piece] = deque()
        self._in_flight: dict[OpId, _OpInFlight] = {}
        self._results: list[OpResult] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._threads: list[threading.Thread] = []

    @property
    def num_threads_left(self) -> int:
        """After `close`: threads that did not come back."""
        return len(self._threads)

    def open(self) -> None:
        """Start the threads."""
        for lane in self._lanes:
            for _ in range(lane.num_threads):
                name = f"kvbm-{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def submit(self, op: TransferOp) -> None:
        src_ids, dst_ids, order = op.src.ids(), op.dst.ids(), self._work.order(op)
        num_threads = sum(lane.num_threads for lane in self._lanes if lane.takes(op))
        size = min(self._piece_blocks, -(-len(order) // num_threads)) or 1
        flight = _OpInFlight(op, time.perf_counter(), -(-len(order) // size), self.context())
        pieces = []
        for start in range(0, len(order), size):
            part = order[start : start + size]
            ids = [src_ids[i] for i in part], [dst_ids[i] for i in part]
            pieces.append(Piece(flight, part, *ids))
        with self._changed:
            self._in_flight[op.op_id] = flight
            (self._up if op.is_upward else self._down).extend(pieces)
            if not pieces:
                self._end(flight)
            self._changed.notify_all()

    def context(self) -> bytes:
        """What a piece's work must know of the moment at which its op was submitted."""
        return b""

    def poll(self) -> list[OpResult]:
        with self._changed:
            results, self._results = self._results, []
        return results

    def wait(self, op_ids: Collection[OpId]) -> None:
        with self._changed:
            urgent = [piece for piece in self._down if piece.op.op_id in op_ids]
            if urgent:  # the engine stands still until these have ended
                self._down = deque(p for p in self._down if p not in urgent)
                self._up.extendleft(reversed(urgent))
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._in_flight.keys().isdisjoint(op_ids))

    def wait_any(self, timeout_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._results or not self._in_flight, timeout_seconds)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            for piece in (*self._up, *self._down):
                failed = dict.fromkeys(piece.positions, "the engine was closed")
                self._end_piece(piece, failed)
            self._up.clear()
            self._down.clear()
            self._changed.notify_all()
        self._join()
        self._threads = [thread for thread in self._threads if thread.is_alive()]

    def _join(self) -> None:
        if self._join_seconds is None:
            for thread in self._threads:
                thread.join()
            return
        deadline_seconds = time.monotonic() + self._join_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline_seconds - time.monotonic()))

    def _run(self, lane: Lane) -> None:
        while (piece := self._next_piece(lane)) is not None:
            failed = self._do(piece)
            with self._changed:
                self._end_piece(piece, failed)

    def _next_piece(self, lane: Lane) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue_for(lane) or self._is_closing)
            if self._is_closing:
                return None
            return self._queue_for(lane).popleft()

    def _queue_for(self, lane: Lane) -> deque[Piece]:
        if lane.is_upward is None:
            return self._up or self._down
        return self._up if lane.is_upward else self._down

    def _do(self, piece: Piece) -> dict[int, str]:
        try:
            return self._work.run(piece)
        except Exception as error:  # noqa: BLE001  boundary: a piece's error is its op's result
            return dict.fromkeys(piece.positions, f"{type(error).__name__}: {error}")

    def _end_piece(self, piece: Piece, failed: dict[int, str]) -> None:
        flight = piece.of
        flight.failed += failed
        flight.error = flight.error or next(iter(failed.values()), "")
        flight.num_pieces_left -= 1
        if not flight.num_pieces_left:
            self._end(flight)
            self._changed.notify_all()

    def _end(self, flight: _OpInFlight) -> None:
        op, num_failed = flight.op, len(flight.failed)
        num_bytes = (len(op.src) - num_failed) * self._work.block_bytes
        seconds = time.perf_counter() - flight.started_seconds
        failed = pack_ids(sorted(flight.failed)) if num_failed < len(op.src) else b""
        self._results.append(OpResult(op.op_id, num_bytes, seconds, flight.error, failed))
        del self._in_flight[op.op_id]
