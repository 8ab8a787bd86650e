"""Blocks between the host arena and a file by NIXL: its POSIX plugin, or GPUDirect Storage.

Lives here: agents, descriptors, polling; the only importer of NIXL for files. Does not live here:
checksums, records, threads (see `disk`).
Invariant: nothing is released, and no block reported, while NIXL or the kernel may still move its
bytes: a handle that is released too early lets a later transfer end well with wrong data.

The backends GDS and GDS_MT have never run: there was no machine that has them.
"""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from kvbm_core.errors import ConfigError
from kvbm_core.storage.disk import ALIGNMENT
from kvbm_core.transfer.disk import BlockFile
from kvbm_core.types import BlockId

logger = logging.getLogger(__name__)

POSIX = "POSIX"
RUN_BYTES = 16 * 2**20
POOL_SIZE = 512
"""I/Os that one agent can have queued; all of a transfer's must fit. NIXL dies above 65,536."""

_MAX_PAUSE_SECONDS = 0.0002
_MORE_PAUSE_SECONDS = 0.00001
_TRIAL_SECONDS = 5.0
_QUEUES = {"io_uring": "use_uring", "AIO": "use_aio"}
_agent_numbers = itertools.count()
_abandoned: list[_Agent] = []


class NixlIo:
    """BlockIo by NIXL; neighbours on disk and in host are one I/O.

    An agent serves one call at a time and one direction: calls at the same time have their own.
    Raises ConfigError where NIXL or the backend can't be used.
    """

    def __init__(self, file: BlockFile, host: torch.Tensor, *, backend: str = POSIX) -> None:
        _api()
        _check_alignment(file, host)
        self._file = file
        self._host = host
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Agent]] = {"READ": [], "WRITE": []}
        self._place = _Place(backend, file.fd, os.fstat(file.fd).st_size, host)
        first, self._parameters = _first_that_works(self._place)
        self._idle["READ"].append(first)

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return self._move("READ", disk_ids, host_ids)

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return self._move("WRITE", disk_ids, host_ids)

    def close(self) -> None:
        self._idle = {"READ": [], "WRITE": []}
        self._place.close()

    def _move(
        self, direction: str, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]
    ) -> dict[int, str]:
        """A transfer that fails does so as a whole; others of the same call may succeed."""
        starts, lengths = self._runs(disk_ids, host_ids)
        agent, failed = self._take(direction), {}
        for first in range(0, len(starts), POOL_SIZE):
            begins, sizes = starts[first : first + POOL_SIZE], lengths[first : first + POOL_SIZE]
            local, remote = self._descriptors(begins, sizes, disk_ids, host_ids)
            problem = agent.transfer(direction, local, remote)
            if problem:
                positions = range(begins[0], begins[-1] + sizes[-1])
                failed.update(
                    dict.fromkeys(positions, f"disk block {disk_ids[begins[0]]}: {problem}")
                )
        with self._lock:
            self._idle[direction].append(agent)
        return failed

    def _take(self, direction: str) -> _Agent:
        with self._lock:
            if self._idle[direction]:
                return self._idle[direction].pop()
        return _Agent(self._place, self._parameters)

    def _runs(
        self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]
    ) -> tuple[list[int], list[int]]:
        """First position and number of blocks of each stretch that is one I/O."""
        longest = max(1, RUN_BYTES // self._file.block_bytes)
        if self._file.extent_bytes != self._file.block_bytes:
            longest = 1  # blocks with padding between them are no neighbours
        starts: list[int] = []
        for i in range(len(disk_ids)):
            is_next = (
                i
                and i - starts[-1] < longest
                and disk_ids[i] == disk_ids[i - 1] + 1
                and host_ids[i] == host_ids[i - 1] + 1
            )
            if not is_next:
                starts.append(i)
        return starts, [end - start for start, end in itertools.pairwise([*starts, len(disk_ids)])]

    def _descriptors(
        self,
        starts: Sequence[int],
        lengths: Sequence[int],
        disk_ids: Sequence[BlockId],
        host_ids: Sequence[BlockId],
    ) -> tuple[_Descriptors, _Descriptors]:
        local, remote = np.zeros((2, len(starts), 3), dtype=np.uint64)
        size = self._file.block_bytes
        local[:, 1] = remote[:, 1] = np.array(lengths, dtype=np.uint64) * np.uint64(size)
        local[:, 0] = [self._host.data_ptr() + host_ids[i] * size for i in starts]
        remote[:, 0] = [disk_ids[i] * self._file.extent_bytes for i in starts]
        remote[:, 2] = self._file.fd
        return local, remote


class _Place:
    """What the agents of one NixlIo move bytes between, and scratch of both kinds."""

    def __init__(self, backend: str, fd: int, file_bytes: int, host: torch.Tensor) -> None:
        self.backend = backend
        self.fd = fd
        self.file_bytes = file_bytes
        self.host = host
        self.scratch = torch.frombuffer(mmap.mmap(-1, ALIGNMENT), dtype=torch.uint8)
        self.scratch_fd = os.memfd_create("kvbm-nixl-scratch", os.MFD_CLOEXEC)
        os.ftruncate(self.scratch_fd, ALIGNMENT)

    def close(self) -> None:
        if self.scratch_fd >= 0:
            os.close(self.scratch_fd)
        self.scratch_fd = -1

    def register(self, agent: Any) -> None:
        """NIXL keeps addresses and numbers only: the place must outlive the agent."""
        files = [(0, self.file_bytes, self.fd, "")]
        if self.backend == POSIX:
            files.append((0, ALIGNMENT, self.scratch_fd, ""))
        memory = [(t.data_ptr(), t.numel(), 0, "") for t in (self.host, self.scratch)]
        agent.register_memory(memory, "DRAM", backends=[self.backend])
        agent.register_memory(files, "FILE", backends=[self.backend])

    def scratch_reads(self, fd: int, count: int) -> tuple[_Descriptors, _Descriptors]:
        """The file's first bytes to scratch, so many times."""
        size = min(ALIGNMENT, self.file_bytes)
        rows = [self.scratch.data_ptr(), size, 0], [0, size, fd]
        local, remote = (np.array([row] * count, dtype=np.uint64) for row in rows)
        return local, remote


class _Agent:
    """One NIXL agent with its queue; used by one thread at a time.

    A transfer that NIXL ends with an error may, after some errors of the queue, still have I/O
    under way, and nothing says so. What does: an entry of the queue's pool is given back when its
    I/O has ended, so once an I/O for every entry has been accepted, all earlier ones have ended.
    """

    def __init__(self, place: _Place, parameters: dict[str, str]) -> None:
        api = _api()
        self._name = f"kvbm-disk-{next(_agent_numbers)}"
        self._place = place
        self._kept: list[Any] = []  # handles that may be in flight: theirs is the memory NIXL uses
        config = api.nixl_agent_config(
            backends=[],
            enable_prog_thread=False,
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        self._agent = api.nixl_agent(self._name, config)
        self._agent.create_backend(place.backend, parameters)
        place.register(self._agent)

    def transfer(self, direction: str, local: _Descriptors, remote: _Descriptors) -> str:
        """Returns when no byte moves any more: "", or why not all have been moved."""
        try:
            handle = self._make(direction, local, remote)
        except Exception as error:  # noqa: BLE001  NIXL's errors have no root of their own
            return f"NIXL refuses the transfer: {error}"
        self._kept.append(handle)
        try:
            self._carry_out(handle)
        except Exception as error:  # noqa: BLE001
            if not self._settle():
                _stay_here(error)
            return f"the file ends, the disk is full or it fails (NIXL: {error})"
        self._release()
        return ""

    def try_out(self) -> None:
        """Read a little, with a deadline. Raises what goes wrong."""
        self._kept.append(self._make("READ", *self._place.scratch_reads(self._place.fd, 1)))
        self._carry_out(self._kept[-1], time.monotonic() + _TRIAL_SECONDS)
        self._release()

    def _settle(self) -> bool:
        """Release what ended in an error; False where it may not have ended."""
        if self._place.backend != POSIX:
            return False  # its pool, if it has one, is unknown
        reads = self._place.scratch_reads(self._place.scratch_fd, POOL_SIZE)
        try:
            self._kept.append(self._make("READ", *reads))
            self._carry_out(self._kept[-1])
        except Exception:  # noqa: BLE001
            return False
        self._release()
        return True

    def _release(self) -> None:
        for handle in self._kept:
            handle.release()
        self._kept.clear()

    def _make(self, direction: str, local: _Descriptors, remote: _Descriptors) -> Any:
        agent = self._agent
        return agent.initialize_xfer(
            direction,
            agent.get_xfer_descs(local, "DRAM"),
            agent.get_xfer_descs(remote, "FILE"),
            self._name,
            backends=[self._place.backend],
        )

    def _carry_out(self, handle: Any, deadline_seconds: float | None = None) -> None:
        self._wait_for(handle, self._agent.transfer(handle), deadline_seconds)

    def _wait_for(self, handle: Any, state: str, deadline_seconds: float | None = None) -> None:
        """Polling is what submits the work: 64 I/Os a time."""
        pause_seconds = 0.0
        while state == "PROC":
            if deadline_seconds is not None and time.monotonic() > deadline_seconds:
                raise TimeoutError(f"no answer within {_TRIAL_SECONDS:.0f} s")
            time.sleep(pause_seconds)
            pause_seconds = min(_MAX_PAUSE_SECONDS, pause_seconds + _MORE_PAUSE_SECONDS)
            state = self._agent.check_xfer_state(handle)
        if state != "DONE":
            raise OSError(f"the transfer ended as {state}")


_Descriptors = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


def is_installed() -> bool:
    """Whether NIXL can be imported; doesn't import it."""
    return importlib.util.find_spec("nixl_cu12") is not None


def _first_that_works(place: _Place) -> tuple[_Agent, dict[str, str]]:
    """A real transfer decides: NIXL accepts any parameter, and containers often forbid io_uring."""
    problems: list[str] = []
    for queue, parameters in _choices(place.backend).items():
        agent = None
        try:
            agent = _Agent(place, parameters)
            agent.try_out()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  NIXL's errors have no root of their own
            if agent is not None:
                _abandoned.append(agent)
            problems.append(f"{queue}: {type(error).__name__}: {error}")
            continue
        but = f" ({'; '.join(problems)})" if problems else ""
        logger.info("kvbm: NIXL's %s moves disk blocks by %s%s", place.backend, queue, but)
        return agent, parameters
    problem = f"NIXL's backend {place.backend} does not work here ({'; '.join(problems)})"
    engine = "nixl" if place.backend == POSIX else "nixl_gds"
    raise ConfigError("disk_engine", engine, problem, "Give threads, or auto.")


def _choices(backend: str) -> dict[str, dict[str, str]]:
    """Queues to try, and the parameters that ask for them."""
    if backend != POSIX:
        return {backend: {}}
    pool = {"ios_pool_size": str(POOL_SIZE)}
    return {queue: {parameter: "true", **pool} for queue, parameter in _QUEUES.items()}


def _api() -> Any:
    try:
        from nixl_cu12 import _api as api
    except ImportError as error:
        raise ConfigError(
            "disk_engine",
            "nixl",
            f"NIXL can't be imported: {error}",
            "pip install kvbm-connectors[nixl], or give threads.",
        ) from error
    if "NIXL_LOG_LEVEL" not in os.environ:  # it would write of every agent to stdout
        logging.getLogger("nixl").setLevel(logging.WARNING)
    return api


def _check_alignment(file: BlockFile, host: torch.Tensor) -> None:
    if not fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT:
        return
    for what, value in (
        ("extents", file.extent_bytes),
        ("blocks", file.block_bytes),
        ("the host arena's address", host.data_ptr()),
    ):
        if value % ALIGNMENT:
            problem = f"O_DIRECT needs multiples of {ALIGNMENT}, {what}: {value}"
            remedy = "Set DYN_KVBM_DISK_DISABLE_O_DIRECT=true."
            raise ConfigError("disk_engine", "nixl", problem, remedy)


def _stay_here(error: Exception) -> NoReturn:
    """Keep the thread, and with it the op's blocks: bytes may still come to them."""
    logger.error(
        "kvbm: a disk transfer failed (%s) and NIXL can't say whether it has ended: its blocks and "
        "this thread stay reserved until restart. DYN_KVBM_DISK_ENGINE=threads avoids NIXL",
        error,
    )
    while True:
        threading.Event().wait()
