"""What the simulated engine knows of a request and of an op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm_core.hashing import PrefixChain
from kvbm_core.types import BlockHash, BlockId, RequestId, TransferOp
from tests.property.cluster import Write
from tests.property.content import Content

BLOCK_SIZE = 2


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


class LateKeys(Sequence[BlockHash]):
    """Keys of an engine that schedules ahead: the last generated token is known at the end only."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._num_prompt_tokens = len(tokens)
        self._chain = PrefixChain(b"root", tokens, BLOCK_SIZE)
        self.is_late = False

    def __len__(self) -> int:
        if not self.is_late:
            return len(self._chain)
        return max(self._num_prompt_tokens, len(self._tokens) - 1) // BLOCK_SIZE

    def __getitem__(self, index: Any) -> Any:
        return self._chain[: len(self)][index]


@dataclass
class Request:
    """state: waiting, loading, loaded (may be scheduled), running, done.

    waits_since_seconds: when it was first told to wait for blocks that come up from disk.
    """

    id: RequestId
    tokens: list[int]
    num_left: int
    keys: LateKeys = field(init=False)
    state: str = "waiting"
    table: list[BlockId] = field(default_factory=list)
    num_computed: int = 0
    num_hits: int = 0
    epoch: int = 0
    is_new: bool = True
    bad_blocks: set[int] = field(default_factory=set)
    loading_ranks: set[int] = field(default_factory=set)
    draining_ranks: set[int] = field(default_factory=set)
    waits_since_seconds: float | None = None

    def __post_init__(self) -> None:
        self.keys = LateKeys(self.tokens)

    def content(self, num_tokens: int) -> Content:
        return self.epoch, tuple(self.tokens[:num_tokens])

    def full_contents(self, num_tokens: int) -> list[Content]:
        """Contents of the complete blocks among the first `num_tokens`."""
        return [self.content((i + 1) * BLOCK_SIZE) for i in range(num_tokens // BLOCK_SIZE)]

    def write(self, end: int) -> Write:
        """The forward's part up to `end` tokens: what must be there, and what it leaves."""
        start, table = self.num_computed, self.table
        reads = list(zip(table, self.full_contents(start), strict=False))
        if start % BLOCK_SIZE:
            reads.append((table[start // BLOCK_SIZE], self.content(start)))
        writes = [
            (table[i], self.content(min(end, (i + 1) * BLOCK_SIZE)))
            for i in range(start // BLOCK_SIZE, blocks_for(end))
        ]
        return Write(tuple(reads), tuple(writes))


@dataclass
class OpMirror:
    """The engine's own record of an op, to compare with the leader's."""

    op: TransferOp
    contents: list[Content]
    owed: set[int]
    began_seconds: float
    failed: bool = False
    failed_positions: set[int] = field(default_factory=set)

    @property
    def route(self) -> str:
        return self.op.route

    def fail(self, positions: Sequence[int]) -> None:
        """Some rank failed at these; without any, at all of them."""
        self.failed = True
        self.failed_positions.update(positions or range(len(self.op.src)))
