"""Blocks between the host arena and a disk store, checked on the way.

Lives here: what surrounds the I/O of a piece: checksums, records, which blocks failed; and the I/O
itself as pread and pwrite. Does not live here: threads, files, NIXL (see `nixl_posix`).
Invariant: bytes of disk count as read only if the block's record names the key that was asked for
and has their checksum; a record exists only while its bytes are complete.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

import torch
import xxhash

from kvbm_core.storage.disk import DiskStore
from kvbm_core.storage.index import stretches
from kvbm_core.transfer.threads import Lane, Piece, ThreadEngine
from kvbm_core.types import KEY_BYTES, BlockHash, BlockId, Tier, TransferOp

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 * 2**20
BUFFERED_PIECE_BYTES = 4 * 2**20  # larger ones spoil the kernel's readahead for each other
JOIN_SECONDS = 5.0
_MAX_VECTORS = 1024  # IOV_MAX of Linux


class BlockFile(Protocol):
    """What a BlockIo knows of a file: block i is `block_bytes` bytes from `i * extent_bytes` on."""

    @property
    def fd(self) -> int: ...
    @property
    def extent_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...


class BlockIo(Protocol):
    """Moves whole blocks between the arena and the file; called from several threads at once."""

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        """Fill the host blocks; positions whose bytes did not come, and why. May raise OSError."""

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        """Store the host blocks; positions that were not stored, and why. May raise OSError."""

    def close(self) -> None:
        """Free what the I/O holds; nothing is in flight any more."""


class DiskTransferEngine(ThreadEngine):
    """Threads that read and threads that write, so that neither direction waits for the other.

    `num_threads` read, half as many write. piece_blocks None: 8 MiB a piece, through the page cache
    4 MiB. A thread that hangs in the kernel is left behind after JOIN_SECONDS of `close`.
    """

    def __init__(
        self,
        store: DiskStore,
        host: torch.Tensor,
        io: BlockIo,
        *,
        num_threads: int,
        piece_blocks: int | None = None,
    ) -> None:
        piece_bytes = PIECE_BYTES if store.is_direct else BUFFERED_PIECE_BYTES
        super().__init__(
            _CheckedPieces(store, host, io),
            lanes_of(num_threads),
            piece_blocks=piece_blocks or max(1, piece_bytes // store.extent_bytes),
            name="disk",
            join_seconds=JOIN_SECONDS,
        )
        self._io = io
        self._store = store

    def context(self) -> bytes:
        """The generation: what was to be written before a reset is not of the next one."""
        return self._store.index.generation

    def close(self) -> None:
        """As the port says; closes the store too. A thread that hangs keeps its file: the number of
        a closed descriptor could come to name another one."""
        super().close()
        if self.num_threads_left:
            logger.error("%d disk threads hang; their files stay open", self.num_threads_left)
            return
        self._io.close()
        self._store.close()


def lanes_of(num_threads: int) -> list[Lane]:
    """So many threads that read, half as many that write."""
    return [Lane(num_threads, is_upward=True), Lane(max(1, num_threads // 2), is_upward=False)]


class _CheckedPieces:
    """PieceWork: I/O between checksums and records."""

    def __init__(self, store: DiskStore, host: torch.Tensor, io: BlockIo) -> None:
        self.block_bytes = store.block_bytes
        self._store = store
        self._rows = rows_of(host)
        self._io = io

    def order(self, op: TransferOp) -> Sequence[int]:
        """By place on disk, so that neighbours become one call."""
        disk_ids = (op.src if op.src.tier is Tier.DISK else op.dst).ids()
        return sorted(range(len(disk_ids)), key=disk_ids.__getitem__)

    def run(self, piece: Piece) -> dict[int, str]:
        keys = [
            BlockHash(piece.op.keys[i * KEY_BYTES : (i + 1) * KEY_BYTES]) for i in piece.positions
        ]
        if piece.op.is_upward:
            failed = self._read(keys, piece.src_ids, piece.dst_ids)
        else:
            failed = self._write(keys, piece.src_ids, piece.dst_ids, piece.context)
        return {piece.positions[i]: problem for i, problem in failed.items()}

    def _read(
        self, keys: Sequence[BlockHash], disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]
    ) -> dict[int, str]:
        failed = self._io.read(disk_ids, host_ids)
        index = self._store.index
        for i, (key, disk_id, host_id) in enumerate(zip(keys, disk_ids, host_ids, strict=True)):
            if i in failed:
                continue
            entry = index.get(disk_id)
            if entry is None or entry.key != key:
                failed[i] = f"disk block {disk_id} does not hold what was written there"
            elif xxhash.xxh3_64_intdigest(self._rows[host_id]) != entry.checksum:
                failed[i] = f"disk block {disk_id} has a wrong checksum"
        if failed:
            index.erase([disk_ids[i] for i in failed])
        return failed

    def _write(
        self,
        keys: Sequence[BlockHash],
        host_ids: Sequence[BlockId],
        disk_ids: Sequence[BlockId],
        generation: bytes,
    ) -> dict[int, str]:
        index = self._store.index
        checksums = [xxhash.xxh3_64_intdigest(self._rows[i]) for i in host_ids]
        index.erase(disk_ids)
        failed = self._io.write(disk_ids, host_ids)
        done = [i for i in range(len(keys)) if i not in failed]
        index.put(
            [disk_ids[i] for i in done],
            [keys[i] for i in done],
            [checksums[i] for i in done],
            generation,
        )
        return failed


class PreadIo:
    """BlockIo by preadv and pwritev: one call for each stretch of neighbours on disk."""

    def __init__(self, file: BlockFile, host: torch.Tensor) -> None:
        self._fd = file.fd
        self._extent_bytes = file.extent_bytes
        self._block_bytes = file.block_bytes
        self._rows = rows_of(host)

    def read(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return self._each_stretch(os.preadv, disk_ids, host_ids)

    def write(self, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]) -> dict[int, str]:
        return self._each_stretch(os.pwritev, disk_ids, host_ids)

    def close(self) -> None:
        """Nothing: the store owns the file."""

    def _each_stretch(
        self, call: _VectorCall, disk_ids: Sequence[BlockId], host_ids: Sequence[BlockId]
    ) -> dict[int, str]:
        # Blocks with padding between them are no neighbours for one call.
        longest = _MAX_VECTORS if self._extent_bytes == self._block_bytes else 1
        failed: dict[int, str] = {}
        end = 0
        for stretch in stretches(disk_ids):
            for part in (stretch[i : i + longest] for i in range(0, len(stretch), longest)):
                start, end = end, end + len(part)
                problem, num_done = self._one(call, part.start, host_ids[start:end])
                failed.update(dict.fromkeys(range(start + num_done, end), problem))
        return failed

    def _one(
        self, call: _VectorCall, disk_id: BlockId, host_ids: Sequence[BlockId]
    ) -> tuple[str, int]:
        """Why it stopped, and how many blocks are complete."""
        vectors = [self._rows[i] for i in host_ids]
        try:
            num_bytes = call(self._fd, vectors, disk_id * self._extent_bytes)
        except OSError as error:
            return f"disk block {disk_id}: {error.strerror}", 0
        num_done = num_bytes // self._block_bytes
        return f"disk block {disk_id + num_done}: the file ends or the disk is full", num_done


class _VectorCall(Protocol):
    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...


def rows_of(host: torch.Tensor) -> list[memoryview]:
    """Each host block's bytes; they keep the arena alive."""
    flat = memoryview(host.numpy()).cast("B")
    size = host.shape[1]
    return [flat[i * size : (i + 1) * size] for i in range(host.shape[0])]
