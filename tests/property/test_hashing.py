"""Keys of a chain: equal for equal prefixes, different for anything else, however they are read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbm_core.hashing import PrefixChain, chain_hashes
from kvbm_core.types import pack_ids

TOKENS = st.lists(st.integers(0, 3), max_size=14)
SIZES = st.integers(1, 4)
ROOTS = st.sampled_from([b"", b"root", b"root\0", b"toor"])
LIKE_TOKENS = st.lists(st.integers(0, 3), max_size=3).map(pack_ids)
CONTENT = st.dictionaries(
    st.integers(0, 4), st.one_of(st.binary(max_size=3), LIKE_TOKENS), max_size=2
)
ENDS = st.one_of(st.none(), st.integers(0, 15))
SLICES = st.builds(slice, ENDS, ENDS, st.sampled_from([None, 1, 2]))
INPUTS = st.tuples(ROOTS, TOKENS, CONTENT)
Input = tuple[bytes, list[int], dict[int, bytes]]


@given(ROOTS, TOKENS, TOKENS, SIZES)
def test_a_longer_sequence_keeps_the_keys_of_its_prefix(
    root: bytes, tokens: list[int], more: list[int], size: int
) -> None:
    keys = chain_hashes(root, tokens, size)
    assert chain_hashes(root, tokens + more, size)[: len(keys)] == keys


@given(INPUTS, INPUTS, SIZES)
def test_keys_are_equal_exactly_for_equal_prefixes(a: Input, b: Input, size: int) -> None:
    keys_a, keys_b = _keys(a, size), _keys(b, size)
    for i, key_a in enumerate(keys_a):
        for j, key_b in enumerate(keys_b):
            assert (key_a == key_b) == (_meaning(a, i, size) == _meaning(b, j, size))


@given(
    TOKENS,
    SIZES,
    st.lists(st.one_of(st.integers(0, 15), SLICES), max_size=6),
    st.lists(st.integers(0, 3), max_size=5),
)
def test_a_lazy_chain_gives_the_same_keys_in_whatever_order_it_is_read(
    tokens: list[int], size: int, reads: list[int | slice], more: list[int]
) -> None:
    grown = [*tokens, *more]
    expected = chain_hashes(b"root", grown, size)
    chain = PrefixChain(b"root", tokens, size)
    for read in reads:
        if isinstance(read, int):
            if read < len(chain):
                assert chain[read] == expected[read]
        else:
            assert list(chain[read]) == expected[: len(chain)][read]
    tokens.extend(more)
    assert list(chain) == expected


def _keys(source: Input, size: int) -> list[bytes]:
    root, tokens, content = source
    return chain_hashes(root, tokens, size, content)


def _meaning(source: Input, index: int, size: int) -> object:
    """All that the key of block `index` stands for."""
    root, tokens, content = source
    before = sorted((i, value) for i, value in content.items() if i <= index)
    return root, tokens[: (index + 1) * size], before
