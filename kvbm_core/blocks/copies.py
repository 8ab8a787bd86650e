"""Copies between the device and host blocks of one program, in a thread of their own.

Lives here: the thread and the futures of its jobs. Does not live here: the copy, which blocks.
Invariant: a job's holds last until its bytes have moved, whoever stopped waiting for it; every job
that was taken gets its result, also when the thread is told to end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue

import torch

from kvbm_core.errors import IllegalTransition, StorageError
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import Blocks, TransferOp


@dataclass(frozen=True)
class _Job:
    """after: work on the caller's stream that comes before."""

    op: TransferOp
    holds: Sequence[object]
    after: torch.cuda.Event | None
    done: Future[None] = field(default_factory=Future)


Jobs = SimpleQueue[_Job | None]
"""None ends the thread. A SimpleQueue may be put to from a finalizer."""


class Copies:
    """Runs jobs one after another; `open_engine` is called in the thread, at the first job.

    device: of the device blocks. jobs: whoever puts None there ends the thread.
    """

    def __init__(self, open_engine: Callable[[], TransferEngine], device: torch.device) -> None:
        self.jobs: Jobs = SimpleQueue()
        self._open_engine: Callable[[], TransferEngine] | None = open_engine
        self._device = device
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._op_ids = count()

    def start(self, src: Blocks, dst: Blocks, holds: Sequence[object]) -> Future[None]:
        """Queue a copy of block by block; its future raises StorageError where it failed.

        Raises IllegalTransition after `close`.
        """
        after = None
        if self._device.type == "cuda":
            after = torch.cuda.current_stream(self._device).record_event()
        with self._lock:
            if self._open_engine is None:
                raise IllegalTransition("the block manager was closed. Make another one.")
            if self._thread is None:
                arguments = self.jobs, self._open_engine
                self._thread = threading.Thread(
                    target=_serve, args=arguments, name="kvbm-block-copies", daemon=True
                )
                self._thread.start()
            job = _Job(TransferOp(next(self._op_ids), (), src, dst), holds, after)
            job.done.set_running_or_notify_cancel()
            self.jobs.put(job)
        return job.done

    def close(self) -> None:
        """Let the jobs taken end, and the thread."""
        with self._lock:
            self._open_engine, thread, self._thread = None, self._thread, None
            self.jobs.put(None)
        if thread is not None:
            thread.join()


def _serve(jobs: Jobs, open_engine: Callable[[], TransferEngine]) -> None:
    engine: TransferEngine | None = None
    while (job := jobs.get()) is not None:
        done, failure = job.done, None
        try:
            engine = engine or open_engine()
            _copy(engine, job.op, job.after)  # not the job: an error keeps what it was called with
        except Exception as error:  # noqa: BLE001  boundary: a job's error is its caller's
            failure = error
        del job  # and with it its holds, before the caller goes on
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)
        del done, failure
    if engine is not None:
        engine.close()


def _copy(engine: TransferEngine, op: TransferOp, after: torch.cuda.Event | None) -> None:
    if after is not None:
        after.synchronize()
    engine.submit(op)
    engine.wait([op.op_id])
    for result in engine.poll():
        if not result.ok:
            raise StorageError(f"{op.route} copy of {len(op.src)} blocks: {result.error}")
