"""Transfer engine for memory that the CPU can address: copy threads behind submit and poll.

Lives here: threads, their queue, how an op is cut into pieces. Does not live here: the copy.
Invariant: onboard pieces start before any offload piece that has not started, save those somebody
waits for; an op's result
appears after its last piece, and only once; a piece that raises fails its op, never its thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvbm_core.transfer.pages import BlockCopier
from kvbm_core.types import BlockId, OpId, OpResult, TransferOp

PIECE_BYTES = 32 * 2**20


@dataclass
class _OpInFlight:
    op: TransferOp
    started_seconds: float
    num_pieces_left: int
    error: str = ""


@dataclass(frozen=True, eq=False)
class _Piece:
    of: _OpInFlight
    device_ids: Sequence[BlockId]
    host_ids: Sequence[BlockId]


class CpuTransferEngine:
    """`num_threads` threads copy pieces of at most `piece_blocks` blocks.

    piece_blocks None: 32 MiB a piece, since a thread that comes back to Python may wait 5 ms for
    the GIL. An op is cut at least into as many pieces as there are threads.
    """

    def __init__(
        self, copier: BlockCopier, *, num_threads: int, piece_blocks: int | None = None
    ) -> None:
        self._copier = copier
        self._num_threads = num_threads
        self._piece_blocks = piece_blocks or max(1, PIECE_BYTES // copier.block_bytes)
        self._onboards: deque[_Piece] = deque()
        self._offloads: deque[_Piece] = deque()
        self._in_flight: dict[OpId, _OpInFlight] = {}
        self._results: list[OpResult] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        """Start the threads."""
        for index in range(self._num_threads):
            thread = threading.Thread(target=self._run, name=f"kvbm-copy-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, op: TransferOp) -> None:
        device, host = (op.dst, op.src) if op.is_onboard else (op.src, op.dst)
        device_ids, host_ids = device.ids(), host.ids()
        size = min(self._piece_blocks, -(-len(device_ids) // self._num_threads)) or 1
        starts = range(0, len(device_ids), size)
        flight = _OpInFlight(op, time.perf_counter(), len(starts))
        pieces = [_Piece(flight, device_ids[i : i + size], host_ids[i : i + size]) for i in starts]
        with self._changed:
            self._in_flight[op.op_id] = flight
            (self._onboards if op.is_onboard else self._offloads).extend(pieces)
            if not pieces:
                self._end(flight)
            self._changed.notify_all()

    def poll(self) -> list[OpResult]:
        with self._changed:
            results, self._results = self._results, []
        return results

    def wait(self, op_ids: Collection[OpId]) -> None:
        with self._changed:
            urgent = [piece for piece in self._offloads if piece.of.op.op_id in op_ids]
            if urgent:  # the engine stands still until these have ended
                self._offloads = deque(p for p in self._offloads if p not in urgent)
                self._onboards.extendleft(reversed(urgent))
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._in_flight.keys().isdisjoint(op_ids))

    def wait_any(self, timeout_seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._results or not self._in_flight, timeout_seconds)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            for piece in (*self._onboards, *self._offloads):
                self._end_piece(piece, "the engine was closed")
            self._onboards.clear()
            self._offloads.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        while (piece := self._next_piece()) is not None:
            error = self._copy(piece)
            with self._changed:
                self._end_piece(piece, error)

    def _next_piece(self) -> _Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: self._onboards or self._offloads or self._is_closing)
            if self._is_closing:
                return None
            return (self._onboards or self._offloads).popleft()

    def _copy(self, piece: _Piece) -> str:
        try:
            to_host = not piece.of.op.is_onboard
            self._copier.copy(piece.device_ids, piece.host_ids, to_host=to_host)
        except Exception as error:  # noqa: BLE001  boundary: a copy's error is its op's result
            return f"{type(error).__name__}: {error}"
        return ""

    def _end_piece(self, piece: _Piece, error: str) -> None:
        flight = piece.of
        flight.error = flight.error or error
        flight.num_pieces_left -= 1
        if not flight.num_pieces_left:
            self._end(flight)
            self._changed.notify_all()

    def _end(self, flight: _OpInFlight) -> None:
        op = flight.op
        num_bytes = 0 if flight.error else len(op.src) * self._copier.block_bytes
        seconds = time.perf_counter() - flight.started_seconds
        self._results.append(OpResult(op.op_id, num_bytes, seconds, flight.error))
        del self._in_flight[op.op_id]
