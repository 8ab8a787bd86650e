"""The connector's pure parts on their own: what they read of TensorRT-LLM's objects, of any
version."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm_core.errors import LayoutMismatch
from tests.contract.trtllm.llm_args import make_llm_args
from tests.contract.trtllm.modules import FLAVOURS, installed, modules_of

with installed("1.3", ("kvbm_connectors.trtllm",)):
    from kvbm_connectors.trtllm import compatibility, translate
    from kvbm_connectors.trtllm.followed import Followed, first_written
    from kvbm_connectors.trtllm.layout import layout_of

ARGS = make_llm_args(num_ranks=2, tokens_per_block=4)
NAMESPACE = translate.namespace_of(ARGS, "1.3.0")
TOKENS = list(range(20))


def request(**fields: Any) -> Any:
    """One that has the oldest version's attributes and these."""
    return SimpleNamespace(**{"request_id": 7, "lora_task_id": None, **fields})


def keys(**fields: Any) -> list[bytes]:
    return list(translate.keys_of(request(**fields), TOKENS, NAMESPACE)[:])


# translate


def test_keys_are_over_complete_blocks_and_grow_with_the_tokens() -> None:
    tokens = TOKENS[:7]
    chain = translate.keys_of(request(), tokens, NAMESPACE)
    assert list(chain[:]) == keys()[:1]
    tokens += TOKENS[7:]
    assert list(chain[:]) == keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_salt": "a"},
        {"cache_salt": ""},
        {"cache_salt_id": 0},
        {"cache_salt_id": 1, "cache_salt": None},
        {"lora_task_id": 0},
        {"lora_task_id": 1},
        {"multimodal_hashes": [[1]], "multimodal_positions": [0], "multimodal_lengths": [2]},
        {"multimodal_hashes": [[2]], "multimodal_positions": [0], "multimodal_lengths": [2]},
        {"multimodal_hashes": [[1]], "multimodal_positions": [1], "multimodal_lengths": [2]},
        {
            "multimodal_hashes": [[1]],
            "multimodal_positions": [0],
            "multimodal_lengths": [2],
            "multimodal_uuids": ["mine"],
        },
    ],
)
def test_every_part_of_a_requests_identity_is_in_its_keys(fields: dict[str, Any]) -> None:
    assert set(keys(**fields)).isdisjoint(keys())
    assert keys(**fields) == keys(**fields)
    assert set(keys(**fields)).isdisjoint(keys(**{**fields, "lora_task_id": 99}))


def test_images_that_lack_a_hash_leave_a_request_without_keys() -> None:
    fields = {"multimodal_hashes": [[1]], "multimodal_positions": [0, 4]}
    assert not translate.keys_of(request(**fields), TOKENS, NAMESPACE)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"revision": "other"},
        {"dtype": "float16"},
        {"kv_cache_config.dtype": "fp8"},
        {"kv_cache_config.tokens_per_block": 8},
        {"tensor_parallel_size": 4},
    ],
)
def test_the_namespace_tells_engines_apart(change: dict[str, Any]) -> None:
    args = make_llm_args(num_ranks=2, tokens_per_block=4, overrides=change)
    assert translate.namespace_of(args, "1.3.0").fingerprint() != NAMESPACE.fingerprint()
    assert translate.namespace_of(ARGS, "1.3.0").fingerprint() == NAMESPACE.fingerprint()
    assert translate.namespace_of(ARGS, "1.2.0").fingerprint() != NAMESPACE.fingerprint()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fields_that_a_version_lacks_have_a_default(flavour: str) -> None:
    make = vars(modules_of(FLAVOURS[flavour])[FLAVOURS[flavour].path])["RequestData"]
    names = FLAVOURS[flavour].data_fields
    fields: dict[str, Any] = dict.fromkeys(names, None)
    fields |= {"new_block_ids": [3, 4, 5], "computed_position": 4}
    if "num_scheduled_tokens" in names:
        fields["num_scheduled_tokens"] = 6
    data = make(**fields)
    assert translate.priorities_of(data) == [translate.DEFAULT_PRIORITY] * 3
    assert first_written(data, 4) == [4, 5]
    followed = Followed("7", request(), 12, False, [0] * 12)
    assert followed.num_written(data) == (10 if flavour != "1.1" else 12)


