from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_core.errors import ConfigError, StorageError
from kvbm_core.storage import disk as disk_module
from kvbm_core.storage.disk import DiskOptions, DiskStore, reserve
from kvbm_core.storage.index import HEADER_BYTES, RECORD_BYTES
from kvbm_core.types import KEY_BYTES, BlockHash
from kvbm_core.wire import GENERATION_BYTES

NUM_BLOCKS, BLOCK_BYTES = 16, 8192
GENERATION = b"g" * GENERATION_BYTES


def key(number: int) -> BlockHash:
    return BlockHash(bytes([number]) * KEY_BYTES)


def failing(code: int) -> Callable[[int, int], None]:
    def allocate(fd: int, num_bytes: int) -> None:
        raise OSError(code, os.strerror(code))

    return allocate


Maker = Callable[..., DiskStore]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    made: list[DiskStore] = []

    def store(
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        identity: str = "model a",
        rank: int = 0,
        num_ranks: int = 1,
        **options: Any,
    ) -> DiskStore:
        made.append(
            DiskStore(
                DiskOptions(tmp_path, **options),
                num_blocks=num_blocks,
                block_bytes=block_bytes,
                identity=identity,
                engine="engine",
                rank=rank,
                num_ranks=num_ranks,
            )
        )
        return made[-1]

    yield store
    for one in made:
        one.close()


def fill(store: DiskStore) -> None:
    """Keys 1 and 2 in blocks 4 and 2."""
    store.index.begin_anew(GENERATION, persists=True)
    store.index.put([4], [key(1)], [0])
    store.index.put([2], [key(2)], [0])


def found(store: DiskStore) -> list[tuple[bytes, int]]:
    inventory = store.take_inventory()
    keys = [inventory.keys[i : i + KEY_BYTES] for i in range(0, len(inventory.keys), KEY_BYTES)]
    return list(zip(keys, inventory.ids(), strict=True))


BOTH = [(key(1), 4), (key(2), 2)]


def test_the_files_have_their_full_size_at_once(make: Maker) -> None:
    store = make()
    store.open()
    assert store.path.stat().st_size == NUM_BLOCKS * BLOCK_BYTES
    assert store.path.stat().st_blocks * 512 >= NUM_BLOCKS * BLOCK_BYTES
    index = store.path.with_suffix(".index")
    assert index.stat().st_size == HEADER_BYTES + NUM_BLOCKS * RECORD_BYTES


