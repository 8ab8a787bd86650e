"""The `vllm.general_plugins` entry point: makes `DynamoConnector` known without a module path.

Imports nothing of the connector: vLLM calls this in every process, also without a connector.
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

NAME = "DynamoConnector"
MODULE = "kvbm_connectors.vllm"


def register() -> None:
    """Register the connector by name; vLLM may call it more than once in a process."""
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
