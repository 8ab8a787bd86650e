"""Which block of a data file holds what: one checked record a block, in a file of its own.

    header (4 KiB)  | record 0 | record 1 | …        a record: 64 bytes

Lives here: the header, the records, their checksums. Does not live here: data, locks, file names.
Invariant: a record is there only while its block's bytes are complete: it is erased before they
are overwritten and written after them. A record that a crash, another generation or a
flipped bit made invalid reads as absent. So the order in which a dying machine's pages reach the
disk does not matter either: bytes that don't belong to their record fail its checksum.

No fsync: what a killed process has written, the kernel still has; a power loss may cost blocks.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from kvbm_core.errors import StorageError
from kvbm_core.types import KEY_BYTES, BlockHash, BlockId
from kvbm_core.wire import GENERATION_BYTES

FORMAT_VERSION = 1
HEADER_BYTES = 4096
_MAGIC = b"KVBMDISK"
_FRAME = struct.Struct("<8sIQ")  # magic, length and checksum of the header's body
_FIELDS = struct.Struct(f"<{KEY_BYTES}sQQ8s")  # key, checksum of the data, sequence, generation
_SEAL = struct.Struct("<Q")
_RECORD = struct.Struct(_FIELDS.format + "Q")
RECORD_BYTES = _RECORD.size
_EMPTY = bytes(RECORD_BYTES)
_MAX_IDENTITY_BYTES = 3072

_Page = tuple[int, bytes]  # place in the file, and what belongs there


class Header(msgspec.Struct, frozen=True):
    """identity: what must be equal for the blocks to be used, in readable words. persists: a later
    process may use them. generation: changes whenever all blocks become void."""

    version: int
    identity: str
    generation: bytes
    persists: bool


class Entry(NamedTuple):
    key: BlockHash
    checksum: int


class DiskIndex:
    """The records of `num_blocks` blocks, mirrored in memory (64 bytes each).

    `put`, `erase`, `get` and `begin_anew` may be called from any thread.
    """

    def __init__(self, fd: int, num_blocks: int, identity: str) -> None:
        self._fd = fd
        self._num_blocks = num_blocks
        self._identity = _short(identity)
        self._records = bytearray()
        self._sequence = 0
        self._is_header_stale = False
        self._lock = threading.Lock()  # memory; held for moments
        self._file_lock = threading.Lock()  # the file; held while the disk answers
        self.generation = b""
        self.persists = False

    def open(self) -> str:
        """Read what an earlier process left; returns why it can't be used, or "".

        Raises StorageError where the file can't be read.
        """
        size = HEADER_BYTES + self._num_blocks * RECORD_BYTES
        try:
            raw = _read_all(self._fd, size)
        except OSError as error:
            raise StorageError(f"cannot read the index of the disk cache: {error}") from error
        header, problem = _parse_header(raw[:HEADER_BYTES], self._identity)
        self._records = bytearray(self._num_blocks * RECORD_BYTES)
        if header is not None:
            self.generation, self.persists = header.generation, header.persists
            self._records[: len(raw) - HEADER_BYTES] = raw[HEADER_BYTES:]
        return problem

    def entries(self) -> list[tuple[BlockHash, BlockId]]:
        """Valid records in the order in which they were written; of one key, the latest only.

        Records that are not valid are erased from memory.
        """
        found: list[tuple[int, BlockHash, BlockId]] = []
        invalid: list[BlockId] = []
        generation, digest, view = self.generation[:8], xxhash.xxh3_64_intdigest, self._records[:]
        for block_id, fields in enumerate(_RECORD.iter_unpack(view) if generation else ()):
            key, _, sequence, its_generation, seal = fields
            if not sequence:
                continue
            start = block_id * RECORD_BYTES
            sealed = view[start : start + _FIELDS.size]
            if its_generation == generation and seal == digest(sealed):
                found.append((sequence, BlockHash(key), block_id))
            else:
                invalid.append(block_id)
        self._set(invalid, [_EMPTY] * len(invalid))
        found.sort()
        self._sequence = found[-1][0] if found else 0
        latest = {key: block_id for _, key, block_id in found}
        return [(key, block_id) for _, key, block_id in found if latest[key] == block_id]

    def begin_anew(self, generation: bytes, *, persists: bool) -> None:
        """Void every record at once, in memory: never waits for the disk. `sync` tells the file."""
        assert len(generation) == GENERATION_BYTES
        with self._lock:
            self.generation, self.persists = generation, persists
            self._records = bytearray(self._num_blocks * RECORD_BYTES)
            self._sequence, self._is_header_stale = 0, True

    def sync(self) -> None:
        """Have the file void what `begin_anew` did. Raises OSError where it can't be written."""
        with self._file_lock:
            self._write_header()

    def get(self, block_id: BlockId) -> Entry | None:
        """What the block holds; None where it holds nothing that can be trusted, of what an earlier
        process left since `entries`. Raises IndexError for no block of these, as `put` and `erase`
        do."""
        if block_id >= self._num_blocks:
            raise IndexError(f"disk block {block_id} of {self._num_blocks}")
        key, checksum, sequence, _, _ = _RECORD.unpack_from(self._records, block_id * RECORD_BYTES)
        return Entry(BlockHash(key), checksum) if sequence else None

    def put(
        self,
        block_ids: Sequence[BlockId],
        keys: Sequence[BlockHash],
        checksums: Sequence[int],
        generation: bytes | None = None,
    ) -> None:
        """The blocks' bytes are complete. generation: under which they were to be written; they are
        forgotten if it has ended since. Raises OSError where that can't be written."""
        self._check(block_ids)
        with self._file_lock:
            self._write_header()
            with self._lock:
                if generation not in (None, self.generation):
                    return
                pages = self._set(block_ids, self._seal(keys, checksums))
            self._write(pages)

    def erase(self, block_ids: Sequence[BlockId]) -> None:
        """The blocks' bytes are void from here on. Raises OSError where that can't be written."""
        self._check(block_ids)
        with self._file_lock:
            self._write_header()
            with self._lock:
                held = [i for i in block_ids if self._holds(i)]
                pages = self._set(held, [_EMPTY] * len(held))
            self._write(pages)

    def _check(self, block_ids: Sequence[BlockId]) -> None:
        highest = max(block_ids, default=0)
        if highest >= self._num_blocks:
            raise IndexError(f"disk block {highest} of {self._num_blocks}")

    def _write_header(self) -> None:
        """Before any record of a new generation, and before bytes that an old record names go."""
        with self._lock:
            if not self._is_header_stale:
                return
            header = Header(FORMAT_VERSION, self._identity, self.generation, self.persists)
            self._is_header_stale = False
        body = msgspec.msgpack.encode(header)
        frame = _FRAME.pack(_MAGIC, len(body), xxhash.xxh3_64_intdigest(body))
        try:
            _write_all(self._fd, (frame + body).ljust(HEADER_BYTES, b"\0"), 0)
        except OSError:
            with self._lock:
                self._is_header_stale = True
            raise

    def _holds(self, block_id: BlockId) -> bool:
        start = block_id * RECORD_BYTES
        return self._records[start : start + RECORD_BYTES] != _EMPTY

    def _seal(self, keys: Sequence[BlockHash], checksums: Sequence[int]) -> list[bytes]:
        """A record each."""
        generation, first = self.generation[:8], self._sequence + 1
        self._sequence += len(keys)
        pack, seal, digest = _FIELDS.pack, _SEAL.pack, xxhash.xxh3_64_intdigest
        return [
            (fields := pack(key, checksum, sequence, generation)) + seal(digest(fields))
            for sequence, (key, checksum) in enumerate(zip(keys, checksums, strict=True), first)
        ]

    def _set(self, block_ids: Sequence[BlockId], records: Sequence[bytes]) -> list[_Page]:
        """In memory; returns what the file must be told."""
        pages, start = [], 0
        for stretch in stretches(block_ids):
            content = b"".join(records[start : start + len(stretch)])
            offset = stretch.start * RECORD_BYTES
            self._records[offset : offset + len(content)] = content
            pages.append((HEADER_BYTES + offset, content))
            start += len(stretch)
        return pages

    def _write(self, pages: Sequence[_Page]) -> None:
        for offset, content in pages:
            _write_all(self._fd, content, offset)


