"""Eviction policies by name; a policy is one file here, or any class named ``module:Name``."""

from __future__ import annotations

from collections.abc import Callable

from kvbm_core.eviction.lru import Lru
from kvbm_core.eviction.port import EvictionPolicy

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": Lru}

__all__ = ["POLICIES", "EvictionPolicy", "Lru"]
