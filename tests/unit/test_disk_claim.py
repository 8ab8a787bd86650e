from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvbm_core.errors import ConfigError, StorageError
from kvbm_core.storage import claim as claim_module
from kvbm_core.storage.claim import MAX_SETS, PREFIX, Claim, claim, remove_foreign_ranks


class Claims:
    """Claims in one directory, released at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._held: list[Claim] = []

    def take(
        self, engine: str, rank: int = 0, is_wanted: Callable[[Path], bool] | None = None
    ) -> Claim:
        held = claim(self.directory, engine=engine, rank=rank, is_wanted=is_wanted)
        self._held.append(held)
        return held

    def release(self, held: Claim) -> None:
        self._held.remove(held)
        held.release()

    def close(self) -> None:
        for held in self._held:
            held.release()

    def names(self) -> list[str]:
        return sorted(path.name.removeprefix(PREFIX) for path in self.directory.iterdir())


@pytest.fixture
def claims(tmp_path: Path) -> Iterator[Claims]:
    claims = Claims(tmp_path)
    yield claims
    claims.close()


def test_the_files_of_a_rank_lie_side_by_side(claims: Claims) -> None:
    held = claims.take("a", rank=2)
    assert held.data_path == claims.directory / f"{PREFIX}0-r2.data"
    assert held.index_path == claims.directory / f"{PREFIX}0-r2.index"
    assert claims.names() == ["0-r2.index", "0.lock"]
    assert held.index_path.stat().st_mode & 0o777 == 0o600


def test_two_engines_get_different_sets(claims: Claims) -> None:
    assert [claims.take(engine).set_number for engine in "abc"] == [0, 1, 2]


def test_the_ranks_of_an_engine_share_a_set(claims: Claims) -> None:
    claims.take("other")
    held = [claims.take("a", rank) for rank in (2, 0, 1)]
    assert {one.set_number for one in held} == {1}
    assert len({one.index_path for one in held}) == 3


def test_the_same_engine_twice_never_shares_a_pair(claims: Claims) -> None:
    first = [claims.take("a", rank) for rank in (0, 1)]
    second = [claims.take("a", rank) for rank in (0, 1)]
    assert [one.set_number for one in (*first, *second)] == [0, 0, 1, 1]


def test_a_set_that_nobody_uses_is_taken_over(claims: Claims) -> None:
    claims.release(claims.take("a"))
    assert claims.take("b").set_number == 0
    assert claims.take("a").set_number == 1


def test_a_set_stays_taken_until_its_last_rank_has_gone(claims: Claims) -> None:
    first, last = claims.take("a", 0), claims.take("a", 1)
    claims.release(first)
    other = claims.take("b")
    assert other.set_number == 1
    claims.release(last)
    assert claims.take("c").set_number == 0


def _hold(connection: Connection, directory: Path) -> None:
    held = claim(directory, engine="killed", rank=0)
    connection.send(held.set_number)
    connection.recv()


def test_a_killed_process_leaves_no_lock(claims: Claims) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(theirs, claims.directory))
    child.start()
    assert ours.recv() == 0
    assert claims.take("b").set_number == 1
    child.kill()
    child.join()
    assert claims.take("c").set_number == 0


def test_files_of_another_user_are_not_used(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims.release(claims.take("a"))
    ours = os.geteuid()
    lock = claims.directory / f"{PREFIX}0.lock"
    foreign = lock.stat().st_ino
    fstat = os.fstat

    def owned(fd: int) -> os.stat_result:
        found = fstat(fd)
        fields = list(found)
        fields[4] = ours + 1 if found.st_ino == foreign else ours
        return os.stat_result(fields)

    monkeypatch.setattr(claim_module.os, "fstat", owned)
    assert claims.take("a").set_number == 1


def test_a_directory_full_of_another_users_files_is_refused(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims.release(claims.take("a"))
    ours = os.geteuid()
    monkeypatch.setattr(claim_module.os, "geteuid", lambda: ours + 1)
    with pytest.raises(StorageError, match="DYN_KVBM_DISK_CACHE_DIR"):
        claims.take("a")


def test_all_sets_in_use_is_refused_with_the_remedy(claims: Claims) -> None:
    for number in range(MAX_SETS):
        claims.take(str(number))
    with pytest.raises(StorageError, match=f"{MAX_SETS} engines.*DYN_KVBM_DISK_CACHE_DIR"):
        claims.take("one more")


@pytest.mark.parametrize("name", ["0.lock", "0-r0.index"])
def test_a_symlink_is_refused(claims: Claims, name: str) -> None:
    target = claims.directory / "precious"
    target.write_text("text")
    (claims.directory / f"{PREFIX}{name}").symlink_to(target)
    with pytest.raises(ConfigError, match="DYN_KVBM_DISK_CACHE_DIR"):
        claims.take("a")
    assert target.read_text() == "text"


def test_a_filesystem_without_locks_is_refused(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"No locks available.*DYN_KVBM_DISK_CACHE_DIR"):
        claims.take("a")


def test_files_that_their_holder_removed_meanwhile_are_made_anew(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open and our lock the one before us ends and removes its files."""
    first = claims.take("a")
    real = fcntl.flock
    waiting = [first]

    def flock(fd: int, kind: int) -> None:
        if waiting and os.fstat(fd).st_ino == os.fstat(first.index_fd).st_ino:
            one = waiting.pop()
            one.remove()
            claims.release(one)
        real(fd, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = claims.take("a")
    assert not waiting
    assert os.fstat(held.index_fd).st_ino == held.index_path.stat().st_ino


def test_no_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no directory\. Make it, or choose another") as error:
        claim(tmp_path / "missing", engine="a", rank=0)
    assert error.value.option == "disk_cache_dir"


def test_a_read_only_directory_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"may not be written to\. sudo chown"):
        claim(tmp_path, engine="a", rank=0)


def test_what_an_engine_with_more_ranks_left_is_removed(claims: Claims) -> None:
    for rank in range(4):
        held = claims.take("a", rank)
        held.data_path.write_bytes(b"x")
        claims.release(held)
    held = claims.take("a")
    remove_foreign_ranks(claims.directory, 0, 2)
    kept = ["0-r0.data", "0-r0.index", "0-r1.data", "0-r1.index", "0.lock"]
    assert claims.names() == kept


def test_a_rank_that_is_at_work_and_other_files_are_left_alone(claims: Claims) -> None:
    for rank in (0, 3):
        claims.take("a", rank).data_path.write_bytes(b"x")
    strange = claims.directory / f"{PREFIX}0-rx.index"
    strange.write_bytes(b"")
    remove_foreign_ranks(claims.directory, 0, 1)
    assert {"0-r3.data", "0-r3.index", "0-rx.index"} <= set(claims.names())


def test_removing_leaves_no_file_of_the_rank(claims: Claims) -> None:
    held = claims.take("a")
    held.data_path.write_bytes(b"x")
    held.remove()
    held.remove()
    assert claims.names() == ["0.lock"]


def test_a_set_with_blocks_for_us_comes_before_the_first(claims: Claims) -> None:
    first, second = claims.take("a"), claims.take("b")
    wanted = second.index_path
    claims.release(first)
    claims.release(second)
    found = claims.take("c", is_wanted=lambda path: path == wanted)
    assert (first.set_number, found.set_number) == (0, second.set_number)


def test_a_rank_joins_the_set_of_its_engine_before_one_with_blocks_for_it(claims: Claims) -> None:
    claims.take("other")
    mine = claims.take("a", rank=0)
    assert claims.take("a", rank=1, is_wanted=lambda _: True).set_number == mine.set_number
