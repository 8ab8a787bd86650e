"""Which weights made a block: what a cache that outlives its process knows of model and adapter.

A name is not enough: somebody may train on in the same folder. Local files count with name, size
and time of change, models of a hub with their commit. What can't be identified gets a name that no
other process will have, so that its blocks are never taken for somebody else's.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import vllm
from vllm.platforms import current_platform

logger = logging.getLogger("kvbm_connectors.vllm")

THIS_PROCESS = os.urandom(16).hex()
_COMMIT = re.compile("[0-9a-f]{40}")
_START_UP_SECONDS = 1.0
_unknown: set[str] = set()


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
        _source(str(getattr(model, "model_weights", "") or model.model), _commit_of(model)),
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
        source = _source(lora.lora_path, "")
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


def _source(name: str, commit: str) -> str:
    path = Path(name)
    files = [path] if path.is_file() else []
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(path)), file.stat()) for file in files]
    if any(max(stat.st_mtime_ns, stat.st_ctime_ns) > _last_load_ns() for _, stat in stats):
        return _unidentified(name)
    if stats:
        return repr([(found, stat.st_size, stat.st_mtime_ns) for found, stat in stats])
    if commit:
        return f"{name}@{commit}"
    return _unidentified(name)


def _unidentified(name: str) -> str:
    if name not in _unknown:
        _unknown.add(name)
        logger.warning(
            "%s has no commit, and no files older than this process: no restart uses its blocks",
            name,
        )
    return THIS_PROCESS


@functools.cache
def _last_load_ns() -> int:
    """A moment after this process began and before it can have read any weights: files that were
    changed later may not be those that were read."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    began_seconds = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
    age_seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - began_seconds
    return time.time_ns() - int((age_seconds - _START_UP_SECONDS) * 1e9)


def _commit_of(model: Any) -> str:
    """The commit of the weights; that of the configuration may be another repository's."""
    if _COMMIT.fullmatch(str(model.revision)):
        return str(model.revision)
    if getattr(model, "hf_config_path", None):
        return ""
    return str(getattr(model.hf_config, "_commit_hash", None) or "")
