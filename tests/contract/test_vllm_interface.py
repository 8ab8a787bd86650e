"""What the connector takes for granted of vLLM, checked against the installed one."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request

from kvbm_connectors.vllm import DynamoConnector, compatibility, plugin, translate
from kvbm_connectors.vllm.identity import Adapters
from kvbm_connectors.vllm.layout import layout_of
from kvbm_core.errors import ConfigError, LayoutMismatch
from kvbm_core.hashing import CacheNamespace

BLOCK_SIZE = 16
NAMESPACE = CacheNamespace("m", "", "bf16", "vllm", BLOCK_SIZE, "tp1.pp1")


def request(tokens: list[int], **fields: Any) -> Request:
    return Request("r", tokens, SamplingParams(max_tokens=4), None, **fields)


def image(identifier: str, offset: int, length: int) -> MultiModalFeatureSpec:
    position = PlaceholderRange(offset=offset, length=length)
    return MultiModalFeatureSpec(None, "image", identifier, position)


def test_our_hooks_take_the_parameters_that_the_engine_passes() -> None:
    for name, ours in vars(DynamoConnector).items():
        base = getattr(KVConnectorBase_V1, name, None)
        if not inspect.isfunction(ours) or base is None or name == "__init__":
            continue
        expected = list(inspect.signature(base).parameters)
        assert list(inspect.signature(ours).parameters) == expected, name


def test_this_vllm_has_every_hook_and_is_the_tested_one() -> None:
    compatibility.check_version(vllm.__version__, KVConnectorBase_V1)
    assert vllm.__version__.startswith(compatibility.TESTED_VERSION)


def test_an_older_interface_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(ConfigError, match=r"handle_preemptions.*Use vLLM 0\.30 to 0\.32"):
        compatibility.check_version("0.20.0", object)


def engine_config(**parallel: int) -> SimpleNamespace:
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel))


def cache_config(*specs: Any) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s) for s in specs])


def test_set_ups_that_cannot_be_cached_safely_are_refused() -> None:
    full = attention_spec(FullAttentionSpec)
    window = attention_spec(SlidingWindowSpec, sliding_window=128)
    compatibility.check_engine(engine_config(), cache_config(full))
    with pytest.raises(ConfigError, match="SlidingWindowSpec"):
        compatibility.check_engine(engine_config(), cache_config(window))
    with pytest.raises(ConfigError, match="several KV cache groups"):
        compatibility.check_engine(engine_config(), cache_config(full, window))
    with pytest.raises(ConfigError, match="context parallelism"):
        compatibility.check_engine(
            engine_config(decode_context_parallel_size=2), cache_config(full)
        )


def test_the_plugin_registers_the_name_once() -> None:
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "kvbm"]
    assert entry.value == "kvbm_connectors.vllm.plugin:register"
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name("DynamoConnector") is DynamoConnector


def scheduler_output() -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData("new", None, [], None, None, ([7, 8, 9],), 2 * BLOCK_SIZE, None)
    ]
    output.scheduled_cached_reqs = CachedRequestData(
        req_ids=["decode", "grown", "resumed"],
        resumed_req_ids={"resumed"},
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None, ([20],), ([30, 31, 32],)],
        num_computed_tokens=[40, 32, BLOCK_SIZE],
        num_output_tokens=[1, 1, 1],
    )
    output.num_scheduled_tokens = {"new": 10, "decode": 1, "grown": 1, "resumed": 20}
    return output


def test_progress_counts_the_tokens_of_this_step() -> None:
    assert dict(translate.progress_of(scheduler_output())) == {
        "new": 2 * BLOCK_SIZE + 10,
        "decode": 41,
        "grown": 33,
        "resumed": BLOCK_SIZE + 20,
    }


def test_only_blocks_that_are_written_anew_count_as_reissued() -> None:
    assert list(translate.reissued_by(scheduler_output(), BLOCK_SIZE)) == [9, 20, 31, 32]


def keys(**fields: Any) -> list[bytes]:
    return list(translate.chain_of(request(list(range(64)), **fields), NAMESPACE, Adapters()))


def test_own_keys_isolate_lora_salt_and_images() -> None:
    chains = [
        keys(),
        keys(cache_salt="a"),
        keys(cache_salt="b"),
        keys(lora_request=LoRARequest("x", 1, "/adapters/x")),
        keys(lora_request=LoRARequest("y", 2, "/adapters/y")),
        keys(mm_features=[image("cat", 0, 20)]),
        keys(mm_features=[image("dog", 0, 20)]),
    ]
    firsts = [chain[0] for chain in chains]
    assert len(set(firsts)) == len(firsts)
    assert keys(cache_salt="a") == chains[1]


def test_an_image_changes_the_keys_from_its_first_block_on() -> None:
    cat, dog = (keys(mm_features=[image(name, 20, 20)]) for name in ("cat", "dog"))
    assert cat[0] == dog[0] == keys()[0]
    assert not set(cat[1:]) & set(dog[1:])


def test_a_prompt_of_embeddings_has_no_keys() -> None:
    embeddings = SimpleNamespace(prompt_embeds=torch.zeros(4, 4))
    assert list(translate.chain_of(embeddings, NAMESPACE, Adapters())) == []


def test_weak_or_odd_hashes_are_not_trusted_as_keys() -> None:
    def trusted(
        choice: str, algorithm: str, *, is_a_hash_a_block: bool = True, has_disk: bool = False
    ) -> bool:
        return translate.uses_engine_keys(
            choice, algorithm, is_a_hash_a_block=is_a_hash_a_block, has_disk=has_disk
        )

    assert trusted("auto", "sha256")
    assert trusted("engine", "xxhash")
    assert not trusted("auto", "xxhash")
    assert not trusted("chain", "sha256")
    assert not trusted("engine", "sha256", is_a_hash_a_block=False)
    assert not trusted("auto", "sha256", has_disk=True)
    with pytest.raises(ConfigError, match="restart"):
        trusted("engine", "sha256", has_disk=True)


def test_tokens_that_may_be_taken_back_have_no_own_keys() -> None:
    assert keys(resumable=True) == []


@pytest.mark.parametrize("kernel_block_size", [None, 4])
@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_planes_hold_the_bytes_of_a_block_in_every_layout_of_vllm(
    layout: KVCacheLayout, kernel_block_size: int | None
) -> None:
    if kernel_block_size and not (layout.is_layer_compact and layout.is_block_compact):
        return  # vLLM does not split blocks there
    views = layer_views(layout, kernel_block_size)
    found, regions = layout_of(views, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    assert found.block_bytes == sum(view.nbytes for view in views.values()) // NUM_BLOCKS
    for block in range(NUM_BLOCKS):
        taken = b"".join(
            regions[plane.region][start : start + plane.page_bytes].numpy().tobytes()
            for plane in found.planes
            for start in [plane.offset_bytes + block * plane.stride_bytes]
        )
        by_block = [view.unflatten(0, (NUM_BLOCKS, -1))[block] for view in views.values()]
        held = torch.cat([part.flatten() for part in by_block])
        taken_elements = torch.frombuffer(bytearray(taken), dtype=torch.int16)
        assert sorted(taken_elements.tolist()) == sorted(held.tolist())


def test_something_that_is_no_kv_tensor_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match="axes"):
        layout_of({"mamba": torch.zeros(4, 4)}, num_blocks=4, block_size=BLOCK_SIZE)


NUM_BLOCKS, NUM_LAYERS, HEADS, HEAD_DIM = 5, 3, 2, 8


def attention_spec(kind: type, **more: int) -> Any:
    return kind(
        block_size=BLOCK_SIZE,
        num_kv_heads=HEADS,
        head_size=HEAD_DIM,
        dtype=torch.int16,
        **more,
    )


def layer_views(layout: KVCacheLayout, kernel_block_size: int | None) -> dict[str, torch.Tensor]:
    """Views as vLLM makes them, every element different."""
    spec = attention_spec(FullAttentionSpec)
    page = spec.page_size_bytes
    names = [f"layer{i}" for i in range(NUM_LAYERS)]
    size = page * NUM_BLOCKS * NUM_LAYERS
    layer_stride, block_stride = page * NUM_BLOCKS, page
    if layout.is_block_outermost:
        layer_stride, block_stride = page, page * NUM_LAYERS
    if layout is KVCacheLayout.LHBNC:
        block_stride = page // HEADS
    if layout is KVCacheLayout.BHLNC:
        layer_stride = page // HEADS
    raw = torch.arange(size // 2, dtype=torch.int16).view(torch.int8)
    placed = KVCacheTensor(size, names, layer_stride, block_stride)
    views = create_kv_cache_views(raw, spec, NUM_BLOCKS, layout, placed, kernel_block_size)
    return dict(zip(names, views, strict=True))
