"""Between the executor and the connector: the hooks, their broadcasts, and what must hold of them.

The order of steps is that of TensorRT-LLM's KvCacheConnectorManager. Every breach of the interface
is a ConformanceError that names the hook.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.contract.trtllm.llm_request import LlmRequest, LlmRequestState, salt_id
from tests.contract.trtllm.llm_request import Sequence as Running
from tests.contract.trtllm.modules import Flavour, modules_of
from tests.contract.trtllm.mpi import CollectiveError, Comm


class ConformanceError(AssertionError):
    """The connector broke the interface's rules."""


@dataclass
class _Transfers:
    saving: dict[int, Running] = field(default_factory=dict)
    loading: dict[int, Running] = field(default_factory=dict)

    def take_all(self, other: _Transfers) -> None:
        self.saving.update(other.saving)
        self.loading.update(other.loading)
        other.saving, other.loading = {}, {}

    def take(self, saved: Sequence[int], loaded: Sequence[int]) -> _Transfers:
        """Raises KeyError on an id that is not there."""
        taken = _Transfers()
        for request_id in saved:
            taken.saving[request_id] = self.saving.pop(request_id)
        for request_id in loaded:
            taken.loading[request_id] = self.loading.pop(request_id)
        return taken


@dataclass
class Call:
    """A hook's call: its name, and what came in and out of it as far as tests look at it."""

    name: str
    given: Any = None
    answer: Any = None
    seconds: float = 0.0
    thread: str = ""


class Stream:
    """Stands for the CUDA stream of the forward; on the CPU everything on it has happened."""

    cuda_stream = 0

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event


