"""The golden keys must never change: caches that outlive a process are read by later releases."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import msgspec
import pytest

from kvbm_core.hashing import KEY_BYTES, CacheNamespace, PrefixChain, chain_hashes
from kvbm_core.types import pack_ids

NAMESPACE = CacheNamespace("model", "rev", "bfloat16/auto", "vllm", 4, "tp1.pp1")
TOKENS = list(range(10))

_PRINT_KEYS = """
from kvbm_core.hashing import CacheNamespace, chain_hashes
namespace = CacheNamespace("model", "rev", "bfloat16/auto", "vllm", 4, "tp1.pp1")
root = namespace.root(adapter="lora", salt="tenant")
keys = chain_hashes(root, list(range(10)), 4, {1: b"image"})
import sys; sys.stdout.write(" ".join([namespace.fingerprint(), *(key.hex() for key in keys)]))
"""


def keys(*, tokens: list[int] = TOKENS, adapter: str = "", salt: str = "") -> list[bytes]:
    return chain_hashes(NAMESPACE.root(adapter=adapter, salt=salt), tokens, 4)


def test_golden_keys_of_a_plain_chain() -> None:
    assert [key.hex() for key in keys()] == [
        "d0eb2e94526664c427e0fc2dda98534d28b2913f3a371adaabbe28c9f453c34a",
        "7d2e740fbd92f612be63fd26a381d4b039224e4bd04810f836eff47269182e2d",
    ]


def test_golden_keys_with_adapter_salt_and_content() -> None:
    root = NAMESPACE.root(adapter="lora", salt="tenant")
    assert [key.hex() for key in chain_hashes(root, TOKENS, 4, {1: b"image"})] == [
        "e35f82e3aa1c6e185724355e25971a93d78dd55e6d2fa6b936a8e281e28b5a72",
        "4ce187cc1b27dd00dd2395d735c0e216b81308d282ffaaf17ad0c29698e79151",
    ]


def test_golden_fingerprint() -> None:
    assert NAMESPACE.fingerprint() == "bbd9d0583a45f5f1"


@pytest.mark.parametrize("seed", ["0", "1", "12345"])
def test_another_process_with_another_hash_seed_gives_the_same(seed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PRINT_KEYS],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    root = NAMESPACE.root(adapter="lora", salt="tenant")
    expected = [key.hex() for key in chain_hashes(root, TOKENS, 4, {1: b"image"})]
    assert run.stdout.split() == [NAMESPACE.fingerprint(), *expected]


def test_keys_cannot_be_forged() -> None:
    assert {len(key) for key in keys()} == {KEY_BYTES} == {32}


def test_only_complete_blocks_have_keys() -> None:
    assert [len(keys(tokens=TOKENS[:n])) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_an_earlier_token_changes_every_later_key() -> None:
    changed = keys(tokens=[99, *TOKENS[1:]])
    assert not set(changed) & set(keys())


def test_equal_blocks_at_other_places_have_other_keys() -> None:
    assert len(set(keys(tokens=[1] * 12))) == 3


@pytest.mark.parametrize("other", [{"salt": "tenant"}, {"adapter": "lora"}])
def test_salt_and_adapter_isolate(other: dict[str, str]) -> None:
    assert not set(keys(**other)) & set(keys())


def test_a_salt_is_not_an_adapter() -> None:
    assert not set(keys(salt="x")) & set(keys(adapter="x"))
    assert not set(keys(salt="xy", adapter="")) & set(keys(salt="y", adapter="x"))


@pytest.mark.parametrize("name", CacheNamespace.__struct_fields__)
def test_every_part_of_the_namespace_isolates(name: str) -> None:
    value = getattr(NAMESPACE, name)
    other = msgspec.structs.replace(NAMESPACE, **{name: value * 2})
    assert other.fingerprint() != NAMESPACE.fingerprint()
    assert not set(chain_hashes(other.root(), TOKENS, 4)) & set(keys())


def test_content_isolates_its_block_and_all_after_it() -> None:
    tokens, root = [0] * 12, NAMESPACE.root()
    plain = chain_hashes(root, tokens, 4)
    cat = chain_hashes(root, tokens, 4, {1: b"cat"})
    dog = chain_hashes(root, tokens, 4, {1: b"dog"})
    assert plain[0] == cat[0] == dog[0]
    assert len({plain[1], cat[1], dog[1]}) == len({plain[2], cat[2], dog[2]}) == 3


def test_empty_content_is_not_no_content() -> None:
    root = NAMESPACE.root()
    assert chain_hashes(root, TOKENS, 4, {0: b""})[0] != chain_hashes(root, TOKENS, 4)[0]


def test_content_cannot_be_imitated_by_tokens() -> None:
    root = NAMESPACE.root()
    with_content = chain_hashes(root, [7], 1, {0: b"\x01\0\0\0"})
    with suppress(OverflowError, ValueError):  # to refuse such tokens is as good
        imitated = chain_hashes(root, [2**32 - 1, 4, 1, 7], 1)
        assert with_content[0] not in imitated


def test_content_cannot_swallow_the_tokens_after_it() -> None:
    """Where content ends must be part of what is hashed."""
    root = NAMESPACE.root()
    short = chain_hashes(root, [5, 7], 1, {0: b"image"})
    long = chain_hashes(root, [7], 1, {0: b"image" + pack_ids([5])})
    assert not set(long) & set(short)


def test_a_lazy_chain_gives_what_an_eager_one_gives() -> None:
    lazy, root = PrefixChain(NAMESPACE.root(), TOKENS, 4), NAMESPACE.root()
    assert lazy[1] == chain_hashes(root, TOKENS, 4)[1]
    assert [lazy[0], lazy[1]] == list(lazy) == lazy[:] == keys()


def test_a_chain_grows_with_its_tokens() -> None:
    tokens = TOKENS[:3]
    chain = PrefixChain(NAMESPACE.root(), tokens, 4)
    assert len(chain) == 0
    tokens.append(3)
    assert list(chain) == keys()[:1]
    tokens.extend(TOKENS[4:])
    assert list(chain) == keys()


def test_a_chain_computes_only_as_far_as_somebody_looks() -> None:
    class Watched(list[int]):
        furthest = 0

        def __getitem__(self, part):  # type: ignore[no-untyped-def]
            self.furthest = max(self.furthest, part.stop)
            return super().__getitem__(part)

    tokens = Watched(range(400))
    chain = PrefixChain(NAMESPACE.root(), tokens, 4)
    assert len(chain[:8]) == 8
    assert tokens.furthest == 32


def test_an_index_past_the_complete_blocks_raises() -> None:
    with pytest.raises(IndexError):
        PrefixChain(NAMESPACE.root(), TOKENS, 4)[2]


@pytest.mark.parametrize("part", [slice(-2, None), slice(-3, -1), slice(None, None, -1)])
def test_slices_from_the_end_are_those_of_a_list(part: slice) -> None:
    tokens = list(range(20))
    expected = keys(tokens=tokens)
    assert PrefixChain(NAMESPACE.root(), tokens, 4)[part] == expected[part]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        keys(tokens=[0, 0, 0, token])
