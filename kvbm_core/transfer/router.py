"""One transfer engine out of two: ops that touch the device, and ops between host and disk."""

from __future__ import annotations

from collections.abc import Collection

from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import OpId, OpResult, TransferOp


class RoutedTransfer:
    """TransferEngine that hands each op to the engine of its route."""

    def __init__(self, device: TransferEngine, disk: TransferEngine) -> None:
        self._device = device
        self._disk = disk

    def submit(self, op: TransferOp) -> None:
        (self._device if op.touches_device else self._disk).submit(op)

    def poll(self) -> list[OpResult]:
        return self._device.poll() + self._disk.poll()

    def wait(self, op_ids: Collection[OpId]) -> None:
        """Only the device's: the engine waits for nobody else, least of all for a disk."""
        self._device.wait(op_ids)

    def wait_any(self, timeout_seconds: float) -> None:
        """Half of the time for each, since neither knows of the other's ops."""
        self._device.wait_any(timeout_seconds / 2)
        self._disk.wait_any(timeout_seconds / 2)

    def close(self) -> None:
        self._device.close()
        self._disk.close()
