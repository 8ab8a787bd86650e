"""A process killed at any moment of a write load: what it had completed is found, and is right."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from kvbm_core.storage.disk import DiskOptions, DiskStore
from kvbm_core.storage.index import DiskIndex
from kvbm_core.transfer.disk import DiskTransferEngine, PreadIo
from kvbm_core.types import KEY_BYTES, BlockHash, Blocks, Tier, TransferOp

BLOCK_BYTES = 16384
NUM_BLOCKS = 64
NUM_KILLS = 50
OP_BLOCKS = 6
GENERATION = b"g" * 16

Placed = dict[int, BlockHash]


def content_of(key: BlockHash) -> bytes:
    return bytes(key) * (BLOCK_BYTES // KEY_BYTES)


def key_of(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(8, "little") * (KEY_BYTES // 8))


def next_number(key: BlockHash) -> int:
    return int.from_bytes(key[:8], "little") + 1


class Disk:
    """A store with an engine and an arena of one op's blocks."""

    def __init__(self, directory: Path) -> None:
        self.store = DiskStore(
            DiskOptions(directory),
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
            identity="crash",
            engine="crash",
            rank=0,
            num_ranks=1,
        )
        self.store.open()
        inventory = self.store.take_inventory()
        self.found: Placed = {
            block_id: BlockHash(inventory.keys[i * KEY_BYTES : (i + 1) * KEY_BYTES])
            for i, block_id in enumerate(inventory.ids())
        }
        if not inventory.generation:
            self.store.index.begin_anew(GENERATION, persists=True)
        flat = torch.zeros(OP_BLOCKS * BLOCK_BYTES + 4096, dtype=torch.uint8)
        start = -flat.data_ptr() % 4096
        self.host = flat[start : start + OP_BLOCKS * BLOCK_BYTES].view(OP_BLOCKS, BLOCK_BYTES)
        io = PreadIo(self.store, self.host)
        self.engine = DiskTransferEngine(self.store, self.host, io, num_threads=2, piece_blocks=2)
        self.engine.open()

    def run(self, op_id: int, placed: Placed, *, is_read: bool) -> str:
        """Move these blocks from or to the arena's first rows; the op's error."""
        disk = Blocks.of(Tier.DISK, placed)
        host = Blocks.of(Tier.HOST, range(len(placed)))
        src, dst = (disk, host) if is_read else (host, disk)
        self.engine.submit(TransferOp(op_id, (), src, dst, b"".join(placed.values())))
        self.engine.wait([op_id])
        [result] = self.engine.poll()
        return result.error


def forgetful_writer(directory: Path, first_key: int, seed: int, pipe: Connection) -> None:
    """The planted fault: a record outlives the bytes that it names."""
    DiskIndex.erase = lambda self, block_ids: None  # type: ignore[method-assign]
    write_until_killed(directory, first_key, seed, pipe)


def write_until_killed(directory: Path, first_key: int, seed: int, pipe: Connection) -> None:
    """Overwrite random blocks for ever; say what each op will do, and when it is done."""
    disk, source = Disk(directory), random.Random(seed)
    key = first_key
    for op_id in range(1, 10**9):
        block_ids = source.sample(range(NUM_BLOCKS), source.randint(1, OP_BLOCKS))
        placed = {block_id: key_of(key + i) for i, block_id in enumerate(block_ids)}
        key += len(placed)
        for row, new in enumerate(placed.values()):
            content = torch.frombuffer(bytearray(content_of(new)), dtype=torch.uint8)
            disk.host[row].copy_(content)
        pipe.send((placed, False))
        assert not disk.run(op_id, placed, is_read=False)
        pipe.send((placed, True))


def killed_run(
    writer: Callable[..., None], directory: Path, first_key: int, seed: int
) -> tuple[Placed, set[int], int]:
    """Kill a writer after a random number of messages: blocks it completed last, those that it was
    about to overwrite, and the next unused key."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvbm_core.transfer.disk"])
    mine, its = context.Pipe()
    process = context.Process(target=writer, args=(directory, first_key, seed, its))
    process.start()
    its.close()
    completed: Placed = {}
    doubtful: set[int] = set()
    num_messages, stop_at = 0, random.Random(seed).randint(1, 40)
    try:
        while True:
            if not mine.poll(60):
                raise AssertionError("the writer does not move")
            placed, is_done = mine.recv()
            if is_done:
                completed.update(placed)
                doubtful -= placed.keys()
            else:
                doubtful |= placed.keys()
            first_key = max(
                first_key, *(int.from_bytes(k[:8], "little") + 1 for k in placed.values())
            )
            num_messages += 1
            if num_messages == stop_at:
                process.kill()
    except EOFError:
        process.join()
    return completed, doubtful, first_key


def kill_and_check(writer: Callable[..., None], directory: Path, num_kills: int) -> None:
    known: Placed = {}
    next_key = 1
    sizes = set()
    for seed in range(num_kills):
        completed, doubtful, next_key = killed_run(writer, directory, next_key, seed)
        known.update(completed)
        disk = Disk(directory)
        for block_id, key in known.items():
            if block_id not in doubtful:
                assert disk.found.get(block_id) == key, f"block {block_id} is lost"
        for op_id, (block_id, key) in enumerate(disk.found.items(), 1):
            assert disk.run(op_id, {block_id: key}, is_read=True) == ""
            assert bytes(disk.host[0].numpy()) == content_of(key)
        known = dict(disk.found)
        disk.engine.close()
        sizes.add(sum(path.stat().st_size for path in directory.iterdir()))
    assert len(sizes) == 1, "a restart takes over the space of the process before it"
    assert len(known) > NUM_BLOCKS // 2


def test_a_killed_process_loses_no_completed_block_and_leaves_no_wrong_one(tmp_path: Path) -> None:
    kill_and_check(write_until_killed, tmp_path, NUM_KILLS)


def test_records_that_outlive_their_bytes_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        kill_and_check(forgetful_writer, tmp_path, 4 * NUM_KILLS)
