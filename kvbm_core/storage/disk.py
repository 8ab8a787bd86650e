"""One rank's disk tier: a preallocated data file with one aligned extent a block, and its index.

Lives here: making room, opening, what was found, going away. Does not live here: moving bytes (see
`kvbm_core.transfer.disk`), which blocks are worth it.
Invariant: from `open` to `close` the files are this process's alone, and as large as they will get.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvbm_core.errors import ConfigError, StorageError
from kvbm_core.storage.claim import Claim, claim, is_own, remove_foreign_ranks
from kvbm_core.storage.index import HEADER_BYTES, RECORD_BYTES, DiskIndex, has_identity
from kvbm_core.types import BlockHash, BlockId
from kvbm_core.wire import DiskInventory, DiskReset

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
RESET_SECONDS = 5.0
_ZEROS_BYTES = 8 * 2**20
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class DiskOptions:
    """directory: must exist. zerofill: write zeros where the filesystem can't reserve space.
    direct: go round the page cache where the filesystem and the block size allow it.
    persist: leave the files to the next process."""

    directory: Path
    zerofill: bool = False
    direct: bool = True
    persist: bool = True


class DiskStore:
    """Blocks of `block_bytes` on disk. Owner: the worker, which opens and closes it.

    identity: what must be equal for blocks to be used again. engine: see `claim`.
    """

    def __init__(
        self,
        options: DiskOptions,
        *,
        num_blocks: int,
        block_bytes: int,
        identity: str,
        engine: str,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.extent_bytes = -(-block_bytes // ALIGNMENT) * ALIGNMENT
        self._options = options
        self._identity = identity
        self._engine = engine
        self._rank = rank
        self._num_ranks = num_ranks
        self._claim: Claim | None = None
        self._index: DiskIndex | None = None
        self._found: list[tuple[BlockHash, BlockId]] = []
        self._resets: list[threading.Thread] = []
        self.fd = -1
        self.is_direct = False

    @property
    def index(self) -> DiskIndex:
        if self._index is None:
            raise StorageError("the disk cache is not open")
        return self._index

    @property
    def path(self) -> Path:
        if self._claim is None:
            raise StorageError("the disk cache is not open")
        return self._claim.data_path

    def open(self) -> None:
        """Claim files, make room, and read what an earlier process left: see `take_inventory`.

        Raises ConfigError or StorageError with the remedy.
        """
        try:
            problem = self._open_files()
        except BaseException:
            self._release()
            raise
        self._found = self.index.entries()
        logger.info(
            "kvbm: disk cache %s, %d blocks of %d bytes, %s; %d blocks of an earlier process%s",
            self.path,
            self.num_blocks,
            self.extent_bytes,
            "O_DIRECT" if self.is_direct else "buffered",
            len(self._found),
            f", discarded what was there: {problem}" if problem else "",
        )

    def _open_files(self) -> str:
        """Why what was there can't be used, or ""."""
        directory = self._options.directory
        self._claim = held = claim(
            directory,
            engine=self._engine,
            rank=self._rank,
            is_wanted=lambda path: has_identity(path, self._identity),
        )
        if self._rank == 0:
            remove_foreign_ranks(directory, held.set_number, self._num_ranks)
        self.fd, self.is_direct = self._open_data(held.data_path)
        self._make_room(held)
        self._index = DiskIndex(held.index_fd, self.num_blocks, self._identity)
        return self._index.open()

    def _make_room(self, held: Claim) -> None:
        """For both files; where there is none for one, the other gets none either."""
        data_bytes, size_before = self.num_blocks * self.extent_bytes, os.fstat(self.fd).st_size
        reserve(self.fd, data_bytes, self._options, held.data_path, fallocate)
        try:
            index_bytes = HEADER_BYTES + self.num_blocks * RECORD_BYTES
            reserve(held.index_fd, index_bytes, self._options, held.index_path, fallocate)
        except (ConfigError, StorageError):
            os.ftruncate(self.fd, min(size_before, data_bytes))
            raise

    def take_inventory(self) -> DiskInventory:
        """What was found at `open`; once, since it is large."""
        found, self._found = self._found, []
        return DiskInventory.of(self.num_blocks, self.index.generation, found)

    def begin_anew(self, reset: DiskReset) -> None:
        """Void all blocks: at once for this process, and for the next one as soon as the disk takes
        it. Never waits."""
        self.index.begin_anew(reset.generation, persists=reset.persists)
        thread = threading.Thread(target=self._sync, name="kvbm-disk-reset", daemon=True)
        thread.start()
        self._resets.append(thread)

    def _sync(self) -> None:
        try:
            self.index.sync()
        except OSError as error:
            logger.error("kvbm: the reset of %s can't be written: %s", self.path, error)

    def close(self) -> None:
        """Let go of the files; remove them where they are not to be kept. A reset that hangs keeps
        them open: the number of a closed descriptor could come to name another file."""
        for thread in self._resets:
            thread.join(RESET_SECONDS)
        if self._claim is None or any(thread.is_alive() for thread in self._resets):
            return
        if not self._options.persist:
            self._claim.remove()
        self._release()

    def _release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if self._claim is not None:
            self._claim.release()
        self._claim, self._index, self.fd = None, None, -1

    def _open_data(self, path: Path) -> tuple[int, bool]:
        wants_direct = self._options.direct
        if wants_direct and self.extent_bytes != self.block_bytes:
            logger.info("kvbm: blocks of %d bytes rule out O_DIRECT", self.block_bytes)
            wants_direct = False
        if wants_direct:
            try:
                return _open_data(path, os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _cannot_open(path, error) from error
                logger.info("kvbm: the filesystem of %s has no O_DIRECT", path.parent)
        try:
            return _open_data(path), False
        except OSError as error:
            raise _cannot_open(path, error) from error


def _open_data(path: Path, more_flags: int = 0) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | more_flags
    fd = os.open(path, flags, 0o600)
    if not is_own(fd):
        os.close(fd)
        raise PermissionError(errno.EACCES, "it belongs to another user")
    return fd


def fallocate(fd: int, num_bytes: int) -> None:
    """fallocate(2), which unlike posix_fallocate says so where the filesystem has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if libc.fallocate(fd, 0, 0, num_bytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def reserve(
    fd: int,
    num_bytes: int,
    options: DiskOptions,
    path: Path,
    allocate: Callable[[int, int], None] = fallocate,
) -> None:
    """Give a file exactly this many bytes, all of them backed by space. Raises with the remedy."""
    size_before = os.fstat(fd).st_size
    try:
        if size_before > num_bytes:
            os.ftruncate(fd, num_bytes)
        try:
            allocate(fd, num_bytes)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            if not options.zerofill:
                raise ConfigError(
                    "disk_zerofill_fallback",
                    False,
                    f"the filesystem of {path.parent} can't reserve space ({error.strerror})",
                    "Set DYN_KVBM_DISK_ZEROFILL_FALLBACK=true, or choose another directory.",
                ) from error
            _fill_with_zeros(path, num_bytes)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, min(size_before, num_bytes))  # a part of it would be no use
        free = shutil.disk_usage(path.parent).free
        raise StorageError(
            f"cannot reserve {num_bytes} bytes for {path}: {error.strerror or error}; {free} bytes "
            "are free. Lower DYN_KVBM_DISK_CACHE_GB, choose another DYN_KVBM_DISK_CACHE_DIR, or "
            f"remove caches that nobody needs: rm -f {path.parent}/dynamo-kvbm-disk-cache-*"
        ) from error


def _fill_with_zeros(path: Path, num_bytes: int) -> None:
    """Append zeros up to the size; through the page cache, whatever the caller's descriptor."""
    zeros = memoryview(bytes(_ZEROS_BYTES))
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        offset = os.fstat(fd).st_size
        while offset < num_bytes:
            offset += os.pwrite(fd, zeros[: num_bytes - offset], offset)
    finally:
        os.close(fd)


def _cannot_open(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot open {path}: {error.strerror}. Check its owner and the filesystem, or choose "
        "another DYN_KVBM_DISK_CACHE_DIR"
    )
