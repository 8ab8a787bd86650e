"""The ranks' collectives, and `tensorrt_llm._utils`' MPI functions on top of them.

A collective pickles what it carries, also towards the sender, and ends by a deadline: with an error
that names the ranks which came and what they came for, never a hang.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

__all__ = [
    "local_mpi_rank",
    "local_mpi_size",
    "mpi_allgather",
    "mpi_barrier",
    "mpi_broadcast",
    "mpi_comm",
    "mpi_rank",
    "mpi_world_size",
]


class CollectiveError(RuntimeError):
    """A collective did not come together: a rank is missing, ended, or is in another one."""


class Comm(Protocol):
    rank: int
    size: int

    def allgather(self, tag: str, value: Any) -> list[Any]:
        """Every rank's value, by rank. Raises CollectiveError."""
        ...

    def fail(self) -> None:
        """Let the peers' collectives raise: this rank has ended with an error."""
        ...


class ThreadWorld:
    """What the ranks of one process share."""

    def __init__(self, size: int, deadline_seconds: float) -> None:
        self.size = size
        self.deadline_seconds = deadline_seconds
        self.changed = threading.Condition()
        self.slots: dict[int, tuple[str, bytes]] = {}
        self.result: dict[int, tuple[str, bytes]] = {}
        self.turn = 0
        self.failed: int | None = None


class ThreadComm:
    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size

    def allgather(self, tag: str, value: Any) -> list[Any]:
        world = self._world
        with world.changed:
            turn = world.turn
            world.slots[self.rank] = (tag, pickle.dumps(value))
            if len(world.slots) == world.size:
                world.result, world.slots = world.slots, {}
                world.turn += 1
                world.changed.notify_all()
            else:
                self._wait(tag, turn)
            result = world.result
        return _unpack(tag, [result[rank] for rank in range(self.size)])

    def _wait(self, tag: str, turn: int) -> None:
        world = self._world
        world.changed.wait_for(
            lambda: world.turn != turn or world.failed is not None, world.deadline_seconds
        )
        if world.turn != turn:
            return
        if world.failed is not None:
            raise CollectiveError(f"rank {self.rank} in {tag!r}: rank {world.failed} has ended")
        came = {rank: slot[0] for rank, slot in world.slots.items()}
        raise CollectiveError(
            f"{tag!r} did not come together in {world.deadline_seconds} s; came: {came}"
        )

    def fail(self) -> None:
        with self._world.changed:
            if self._world.failed is None:
                self._world.failed = self.rank
            self._world.changed.notify_all()


class PipeComm:
    """Ranks in processes: rank 0 gathers from a pipe per peer and sends back.

    pipes: rank 0's, one per peer in order of rank; a peer's, the one to rank 0.
    """

    def __init__(
        self, rank: int, size: int, pipes: Sequence[Connection], deadline_seconds: float
    ) -> None:
        self.rank = rank
        self.size = size
        self._pipes = pipes
        self._deadline_seconds = deadline_seconds

    def allgather(self, tag: str, value: Any) -> list[Any]:
        own = (tag, pickle.dumps(value))
        try:
            if self.rank:
                self._pipes[0].send(own)
                return _unpack(tag, self._receive(self._pipes[0], tag))
            slots = [own, *(self._receive(pipe, tag) for pipe in self._pipes)]
            for pipe in self._pipes:
                pipe.send(slots)
        except (EOFError, OSError) as error:
            raise CollectiveError(f"rank {self.rank} in {tag!r}: a peer has ended") from error
        return _unpack(tag, slots)

    def _receive(self, pipe: Connection, tag: str) -> Any:
        if not wait([pipe], self._deadline_seconds):
            raise CollectiveError(
                f"rank {self.rank} waited {self._deadline_seconds} s for a peer in {tag!r}"
            )
        return pipe.recv()

    def fail(self) -> None:
        for pipe in self._pipes:
            pipe.close()


def _unpack(tag: str, slots: Sequence[tuple[str, bytes]]) -> list[Any]:
    tags = [slot[0] for slot in slots]
    if any(other != tag for other in tags):
        raise CollectiveError(f"the ranks are in different collectives: {tags}")
    return [pickle.loads(data) for _, data in slots]


_local = threading.local()


def enter(comm: Comm) -> None:
    """Make the calling thread one of this rank's."""
    _local.comm = comm


def _comm() -> Comm:
    comm: Comm | None = getattr(_local, "comm", None)
    if comm is None:
        raise CollectiveError(
            f"thread {threading.current_thread().name!r} belongs to no rank: read the rank in the "
            "constructor and keep it"
        )
    return comm


def mpi_rank() -> int:
    return _comm().rank


def mpi_world_size() -> int:
    return _comm().size


local_mpi_rank, local_mpi_size = mpi_rank, mpi_world_size


def mpi_broadcast(obj: Any, root: int = 0) -> Any:
    return _comm().allgather("mpi_broadcast", obj)[root]


def mpi_allgather(obj: Any) -> list[Any]:
    return _comm().allgather("mpi_allgather", obj)


def mpi_barrier() -> None:
    _comm().allgather("mpi_barrier", None)


class _MpiComm:
    """The part of mpi4py's communicator that connectors use."""

    def Get_rank(self) -> int:
        return mpi_rank()

    def Get_size(self) -> int:
        return mpi_world_size()

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return mpi_broadcast(obj, root)

    def allgather(self, obj: Any) -> list[Any]:
        return mpi_allgather(obj)

    def barrier(self) -> None:
        mpi_barrier()

    Barrier = barrier


def mpi_comm() -> _MpiComm:
    return _MpiComm()
