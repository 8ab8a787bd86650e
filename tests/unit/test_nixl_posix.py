from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvbm_core.errors import ConfigError
from kvbm_core.host_memory import HostArena
from kvbm_core.transfer import nixl_posix
from kvbm_core.transfer.nixl_posix import POOL_SIZE, NixlIo, _Agent

NUM_BLOCKS, BLOCK_BYTES = 1024, 4096


class File:
    """A BlockFile of blocks that differ, and an empty arena."""

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = self.extent_bytes = block_bytes
        self.path = path
        arena = HostArena(NUM_BLOCKS, block_bytes, pinned=False)
        arena.open()
        self.host = arena.tensor
        self.content = torch.randint(0, 256, self.host.shape, dtype=torch.uint8)
        path.write_bytes(self.content.numpy().tobytes())
        self.fd = os.open(path, os.O_RDWR)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "data")
    yield file
    os.close(file.fd)


@pytest.fixture(params=["io_uring", "AIO"])
def io(
    request: pytest.FixtureRequest, file: File, monkeypatch: pytest.MonkeyPatch
) -> Iterator[NixlIo]:
    monkeypatch.setattr(nixl_posix, "_QUEUES", {request.param: nixl_posix._QUEUES[request.param]})
    io = NixlIo(file, file.host)
    yield io
    io.close()


def idle_agent(io: NixlIo) -> _Agent:
    (agent,) = io._idle["READ"]
    return agent


def test_neighbours_on_both_sides_are_one_transfer_item(io: NixlIo) -> None:
    disk_ids, host_ids = [3, 4, 5, 6, 9, 10, 11], [7, 8, 20, 21, 22, 23, 24]
    assert io._runs(disk_ids, host_ids) == ([0, 2, 4], [2, 2, 3])


def test_a_run_has_an_upper_size(io: NixlIo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_posix, "RUN_BYTES", 2 * BLOCK_BYTES)
    assert io._runs(range(5), range(5)) == ([0, 2, 4], [2, 2, 1])


def test_calls_one_after_another_share_an_agent(io: NixlIo, file: File) -> None:
    agent = idle_agent(io)
    for _ in range(3):
        assert io.read(range(8), range(8)) == {}
    assert idle_agent(io) is agent
    assert torch.equal(file.host[:8], file.content[:8])


def test_calls_at_the_same_time_have_agents_of_their_own(
    io: NixlIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_in, transfer = threading.Barrier(2), _Agent.transfer

    def met(agent: _Agent, *args: object) -> str:
        both_in.wait()
        return transfer(agent, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(_Agent, "transfer", met)
    threads = [threading.Thread(target=io.read, args=([i], [i])) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(io._idle["READ"])) == 2


def test_a_transfer_that_failed_leaves_an_agent_that_works(io: NixlIo, file: File) -> None:
    os.truncate(file.path, 100 * BLOCK_BYTES)
    agent = idle_agent(io)
    for _ in range(20):
        failed = io.read([2, 200, 201], [0, 1, 2])
        assert set(failed) == {0, 1, 2}
        assert io.read([5], [5]) == {}
    assert (idle_agent(io), agent._kept) == (agent, [])
    assert torch.equal(file.host[5], file.content[5])


def test_only_the_transfer_with_the_bad_block_fails(io: NixlIo, file: File) -> None:
    host_ids = [*range(0, NUM_BLOCKS, 2), 1]  # no neighbours: one more than a transfer takes
    assert len(host_ids) == POOL_SIZE + 1
    os.truncate(file.path, (NUM_BLOCKS - 1) * BLOCK_BYTES)
    disk_ids = [*range(0, NUM_BLOCKS, 2), NUM_BLOCKS - 1]
    assert set(io.read(disk_ids, host_ids)) == {POOL_SIZE}
    assert torch.equal(file.host[::2], file.content[::2])


def test_a_full_pool_is_taken_where_nothing_is_in_flight(io: NixlIo) -> None:
    agent = idle_agent(io)
    for _ in range(3):
        assert agent._settle()


def test_a_full_pool_is_refused_while_one_io_is_in_flight(io: NixlIo) -> None:
    """What `settle` rests on; a release of NIXL that changes it must not be used."""
    agent = idle_agent(io)
    local, remote = io._descriptors([0], [NUM_BLOCKS], range(NUM_BLOCKS), range(NUM_BLOCKS))
    handle = agent._make("READ", local, remote)
    agent._kept.append(handle)
    assert agent._agent.transfer(handle) == "PROC"  # ended or not: nobody has polled
    assert not agent._settle()
    nixl_posix._abandoned.append(agent)


def test_a_thread_whose_transfer_may_not_have_ended_does_not_return(
    io: NixlIo, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    stayed, released = threading.Event(), threading.Event()
    answers: list[str] = []

    def stay(error: Exception) -> None:
        stayed.set()
        released.wait()
        raise _Released

    monkeypatch.setattr(_Agent, "_settle", lambda agent: False)
    monkeypatch.setattr(nixl_posix, "_stay_here", stay)
    agent = idle_agent(io)
    os.truncate(file.path, 100 * BLOCK_BYTES)
    thread = threading.Thread(target=lambda: answers.append(_answer(io)))
    thread.start()
    stayed.wait()
    assert (answers, io._idle["READ"], len(agent._kept)) == ([], [], 1)
    released.set()
    thread.join()
    assert answers == ["stayed"]
    nixl_posix._abandoned.append(agent)


class _Released(Exception):
    pass


def _answer(io: NixlIo) -> str:
    try:
        io.read([200], [0])
    except _Released:
        return "stayed"
    return "returned"


def test_where_io_uring_does_not_work_aio_does(
    file: File, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    try_out = _Agent.try_out
    answers: list[Callable[[_Agent], None]] = [forbidden, try_out]
    monkeypatch.setattr(_Agent, "try_out", lambda agent: answers.pop(0)(agent))
    io = NixlIo(file, file.host)
    assert "moves disk blocks by AIO (io_uring: PermissionError: forbidden)" in caplog.text
    assert io.read(range(4), range(4)) == {}
    assert torch.equal(file.host[:4], file.content[:4])
    io.close()


def forbidden(agent: _Agent) -> None:
    raise PermissionError("forbidden")


def test_io_uring_is_the_first_choice() -> None:
    assert list(nixl_posix._QUEUES) == ["io_uring", "AIO"]


@pytest.mark.parametrize("backend", ["NO_SUCH_BACKEND", "POSIX"])
def test_a_backend_that_does_not_work_is_refused_with_the_remedy(
    file: File, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Agent, "try_out", forbidden)
    with pytest.raises(ConfigError, match=r"does not work here.*Give threads, or auto\.") as error:
        NixlIo(file, file.host, backend=backend)
    assert error.value.option == "disk_engine"


def test_without_nixl_the_error_says_what_to_install(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    with pytest.raises(ConfigError, match=r"pip install kvbm-connectors\[nixl\]"):
        NixlIo(file, file.host)


def test_blocks_that_o_direct_cannot_move_are_refused(tmp_path: Path) -> None:
    file = File(tmp_path / "data", block_bytes=4096 + 512)
    direct = os.open(file.path, os.O_RDWR | os.O_DIRECT)
    os.dup2(direct, file.fd)
    os.close(direct)
    with pytest.raises(ConfigError, match="DYN_KVBM_DISK_DISABLE_O_DIRECT=true"):
        NixlIo(file, file.host)
    os.close(file.fd)


def test_nixl_is_found_without_being_imported() -> None:
    assert nixl_posix.is_installed()
