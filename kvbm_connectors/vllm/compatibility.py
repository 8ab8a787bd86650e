"""Which vLLM this connector can work with, and which set-ups of it; clear refusals for the rest."""

from __future__ import annotations

import logging
from typing import Any

from kvbm_core.errors import ConfigError

logger = logging.getLogger(__name__)

TESTED_VERSION = "0.32.0"
SUPPORTED_VERSIONS = ("0.30", "0.31", "0.32")
_SUPPORTED_SPECS = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_NEEDED_HOOKS = (
    "bind_kv_cache_manager",
    "build_connector_worker_meta",
    "get_block_ids_with_load_errors",
    "get_handshake_metadata",
    "handle_preemptions",
    "has_pending_push_work",
    "requires_kv_delivery",
    "set_xfer_handshake_metadata_pp_aware",
)


def check_version(version: str, connector_base: type) -> None:
    """Raise where this vLLM lacks a hook that the connector rests on; warn where untested."""
    missing = [hook for hook in _NEEDED_HOOKS if not hasattr(connector_base, hook)]
    if missing:
        raise ConfigError(
            "vllm version",
            version,
            f"its connector interface has no {', '.join(missing)}",
            f"Use vLLM {' to '.join((SUPPORTED_VERSIONS[0], SUPPORTED_VERSIONS[-1]))}.",
        )
    if not version.startswith(SUPPORTED_VERSIONS):
        logger.warning(
            "vLLM %s is untested with this release (tested: %s, supported: %s)",
            version,
            TESTED_VERSION,
            ", ".join(SUPPORTED_VERSIONS),
        )


def check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise on parallelism or cache shapes that the connector does not handle."""
    parallel = vllm_config.parallel_config
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            problem = "context parallelism spreads a block over ranks, which is not supported"
            raise ConfigError(option, getattr(parallel, option), problem, "Set it to 1.")
    groups = kv_cache_config.kv_cache_groups
    num_groups = len(groups)
    if num_groups != 1:
        raise ConfigError(
            "kv_cache_groups",
            num_groups,
            "models with several KV cache groups (hybrid, Mamba) are not supported",
            "Pass --disable-hybrid-kv-cache-manager where the model allows it.",
        )
    spec = groups[0].kv_cache_spec
    for layer_spec in getattr(spec, "kv_cache_specs", {"": spec}).values():
        kind = type(layer_spec).__name__
        if kind not in _SUPPORTED_SPECS:
            raise ConfigError(
                "kv_cache_spec",
                kind,
                "the engine may drop blocks of such a cache while a request runs",
                "Serve this model without the connector.",
            )


def warn_about_policy(policy: str) -> None:
    """Say what vLLM's default failure policy costs."""
    if policy != "recompute":
        logger.warning(
            "kv_load_failure_policy=%r: a request whose cached blocks can't be loaded fails. Set "
            '"kv_load_failure_policy":"recompute" in --kv-transfer-config to recompute instead.',
            policy,
        )