class ConnectorManager:
    """A rank's. scheduler: on rank 0 only. late_polls: how many polls this rank's completions come
    late, as those of a slow rank do."""

    def __init__(
        self, worker: Any, scheduler: Any, comm: Comm, flavour: Flavour, late_polls: int = 0
    ) -> None:
        assert (scheduler is not None) == (comm.rank == 0)
        self.worker = worker
        self.scheduler = scheduler
        self.calls: list[Call] = []
        self.stream = Stream()
        self._comm = comm
        self._flavour = flavour
        self._types = vars(modules_of(flavour)[flavour.path])
        self._new = _Transfers()
        self._pending = _Transfers()
        self._finished_here = _Transfers()
        self._loaded_ids: set[int] = set()
        self._external: dict[int, int] = {}
        self._known: dict[int, tuple[int, int]] = {}
        self._output: Any = None
        self._late_polls = late_polls
        self._held: list[tuple[list[int], list[int]]] = []

    @property
    def counts(self) -> Counter[str]:
        return Counter(call.name for call in self.calls)

    @property
    def loading_ids(self) -> set[int]:
        """Loads that some rank has not finished."""
        every = (self._new, self._pending, self._finished_here)
        return {i for transfers in every for i in transfers.loading}

    @property
    def saving_ids(self) -> set[int]:
        every = (self._new, self._pending, self._finished_here)
        return {i for transfers in every for i in transfers.saving}

    def start(self, name: str, hook: Callable[..., Any], *args: Any, given: Any = None) -> Any:
        """One hook of the bring-up: it may raise, and then the engine doesn't start."""
        record = Call(name, given, thread=threading.current_thread().name)
        self.calls.append(record)
        start = time.perf_counter()
        record.answer = hook(*args)
        record.seconds = time.perf_counter() - start
        return record.answer

    def call(self, name: str, hook: Callable[..., Any], *args: Any, given: Any = None) -> Any:
        """One hook; whatever it raises is a breach: there is nobody above who could handle it."""
        try:
            return self.start(name, hook, *args, given=given)
        except CollectiveError:
            raise
        except Exception as error:
            raise ConformanceError(f"rank {self._comm.rank}: {name} raised {error!r}") from error

    def _lead(self, name: str, hook: Callable[[], Any], given: Any = None) -> Any:
        """Run on the leader, give the result to all; what can't be pickled is a breach."""
        answer = None if self.scheduler is None else self.call(name, hook, given=given)
        try:
            return self._comm.allgather(name, answer)[0]
        except (TypeError, AttributeError, ValueError) as error:
            raise ConformanceError(f"{name}'s result can't be pickled: {error!r}") from error

    def _view(self, running: Running) -> LlmRequest:
        return LlmRequest(running, self._flavour.request_fields)

    # Scheduling

    def should_add(self, running: Running) -> bool:
        return running.request_id not in self._loaded_ids

    def match(self, running: Running, num_local: int) -> int:
        """Ask the connector; called while the radix tree's mutex is held.

        The request is a C++ copy, which never learns how the request goes on: nanobind casts a
        `const&` argument of an overridden method by copy (KvCacheConnectorManager's trampoline in
        nanobind/batch_manager/kvCacheConnector.cpp). The other hooks are called from Python.
        """
        snapshot = self._view(copy.copy(running))
        answer = self._lead(
            "get_num_new_matched_tokens",
            lambda: self.scheduler.get_num_new_matched_tokens(snapshot, num_local),
            (running.request_id, num_local),
        )
        num_matched, is_async = _match_answer(answer)
        if num_local + num_matched >= running.prompt_len:
            raise ConformanceError(
                f"{num_local} local + {num_matched} matched tokens of a prompt of "
                f"{running.prompt_len}: one must be left to compute"
            )
        if is_async:
            self._new.loading[running.request_id] = running
        self._external[running.request_id] = num_matched
        return num_matched

    def allocated(self, running: Running) -> None:
        if self.scheduler is not None:
            ids = list(running.block_ids)
            self.call(
                "update_state_after_alloc",
                self.scheduler.update_state_after_alloc,
                self._view(running),
                ids,
                given=(running.request_id, list(ids)),
            )

    def build_output(self, context: Sequence[Running], generation: Sequence[Running]) -> None:
        """Describe the batch before loads leave it; the deltas are against the last time."""
        self._output = self._types["SchedulerOutput"]()
        for running in context:
            if running.request_id in self._new.loading:
                continue
            is_new = running.request_id not in self._known
            data = self._data(
                running,
                running.position - self._external.get(running.request_id, 0),
                min(running.remaining, running.chunk_size),
            )
            kind = self._output.new_requests if is_new else self._output.cached_requests
            kind.append(data)
        for running in generation:
            data = self._data(running, len(running.tokens) - 1, 1)
            self._output.cached_requests.append(data)
        self._external = {}

    def _data(self, running: Running, position: int, num_scheduled: int) -> Any:
        num_tokens, num_blocks = self._known.get(running.request_id, (0, 0))
        self._known[running.request_id] = (len(running.tokens), len(running.block_ids))
        new_ids = running.block_ids[num_blocks:]
        priority = running.request.priority
        fields = {
            "request_id": running.request_id,
            "new_tokens": running.tokens[num_tokens:],
            "new_block_ids": new_ids,
            "computed_position": position,
            "num_scheduled_tokens": num_scheduled,
            "block_hashes": [],
            "priorities": None if priority is None else [priority] * len(new_ids),
            "cache_salt": running.request.cache_salt,
            "cache_salt_id": salt_id(running.request.cache_salt),
            "new_block_ids_by_layer_group": [],
        }
        names = self._flavour.data_fields
        return self._types["RequestData"](**{name: fields[name] for name in names})

    def take_loading(self, context: list[Running]) -> list[Running]:
        """The context requests of the batch that do not wait for a load."""
        for running in context:
            if running.request_id in self._new.loading:
                running.state = LlmRequestState.DISAGG_GENERATION_TRANS_IN_PROGRESS
        return [r for r in context if r.request_id not in self._new.loading]

    def exchange_metadata(self) -> None:
        output, self._output = self._output, None
        metadata = self._lead(
            "build_connector_meta",
            lambda: self.scheduler.build_connector_meta(output),
            output,
        )
        self.call("bind_connector_meta", self.worker.bind_connector_meta, metadata)
        self.call("start_load_kv", self.worker.start_load_kv, self.stream)

    # Forward

    def before_layer(self, layer: int) -> None:
        self.call(
            "wait_for_layer_load", self.worker.wait_for_layer_load, layer, self.stream, given=layer
        )

    def after_layer(self, layer: int) -> None:
        self.call("save_kv_layer", self.worker.save_kv_layer, layer, self.stream, given=layer)

    def wait_for_save(self) -> None:
        self.call("wait_for_save", self.worker.wait_for_save, self.stream)

    # Ends

    def finished(self, running: Running) -> bool:
        """Whether the request's blocks are still being saved."""
        self._loaded_ids.discard(running.request_id)
        ids = list(running.block_ids)
        is_saving = self._lead(
            "request_finished",
            lambda: self.scheduler.request_finished(self._view(running), list(ids)),
            (running.request_id, ids),
        )
        if not isinstance(is_saving, bool):
            raise ConformanceError(f"request_finished returned {is_saving!r}, not a bool")
        if is_saving:
            self._new.saving[running.request_id] = running
            running.state = LlmRequestState.DISAGG_CONTEXT_TRANS_IN_PROGRESS
        return is_saving

    def poll(self) -> list[Running]:
        """Once an iteration; returns requests that every rank has saved. Requests that every rank
        has loaded go back to the scheduler."""
        given = (list(self._new.saving), list(self._new.loading))
        self._pending.take_all(self._new)
        answer = self.call(
            "get_finished", self.worker.get_finished, *given, given=tuple(map(list, given))
        )
        saved, loaded = self._delay(_finished_answer(answer))
        try:
            self._finished_here.take_all(self._pending.take(saved, loaded))
        except KeyError as error:
            raise ConformanceError(
                f"rank {self._comm.rank}: get_finished returned {answer!r} with an id that is "
                f"unknown or was returned before: KeyError({error})"
            ) from error
        here = (list(self._finished_here.saving), list(self._finished_here.loading))
        ranks = self._comm.allgather("get_finished", here)
        done = self._finished_here.take(
            sorted(set.intersection(*(set(saved) for saved, _ in ranks))),
            sorted(set.intersection(*(set(loaded) for _, loaded in ranks))),
        )
        for running in done.loading.values():
            self._loaded(running)
        return list(done.saving.values())

    def _loaded(self, running: Running) -> None:
        self._loaded_ids.add(running.request_id)
        if not running.is_finished:
            running.num_kv = running.prepopulated
            running.state = LlmRequestState.CONTEXT_INIT

    def _delay(self, answer: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        self._held.append(answer)
        return self._held.pop(0) if len(self._held) > self._late_polls else ([], [])


def _match_answer(answer: Any) -> tuple[int, bool]:
    name = "get_num_new_matched_tokens"
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise ConformanceError(f"{name} returned {answer!r}, not a pair")
    num_matched, is_async = answer
    if type(num_matched) is not int or type(is_async) is not bool or num_matched < 0:
        raise ConformanceError(f"{name} returned {answer!r}, not (count, bool)")
    if is_async and not num_matched:
        raise ConformanceError(f"{name} returned (0, True): nothing can't be loaded later")
    return num_matched, is_async


def _finished_answer(answer: Any) -> tuple[list[int], list[int]]:
    try:
        saved, loaded = answer
        return list(saved), list(loaded)
    except (TypeError, ValueError) as error:
        raise ConformanceError(f"get_finished returned {answer!r}, not two lists") from error
