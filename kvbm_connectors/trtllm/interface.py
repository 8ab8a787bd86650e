"""TensorRT-LLM's own classes, wherever this version keeps them.

Source: `tensorrt_llm/_torch/pyexecutor/kv_cache_connector.py` up to 1.3.0rc11,
`…/pyexecutor/connectors/kv_cache_connector.py` from 1.3.0rc14.
"""

from __future__ import annotations

import importlib
from typing import Any

_PATHS = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)


def _interface() -> Any:
    for path in _PATHS:
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):
                raise  # it is there, and lacks something itself
    raise ImportError(
        "this TensorRT-LLM has no KV cache connector interface at "
        f"{' or '.join(_PATHS)}; supported: TensorRT-LLM 1.1 to 1.3, PyTorch backend"
    )


_found = _interface()
KvCacheConnectorScheduler: Any = _found.KvCacheConnectorScheduler
KvCacheConnectorWorker: Any = _found.KvCacheConnectorWorker
