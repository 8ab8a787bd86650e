"""TensorRT-LLM connector: the names that `kv_connector_config` in its YAML takes."""

from __future__ import annotations

from kvbm_connectors.trtllm.connector import DynamoKVBMConnectorLeader, DynamoKVBMConnectorWorker

__all__ = ["DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"]
