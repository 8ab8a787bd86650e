from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvbm_core import build
from kvbm_core.build import DISK_ENGINES
from kvbm_core.config import KvbmConfig
from kvbm_core.storage.disk import DiskOptions, DiskStore
from kvbm_core.transfer import disk_probe, nixl_posix
from kvbm_core.transfer.disk import BlockFile, PreadIo
from kvbm_core.transfer.disk_probe import CANDIDATE_SECONDS, MAX_ROUNDS, fastest
from kvbm_core.types import BlockId

NUM_BLOCKS, BLOCK_BYTES = 8, 4096


class Clock:
    """Time that passes only where an io says so."""

    def __init__(self) -> None:
        self.now_seconds = 0.0

    def __call__(self) -> float:
        return self.now_seconds


class TimedIo(PreadIo):
    """Real I/O that takes as long as it is told; a list is used up call by call, then its last."""

    def __init__(
        self, file: BlockFile, host: torch.Tensor, clock: Clock, seconds: Sequence[float]
    ) -> None:
        super().__init__(file, host)
        self._clock = clock
        self._seconds = list(seconds)
        self.num_calls = 0
        self.is_closed = False

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        self._spend()
        return super().read(disk_ids, host_ids)

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        self._spend()
        return super().write(disk_ids, host_ids)

    def close(self) -> None:
        self.is_closed = True

    def _spend(self) -> None:
        self.num_calls += 1
        self._clock.now_seconds += self._seconds[0]
        if len(self._seconds) > 1:
            del self._seconds[0]


class LyingIo(TimedIo):
    """Says that it has read."""

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        self._spend()
        return {}


class FailingIo(TimedIo):
    """Fails its second write."""

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        if self.num_calls >= 2:
            return {0: "no"}
        return super().write(disk_ids, host_ids)


class RaisingIo(TimedIo):
    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        raise RuntimeError("broken")


class Probe:
    """Candidates on a fake clock over a real store that holds something."""

    def __init__(self, directory: Path) -> None:
        self.clock = Clock()
        self.made: dict[str, TimedIo] = {}
        self.candidates: dict[str, disk_probe.IoFactory] = {}
        self.store = DiskStore(
            DiskOptions(directory),
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
            identity="test",
            engine="test",
            rank=0,
            num_ranks=1,
        )
        self.store.open()
        self.store.path.write_bytes(b"x" * NUM_BLOCKS * BLOCK_BYTES)

    def add(self, name: str, *seconds: float, kind: type[TimedIo] = TimedIo) -> None:
        def make(file: BlockFile, host: torch.Tensor) -> TimedIo:
            self.made[name] = kind(file, host, self.clock, seconds)
            return self.made[name]

        self.candidates[name] = make

    def fastest(self) -> str:
        return fastest(self.candidates, self.store, num_threads=1, clock=self.clock)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Probe]:
    """Afterwards nothing of it is left, and the store is as it was."""
    monkeypatch.setattr(disk_probe, "ROUND_BYTES", 16 * BLOCK_BYTES)
    probe = Probe(tmp_path)
    files = sorted(tmp_path.iterdir())
    yield probe
    assert sorted(tmp_path.iterdir()) == files
    assert set(probe.store.path.read_bytes()) == {ord("x")}
    probe.store.close()


@pytest.mark.parametrize(
    ("reference", "other", "choice"),
    [(0.010, 0.010, "threads"), (0.0109, 0.010, "threads"), (0.0112, 0.010, "other")],
    ids=["equal", "less-than-a-tenth", "more-than-a-tenth"],
)
def test_another_must_be_a_tenth_faster(
    probe: Probe, reference: float, other: float, choice: str
) -> None:
    probe.add("threads", reference)
    probe.add("other", other)
    assert probe.fastest() == choice
    assert all(io.is_closed for io in probe.made.values())


def test_the_best_round_of_each_direction_counts(probe: Probe) -> None:
    probe.add("threads", 0.020)
    probe.add("other", 0.05, 0.05, 0.010, 0.05, 0.05, 0.010, 0.05)
    assert probe.fastest() == "other"


