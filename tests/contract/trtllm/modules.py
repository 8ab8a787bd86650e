"""Stand-in `tensorrt_llm` modules, one set per flavour (a range of versions).

Names and signatures were read from NVIDIA/TensorRT-LLM; bodies are our own. A flavour's classes are
made once, so a connector imported under a flavour keeps its base classes from run to run. Connector
modules are put away with the flavour: they were imported against its names.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType
from typing import Any

from tests.contract.trtllm import mpi
from tests.contract.trtllm.llm_args import TorchLlmArgs
from tests.contract.trtllm.llm_request import LlmRequest, LlmRequestState

PATH_A = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"
PATH_B = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"

_CORE = ("request_id", "new_tokens", "new_block_ids", "computed_position")


@dataclass(frozen=True)
class Flavour:
    """A range of versions that behaves alike.

    finish: how a request ends. A: `request_finished` on every end, a yes defers the free. B: on
    every end, a yes pins what is stored for reuse and the rest is freed. C: as B, but only on the
    normal end. adds_in_batch: all new requests of a batch are matched before the connector hears of
    the first one's blocks (`add_sequence_batch`; from which release is uncertain, main of 2026 has
    it). request_fields: what the request seen by the match hook has beyond the common ones.
    has_shutdown: `shutdown()` on both classes; it is on later main only, in no release we know.
    """

    name: str
    version: str
    path: str
    finish: str
    data_fields: tuple[str, ...]
    request_fields: tuple[str, ...] = ("cache_salt_id",)
    adds_in_batch: bool = False
    has_wait_for_initialization: bool = False
    has_shutdown: bool = False


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        # No `num_scheduled_tokens` yet; terminate frees only once saved.
        Flavour("1.1", "1.1.0", PATH_A, "A", _CORE),
        # From 1.2.0rc2: `num_scheduled_tokens`. Store, pin and free inside terminate.
        Flavour("1.2rc2", "1.2.0rc2", PATH_A, "B", (*_CORE, "num_scheduled_tokens")),
        Flavour("1.2", "1.2.0", PATH_A, "C", (*_CORE, "num_scheduled_tokens")),
        # A field in the middle: it shows who reads by position. Which release had which order is
        # uncertain; main of 2026 has block_hashes, priorities, cache_salt in this one.
        Flavour(
            "1.3",
            "1.3.0rc14",
            PATH_B,
            "C",
            (*_CORE, "num_scheduled_tokens", "block_hashes", "priorities", "cache_salt"),
            ("cache_salt", "cache_salt_id"),
            adds_in_batch=True,
            has_wait_for_initialization=True,
        ),
        Flavour(
            "main",
            "1.3.0",
            PATH_B,
            "C",
            (
                *_CORE,
                "num_scheduled_tokens",
                "block_hashes",
                "priorities",
                "cache_salt",
                "new_block_ids_by_layer_group",
            ),
            ("cache_salt", "cache_salt_id"),
            adds_in_batch=True,
            has_wait_for_initialization=True,
            has_shutdown=True,
        ),
    )
}

_DEFAULTS: dict[str, Any] = {
    "block_hashes": field(default_factory=list),
    "priorities": None,
    "cache_salt": None,
    "new_block_ids_by_layer_group": field(default_factory=list),
}


def _request_data(flavour: Flavour) -> type:
    fields: list[Any] = [
        (name, Any, _DEFAULTS[name]) if name in _DEFAULTS else (name, Any)
        for name in flavour.data_fields
    ]
    return make_dataclass("RequestData", fields, namespace={"__module__": flavour.path})


@dataclass
class SchedulerOutput:
    new_requests: list[Any] = field(default_factory=list)
    cached_requests: list[Any] = field(default_factory=list)


class KvCacheConnectorWorker(ABC):
    def __init__(self, llm_args: TorchLlmArgs) -> None:
        self._llm_args = llm_args
        self._metadata: object = None
        super().__init__()

    def bind_connector_meta(self, metadata: object) -> None:
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None

    def register_forward_pass_callable(self) -> Any:
        """None where the connector wants no call."""
        return None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None: ...

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]: ...


class KvCacheConnectorScheduler(ABC):
    def __init__(self, llm_args: TorchLlmArgs) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object: ...

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: LlmRequest, num_computed_tokens: int
    ) -> tuple[int, bool]: ...

    @abstractmethod
    def request_finished(self, request: LlmRequest, cache_block_ids: list[int]) -> bool: ...

    @abstractmethod
    def update_state_after_alloc(self, request: LlmRequest, block_ids: list[int]) -> None: ...


def _does_nothing(self: Any) -> None:
    pass


def _bases(flavour: Flavour) -> dict[str, type]:
    """This flavour's own copies of the base classes."""
    worker: dict[str, Any] = {"__module__": flavour.path}
    scheduler: dict[str, Any] = {"__module__": flavour.path}
    if flavour.has_wait_for_initialization:
        scheduler["wait_for_initialization"] = _does_nothing
    if flavour.has_shutdown:
        worker["shutdown"] = scheduler["shutdown"] = _does_nothing
    return {
        "KvCacheConnectorWorker": type("KvCacheConnectorWorker", (KvCacheConnectorWorker,), worker),
        "KvCacheConnectorScheduler": type(
            "KvCacheConnectorScheduler", (KvCacheConnectorScheduler,), scheduler
        ),
        "SchedulerOutput": type(
            "SchedulerOutput", (SchedulerOutput,), {"__module__": flavour.path}
        ),
        "RequestData": _request_data(flavour),
    }