def test_blocks_survive_a_reopen(make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = make()
    store.open()
    fill(store)
    store.close()
    again = make()
    again.open()
    assert found(again) == BOTH
    assert "2 blocks of an earlier process" in caplog.text
    assert found(again) == []  # handed out once


def test_blocks_of_another_identity_are_discarded_and_said_so(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.open()
    fill(store)
    store.close()
    caplog.set_level(logging.INFO)
    other = make(identity="model b")
    other.open()
    assert found(other) == []
    assert "discarded what was there: it belongs to [model a], this is [model b]" in caplog.text


def test_a_smaller_cache_gives_space_back_and_keeps_what_fits(make: Maker) -> None:
    store = make()
    store.open()
    fill(store)
    store.close()
    smaller = make(num_blocks=3)
    smaller.open()
    assert smaller.path.stat().st_size == 3 * BLOCK_BYTES
    assert found(smaller) == BOTH[1:]


def test_a_larger_cache_keeps_all(make: Maker) -> None:
    store = make(num_blocks=6)
    store.open()
    fill(store)
    with store.path.open("r+b") as file:
        file.write(b"mark")
    store.close()
    larger = make(num_blocks=40)
    larger.open()
    assert larger.path.stat().st_size == 40 * BLOCK_BYTES
    assert larger.path.read_bytes()[:4] == b"mark"
    assert found(larger) == BOTH


def test_files_that_are_not_to_be_kept_are_removed(make: Maker, tmp_path: Path) -> None:
    store = make(persist=False)
    store.open()
    store.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_files_that_are_to_be_kept_stay(make: Maker, tmp_path: Path) -> None:
    store = make()
    store.open()
    store.close()
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".data", ".index"}


def test_rank_zero_removes_what_more_ranks_left(make: Maker, tmp_path: Path) -> None:
    for rank in range(3):
        store = make(rank=rank, num_ranks=3)
        store.open()
        store.close()
    make(num_ranks=2).open()
    assert sorted(path.name[-7:] for path in tmp_path.glob("*.data")) == ["r0.data", "r1.data"]


def test_a_closed_store_has_no_files(make: Maker) -> None:
    store = make()
    with pytest.raises(StorageError, match="not open"):
        _ = store.index
    store.open()
    store.close()
    store.close()
    with pytest.raises(StorageError, match="not open"):
        _ = store.path


def test_blocks_of_an_odd_size_go_through_the_page_cache(make: Maker) -> None:
    store = make(block_bytes=5000)
    store.open()
    assert (store.is_direct, store.extent_bytes) == (False, 8192)


def test_o_direct_can_be_ruled_out(make: Maker) -> None:
    store = make(direct=False)
    store.open()
    assert not store.is_direct


def test_a_filesystem_without_o_direct_is_used_without(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(disk_module.os, "open", opened)
    store = make()
    store.open()
    assert not store.is_direct


def test_a_symlink_for_the_data_is_refused(make: Maker, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("text")
    (tmp_path / "dynamo-kvbm-disk-cache-0-r0.data").symlink_to(target)
    with pytest.raises(StorageError, match="DYN_KVBM_DISK_CACHE_DIR"):
        make().open()
    assert target.read_text() == "text"


def test_a_data_file_of_another_user_is_refused(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "dynamo-kvbm-disk-cache-0-r0.data"
    data.write_bytes(b"x")
    foreign, fstat = data.stat().st_ino, os.fstat

    def owned(fd: int) -> os.stat_result:
        result = fstat(fd)
        if result.st_ino != foreign:
            return result
        fields = list(result)
        fields[4] = result.st_uid + 1
        return os.stat_result(fields)

    monkeypatch.setattr(disk_module.os, "fstat", owned)
    with pytest.raises(StorageError, match="belongs to another user"):
        make().open()
    assert data.read_bytes() == b"x"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_fallocate_the_error_names_the_fallback(
    make: Maker, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(disk_module, "fallocate", failing(code))
    with pytest.raises(ConfigError, match="Set DYN_KVBM_DISK_ZEROFILL_FALLBACK=true"):
        make().open()


def test_without_fallocate_the_fallback_fills_with_real_blocks(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "fallocate", failing(errno.EOPNOTSUPP))
    monkeypatch.setattr(disk_module, "_ZEROS_BYTES", 3 * 4096)
    store = make(zerofill=True)
    store.open()
    os.sync()
    result = store.path.stat()
    assert result.st_size == NUM_BLOCKS * BLOCK_BYTES
    assert result.st_blocks * 512 >= NUM_BLOCKS * BLOCK_BYTES
    assert not any(store.path.read_bytes())


def test_without_space_nothing_stays_taken_and_the_remedy_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"kept")

    def allocate(fd: int, num_bytes: int) -> None:
        os.ftruncate(fd, num_bytes // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with path.open("r+b") as file, pytest.raises(StorageError) as error:
        reserve(file.fileno(), 2**20, DiskOptions(tmp_path), path, allocate)
    assert path.read_bytes() == b"kept"
    for part in ("1048576 bytes", "bytes are free", "Lower DYN_KVBM_DISK_CACHE_GB", "rm -f "):
        assert part in str(error.value)


def test_a_zero_fill_without_space_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.pwrite, [3]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(disk_module.os, "pwrite", pwrite)
    monkeypatch.setattr(disk_module, "_ZEROS_BYTES", 4096)
    path = tmp_path / "data"
    with path.open("w+b") as file, pytest.raises(StorageError, match="No space left on device"):
        options = DiskOptions(tmp_path, zerofill=True)
        reserve(file.fileno(), 2**20, options, path, failing(errno.EOPNOTSUPP))
    assert path.stat().st_size == 0


@pytest.mark.parametrize("num_bytes_left", [0, HEADER_BYTES, NUM_BLOCKS * BLOCK_BYTES])
def test_a_store_that_found_no_space_keeps_neither_space_nor_files(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes_left: int
) -> None:
    left = [num_bytes_left]

    def allocate(fd: int, num_bytes: int) -> None:
        left[0] -= num_bytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "fallocate", allocate)
        with pytest.raises(StorageError, match="cannot reserve"):
            make().open()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= len("engine")
    store = make(num_blocks=2)
    store.open()
    assert store.path.name == "dynamo-kvbm-disk-cache-0-r0.data"


def test_a_store_that_could_not_grow_keeps_its_blocks(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    store.open()
    fill(store)
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "fallocate", failing(errno.ENOSPC))
        with pytest.raises(StorageError):
            make(num_blocks=1000).open()
    again = make()
    again.open()
    assert found(again) == BOTH
