"""vLLM's objects in `kvbm_core`'s words: functions without policy.

Everything is read by name from vLLM 0.30 to 0.32 (vllm/v1/core/sched/output.py,
vllm/v1/request.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from kvbm_connectors.sources import THIS_PROCESS
from kvbm_connectors.vllm.identity import Adapters
from kvbm_core.errors import ConfigError
from kvbm_core.hashing import CacheNamespace, PrefixChain, block_content
from kvbm_core.types import BlockHash, BlockId, RequestId

# Algorithms of vLLM's prefix cache whose keys can't be forged; see its CacheConfig.
# blake3, sha256 or sha512 in hex, after the name of an adapter where there is one.
_CONTENT_HASH = re.compile(r"(?:.*:)?(?:[0-9a-f]{64}){1,2}", re.DOTALL)
PRIORITY_PARAM = "kvbm_priority"
COLLISION_RESISTANT = frozenset({"sha256", "sha256_cbor"})


def namespace_of(vllm_config: Any, block_size: int, weights: str = "") -> CacheNamespace:
    """Identity of what this engine computes. weights: needed where blocks outlive the process."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    return CacheNamespace(
        model=str(model.model),
        revision=weights or str(model.revision or ""),
        dtype=f"{model.dtype}/{cache.cache_dtype}",
        layout="vllm",
        block_size=block_size,
        parallel=f"tp{parallel.tensor_parallel_size}.pp{parallel.pipeline_parallel_size}",
    )


def uses_engine_keys(
    choice: str, hash_algorithm: str, *, is_a_hash_a_block: bool, has_disk: bool
) -> bool:
    """Whether vLLM's own block hashes are the keys; `choice` is the option `block_keys`.

    is_a_hash_a_block: whether vLLM hashes as many tokens at a time as a block has. has_disk: keys
    must be the same after a restart, and vLLM's begin with a random number. Raises ConfigError.
    """
    if has_disk:
        if choice == "engine":
            problem = "vLLM's block hashes can't name blocks on disk: a restart changes them"
            raise ConfigError("block_keys", choice, problem, "Leave it unset.")
        return False
    if choice == "auto":
        return is_a_hash_a_block and hash_algorithm in COLLISION_RESISTANT
    return is_a_hash_a_block and choice == "engine"


def chain_of(request: Any, namespace: CacheNamespace, adapters: Adapters) -> Sequence[BlockHash]:
    """Our own keys of a request.

    None for one whose prompt is embeddings without identity, or whose tokens may be taken back
    (vLLM's streaming sessions drop the last sampled one).
    """
    if request.prompt_embeds is not None or request.resumable:
        return ()
    lora = request.lora_request
    adapter = adapters.identity(lora) if lora is not None else ""
    root = namespace.root(adapter=adapter, salt=request.cache_salt or "")
    content = _content_of(request.mm_features, namespace.block_size)
    return PrefixChain(root, request.all_token_ids, namespace.block_size, content)


def priorities_of(request: Any) -> Sequence[int]:
    """For the offload filter, where more is kept longer: what the request asks for in
    `kv_transfer_params`, else vLLM's own priority, whose lower numbers go first, turned round."""
    params = request.kv_transfer_params or {}
    if isinstance(priority := params.get(PRIORITY_PARAM), int):
        return (priority,)
    return (-request.priority,)


def progress_of(output: Any) -> Iterator[tuple[RequestId, int]]:
    """Each scheduled request with the tokens whose KV exists after this step's forward."""
    scheduled = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + scheduled[new.req_id]
    cached = output.scheduled_cached_reqs
    for request_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield request_id, num_computed + scheduled[request_id]


def reissued_by(output: Any, block_size: int) -> Iterator[BlockId]:
    """Device blocks that this step's forward writes for the first time.

    A newly admitted request shares the blocks of its cached prefix: those are only read.
    """
    for new in output.scheduled_new_reqs:
        yield from new.block_ids[0][new.num_computed_tokens // block_size :]
    cached = output.scheduled_cached_reqs
    for index, request_id in enumerate(cached.req_ids):
        if (blocks := cached.new_block_ids[index]) is None:
            continue
        is_whole_table = request_id in cached.resumed_req_ids
        first = cached.num_computed_tokens[index] // block_size if is_whole_table else 0
        yield from blocks[0][first:]


def _lasting(identifier: str) -> str:
    """What names an image or audio clip for other processes too. vLLM may count where it does not
    hash (vllm/renderers/base.py, 0.32), and clients may give names of their own."""
    return identifier if _CONTENT_HASH.fullmatch(identifier) else f"{THIS_PROCESS}:{identifier}"


def _content_of(features: Sequence[Any], block_size: int) -> dict[int, bytes]:
    items = []
    for feature in features:
        place = feature.mm_position
        items.append((_lasting(feature.identifier), place.offset, place.length))
    return block_content(items, block_size)
