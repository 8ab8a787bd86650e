"""The engine's own paged cache of device blocks: reference counts and a prefix cache."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from kvbm_core.types import BlockId
from tests.property.content import Content


class DeviceCache:
    """Blocks nobody holds stay matchable until they are given to somebody else.

    eager: a freed block is the next one to be given out, else the last. remembers: cached
    blocks are matched at all; without it everything has to come from host.
    """

    def __init__(self, num_blocks: int, *, eager: bool, remembers: bool) -> None:
        self.num_blocks = num_blocks
        self._eager = eager
        self._remembers = remembers
        self._free: deque[BlockId] = deque(range(num_blocks))
        self._holders: Counter[BlockId] = Counter()
        self._cached: dict[Content, BlockId] = {}
        self.contents: dict[BlockId, Content] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def hits(self, contents: Sequence[Content]) -> list[BlockId]:
        """Blocks of the longest cached prefix."""
        found = []
        for content in contents:
            if content not in self._cached:
                break
            found.append(self._cached[content])
        return found

    def take(self, hits: Sequence[BlockId], num_new: int) -> list[BlockId] | None:
        """Hold `hits` and `num_new` blocks more; None, and nothing changed, without room."""
        revived = [block for block in hits if not self._holders[block]]
        if num_new > self.num_free - len(revived):
            return None
        for block in revived:
            self._free.remove(block)
        new = [self._free.popleft() for _ in range(num_new)]
        for block in new:
            self._forget(block)
        self._holders.update([*hits, *new])
        return [*hits, *new]

    def release(self, blocks: Sequence[BlockId]) -> None:
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, f"block {block} freed twice"
            if self._holders[block]:
                continue
            if self._eager:
                self._free.appendleft(block)
            else:
                self._free.append(block)

    def cache(self, contents: Sequence[Content], blocks: Sequence[BlockId]) -> None:
        """Make complete blocks matchable."""
        for content, block in zip(contents, blocks, strict=False):
            self.contents[block] = content
            if self._remembers:
                self._cached.setdefault(content, block)

    def clear(self) -> None:
        """Match nothing any more."""
        self._cached.clear()

    def _forget(self, block: BlockId) -> None:
        content = self.contents.pop(block, None)
        if content is not None and self._cached.get(content) == block:
            del self._cached[content]
