"""Block keys that are the same in every process: a namespaced, salted prefix chain.

Lives here: what identifies a cache, and the chain of block keys over a token sequence.
Does not live here: an engine's own block hashes, which a connector may use as keys while
nothing outlives the process.
Invariant: equal keys mean equal namespace, salt, adapter, block content and every token before.
The byte stream that is hashed can be decoded in only one way, so no two inputs share it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import msgspec

from kvbm_core.types import KEY_BYTES, BlockHash

_CONTENT = b"kvbm-content"  # blake2b personalisation: no stream of tokens can imitate it


class CacheNamespace(msgspec.Struct, frozen=True):
    """What must be equal for two caches to share blocks.

    model: name or path; revision: weights identity; dtype, layout: of the stored bytes;
    block_size: tokens; parallel: layout of ranks, such as ``tp2.pp1``.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    block_size: int
    parallel: str

    def root(self, *, adapter: str = "", salt: str = "") -> bytes:
        """First bytes of every chain: namespace, LoRA adapter identity and cache salt."""
        return msgspec.msgpack.encode(("kvbm-chain-1", self, adapter, salt))

    def fingerprint(self) -> str:
        """16 hex digits for logs and file headers."""
        return hashlib.blake2b(self.root(), digest_size=8).hexdigest()


class PrefixChain(Sequence[BlockHash]):
    """Keys of a growing token sequence, computed as far as somebody looks.

    Raises OverflowError at a token that is no u32.

    One running blake2b state with a digest at each block boundary: 1.3 µs a block of 16
    tokens, where chaining digests costs twice that. Length: complete blocks of `tokens` now.
    `tokens` is the caller's, may grow, and must not change below its length.
    content: block index → identity of what the tokens stand for (images, audio); part of
    that block's key and of all after it. Not thread-safe.
    """

    def __init__(
        self,
        root: bytes,
        tokens: Sequence[int],
        block_size: int,
        content: Mapping[int, bytes] | None = None,
    ) -> None:
        self._state = hashlib.blake2b(root, digest_size=KEY_BYTES)
        self._tokens = tokens
        self._block_size = block_size
        self._content = content or {}
        self._keys: list[BlockHash] = []

    def __len__(self) -> int:
        return len(self._tokens) // self._block_size

    @overload
    def __getitem__(self, index: int) -> BlockHash: ...
    @overload
    def __getitem__(self, index: slice) -> list[BlockHash]: ...
    def __getitem__(self, index: int | slice) -> BlockHash | list[BlockHash]:
        if isinstance(index, slice):
            wanted = range(*index.indices(len(self)))
            self._extend(max(wanted, default=-1) + 1)
            if wanted.step == 1:
                return self._keys[wanted.start : wanted.stop]
            return [self._keys[i] for i in wanted]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._extend(index + 1)
        return self._keys[index]

    def _extend(self, num_blocks: int) -> None:
        start = len(self._keys)
        if num_blocks <= start:
            return
        size, state, keys, content = self._block_size, self._state, self._keys, self._content
        packed = memoryview(_pack_tokens(self._tokens[start * size : num_blocks * size]))
        for offset in range(0, len(packed), size * 4):
            if content and (block_content := content.get(len(keys))) is not None:
                size_bytes = len(block_content).to_bytes(4, "little")
                before = state.digest() + size_bytes + block_content
                state = hashlib.blake2b(before, digest_size=KEY_BYTES, person=_CONTENT)
            state.update(packed[offset : offset + size * 4])
            keys.append(BlockHash(state.copy().digest()))
        self._state = state


def chain_hashes(
    root: bytes,
    tokens: Sequence[int],
    block_size: int,
    content: Mapping[int, bytes] | None = None,
) -> list[BlockHash]:
    """Keys of every complete block of `tokens`."""
    return PrefixChain(root, tokens, block_size, content)[:]


def block_content(items: Iterable[tuple[str, int, int]], block_size: int) -> dict[int, bytes]:
    """Block index → identities and offsets of the images or audio whose placeholders it holds.

    items: identity, first token and number of tokens of each.
    """
    content: defaultdict[int, bytes] = defaultdict(bytes)
    for identity, first, num_tokens in items:
        for block in range(first // block_size, (first + num_tokens - 1) // block_size + 1):
            part = f"{identity}@{first - block * block_size}".encode()
            content[block] += len(part).to_bytes(4, "little") + part
    return dict(content)


def _pack_tokens(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
