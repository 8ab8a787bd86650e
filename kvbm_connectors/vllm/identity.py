"""Which weights made a block: what a cache that outlives its process knows of model and adapter.

Lives here: what of vLLM's configuration says how a prompt's KV comes about. Does not live here:
what identifies files (see `kvbm_connectors.sources`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

from kvbm_connectors.sources import COMMIT, THIS_PROCESS, source_of


def weights_identity(vllm_config: Any) -> str:
    """32 hex digits that are equal where a prompt has equal KV; stable over restarts."""
    cache, load = vllm_config.cache_config, vllm_config.load_config
    parts = [
        vllm.__version__,
        _kernels(vllm_config),
        *_model(vllm_config.model_config),
        repr((load.load_format, load.model_loader_extra_config, load.ignore_patterns)),
        # Scales that the first requests decide are not those of the next process.
        THIS_PROCESS if getattr(cache, "calculate_kv_scales", False) else "",
    ]
    if (draft := getattr(vllm_config.speculative_config, "draft_model_config", None)) is not None:
        parts += _model(draft)
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _model(model: Any) -> list[str]:
    """Its files, its configuration, and whatever vLLM itself counts as making another graph."""
    multimodal = getattr(model, "multimodal_config", None)
    options = ("mm_processor_kwargs", "media_io_kwargs")
    return [
        source_of(str(getattr(model, "model_weights", "") or model.model), _commit_of(model)),
        model.hf_config.to_json_string(),
        str(model.compute_hash()),
        repr([getattr(multimodal, option, None) for option in options]),
        str(model.seed),
    ]


class Adapters:
    """Identities of LoRA adapters. Files that change after their first use are not those that the
    engine has loaded, or not for sure."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str, int], str] = {}

    def identity(self, lora: Any) -> str:
        source = source_of(lora.lora_path, "")
        first = self._first.setdefault((lora.lora_name, lora.lora_path, lora.lora_int_id), source)
        if source != first or getattr(lora, "load_inplace", False):
            source = THIS_PROCESS
        return f"{lora.lora_name}\0{lora.lora_path}\0{source}"


def _kernels(vllm_config: Any) -> str:
    """What chooses the attention kernels, which lay out a page each in its own way: vLLM's CPU
    kernels do by the CPU's instructions (v1/attention/backends/cpu_attn.py, 0.32)."""
    parts = [current_platform.get_device_name(), vllm_config.attention_config.compute_hash()]
    if current_platform.is_cpu():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\0".join(parts)


def _commit_of(model: Any) -> str:
    """The commit of the weights; that of the configuration may be another repository's."""
    if COMMIT.fullmatch(str(model.revision)):
        return str(model.revision)
    if getattr(model, "hf_config_path", None):
        return ""
    return str(getattr(model.hf_config, "_commit_hash", None) or "")
