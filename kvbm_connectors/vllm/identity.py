"""Which weights made a block: what a cache that outlives its process knows of model and adapter.

A name is not enough: somebody may train on in the same folder. Local files count with name, size
and time of change, models of a hub with their commit. What can't be identified gets a name that no
other process will have, so that its blocks are never taken for somebody else's.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

logger = logging.getLogger("kvbm_connectors.vllm")

_THIS_PROCESS = os.urandom(16).hex()
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".json")


def weights_identity(vllm_config: Any) -> str:
    """32 hex digits that are equal where a prompt has equal KV; stable over restarts."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    load = vllm_config.load_config
    parts = [
        vllm.__version__,
        _kernels(vllm_config),
        _source(str(model.model), _commit_of(model)),
        model.hf_config.to_json_string(),
        str(model.quantization),
        str(load.load_format),
        str(model.seed) if str(load.load_format) == "dummy" else "",
        # Scales that the first requests decide are not those of the next process.
        _THIS_PROCESS if getattr(cache, "calculate_kv_scales", False) else "",
    ]
    if (draft := getattr(vllm_config.speculative_config, "draft_model_config", None)) is not None:
        parts += [_source(str(draft.model), _commit_of(draft)), draft.hf_config.to_json_string()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


class Adapters:
    """Identities of LoRA adapters, read once for each that the engine loads."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, int], str] = {}

    def identity(self, lora: Any) -> str:
        key = lora.lora_name, lora.lora_path, lora.lora_int_id
        if key not in self._known:
            self._known[key] = f"{lora.lora_name}\0{lora.lora_path}\0{_source(lora.lora_path, '')}"
        return self._known[key]


def _kernels(vllm_config: Any) -> str:
    """What chooses the attention kernels, which lay out a page each in its own way: vLLM's CPU
    kernels do by the CPU's instructions (v1/attention/backends/cpu_attn.py, 0.32)."""
    parts = [current_platform.get_device_name(), vllm_config.attention_config.compute_hash()]
    if current_platform.is_cpu():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\0".join(parts)


def _source(name: str, commit: str) -> str:
    path = Path(name)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
    if files:
        stats = [(file.name, file.stat()) for file in files]
        return repr([(found, stat.st_size, stat.st_mtime_ns) for found, stat in stats])
    if commit:
        return f"{name}@{commit}"
    logger.warning(
        "%s: neither files nor a commit are known, a restart will not use its blocks", name
    )
    return _THIS_PROCESS


def _commit_of(model: Any) -> str:
    return str(getattr(model.hf_config, "_commit_hash", None) or "")
