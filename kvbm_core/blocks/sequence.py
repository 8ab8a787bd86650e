"""The tokens that blocks of one sequence share, and the keys they make.

Invariant: a span of a sequence belongs to one block; tokens of a full span never change; the key
of span i covers the salt and all tokens up to the end of span i.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from kvbm_core.errors import IllegalTransition
from kvbm_core.hashing import PrefixChain
from kvbm_core.types import BlockHash


class TokenSequence:
    """Tokens that grow span by span, `block_size` in each. Not thread-safe.

    Raises OverflowError at a token that is no u32.
    """

    def __init__(self, root: bytes, block_size: int, tokens: Iterable[int] = ()) -> None:
        self.block_size = block_size
        self._root = root
        self._tokens = array("I", tokens)
        self._keys = PrefixChain(root, self._tokens, block_size)
        self._num_spans = len(self._keys)

    @property
    def keys(self) -> Sequence[BlockHash]:
        """Of the full spans."""
        return self._keys

    def span(self, index: int) -> TokenSpan:
        """Span `index`, which nobody else has unless it is full."""
        self._num_spans = max(self._num_spans, index + 1)
        return TokenSpan(self, index)

    def span_after(self, index: int) -> TokenSpan:
        """The span after full span `index`; in a fork where that one is another block's already."""
        after = index + 1
        if self._num_spans == after:
            return self.span(after)
        tokens = self._tokens[: after * self.block_size]
        return TokenSequence(self._root, self.block_size, tokens).span(after)

    def tokens_of(self, index: int) -> list[int]:
        return self._tokens[index * self.block_size : (index + 1) * self.block_size].tolist()

    def extend(self, tokens: array[int]) -> None:
        self._tokens.extend(tokens)


class TokenSpan:
    """One block's part of a sequence."""

    def __init__(self, sequence: TokenSequence, index: int) -> None:
        self.sequence = sequence
        self._index = index

    @property
    def prefix_keys(self) -> Sequence[BlockHash]:
        """Of the full spans up to this one."""
        return self.sequence.keys[: self._index + 1]

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens_of(self._index)

    @property
    def num_missing(self) -> int:
        return self.sequence.block_size - len(self.tokens)

    @property
    def key(self) -> BlockHash:
        """Raises IllegalTransition where tokens are missing."""
        if missing := self.num_missing:
            size = self.sequence.block_size
            raise IllegalTransition(
                f"the block has {size - missing} of {size} tokens. Add {missing} before commit."
            )
        return self.sequence.keys[self._index]

    def add(self, tokens: Sequence[int]) -> list[int]:
        """Take as many of `tokens` as are missing; returns the others."""
        new, num_missing = array("I", tokens), self.num_missing
        self.sequence.extend(new[:num_missing])
        return new[num_missing:].tolist()

    def next(self) -> TokenSpan:
        """The span after this full one."""
        return self.sequence.span_after(self._index)