_SETS: dict[str, dict[str, ModuleType]] = {}
_PUT_AWAY: dict[str, dict[str, ModuleType]] = {}


def modules_of(flavour: Flavour) -> dict[str, ModuleType]:
    """This flavour's stand-ins by dotted name; made on the first call."""
    if flavour.name not in _SETS:
        _SETS[flavour.name] = _make(flavour)
    return _SETS[flavour.name]


def _make(flavour: Flavour) -> dict[str, ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        # `tensorrt_llm` exports mpi_rank and mpi_world_size too.
        "tensorrt_llm": {
            "__version__": flavour.version,
            "mpi_rank": mpi.mpi_rank,
            "mpi_world_size": mpi.mpi_world_size,
        },
        flavour.path: {**_bases(flavour), "LlmRequest": LlmRequest, "TorchLlmArgs": TorchLlmArgs},
        "tensorrt_llm.llmapi.llm_args": {"TorchLlmArgs": TorchLlmArgs},
        "tensorrt_llm.bindings": {"LlmRequestState": LlmRequestState},
        "tensorrt_llm.bindings.internal.batch_manager": {"LlmRequest": LlmRequest},
        "tensorrt_llm.logger": {"logger": logging.getLogger("tensorrt_llm")},
        "tensorrt_llm._utils": {name: getattr(mpi, name) for name in mpi.__all__},
    }
    names = {name.rsplit(".", n)[0] for name in contents for n in range(name.count(".") + 1)}
    made = {name: ModuleType(name) for name in sorted(names)}
    for name, module in made.items():
        module.__path__ = []
        vars(module).update(contents.get(name, {}))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made


@contextmanager
def installed(name: str, connectors: Sequence[str] = ()) -> Iterator[Flavour]:
    """Put a flavour's stand-ins into `sys.modules`, and take them out at the end.

    connectors: packages or modules that import `tensorrt_llm`; what is imported of them inside is
    put away with the flavour at the end and brought back the next time. One thread at a time.
    """
    flavour = FLAVOURS[name]
    prefixes = ("tensorrt_llm", *connectors)
    before = _take(prefixes)
    sys.modules.update(modules_of(flavour))
    for module_name, module in _PUT_AWAY.get(name, {}).items():
        sys.modules[module_name] = module
        parent, _, child = module_name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)
    importlib.invalidate_caches()
    try:
        yield flavour
    finally:
        taken = _take(prefixes)
        away = {n: m for n, m in taken.items() if n.split(".")[0] != "tensorrt_llm"}
        _PUT_AWAY.setdefault(name, {}).update(away)
        sys.modules.update(before)


def _take(prefixes: Sequence[str]) -> dict[str, ModuleType]:
    """Remove the modules under these prefixes from `sys.modules`."""
    names = [
        name
        for name in sys.modules
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    ]
    return {name: sys.modules.pop(name) for name in names}
