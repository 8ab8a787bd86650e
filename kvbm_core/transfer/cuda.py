"""Transfer engine for a CUDA device: copies on two side streams, polled through events.

All lines of the suite that need a GPU are here and in `kvbm_core.host_memory`. They have not been
run on a GPU yet; the copy itself is the ForeachCopier that the CPU tests use.
Invariant: a copy starts after all work that was on the current stream when it was submitted.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from kvbm_core.transfer.pages import BlockCopier
from kvbm_core.types import OpId, OpResult, TransferOp

_POLL_SECONDS = 0.0001


@dataclass(frozen=True)
class _OpInFlight:
    op: TransferOp
    start: torch.cuda.Event
    end: torch.cuda.Event


class CudaTransferEngine:
    """Onboards and offloads each have a stream of low priority, so neither waits for the other."""

    def __init__(self, copier: BlockCopier, device: torch.device) -> None:
        self._copier = copier
        self._device = device
        self._streams: dict[bool, torch.cuda.Stream] = {}
        self._in_flight: dict[OpId, _OpInFlight] = {}
        self._results: list[OpResult] = []

    def open(self) -> None:
        """Create the streams."""
        for is_onboard in (True, False):
            self._streams[is_onboard] = torch.cuda.Stream(self._device)

    def submit(self, op: TransferOp) -> None:
        device, host = (op.dst, op.src) if op.is_onboard else (op.src, op.dst)
        stream = self._streams[op.is_onboard]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            try:
                if not op.touches_device:
                    raise ValueError(f"{op.route} on a rank without a disk tier")
                self._copier.copy(device.ids(), host.ids(), to_host=not op.is_onboard)
            except Exception as error:  # noqa: BLE001  boundary: a copy's error is its op's result
                stream.synchronize()
                text = f"{type(error).__name__}: {error}"
                self._results.append(OpResult(op.op_id, 0, 0.0, text))
                return
            end.record()
        self._in_flight[op.op_id] = _OpInFlight(op, start, end)

    def poll(self) -> list[OpResult]:
        for flight in list(self._in_flight.values()):
            if flight.end.query():
                self._end(flight)
        results, self._results = self._results, []
        return results

    def wait(self, op_ids: Collection[OpId]) -> None:
        for op_id in op_ids:
            if (flight := self._in_flight.get(op_id)) is not None:
                flight.end.synchronize()
                self._end(flight)

    def wait_any(self, timeout_seconds: float) -> None:
        deadline = time.perf_counter() + timeout_seconds
        while self._in_flight and not self._results and time.perf_counter() < deadline:
            for flight in list(self._in_flight.values()):
                if flight.end.query():
                    self._end(flight)
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        self._in_flight.clear()

    def _end(self, flight: _OpInFlight) -> None:
        op = flight.op
        num_bytes = len(op.src) * self._copier.block_bytes
        seconds = flight.start.elapsed_time(flight.end) / 1000
        self._results.append(OpResult(op.op_id, num_bytes, seconds))
        del self._in_flight[op.op_id]
