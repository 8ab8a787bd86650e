from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvbm_core import host_memory
from kvbm_core.errors import StorageError
from kvbm_core.host_memory import HostArena, available_bytes, total_bytes

GB = 2**30


class Machine:
    """What a machine and its container say, as files; `_CGROUPS` and /proc/meminfo point here."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._limits = (str(folder / "max"), str(folder / "current"))
        monkeypatch.setattr(host_memory, "_CGROUPS", (self._limits,))
        monkeypatch.setattr(host_memory, "Path", self._path)

    def meminfo(self, text: str) -> None:
        (self._folder / "meminfo").write_text(text, encoding="ascii")

    def cgroup(self, limit: str, used: str) -> None:
        for path, text in zip(self._limits, (limit, used), strict=True):
            Path(path).write_text(text + "\n", encoding="ascii")

    def _path(self, name: str) -> Path:
        return self._folder / "meminfo" if name == "/proc/meminfo" else Path(name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path, monkeypatch)
    machine.meminfo(f"MemTotal: {8 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {6 * 2**20} kB\n")
    return machine


@pytest.fixture
def arena() -> Iterator[HostArena]:
    arena = HostArena(3, 1000, pinned=False)
    arena.open()
    yield arena
    arena.close()


def test_an_arena_has_its_blocks_one_after_another(arena: HostArena) -> None:
    tensor = arena.tensor
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (
        (3, 1000),
        torch.uint8,
        True,
    )
    assert arena.num_bytes == 3000


def test_an_arena_is_zero_and_can_be_written(arena: HostArena) -> None:
    assert not arena.tensor.any()
    arena.tensor[2, 999] = 7
    assert arena.tensor.view(-1)[2999] == 7


def test_an_arena_larger_than_a_touch_is_zero_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_TOUCH_BYTES", 1000)
    arena = HostArena(7, 999, pinned=False)
    arena.open()
    assert not arena.tensor.any()
    arena.close()


def test_an_arena_that_is_not_open_has_no_memory() -> None:
    arena = HostArena(3, 1000, pinned=False)
    with pytest.raises(StorageError, match="not open"):
        _ = arena.tensor


def test_a_closed_arena_has_no_memory() -> None:
    arena = HostArena(3, 1000, pinned=False)
    arena.open()
    arena.close()
    arena.close()
    with pytest.raises(StorageError, match="not open"):
        _ = arena.tensor


@pytest.mark.parametrize("num_blocks", [2**50, 2**62, 2**80])
def test_an_arena_that_cannot_be_mapped_says_what_to_lower(num_blocks: int) -> None:
    with pytest.raises(StorageError, match="Lower DYN_KVBM_CPU_CACHE_GB"):
        HostArena(num_blocks, 4096, pinned=False).open()


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_an_arena_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(StorageError):
        HostArena(num_blocks, 4096, pinned=False).open()


def test_without_a_container_the_machine_counts(machine: Machine) -> None:
    assert (total_bytes(), available_bytes()) == (8 * GB, 6 * GB)


def test_a_container_without_a_limit_does_not_count(machine: Machine) -> None:
    machine.cgroup("max", str(7 * GB))
    assert (total_bytes(), available_bytes()) == (8 * GB, 6 * GB)


def test_a_containers_limit_counts_and_so_does_what_it_uses(machine: Machine) -> None:
    machine.cgroup(str(4 * GB), str(3 * GB))
    assert (total_bytes(), available_bytes()) == (4 * GB, GB)


def test_a_container_above_its_limit_has_nothing_free(machine: Machine) -> None:
    machine.cgroup(str(GB), str(2 * GB))
    assert available_bytes() == 0


def test_an_old_containers_number_for_no_limit_does_not_count(machine: Machine) -> None:
    machine.cgroup("9223372036854771712", str(GB))
    assert (total_bytes(), available_bytes()) == (8 * GB, 6 * GB)


def test_a_machine_that_does_not_say_is_an_error(machine: Machine) -> None:
    machine.meminfo("MemTotal: 1 kB\n")
    with pytest.raises(StorageError, match="MemAvailable"):
        available_bytes()


def test_this_machine_says() -> None:
    assert 0 < available_bytes() <= total_bytes()


def test_page_cache_that_a_container_can_drop_counts_as_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("7900\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 6000\nactive_file 900\n")
    paths = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))
    monkeypatch.setattr(host_memory, "_CGROUPS", (paths,))
    monkeypatch.setattr(host_memory, "_meminfo", lambda field: 64_000)
    assert host_memory.available_bytes() == 6100
