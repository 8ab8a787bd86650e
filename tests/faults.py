"""A transfer engine that fails, delays, reorders and poisons on command.

Named as ``tests.faults:faulty_engine`` in the option `transfer_engine`. It stands before the real
CPU engine; CONTROL is the same object for a test's code that runs in the engine's process.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from kvbm_core.build import cpu_engine
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import OpId, OpResult, TransferOp


@dataclass
class Control:
    """What the engine does to the ops it is given.

    num_onboards_to_fail: so many next onboards fail without copying. hold_onboards,
    hold_offloads: keep results back until released. reverse: hand results out in reverse.
    host: the arena, to poison. submitted: every op that came.
    """

    num_onboards_to_fail: int = 0
    num_offloads_to_fail: int = 0
    hold_onboards: bool = False
    hold_offloads: bool = False
    reverse: bool = False
    host: torch.Tensor | None = None
    submitted: list[TransferOp] = field(default_factory=list)

    def reset(self) -> None:
        host = self.host
        self.__init__()  # type: ignore[misc]
        self.host = host

    def poison(self) -> None:
        """Overwrite every host block with a large finite pattern."""
        assert self.host is not None
        self.host.fill_(0x40)


CONTROL = Control()


class FaultyEngine:
    """TransferEngine before another; thread-safe only as its port asks."""

    def __init__(self, inner: TransferEngine) -> None:
        self._inner = inner
        self._ops: dict[OpId, TransferOp] = {}
        self._held: list[OpResult] = []
        self._failed: list[OpResult] = []

    def submit(self, op: TransferOp) -> None:
        CONTROL.submitted.append(op)
        self._ops[op.op_id] = op
        if self._must_fail(op):
            self._failed.append(OpResult(op.op_id, 0, 0.0, "planted fault"))
        else:
            self._inner.submit(op)

    def poll(self) -> list[OpResult]:
        results = self._held + self._inner.poll() + self._failed
        self._failed = []
        self._held = [result for result in results if self._is_held(self._ops[result.op_id])]
        ended = [result for result in results if result not in self._held]
        return ended[::-1] if CONTROL.reverse else ended

    def wait(self, op_ids: Collection[OpId]) -> None:
        self._inner.wait(op_ids)

    def wait_any(self, timeout_seconds: float) -> None:
        if not self._failed:
            self._inner.wait_any(timeout_seconds)

    def close(self) -> None:
        self._inner.close()

    def _must_fail(self, op: TransferOp) -> bool:
        if op.is_onboard and CONTROL.num_onboards_to_fail:
            CONTROL.num_onboards_to_fail -= 1
            return True
        if not op.is_onboard and CONTROL.num_offloads_to_fail:
            CONTROL.num_offloads_to_fail -= 1
            return True
        return False

    def _is_held(self, op: TransferOp) -> bool:
        return CONTROL.hold_onboards if op.is_onboard else CONTROL.hold_offloads


def faulty_engine(config, layout, regions, host):  # type: ignore[no-untyped-def]
    """EngineFactory of `kvbm_core.build`."""
    CONTROL.host = host
    return FaultyEngine(cpu_engine(config, layout, regions, host))
