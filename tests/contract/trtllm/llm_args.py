"""A stand-in for `tensorrt_llm.llmapi.llm_args.TorchLlmArgs`: the fields that a connector reads.

Field names as in NVIDIA/TensorRT-LLM's llm_args.py and mapping.py. `parallel_config.to_mapping()`
gives a Mapping whose `rank` is the caller's. Everything else is absent, and so an AttributeError.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from types import SimpleNamespace
from typing import Any

from tests.contract.trtllm import mpi


class ParallelConfig(SimpleNamespace):
    """`_ParallelConfig` upstream."""

    @property
    def world_size(self) -> int:
        return int(self.tp_size * self.pp_size * self.cp_size)

    def to_mapping(self) -> SimpleNamespace:
        return SimpleNamespace(
            world_size=self.world_size,
            rank=mpi.mpi_rank(),
            gpus_per_node=self.gpus_per_node,
            tp_size=self.tp_size,
            pp_size=self.pp_size,
            cp_size=self.cp_size,
            tp_rank=mpi.mpi_rank() % self.tp_size,
            enable_attention_dp=self.enable_attention_dp,
        )


class TorchLlmArgs(SimpleNamespace):
    """A plain object; tests override single fields by dotted name."""

    @property
    def parallel_config(self) -> ParallelConfig:
        return ParallelConfig(
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            cp_size=self.context_parallel_size,
            gpus_per_node=self.gpus_per_node,
            enable_attention_dp=self.enable_attention_dp,
        )


def make_llm_args(
    *, num_ranks: int, tokens_per_block: int, overrides: Dict[str, Any] | None = None
) -> TorchLlmArgs:
    """Arguments of an engine whose defaults a connector accepts, with some fields overridden."""
    args = TorchLlmArgs(
        model="toy",
        tokenizer=None,
        revision=None,
        trust_remote_code=False,
        backend="pytorch",
        dtype="auto",
        quant_config=None,
        tensor_parallel_size=num_ranks,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        gpus_per_node=8,
        enable_attention_dp=False,
        max_beam_width=1,
        max_batch_size=8,
        max_num_tokens=8192,
        max_seq_len=None,
        enable_chunked_prefill=False,
        disable_overlap_scheduler=False,
        cuda_graph_config=None,
        speculative_config=None,
        lora_config=None,
        load_format="AUTO",
        scheduler_config=SimpleNamespace(capacity_scheduler_policy="GUARANTEED_NO_EVICT"),
        cache_transceiver_config=None,
        kv_connector_config=None,
        kv_cache_config=SimpleNamespace(
            tokens_per_block=tokens_per_block,
            enable_block_reuse=True,
            enable_partial_reuse=False,
            host_cache_size=None,
            dtype="auto",
            max_attention_window=None,
            free_gpu_memory_fraction=0.9,
            max_tokens=None,
            event_buffer_max_size=0,
            copy_on_partial_reuse=True,
            secondary_offload_min_priority=None,
            sink_token_length=None,
            mamba_ssm_cache_dtype="auto",
        ),
    )
    for name, value in (overrides or {}).items():
        *path, last = name.split(".")
        target: Any = args
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return args
