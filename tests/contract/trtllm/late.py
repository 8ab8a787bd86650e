"""A transfer engine that copies as late as it may, so that what comes too late does so always.

Named as ``tests.contract.trtllm.late:late_engine`` in the option `transfer_engine`. An op waits for
its turn by count of polls, not by time; whoever waits for an op has it done at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from kvbm_core.build import cpu_engine
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import OpId, OpResult, TransferOp
from tests.contract.trtllm import kvbm, mpi

ENGINE = "tests.contract.trtllm.late:late_engine"
KILLER = "tests.contract.trtllm.late:killing_engine"
KILL_ON = "LATE_ENGINE_KILLS_ON"  # "load" or "offload"
VICTIM = "LATE_ENGINE_VICTIM"  # a rank


@dataclass
class Control:
    """num_polls: between an op's submission and its copy, 0 copies at once. num_loads_to_fail: so
    many next loads fail without copying. submitted: every op that came, of every rank."""

    num_polls: int = 8
    num_loads_to_fail: int = 0
    submitted: list[TransferOp] = field(default_factory=list)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


CONTROL = Control()


def settle(rank: int, scheduler: Any, worker: Any) -> None:
    """As `kvbm.settle`; what is late is done now."""
    if scheduler is not None:
        num_polls, CONTROL.num_polls = CONTROL.num_polls, 0
        kvbm.settle(rank, scheduler, worker)
        CONTROL.num_polls = num_polls


def state_of(rank: int, scheduler: Any, worker: Any) -> kvbm.LeaderState | None:
    settle(rank, scheduler, worker)
    return kvbm.state_of(rank, scheduler, worker)


class LateEngine:
    """TransferEngine before another."""

    def __init__(self, inner: TransferEngine) -> None:
        self._inner = inner
        self._queue: dict[OpId, tuple[int, TransferOp]] = {}
        self._failed: list[OpResult] = []
        self._num_polls = 0

    def submit(self, op: TransferOp) -> None:
        CONTROL.submitted.append(op)
        self._queue[op.op_id] = (self._num_polls, op)
        if not CONTROL.num_polls:
            self.wait([op.op_id])

    def poll(self) -> list[OpResult]:
        self._num_polls += 1
        last = self._num_polls - CONTROL.num_polls
        self.wait([i for i, (submitted, _) in self._queue.items() if submitted <= last])
        failed, self._failed = self._failed, []
        return self._inner.poll() + failed

    def wait(self, op_ids: Collection[OpId]) -> None:
        for op_id in [i for i in self._queue if i in op_ids]:
            self._copy(self._queue.pop(op_id)[1])
        self._inner.wait(op_ids)

    def wait_any(self, timeout_seconds: float) -> None:
        self._inner.wait_any(0.0)

    def close(self) -> None:
        self._inner.close()

    def _copy(self, op: TransferOp) -> None:
        if op.is_onboard and CONTROL.num_loads_to_fail:
            CONTROL.num_loads_to_fail -= 1
            self._failed.append(OpResult(op.op_id, 0, 0.0, "planted fault"))
            return
        self._inner.submit(op)
        self._inner.wait([op.op_id])


class KillingEngine(LateEngine):
    """Kills its process in the middle of a copy."""

    def submit(self, op: TransferOp) -> None:
        super().submit(op)
        if os.environ[KILL_ON] == ("load" if op.is_onboard else "offload"):
            os.kill(os.getpid(), signal.SIGKILL)


def late_engine(config, layout, regions, host):  # type: ignore[no-untyped-def]
    """EngineFactory of `kvbm_core.build`."""
    return LateEngine(cpu_engine(config, layout, regions, host))


def killing_engine(config, layout, regions, host):  # type: ignore[no-untyped-def]
    """As `late_engine`; the process of one rank is killed in mid-copy."""
    is_victim = os.environ[VICTIM] == str(mpi.mpi_rank())
    return (KillingEngine if is_victim else LateEngine)(cpu_engine(config, layout, regions, host))
