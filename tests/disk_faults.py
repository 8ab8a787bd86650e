"""Disk I/O that fails and hangs on command.

Named as ``tests.disk_faults:faulty_io`` in the option `disk_engine`. CONTROL is the same object for
a test's code that runs in the engine's process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvbm_core.transfer.disk import PreadIo
from kvbm_core.types import BlockId


@dataclass
class Control:
    """read_errno, write_errno: what calls fail with, 0: nothing. gate: calls wait for it."""

    read_errno: int = 0
    write_errno: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.read_errno = self.write_errno = 0
        self.gate.set()


CONTROL = Control()
CONTROL.reset()

NO_SPACE, IO_ERROR = errno.ENOSPC, errno.EIO


class FaultyIo:
    """BlockIo before another."""

    def __init__(self, inner: PreadIo) -> None:
        self._inner = inner

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return _checked(CONTROL.read_errno, self._inner.read, disk_ids, host_ids)

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return _checked(CONTROL.write_errno, self._inner.write, disk_ids, host_ids)

    def close(self) -> None:
        self._inner.close()


def _checked(
    code: int,
    call: Callable[[Sequence[BlockId], Sequence[BlockId]], dict[int, str]],
    disk_ids: Sequence[BlockId],
    host_ids: Sequence[BlockId],
) -> dict[int, str]:
    CONTROL.gate.wait()
    if code:
        raise OSError(code, os.strerror(code))
    return call(disk_ids, host_ids)


def faulty_io(config, store, host):  # type: ignore[no-untyped-def]
    """Entry of `kvbm_core.build.DISK_ENGINES`."""
    return FaultyIo(PreadIo(store, host))
