"""TensorRT-LLM's objects in `kvbm_core`'s words: functions without policy.

Everything is read by name, and what some versions lack has a default: fields were inserted in the
middle over time (RequestData in kv_cache_connector.py, 1.1 to 1.3; LlmRequest in
nanobind/batch_manager/bindings.cpp).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbm_connectors.sources import COMMIT, THIS_PROCESS, source_of
from kvbm_core.hashing import CacheNamespace, PrefixChain, block_content
from kvbm_core.types import BlockHash

DEFAULT_PRIORITY = 35  # of KvCacheRetentionConfig, cpp/include/tensorrt_llm/executor/executor.h
_COMPLETE = "GENERATION_COMPLETE"


def namespace_of(llm_args: Any, version: str, weights: str = "") -> CacheNamespace:
    """Identity of what this engine computes. weights: needed where blocks outlive the process."""
    cache, parallel = llm_args.kv_cache_config, llm_args.parallel_config
    return CacheNamespace(
        model=str(llm_args.model),
        revision=weights or str(getattr(llm_args, "revision", None) or ""),
        dtype=f"{getattr(llm_args, 'dtype', 'auto')}/{getattr(cache, 'dtype', 'auto')}",
        layout=f"trtllm-{version}",
        block_size=int(cache.tokens_per_block),
        parallel=f"tp{parallel.tp_size}.pp{parallel.pp_size}",
    )


def weights_identity(llm_args: Any, device_name: str) -> str:
    """32 hex digits that are equal where a prompt has equal KV; stable over restarts."""
    name = str(llm_args.model)
    options = ("quant_config", "load_format", "attn_backend", "moe_config", "torch_compile_config")
    revision = str(getattr(llm_args, "revision", None) or "")
    commit = revision if COMMIT.fullmatch(revision) else _commit_in(name)
    parts = [source_of(name, commit), device_name]
    parts += [repr(getattr(llm_args, option, None)) for option in options]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _commit_in(name: str) -> str:
    """Hubs keep snapshots in folders named by their commit."""
    return next((part for part in reversed(Path(name).parts) if COMMIT.fullmatch(part)), "")


def keys_of(request: Any, tokens: list[int], namespace: CacheNamespace) -> Sequence[BlockHash]:
    """Our own keys over `tokens`, which grows; none where the request's content has no identity.

    The engine's block hashes know no salt in some versions and are 64 bits long: never used.
    """
    positions = getattr(request, "multimodal_positions", None) or ()
    hashes = getattr(request, "multimodal_hashes", None) or ()
    lengths = getattr(request, "multimodal_lengths", None) or ()
    if not len(positions) == len(hashes) == len(lengths):
        return ()
    # Clients may name images themselves, in newer versions.
    prefix = f"{THIS_PROCESS}:" if any(getattr(request, "multimodal_uuids", None) or ()) else ""
    names = (prefix + ".".join(map(str, parts)) for parts in hashes)
    content = block_content(zip(names, positions, lengths, strict=True), namespace.block_size)
    root = namespace.root(adapter=_adapter_of(request), salt=_salt_of(request))
    return PrefixChain(root, tokens, namespace.block_size, content)


def _adapter_of(request: Any) -> str:
    """The engine names adapters by number; another process may number them otherwise."""
    task_id = getattr(request, "lora_task_id", None)
    return "" if task_id is None else f"{THIS_PROCESS}:{task_id}"


def _salt_of(request: Any) -> str:
    salt, salt_id = getattr(request, "cache_salt", None), getattr(request, "cache_salt_id", None)
    return "" if salt is None and salt_id is None else f"{salt!r} {salt_id!r}"


def is_over(request: Any) -> bool:
    """Whether the engine is done with it, for whatever reason."""
    return bool(request.is_finished) or getattr(request.state, "name", "") == _COMPLETE


def priorities_of(data: Any) -> list[int]:
    """Retention priorities of a RequestData's new blocks."""
    priorities = getattr(data, "priorities", None)
    return [DEFAULT_PRIORITY] * len(data.new_block_ids) if priorities is None else list(priorities)
