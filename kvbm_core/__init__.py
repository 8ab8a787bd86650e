"""Engine-agnostic KV-cache block management: decisions first, effects second."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.hashing import CacheNamespace, PrefixChain, chain_hashes
from kvbm_core.layout import KvLayout, Plane
from kvbm_core.leader import Leader
from kvbm_core.metrics import Counters
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, Tier

if TYPE_CHECKING:
    from kvbm_core.blocks.manager import BlockManager
    from kvbm_core.kvbm_leader import KvbmLeader
    from kvbm_core.kvbm_worker import KvbmWorker

__all__ = [
    "BlockHash",
    "BlockManager",
    "BlockPool",
    "CacheNamespace",
    "ConfigError",
    "Counters",
    "KvLayout",
    "KvbmConfig",
    "KvbmError",
    "KvbmLeader",
    "KvbmWorker",
    "Leader",
    "Plane",
    "PrefixChain",
    "Tier",
    "chain_hashes",
]

# These bring torch and sockets: imported when they are first asked for.
_LAZY = {
    "BlockManager": "kvbm_core.blocks.manager",
    "KvbmLeader": "kvbm_core.kvbm_leader",
    "KvbmWorker": "kvbm_core.kvbm_worker",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
