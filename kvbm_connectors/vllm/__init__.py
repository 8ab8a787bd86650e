"""vLLM connector: `DynamoConnector`, the name that `kv_connector` in vLLM's config takes."""

from __future__ import annotations

from kvbm_connectors.vllm.connector import DynamoConnector

__all__ = ["DynamoConnector"]
