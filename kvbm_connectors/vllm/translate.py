"""vLLM's objects in `kvbm_core`'s words: pure functions, no state, no policy.

Everything is read by name from vLLM 0.30 to 0.32 (vllm/v1/core/sched/output.py,
vllm/v1/request.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from kvbm_core.hashing import CacheNamespace, PrefixChain
from kvbm_core.types import BlockHash, BlockId, RequestId

# Algorithms of vLLM's prefix cache whose keys can't be forged; see its CacheConfig.
COLLISION_RESISTANT = frozenset({"sha256", "sha256_cbor"})


def namespace_of(vllm_config: Any, block_size: int) -> CacheNamespace:
    """Identity of what this engine computes."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    return CacheNamespace(
        model=str(model.model),
        revision=str(model.revision or ""),
        dtype=f"{model.dtype}/{cache.cache_dtype}",
        layout="vllm",
        block_size=block_size,
        parallel=f"tp{parallel.tensor_parallel_size}.pp{parallel.pipeline_parallel_size}",
    )


def uses_engine_keys(choice: str, hash_algorithm: str, *, is_a_hash_a_block: bool) -> bool:
    """Whether vLLM's own block hashes are the keys; `choice` is the option `block_keys`.

    is_a_hash_a_block: whether vLLM hashes as many tokens at a time as a block has.
    """
    if choice == "auto":
        return is_a_hash_a_block and hash_algorithm in COLLISION_RESISTANT
    return is_a_hash_a_block and choice == "engine"


def chain_of(request: Any, namespace: CacheNamespace) -> Sequence[BlockHash]:
    """Our own keys of a request.

    None for one whose prompt is embeddings without identity, or whose tokens may be taken back
    (vLLM's streaming sessions drop the last sampled one).
    """
    if request.prompt_embeds is not None or request.resumable:
        return ()
    lora = request.lora_request
    adapter = f"{lora.lora_name}\0{lora.lora_path}" if lora is not None else ""
    root = namespace.root(adapter=adapter, salt=request.cache_salt or "")
    content = _content_of(request.mm_features, namespace.block_size)
    return PrefixChain(root, request.all_token_ids, namespace.block_size, content)


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


def _content_of(features: Sequence[Any], block_size: int) -> dict[int, bytes]:
    """Block index → identities and offsets of the images or audio whose placeholders it holds."""
    content: defaultdict[int, bytes] = defaultdict(bytes)
    for feature in features:
        first, length = feature.mm_position.offset, feature.mm_position.length
        for block in range(first // block_size, (first + length - 1) // block_size + 1):
            identity = f"{feature.identifier}@{first - block * block_size}".encode()
            content[block] += len(identity).to_bytes(4, "little") + identity
    return dict(content)
