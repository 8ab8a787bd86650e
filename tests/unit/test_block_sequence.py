from __future__ import annotations

import pytest

from kvbm_core.blocks.sequence import TokenSequence
from kvbm_core.errors import IllegalTransition
from kvbm_core.hashing import chain_hashes

ROOT = b"root"


def test_a_spans_key_is_that_of_the_chain() -> None:
    first = TokenSequence(ROOT, 4).span(0)
    assert first.add([1, 2, 3, 4, 5]) == [5]
    second = first.next()
    second.add([5, 6, 7, 8])
    assert [first.key, second.key] == chain_hashes(ROOT, range(1, 9), 4)


def test_a_span_with_missing_tokens_has_no_key() -> None:
    span = TokenSequence(ROOT, 4).span(0)
    span.add([1])
    with pytest.raises(IllegalTransition, match=r"1 of 4 tokens\. Add 3"):
        _ = span.key


def test_two_spans_after_the_same_one_do_not_mix_their_tokens() -> None:
    first = TokenSequence(ROOT, 2).span(0)
    first.add([1, 2])
    left, right = first.next(), first.next()
    left.add([3])
    right.add([5, 6])
    left.add([4])
    assert (left.tokens, right.tokens) == ([3, 4], [5, 6])
    assert [first.key, left.key] == chain_hashes(ROOT, [1, 2, 3, 4], 2)
    assert [first.key, right.key] == chain_hashes(ROOT, [1, 2, 5, 6], 2)


def test_a_span_after_one_inside_known_tokens_is_new() -> None:
    sequence = TokenSequence(ROOT, 2, [1, 2, 3, 4])
    after = sequence.span(0).next()
    assert after.tokens == []
    assert sequence.span(1).tokens == [3, 4]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_u32_changes_nothing(token: int) -> None:
    span = TokenSequence(ROOT, 4).span(0)
    with pytest.raises(OverflowError):
        span.add([7, token])
    assert span.tokens == []
