"""A LoRA adapter for the tiny checkpoint, made on the spot, large enough to change tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.checkpoint import TINY

RANK = 8


def write_adapter(directory: Path) -> Path:
    """Make `directory` hold the adapter; return it."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(TINY.num_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        down = torch.randn(RANK, TINY.hidden_size, generator=generator)
        up = torch.randn(TINY.num_heads * TINY.head_dim, RANK, generator=generator)
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = down, up
    save_file(weights, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