@pytest.mark.parametrize(
    ("is_finished", "state", "is_over"),
    [
        (False, "GENERATION_IN_PROGRESS", False),
        (True, "GENERATION_IN_PROGRESS", True),
        (False, "GENERATION_COMPLETE", True),
    ],
)
def test_a_request_is_over_by_its_end_or_its_state(
    is_finished: bool, state: str, is_over: bool
) -> None:
    found = request(is_finished=is_finished, state=SimpleNamespace(name=state))
    assert translate.is_over(found) is is_over


# followed


def follow(prompt: list[int], num_loading: int = 0) -> Followed:
    return Followed("7", request(), len(prompt), False, list(prompt), num_loading=num_loading)


def data_of(tokens: list[int], block_ids: list[int], position: int, scheduled: int | None) -> Any:
    fields = {"new_tokens": tokens, "new_block_ids": block_ids, "computed_position": position}
    return SimpleNamespace(**fields, num_scheduled_tokens=scheduled)


def take(followed: Followed, data: Any, *, is_new: bool = False, is_chunked: bool = False) -> Any:
    followed.is_chunked = is_chunked
    written = followed.begin(data, 4) if is_new else followed.go_on(data)
    return followed.num_written(data), list(written)


def test_a_prompt_counts_chunk_by_chunk_and_its_blocks_once() -> None:
    followed = follow(TOKENS[:10])
    assert take(followed, data_of(TOKENS[:10], [5, 6, 7], 0, 4), is_new=True) == (4, [5, 6, 7])
    assert take(followed, data_of([], [], 4, 4)) == (8, [])
    assert take(followed, data_of([], [], 8, 2)) == (10, [])


def test_what_the_engine_found_itself_is_not_written() -> None:
    followed = follow(TOKENS[:10])
    assert take(followed, data_of(TOKENS[:10], [5, 6, 7], 4, 6), is_new=True) == (10, [6, 7])


def test_a_part_of_a_block_that_was_found_is_written_on() -> None:
    followed = follow(TOKENS[:10])
    assert take(followed, data_of(TOKENS[:10], [5, 6, 7], 6, 4), is_new=True) == (10, [6, 7])


def test_the_first_position_excludes_what_is_loaded_in_step() -> None:
    followed = follow(TOKENS[:10], num_loading=8)
    assert take(followed, data_of(TOKENS[:10], [5, 6, 7], 0, 2), is_new=True) == (10, [7])
    assert take(followed, data_of([77], [], 10, 1)) == (11, [])


def test_under_overlap_a_token_counts_when_it_is_known() -> None:
    followed = follow(TOKENS[:4])
    assert take(followed, data_of(TOKENS[:4], [5], 0, 4), is_new=True) == (4, [5])
    assert take(followed, data_of([], [6], 3, 1)) == (4, [6])
    assert take(followed, data_of([70], [], 4, 1)) == (5, [])


def test_more_than_the_known_tokens_never_counts() -> None:
    followed = follow(TOKENS[:4])
    assert take(followed, data_of(TOKENS[:4], [5, 6], 0, 7), is_new=True)[0] == 4


def test_before_scheduled_counts_a_chunk_counts_with_the_next_one() -> None:
    whole, chunked = follow(TOKENS[:10]), follow(TOKENS[:10])
    first = data_of(TOKENS[:10], [5, 6, 7], 0, None)
    assert take(whole, first, is_new=True)[0] == 10
    assert take(chunked, first, is_new=True, is_chunked=True)[0] == 0
    assert take(chunked, data_of([], [], 8, None), is_chunked=True)[0] == 8
    assert take(chunked, data_of([70], [], 10, None), is_chunked=True)[0] == 11