def test_a_slow_candidate_is_not_measured_for_long(probe: Probe) -> None:
    probe.add("threads", 0.001)
    probe.add("other", CANDIDATE_SECONDS)
    probe.fastest()
    assert probe.made["threads"].num_calls == 2 * MAX_ROUNDS
    assert probe.made["other"].num_calls == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LyingIo, "other bytes came back than were written"),
        (FailingIo, "no"),
        (RaisingIo, "RuntimeError: broken"),
    ],
)
def test_a_candidate_that_does_not_work_is_out_however_fast(
    probe: Probe, kind: type[TimedIo], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    probe.add("threads", 0.010)
    probe.add("other", 0.0001, kind=kind)
    assert probe.fastest() == "threads"
    assert "disk engine other is out" in caplog.text
    assert reason in caplog.text
    assert probe.made["other"].is_closed


def test_a_candidate_that_cannot_be_made_is_out(
    probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    def make(file: BlockFile, host: torch.Tensor) -> TimedIo:
        raise ValueError("not here")

    caplog.set_level(logging.INFO)
    probe.add("threads", 0.010)
    probe.candidates["other"] = make
    assert probe.fastest() == "threads"
    assert "disk engine other is out: ValueError: not here" in caplog.text


def test_where_the_reference_fails_another_serves(
    probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    probe.add("threads", 0.001, kind=RaisingIo)
    probe.add("other", 0.010)
    assert probe.fastest() == "other"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1


def test_where_all_fail_it_is_the_reference(probe: Probe) -> None:
    probe.add("threads", 0.001, kind=RaisingIo)
    probe.add("other", 0.010, kind=LyingIo)
    assert probe.fastest() == "threads"


def test_a_candidate_that_hangs_is_out_and_keeps_its_file(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ended, fds = threading.Event(), threading.Event(), []

    class HangingIo(TimedIo):
        def __init__(self, file: BlockFile, *args: object) -> None:
            super().__init__(file, *args)  # type: ignore[arg-type]
            fds.append(file.fd)

        def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
            gate.wait()
            try:
                return super().read(disk_ids, host_ids)
            finally:
                ended.set()

    monkeypatch.setattr(disk_probe, "ANSWER_SECONDS", 0.5)
    probe.add("threads", 0.010)
    probe.add("other", 0.001, kind=HangingIo)
    assert probe.fastest() == "threads"
    assert "(deleted)" in str(Path(f"/proc/self/fd/{fds[0]}").readlink())
    assert not probe.made["other"].is_closed
    gate.set()
    ended.wait()


def test_without_room_to_measure_it_is_the_reference(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ftruncate(fd: int, size: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(disk_probe.os, "ftruncate", ftruncate)
    probe.add("threads", 0.010)
    probe.add("other", 0.001)
    assert probe.fastest() == "threads"
    assert "disk engine threads, unmeasured: no room" in caplog.text


def test_one_line_says_what_was_measured(probe: Probe, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    probe.add("threads", 0.010)
    probe.add("other", 0.005)
    probe.fastest()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "kvbm: disk engine other (threads writes 7, reads 7 MB/s; other writes 13, reads 13 MB/s)"
    )


def test_the_built_in_engines_pass_the_probe(
    probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert build._fastest_disk(KvbmConfig(), probe.store) in ("threads", "nixl")
    assert "threads writes" in caplog.text
    assert "nixl writes" in caplog.text


def test_without_nixl_threads_are_used_unmeasured(
    probe: Probe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(nixl_posix, "is_installed", lambda: False)
    assert build._fastest_disk(KvbmConfig(), probe.store) == "threads"
    assert not caplog.records


def test_the_wiring_imports_without_nixl() -> None:
    code = "import sys; sys.modules['nixl_cu12'] = None; import kvbm_core.build"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_disk_engines_that_can_be_named() -> None:
    assert list(DISK_ENGINES) == ["threads", "nixl", "nixl_gds"]
