"""One rank's disk: contents instead of bytes, under the real records.

Reads and writes a block as `kvbm_core.transfer.disk` does: a record is erased before its block is
overwritten and written after it; what does not match its record is not read, and loses it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable

from kvbm_core.storage.index import DiskIndex
from kvbm_core.types import BlockHash, BlockId
from kvbm_core.wire import DiskInventory, DiskReset
from tests.property.content import Content


class ModelDisk:
    """Contents and records outlive the rank that opens them; its index does not.

    corrupted: blocks whose content changed by itself since they were written.
    """

    def __init__(self, num_blocks: int, make_index: Callable[..., DiskIndex]) -> None:
        self.num_blocks = num_blocks
        self.contents: dict[BlockId, Content | None] = {}
        self.corrupted: set[BlockId] = set()
        self._make_index = make_index
        self._fd = os.memfd_create("records")

    def open(self) -> DiskInventory:
        """Start anew from what is in the file, as a new process does."""
        self.index = self._make_index(self._fd, self.num_blocks, "model")
        self.index.open()
        return DiskInventory.of(self.num_blocks, self.index.generation, self.index.entries())

    def begin_anew(self, reset: DiskReset) -> None:
        """Void all blocks; the file says so with the next write, if there is one."""
        self.index.begin_anew(reset.generation, persists=reset.persists)

    def close(self) -> None:
        os.close(self._fd)

    def write(
        self, block_id: BlockId, key: BlockHash, content: Content | None, generation: bytes
    ) -> None:
        """generation: the one in which this was to be written."""
        self.tear(block_id)
        self.contents[block_id] = content
        self.index.put([block_id], [key], [_checksum(content)], generation)

    def read(self, block_id: BlockId, key: BlockHash) -> Content | None:
        """None where it holds something else than what was written under this key."""
        content, entry = self.contents.get(block_id), self.index.get(block_id)
        if entry is not None and entry.key == key and entry.checksum == _checksum(content):
            return content
        self.index.erase([block_id])
        return None

    def forget(self, block_id: BlockId) -> None:
        """The block could not be read, so nobody is to find it again."""
        self.index.erase([block_id])

    def tear(self, block_id: BlockId) -> None:
        """A write began, and that is all."""
        self.index.erase([block_id])
        self.contents.pop(block_id, None)
        self.corrupted.discard(block_id)

    def corrupt(self, block_id: BlockId) -> None:
        """Flip a bit of a block that was written."""
        if self.contents.get(block_id) is not None:
            self.contents[block_id] = (-1, ())
            self.corrupted.add(block_id)


def _checksum(content: Content | None) -> int:
    return zlib.crc32(repr(content).encode())
