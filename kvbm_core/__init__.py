"""Engine-agnostic KV-cache block management: decisions first, effects second."""

from __future__ import annotations

from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.hashing import CacheNamespace, PrefixChain, chain_hashes
from kvbm_core.layout import KvLayout, Plane
from kvbm_core.leader import Leader
from kvbm_core.metrics import Counters
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, Tier

__all__ = [
    "BlockHash",
    "BlockPool",
    "CacheNamespace",
    "ConfigError",
    "Counters",
    "KvLayout",
    "KvbmConfig",
    "KvbmError",
    "Leader",
    "Plane",
    "PrefixChain",
    "Tier",
    "chain_hashes",
]