def test_priorities_follow_the_blocks_in_the_list_that_the_slot_has() -> None:
    followed = follow(TOKENS[:8])
    shared = followed.priorities
    first, second = data_of(TOKENS[:8], [5, 6], 0, 8), data_of([70], [7], 8, 1)
    first.priorities, second.priorities = [90, 10], None
    take(followed, first, is_new=True)
    take(followed, second)
    assert shared == [90, 10, translate.DEFAULT_PRIORITY]


# layout


def test_a_pool_is_one_region_with_a_plane_for_all_of_a_block() -> None:
    pool = torch.zeros((6, 3, 2, 16), dtype=torch.float16)
    layout, (region,) = layout_of(pool, block_size=4)
    assert (layout.num_device_blocks, layout.block_size) == (6, 4)
    assert layout.block_bytes == 3 * 2 * 16 * 2
    assert (region.dtype, region.numel()) == (torch.uint8, pool.numel() * 2)
    assert region.data_ptr() == pool.data_ptr()


def test_a_pool_that_is_a_part_of_a_larger_one_is_found_in_it() -> None:
    whole = torch.zeros((8, 3, 2, 16), dtype=torch.float16)
    layout, (region,) = layout_of(whole[2:], block_size=4)
    assert layout.num_device_blocks == 6
    assert region.numel() == whole.numel() * 2
    (plane,) = layout.planes
    assert plane.offset_bytes == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize("pool", [torch.zeros(4, 2, 16), [torch.zeros(4, 2, 2, 16)] * 2, None])
def test_several_pools_are_refused(pool: Any) -> None:
    with pytest.raises(LayoutMismatch, match="several pools"):
        layout_of(pool, block_size=4)


def test_layouts_of_other_shapes_have_other_fingerprints() -> None:
    shapes = [(6, 3, 2, 16), (6, 3, 1, 32), (6, 2, 3, 16)]
    prints = {layout_of(torch.zeros(s), block_size=4)[0].fingerprint() for s in shapes}
    assert len(prints) == 3


# compatibility, interface


def test_a_version_that_was_never_read_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compatibility.check_version("1.2.0rc7")
        assert not caplog.records
        compatibility.check_version("2.0.0")
    assert "2.0.0" in caplog.text


def test_the_engines_defaults_are_fine_and_fields_may_be_missing() -> None:
    compatibility.check_engine(ARGS)
    compatibility.check_engine(SimpleNamespace(kv_cache_config=SimpleNamespace()))


def test_partial_reuse_is_the_engines_default() -> None:
    assert not compatibility.reuses_parts_of_blocks(ARGS)
    bare = SimpleNamespace(kv_cache_config=SimpleNamespace())
    assert compatibility.reuses_parts_of_blocks(bare)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_base_classes_are_those_of_the_version(flavour: str) -> None:
    with installed(flavour, ("kvbm_connectors.trtllm",)):
        from kvbm_connectors.trtllm import DynamoKVBMConnectorLeader, DynamoKVBMConnectorWorker

        for connector in (DynamoKVBMConnectorLeader, DynamoKVBMConnectorWorker):
            bases = {base.__module__ for base in connector.__mro__}
            assert FLAVOURS[flavour].path in bases


def test_an_engine_without_the_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed("1.3", ("kvbm_connectors.trtllm",)):
        for name in [n for n in sys.modules if "kv_cache_connector" in n or "trtllm.inter" in n]:
            monkeypatch.delitem(sys.modules, name)
        for name in [n for n in sys.modules if n.startswith("kvbm_connectors.trtllm")]:
            monkeypatch.delitem(sys.modules, name)
        package = ModuleType("tensorrt_llm._torch.pyexecutor")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
        with pytest.raises(ImportError, match="no KV cache connector interface"):
            import kvbm_connectors.trtllm.interface  # noqa: F401
        monkeypatch.undo()
