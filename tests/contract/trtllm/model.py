"""A toy language model whose next token depends on every byte of the request's KV in the pool.

KV of a position and layer depends on the rank, the layer, the token and all KV of that layer at
earlier positions *as read back from the pool*: one wrong byte anywhere changes all that follows.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq

import numpy as np
import torch

from tests.contract.trtllm.llm_request import Sequence

VOCABULARY = 50_000
_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """splitmix64's last step."""
    x = (x + _BASE) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Model:
    """One rank's shard.

    pool: `[num_blocks, num_layers, kv_factor, kv_heads * tokens_per_block * head_dim]` of any
    dtype; a block's inner order is head, token, element of head, as TensorRT-LLM has it.
    """

    def __init__(self, pool: torch.Tensor, *, rank: int, kv_heads: int, tokens_per_block: int):
        data = pool.view(torch.uint8).numpy()
        num_blocks, self.num_layers, kv_factor, block_bytes = data.shape
        head_bytes = block_bytes // kv_heads // tokens_per_block
        self._rank = rank
        self._size = tokens_per_block
        self._kv = data.reshape(
            num_blocks, self.num_layers, kv_factor, kv_heads, tokens_per_block, head_bytes
        )
        self._shape = (kv_factor, kv_heads, head_bytes)
        self._width = kv_factor * kv_heads * head_bytes
        rng = np.random.default_rng(1234)
        self._weights = rng.integers(1, 1 << 63, self._width, dtype=np.uint64) | np.uint64(1)
        self._powers = _powers_of(_BASE | 1, 4096)

    def hidden(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        """What enters layer 0 at these positions."""
        tokens = [*sequence.request.prompt, *sequence.sampled][start:stop]
        identity = zlib.crc32(repr(sequence.request.identity).encode())
        return [_mix(t * 1_000_003 + p + (identity << 24)) for p, t in enumerate(tokens, start)]

    def layer(self, layer: int, block_ids: Seq[int], start: int, hidden: Seq[int]) -> list[int]:
        """Compute one layer's KV at positions from `start` on, and what leaves the layer."""
        digest = self._digest(layer, block_ids, start)
        out = []
        for p, x in enumerate(hidden, start):
            row = self._row(_mix(x ^ digest ^ (layer << 8) ^ self._rank))
            self._kv[block_ids[p // self._size], layer, :, :, p % self._size] = row.reshape(
                self._shape
            )
            row_hash = int((row.astype(np.uint64) * self._weights).sum(dtype=np.uint64))
            digest = (digest * (_BASE | 1) + row_hash) & _MASK
            out.append(_mix(x ^ digest))
        return out

    def _row(self, seed: int) -> np.ndarray:
        lanes = np.arange(1, self._width + 1, dtype=np.uint64) * np.uint64(seed | 1)
        lanes ^= lanes >> np.uint64(29)
        return (lanes >> np.uint64(17)).astype(np.uint8)

    def _digest(self, layer: int, block_ids: Seq[int], stop: int) -> int:
        """Of all KV of this layer before `stop`, read through the block table."""
        if not stop:
            return 0
        ids = list(block_ids[: -(-stop // self._size)])
        kv = self._kv[ids, layer]  # [block, k/v, head, token, byte]
        rows = kv.transpose(0, 3, 1, 2, 4).reshape(-1, self._width)[:stop]
        hashes = (rows.astype(np.uint64) * self._weights).sum(axis=1, dtype=np.uint64)
        powers = self._powers[:stop][::-1]
        return int((hashes * powers).sum(dtype=np.uint64))


def _powers_of(base: int, count: int) -> np.ndarray:
    powers = np.ones(count, dtype=np.uint64)
    for i in range(1, count):
        powers[i] = (int(powers[i - 1]) * base) & _MASK
    return powers


def token_of(parts: Seq[int]) -> int:
    """The next token, from the last position's output on every rank."""
    return _mix(sum(parts) & _MASK) % VOCABULARY
