"""The device's KV blocks: who holds which, what can be reused, and when old bytes are destroyed.

One per rank. The bookkeeping is the same on every rank, the bytes are the rank's own. Poison stands
for "anybody may have written here": a block whose end the connector was told of is poisoned when it
is freed; one freed behind its back (cancel, error, eviction) when it is about to be computed again,
after `start_load_kv`: until then the real engine leaves the bytes alone too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch

from tests.contract.trtllm.llm_request import Sequence

POISON = 0x5A

Key = tuple[object, ...]


class Pool:
    """tensor: `[num_blocks, num_layers, kv_factor, block_size]`; ids are handed out in random
    order from a seed that all ranks share."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_layers: int,
        kv_factor: int,
        block_size: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        seed: int,
        enable_block_reuse: bool,
        enable_partial_reuse: bool,
    ) -> None:
        self.tensor = torch.zeros((num_blocks, num_layers, kv_factor, block_size), dtype=dtype)
        self._bits = self.tensor.view(torch.uint8)
        self._bits.fill_(POISON)
        self._size = tokens_per_block
        self._random = random.Random(seed)
        self._free = list(range(num_blocks))
        self._refs: dict[int, int] = {}
        self._stored: dict[Key, int] = {}  # oldest use first
        self._key_of: dict[int, Key] = {}
        self._stale: set[int] = set()
        self._reuses = enable_block_reuse
        self._reuses_partly = enable_partial_reuse

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._size)

    @property
    def keeps_blocks(self) -> bool:
        """Whether blocks are stored for reuse."""
        return self._reuses

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds, stored or not."""
        return len(self._free) + sum(1 for b in self._key_of if not self._refs.get(b))

    def check_fits(self, num_tokens: int) -> None:
        num_blocks = len(self.tensor)
        if self.num_blocks_for(num_tokens) > num_blocks:
            raise ValueError(f"{num_tokens} tokens never fit into {num_blocks} blocks")

    # Sequences

    def add(self, sequence: Sequence) -> None:
        """Give a sequence the blocks of its prompt; `num_local` says how much of it is valid."""
        tokens = sequence.request.prompt
        shared = self._match(sequence) if self._reuses else []
        for block_id in shared:
            self._hold(block_id)
        num_local = len(shared) * self._size
        fresh = self._allocate(self.num_blocks_for(len(tokens)) - len(shared))
        if self._reuses_partly:
            num_local += self._copy_part(sequence, num_local, fresh[0])
        sequence.block_ids = [*shared, *fresh]
        sequence.num_local = num_local
        sequence.is_added = True

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for this many tokens."""
        missing = self.num_blocks_for(num_tokens) - len(sequence.block_ids)
        if missing > 0:
            sequence.block_ids += self._allocate(missing)

    def store(self, sequence: Sequence) -> list[int]:
        """Offer the full blocks for reuse; returns the stored ids. Where another block with the
        same content is stored, that one is returned and the sequence's own stays unstored."""
        if not self._reuses:
            return []
        num_valid = min(sequence.num_kv, max(sequence.prompt_len, len(sequence.tokens) - 1))
        stored = []
        for i in range(num_valid // self._size):
            key = self._key(sequence, sequence.tokens[: (i + 1) * self._size])
            block_id = self._stored.setdefault(key, sequence.block_ids[i])
            self._key_of.setdefault(block_id, key)
            stored.append(block_id)
        return stored

    def free(self, sequence: Sequence, *, told: bool) -> None:
        """Store what can be reused and let go of the rest. told: the connector knows."""
        if not sequence.is_added:
            return
        kept = set(self.store(sequence))
        for block_id in reversed(sequence.block_ids):
            # A copy of a stored block is freed although the connector may be saving it: only
            # the stored one is pinned, and nobody can tell which one that is.
            is_copy = bool(kept) and block_id not in kept and self._is_full(sequence, block_id)
            self._release(block_id, poison=told and not is_copy)
        sequence.block_ids = []
        sequence.is_added = False

    def _is_full(self, sequence: Sequence, block_id: int) -> bool:
        return (sequence.block_ids.index(block_id) + 1) * self._size <= sequence.num_kv

    def pin(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._hold(block_id)

    def unpin(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            self._release(block_id, poison=False)

    def forget(self) -> None:
        """A cold device: nothing can be reused. What is pinned is freed when it is unpinned."""
        for block_id in list(self._key_of):
            del self._stored[self._key_of.pop(block_id)]
            if not self._refs.get(block_id):
                self._free.append(block_id)

    # Bytes

    def spoil(self, except_ids: set[int]) -> None:
        """Poison what was handed out since the last call, but for what a load fills."""
        self._poison(self._stale - except_ids)
        self._stale.clear()

    def _poison(self, block_ids: Iterable[int]) -> None:
        if ids := list(block_ids):
            self._bits[ids] = POISON

    # Inside

    def _key(self, sequence: Sequence, tokens: Iterable[int]) -> Key:
        return (sequence.request.identity, tuple(tokens))

    def _match(self, sequence: Sequence) -> list[int]:
        prompt, found = sequence.request.prompt, []
        for end in range(self._size, len(prompt), self._size):
            key = self._key(sequence, prompt[:end])
            if key not in self._stored:
                break
            self._stored[key] = self._stored.pop(key)
            found.append(self._stored[key])
        return found

    def _copy_part(self, sequence: Sequence, start: int, target: int) -> int:
        """Take the longest beginning of a stored next block; returns its tokens."""
        prompt = sequence.request.prompt
        best, source = 0, None
        for (identity, tokens), block_id in self._stored.items():
            if identity != sequence.request.identity or len(tokens) != start + self._size:
                continue
            num_same = _num_common(tokens, prompt[: len(prompt) - 1]) - start
            if num_same > best:
                best, source = num_same, block_id
        if source is not None:
            self._bits[target] = self._bits[source]
            self._stale.discard(target)
        return best

    def _allocate(self, count: int) -> list[int]:
        while len(self._free) < count:
            self._evict(self._oldest())
        ids = [self._free.pop(self._random.randrange(len(self._free))) for _ in range(count)]
        for block_id in ids:
            self._hold(block_id)
        self._stale.update(ids)
        return ids

    def _oldest(self) -> int:
        parents = {(identity, tokens[: -self._size]) for identity, tokens in self._stored}
        unheld = [(k, b) for k, b in self._stored.items() if not self._refs.get(b)]
        leaves = [b for k, b in unheld if k not in parents]
        return leaves[0] if leaves else unheld[0][1]

    def _evict(self, block_id: int) -> None:
        del self._stored[self._key_of.pop(block_id)]
        self._free.append(block_id)

    def _hold(self, block_id: int) -> None:
        self._refs[block_id] = self._refs.get(block_id, 0) + 1

    def _release(self, block_id: int, *, poison: bool) -> None:
        self._refs[block_id] -= 1
        if self._refs[block_id]:
            return
        del self._refs[block_id]
        if block_id not in self._key_of:
            self._free.append(block_id)
            if poison:
                self._poison([block_id])


def _num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
