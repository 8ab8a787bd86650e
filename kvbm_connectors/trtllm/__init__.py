"""TensorRT-LLM connector: the names that `kv_connector_config` in its YAML takes.

They are imported when asked for: what does not need the engine can be used without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbm_connectors.trtllm.connector import (
        DynamoKVBMConnectorLeader,
        DynamoKVBMConnectorWorker,
    )

__all__ = ["DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.connector"), name)
