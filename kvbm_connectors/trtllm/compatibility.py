"""Which TensorRT-LLM this connector can work with, and which set-ups of it; clear refusals for the
rest. Every rank asks, so that all of them refuse alike and none waits for another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from kvbm_core.errors import ConfigError

logger = logging.getLogger(__name__)

SUPPORTED_VERSIONS = ("1.1", "1.2", "1.3")


def check_version(version: str) -> None:
    """Warn where the interface is not one that was read."""
    if not version.startswith(SUPPORTED_VERSIONS):
        logger.warning(
            "TensorRT-LLM %s is unknown to this release (made for: %s)",
            version,
            ", ".join(SUPPORTED_VERSIONS),
        )


def check_engine(llm_args: Any) -> None:
    """Raise ConfigError on parallelism or cache shapes that the connector does not handle."""
    for option, value, is_bad, problem, remedy in _findings(llm_args):
        if is_bad:
            raise ConfigError(option, value, problem, remedy)


def reuses_parts_of_blocks(llm_args: Any) -> bool:
    """Whether the engine copies parts of cached blocks into new ones by itself."""
    return bool(getattr(llm_args.kv_cache_config, "enable_partial_reuse", True))


def warn_about_partial_reuse() -> None:
    """Say what TensorRT-LLM's default costs."""
    logger.warning(
        "kv_cache_config.enable_partial_reuse is on: a prompt that shares part of a block with a "
        "cached one loads nothing, and every forward waits for its loads and offloads. Set it to "
        "false."
    )


_Finding = tuple[str, Any, bool, str, str]


def _findings(llm_args: Any) -> Iterator[_Finding]:
    """(option, value, whether it can't work, problem, remedy)"""
    yield from _parallelism(llm_args)
    cache = llm_args.kv_cache_config
    reuse = getattr(cache, "enable_block_reuse", True)
    problem = "without it the engine tells no connector which blocks a prompt has"
    yield "kv_cache_config.enable_block_reuse", reuse, not reuse, problem, "Set it to true."
    size = getattr(cache, "host_cache_size", None)
    problem = "the engine would move blocks to host by itself, unseen by the connector"
    yield "kv_cache_config.host_cache_size", size, bool(size), problem, "Leave it unset."
    is_v2 = getattr(cache, "use_kv_cache_manager_v2", False) is True
    problem = "its pools and block ids are other ones, which this release has not been tried with"
    yield "kv_cache_config.use_kv_cache_manager_v2", is_v2, is_v2, problem, "Set it to false."
    windows = getattr(cache, "max_attention_window", None)
    problem = "the engine drops blocks that left the window while a request runs"
    yield "kv_cache_config.max_attention_window", windows, bool(windows), problem, "Leave it unset."
    beams = getattr(llm_args, "max_beam_width", None) or 1
    problem = "beams share and copy blocks, unseen by the connector"
    yield "max_beam_width", beams, beams > 1, problem, "Set it to 1."
    drafts = getattr(llm_args, "speculative_config", None)
    problem = "TensorRT-LLM has no connector for drafted tokens"
    yield "speculative_config", drafts, drafts is not None, problem, "Leave it unset."


def _parallelism(llm_args: Any) -> Iterator[_Finding]:
    for option in ("pipeline_parallel_size", "context_parallel_size"):
        size = getattr(llm_args, option, None) or 1
        problem = "the engine's connector interface knows tensor parallelism only"
        yield option, size, size > 1, problem, "Set it to 1."
    is_on = bool(getattr(llm_args, "enable_attention_dp", False))
    problem = "its ranks have blocks of their own, which is not supported"
    yield "enable_attention_dp", is_on, is_on, problem, "Set it to false."