def stretches(ids: Sequence[int]) -> list[range]:
    """The ids in their order, cut wherever the next one is not one more."""
    found, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            found.append(range(ids[start], ids[start] + i - start))
            start = i
    return found


def _short(identity: str) -> str:
    """The identity if a header has room for it, else its beginning and a digest of all of it."""
    encoded = identity.encode()
    if len(encoded) <= _MAX_IDENTITY_BYTES:
        return identity
    start = encoded[: _MAX_IDENTITY_BYTES // 2].decode(errors="ignore")
    return f"{start}… blake2b {hashlib.blake2b(encoded, digest_size=32).hexdigest()}"


def has_identity(path: Path, identity: str) -> bool:
    """Whether the index there holds blocks that could be used under this identity."""
    try:
        with path.open("rb") as file:
            header, _ = _parse_header(file.read(HEADER_BYTES), _short(identity))
    except OSError:
        return False
    return header is not None


def _parse_header(raw: bytes, identity: str) -> tuple[Header | None, str]:
    """The header if its blocks may be used, and why not; nothing at all for a new file."""
    if not raw.strip(b"\0"):
        return None, ""
    if len(raw) < HEADER_BYTES or not raw.startswith(_MAGIC):
        return None, "its index is not one of ours"
    _, length, seal = _FRAME.unpack_from(raw)
    body = raw[_FRAME.size : _FRAME.size + length]
    if len(body) != length or xxhash.xxh3_64_intdigest(body) != seal:
        return None, "its header is damaged"
    try:
        header = msgspec.msgpack.decode(body, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return None, f"its header can't be read: {error}"
    if header.version != FORMAT_VERSION:
        return None, f"it has format {header.version}, this release writes {FORMAT_VERSION}"
    if header.identity != identity:
        return None, f"it belongs to [{header.identity}], this is [{identity}]"
    if not header.persists:
        return None, "it was not to be kept"
    return header, ""


def _read_all(fd: int, size: int) -> bytes:
    parts, offset = [], 0
    while offset < size and (part := os.pread(fd, min(size - offset, 2**26), offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
