from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash

from kvbm_core.errors import StorageError
from kvbm_core.storage import index as index_module
from kvbm_core.storage.index import (
    _FIELDS,
    _FRAME,
    _MAGIC,
    _SEAL,
    FORMAT_VERSION,
    HEADER_BYTES,
    RECORD_BYTES,
    DiskIndex,
    Header,
    stretches,
)
from kvbm_core.types import KEY_BYTES, BlockHash
from kvbm_core.wire import GENERATION_BYTES

NUM_BLOCKS = 8
IDENTITY = "model a; rank 0 of 1"
FIRST, SECOND = b"1" * GENERATION_BYTES, b"2" * GENERATION_BYTES


def key(number: int) -> BlockHash:
    return BlockHash(bytes([number]) * KEY_BYTES)


class File:
    """An index file that outlives the indexes over it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def index(self, identity: str = IDENTITY, num_blocks: int = NUM_BLOCKS) -> DiskIndex:
        return DiskIndex(self.fd, num_blocks, identity)

    def fresh(self, *, persists: bool = True) -> DiskIndex:
        index = self.index()
        index.open()
        index.begin_anew(FIRST, persists=persists)
        return index

    def filled(self, *, persists: bool = True) -> DiskIndex:
        """Keys 5, 1 and 9 in blocks 3, 0 and 7, in this order."""
        index = self.fresh(persists=persists)
        index.put([3], [key(5)], [55])
        index.put([0, 7], [key(1), key(9)], [11, 99])
        return index

    def flip(self, offset: int) -> None:
        os.pwrite(self.fd, bytes([os.pread(self.fd, 1, offset)[0] ^ 1]), offset)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def reopened(self, identity: str = IDENTITY, num_blocks: int = NUM_BLOCKS) -> Reopened:
        index = self.index(identity, num_blocks)
        return Reopened(index.open(), index)


class Reopened:
    """What a later process finds."""

    def __init__(self, problem: str, index: DiskIndex) -> None:
        self.problem = problem
        self.index = index
        self.entries = index.entries()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "index")
    yield file
    os.close(file.fd)


ALL = [(key(5), 3), (key(1), 0), (key(9), 7)]


def test_entries_survive_in_the_order_in_which_they_were_written(file: File) -> None:
    file.filled()
    found = file.reopened()
    assert (found.problem, found.entries) == ("", ALL)
    assert (found.index.generation, found.index.persists) == (FIRST, True)
    entry = found.index.get(7)
    assert entry is not None
    assert (entry.key, entry.checksum) == (key(9), 99)


def test_order_goes_on_after_a_reopen(file: File) -> None:
    file.filled()
    file.reopened().index.put([1], [key(2)], [22])
    assert file.reopened().entries == [*ALL, (key(2), 1)]


def test_a_new_file_holds_nothing_and_has_no_problem(file: File) -> None:
    found = file.reopened()
    assert (found.problem, found.entries, found.index.generation) == ("", [], b"")
    os.truncate(file.fd, HEADER_BYTES + NUM_BLOCKS * RECORD_BYTES)
    found = file.reopened()
    assert (found.problem, found.entries) == ("", [])


def test_an_erased_entry_is_gone(file: File) -> None:
    index = file.filled()
    index.erase([0, 2])
    assert index.get(0) is None
    assert file.reopened().entries == [(key(5), 3), (key(9), 7)]


def test_of_a_key_in_two_blocks_the_later_counts(file: File) -> None:
    index = file.filled()
    index.put([1], [key(5)], [56])
    assert file.reopened().entries == [(key(1), 0), (key(9), 7), (key(5), 1)]


@pytest.mark.parametrize("offset", range(0, RECORD_BYTES, 7))
def test_a_flipped_bit_in_a_record_loses_that_block_only(file: File, offset: int) -> None:
    file.filled()
    file.flip(HEADER_BYTES + 3 * RECORD_BYTES + offset)
    found = file.reopened()
    assert (found.problem, found.entries) == ("", ALL[1:])
    assert found.index.get(3) is None


@pytest.mark.parametrize("offset", [0, 7, 8, 12, 20, 30, 60])
def test_a_flipped_bit_in_the_header_loses_all(file: File, offset: int) -> None:
    file.filled()
    file.flip(offset)
    found = file.reopened()
    assert found.problem in ("its header is damaged", "its index is not one of ours")
    assert (found.entries, found.index.generation) == ([], b"")


def test_a_torn_record_is_absent(file: File) -> None:
    """Half of the new record over the old one."""
    index = file.filled()
    before = file.read()
    index.put([3], [key(6)], [66])
    start = HEADER_BYTES + 3 * RECORD_BYTES
    os.pwrite(file.fd, before[start + 32 : start + RECORD_BYTES], start + 32)
    assert file.reopened().entries == ALL[1:]


@pytest.mark.parametrize("num_bytes", [0, 1, RECORD_BYTES, 4 * RECORD_BYTES - 1])
def test_of_a_truncated_index_the_rest_is_found(file: File, num_bytes: int) -> None:
    file.filled()
    os.truncate(file.fd, HEADER_BYTES + num_bytes)
    wanted = [(key(1), 0)] if num_bytes >= RECORD_BYTES else []
    assert file.reopened().entries == wanted


def test_half_a_header_is_none(file: File) -> None:
    file.filled()
    os.truncate(file.fd, HEADER_BYTES // 2)
    found = file.reopened()
    assert (found.problem, found.entries) == ("its index is not one of ours", [])


def test_blocks_of_another_identity_are_discarded_and_both_are_named(file: File) -> None:
    file.filled()
    found = file.reopened(identity="model b; rank 0 of 1")
    assert found.problem == "it belongs to [model a; rank 0 of 1], this is [model b; rank 0 of 1]"
    assert found.entries == []


def test_blocks_of_another_format_are_discarded(file: File) -> None:
    file.filled()
    body = msgspec.msgpack.encode(Header(FORMAT_VERSION + 1, IDENTITY, FIRST, True))
    frame = _FRAME.pack(_MAGIC, len(body), xxhash.xxh3_64_intdigest(body))
    os.pwrite(file.fd, frame + body, 0)
    found = file.reopened()
    assert found.problem == f"it has format 2, this release writes {FORMAT_VERSION}"
    assert found.entries == []


def test_a_header_of_other_fields_is_discarded(file: File) -> None:
    file.filled()
    body = msgspec.msgpack.encode({"version": "x"})
    frame = _FRAME.pack(_MAGIC, len(body), xxhash.xxh3_64_intdigest(body))
    os.pwrite(file.fd, frame + body, 0)
    found = file.reopened()
    assert found.problem.startswith("its header can't be read")
    assert found.entries == []


def test_blocks_that_were_not_to_be_kept_are_discarded(file: File) -> None:
    file.filled(persists=False)
    found = file.reopened()
    assert (found.problem, found.entries) == ("it was not to be kept", [])


def test_records_of_another_generation_are_absent(file: File) -> None:
    file.filled()
    fields = _FIELDS.pack(key(8), 88, 100, SECOND[:8])
    record = fields + _SEAL.pack(xxhash.xxh3_64_intdigest(fields))
    os.pwrite(file.fd, record, HEADER_BYTES + RECORD_BYTES)
    assert file.reopened().entries == ALL


def test_the_same_record_of_this_generation_is_there(file: File) -> None:
    file.filled()
    fields = _FIELDS.pack(key(8), 88, 100, FIRST[:8])
    record = fields + _SEAL.pack(xxhash.xxh3_64_intdigest(fields))
    os.pwrite(file.fd, record, HEADER_BYTES + RECORD_BYTES)
    assert file.reopened().entries == [*ALL, (key(8), 1)]


def test_beginning_anew_voids_all_without_a_write(file: File) -> None:
    index = file.filled()
    before = file.read()
    index.begin_anew(SECOND, persists=True)
    assert [index.get(i) for i in range(NUM_BLOCKS)] == [None] * NUM_BLOCKS
    assert file.read() == before
    assert file.reopened().entries == ALL


def test_the_first_entry_of_a_new_generation_ends_the_old_one(file: File) -> None:
    index = file.filled()
    index.begin_anew(SECOND, persists=True)
    index.put([5], [key(4)], [44])
    found = file.reopened()
    assert (found.entries, found.index.generation) == ([(key(4), 5)], SECOND)


def test_what_a_reset_voided_is_not_kept_once_something_new_is_written(file: File) -> None:
    index = file.filled()
    index.begin_anew(SECOND, persists=False)
    index.put([5], [key(4)], [44])
    assert file.reopened().problem == "it was not to be kept"


def test_fewer_blocks_lose_those_beyond(file: File) -> None:
    file.filled()
    assert file.reopened(num_blocks=4).entries == ALL[:2]


def test_more_blocks_keep_all(file: File) -> None:
    file.filled()
    found = file.reopened(num_blocks=3 * NUM_BLOCKS)
    assert found.entries == ALL
    found.index.put([20], [key(2)], [22])
    assert file.reopened(num_blocks=3 * NUM_BLOCKS).entries == [*ALL, (key(2), 20)]


@pytest.mark.parametrize("block_id", [NUM_BLOCKS, NUM_BLOCKS + 5])
def test_a_block_out_of_range_is_refused_and_changes_nothing(file: File, block_id: int) -> None:
    index = file.filled()
    before = file.read()
    with pytest.raises(IndexError, match=f"disk block {block_id} of {NUM_BLOCKS}"):
        index.get(block_id)
    with pytest.raises(IndexError):
        index.erase([0, block_id])
    with pytest.raises(IndexError):
        index.put([0, block_id], [key(1), key(2)], [1, 2])
    assert file.read() == before
    assert file.reopened().entries == ALL


def test_an_identity_longer_than_a_header_keeps_its_entries(file: File) -> None:
    long = "m" * 2 * HEADER_BYTES
    index = file.index(long + "a")
    index.open()
    index.begin_anew(FIRST, persists=True)
    index.put([0], [key(1)], [11])
    assert file.reopened(identity=long + "a").entries == [(key(1), 0)]
    assert file.reopened(identity=long + "b").problem.startswith("it belongs to")


def test_an_index_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "index", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(StorageError, match="cannot read the index"):
        DiskIndex(fd, NUM_BLOCKS, IDENTITY).open()
    os.close(fd)


def test_a_write_that_fails_is_raised(file: File, tmp_path: Path) -> None:
    file.filled()
    fd = os.open(file.path, os.O_RDONLY)
    index = DiskIndex(fd, NUM_BLOCKS, IDENTITY)
    index.open()
    with pytest.raises(OSError, match="Bad file descriptor"):
        index.put([1], [key(2)], [22])
    os.close(fd)


def test_a_short_write_is_finished(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    class Sys:
        """`os` whose pwrite takes at most 100 bytes."""

        pread = staticmethod(os.pread)

        @staticmethod
        def pwrite(fd: int, data: bytes, offset: int) -> int:
            return real(fd, data[:100], offset)

    monkeypatch.setattr(index_module, "os", Sys)
    file.filled()
    assert file.reopened().entries == ALL


def test_stretches_are_of_consecutive_numbers() -> None:
    assert stretches([]) == []
    assert stretches([4]) == [range(4, 5)]
    assert stretches([1, 2, 3, 7, 10, 9]) == [range(1, 4), range(7, 8), range(10, 11), range(9, 10)]


def test_a_million_entries_are_found(file: File) -> None:
    count = 10**6
    index = file.index(num_blocks=count)
    index.open()
    index.begin_anew(FIRST, persists=True)
    keys = [BlockHash(i.to_bytes(KEY_BYTES, "little")) for i in range(count)]
    index.put(range(count), keys, range(count))
    found = file.reopened(num_blocks=count).entries
    assert len(found) == count
    assert found[-1] == (keys[-1], count - 1)


def test_a_reset_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = File(tmp_path / "index").filled()
    gate, is_inside, pwrite = threading.Event(), threading.Event(), os.pwrite

    def hanging(fd: int, data: bytes, offset: int) -> int:
        is_inside.set()
        gate.wait()
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", hanging)
    writer = threading.Thread(target=index.put, args=([1], [key(2)], [22]))
    writer.start()
    is_inside.wait()
    index.begin_anew(SECOND, persists=False)  # a test that waits here hangs
    assert index.get(3) is None
    gate.set()
    writer.join()


def test_a_synced_reset_is_known_to_the_next_process(tmp_path: Path) -> None:
    file = File(tmp_path / "index")
    index = file.filled()
    index.begin_anew(SECOND, persists=False)
    index.sync()
    found = file.index()
    assert found.open() == "it was not to be kept"
    assert found.entries() == []


def test_old_records_are_void_before_their_bytes_are_overwritten(tmp_path: Path) -> None:
    file = File(tmp_path / "index")
    index = file.filled()
    index.begin_anew(SECOND, persists=True)
    index.erase([3])
    found = file.index()
    found.open()
    assert found.entries() == []


def test_bytes_of_before_a_reset_are_not_of_the_next_generation(tmp_path: Path) -> None:
    index = File(tmp_path / "index").filled()
    index.begin_anew(SECOND, persists=True)
    index.put([1], [key(2)], [22], FIRST)
    assert index.get(1) is None
    index.put([1], [key(2)], [22], SECOND)
    assert index.get(1) is not None
