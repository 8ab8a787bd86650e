"""Who may use which files of a cache directory: one set of files a server, one file pair a rank.

    dynamo-kvbm-disk-cache-<set>.lock       shared by the ranks of one engine, names that engine
    dynamo-kvbm-disk-cache-<set>-r<rank>.data, .index

Lives here: names and locks. Does not live here: what the files hold.
Invariant: two engines never use one set, two processes never one pair; a lock ends with its
process, however that ends. A set that nobody uses is taken over with its files, so that a
changed model or size leaks no space.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvbm_core.errors import ConfigError, StorageError

PREFIX = "dynamo-kvbm-disk-cache-"
MAX_SETS = 64
_TRIES = 50
_TRY_SECONDS = 0.01
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class Claim:
    """A rank's files, opened and locked; the holder closes the descriptors.

    lock_fd: keeps the set. index_fd: keeps the pair.
    """

    set_number: int
    data_path: Path
    index_path: Path
    lock_fd: int
    index_fd: int

    def release(self) -> None:
        os.close(self.index_fd)
        os.close(self.lock_fd)

    def remove(self) -> None:
        """Delete the rank's files; they must still be held."""
        self.data_path.unlink(missing_ok=True)
        self.index_path.unlink(missing_ok=True)


def claim(
    directory: Path, *, engine: str, rank: int, is_wanted: Callable[[Path], bool] | None = None
) -> Claim:
    """A set of the directory that this engine has or can have: the one that another rank of it has
    joined, else one with blocks for us, else the first.

    engine: the same text in all ranks of one engine, and in no other. is_wanted: whether an index
    file holds blocks for us. Raises ConfigError where the directory can't be used, StorageError
    where all sets are in use.
    """
    check_directory(directory)

    def rating(number: int) -> int:
        index_path = directory / f"{PREFIX}{number}-r{rank}.index"
        if _read(directory / f"{PREFIX}{number}.lock") == engine.encode():
            return 0
        return 1 if is_wanted is not None and is_wanted(index_path) else 2

    for number in sorted(range(MAX_SETS), key=rating):
        lock_fd = _join(directory / f"{PREFIX}{number}.lock", engine)
        if lock_fd is None:
            continue
        stem = f"{PREFIX}{number}-r{rank}"
        index_path = directory / f"{stem}.index"
        index_fd = _lock_own(index_path)
        if index_fd is not None:
            return Claim(number, directory / f"{stem}.data", index_path, lock_fd, index_fd)
        os.close(lock_fd)
    raise StorageError(
        f"{directory} already serves {MAX_SETS} engines, or other users: give this one a directory "
        "of its own with DYN_KVBM_DISK_CACHE_DIR"
    )


def remove_foreign_ranks(directory: Path, set_number: int, num_ranks: int) -> None:
    """Delete what an engine with more ranks left in a set that is now ours."""
    for path in directory.glob(f"{PREFIX}{set_number}-r*.index"):
        rank = path.stem.rpartition("-r")[2]
        if not rank.isdigit() or int(rank) < num_ranks:
            continue
        fd = _lock_own(path)
        if fd is not None:
            path.with_suffix(".data").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            os.close(fd)


def check_directory(directory: Path) -> None:
    """Raise ConfigError where files can't be made there."""
    remedy = "Make it, or choose another with DYN_KVBM_DISK_CACHE_DIR."
    if not directory.is_dir():
        raise ConfigError("disk_cache_dir", str(directory), "is no directory", remedy)
    if not os.access(directory, os.W_OK | os.X_OK):
        remedy = f"sudo chown $USER {directory}, or choose another with DYN_KVBM_DISK_CACHE_DIR."
        raise ConfigError("disk_cache_dir", str(directory), "may not be written to", remedy)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _join(path: Path, engine: str) -> int | None:
    """Share the set with the engine's other ranks, or take it where nobody has it."""
    fd = _open_own(path)
    if fd is None:
        return None
    for _ in range(_TRIES):
        if _try_lock(fd, fcntl.LOCK_EX, path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, engine.encode(), 0)
        if _try_lock(fd, fcntl.LOCK_SH, path):
            # Between the two locks another engine may have come first: what is written counts.
            if os.pread(fd, 4096, 0) == engine.encode():
                return fd
            break
        time.sleep(_TRY_SECONDS)  # somebody is writing a name
    os.close(fd)
    return None


def _lock_own(path: Path) -> int | None:
    """Open or create, and lock for us alone; None where somebody else has it."""
    while (fd := _open_own(path)) is not None:
        if not _try_lock(fd, fcntl.LOCK_EX, path):
            os.close(fd)
            return None
        if _is_at(path, fd):
            return fd
        os.close(fd)  # its holder removed it between our open and our lock
    return None


def _is_at(path: Path, fd: int) -> bool:
    try:
        return path.lstat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def is_own(fd: int) -> bool:
    """Whether the file belongs to us, and not to another user who could read and change it."""
    return os.fstat(fd).st_uid == os.geteuid()


def _open_own(path: Path) -> int | None:
    """Open or create; None for a file of another user, whom we would hand the cache."""
    try:
        fd = os.open(path, _FLAGS, 0o600)
    except PermissionError:
        return None
    except OSError as error:
        raise ConfigError(
            "disk_cache_dir",
            str(path.parent),
            f"{path.name} can't be opened: {error}",
            "Choose another with DYN_KVBM_DISK_CACHE_DIR.",
        ) from error
    if not is_own(fd):
        os.close(fd)
        return None
    return fd


def _try_lock(fd: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(
            "disk_cache_dir",
            str(path.parent),
            f"{path.name} can't be locked: {error}",
            "Choose a directory on a local disk with DYN_KVBM_DISK_CACHE_DIR.",
        ) from error
    return True
