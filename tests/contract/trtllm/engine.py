"""One rank's engine: bring-up in TensorRT-LLM's order, then its waves, then its shutdown.

Threads as there: constructors in a pool of two; registration and `wait_for_initialization` on the
main thread; everything else on the event-loop thread.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.contract.trtllm import mpi
from tests.contract.trtllm.executor import Executor, Limits
from tests.contract.trtllm.llm_args import make_llm_args
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.manager import Call, ConformanceError, ConnectorManager
from tests.contract.trtllm.model import Model
from tests.contract.trtllm.modules import Flavour
from tests.contract.trtllm.mpi import Comm
from tests.contract.trtllm.pool import Pool

Hook = Callable[[int, Any, Any], Any]
"""(rank, scheduler or None, worker) -> what the outcome keeps."""


@dataclass(frozen=True)
class Connector:
    """As in `kv_connector_config`."""

    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


@dataclass(frozen=True)
class Setup:
    """Everything that all ranks share; can be pickled if its hooks can.

    cold: empty the radix tree between waves. between_waves: called on every rank before each wave
    but the first, while the engine is idle. at_end: called on every rank before shutdown.
    late_polls: by rank, how many polls its completions come late. shuts_down: False drops the
    connector's objects without a call, as all releases do. dtype: of any size.
    """

    connector: Connector | None
    flavour: Flavour
    num_ranks: int
    limits: Limits
    waves: tuple[tuple[Request, ...], ...]
    seed: int
    llm_args: dict[str, Any] = field(default_factory=dict)
    num_blocks: int = 64
    num_layers: int = 2
    kv_factor: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    tokens_per_block: int = 4
    dtype: str = "float16"
    cold: bool = True
    late_polls: tuple[int, ...] = ()
    between_waves: Hook | None = None
    at_end: Hook | None = None
    shuts_down: bool = True


@dataclass
class RankResult:
    """`num_open_saves`: requests whose save was not reported when the engine went down."""

    tokens: dict[int, tuple[int, ...]]
    ends: dict[int, str]
    matched: dict[int, tuple[int, int]]
    counts: Counter[str]
    calls: list[Call]
    num_open_saves: int
    num_open_loads: int
    state: Any


def run_rank(setup: Setup, comm: Comm) -> RankResult:
    """A rank from bring-up to shutdown, on the calling (main) thread and an event-loop thread."""
    mpi.enter(comm)
    pool = _make_pool(setup)
    args = make_llm_args(
        num_ranks=setup.num_ranks,
        tokens_per_block=setup.tokens_per_block,
        overrides={
            "disable_overlap_scheduler": not setup.limits.overlap,
            "enable_chunked_prefill": setup.limits.max_num_tokens is not None,
            "kv_connector_config": setup.connector,
            **setup.llm_args,
        },
    )
    manager, after_forward = None, None
    if setup.connector is not None:
        manager, after_forward = _bring_up(setup, comm, args, pool)
    executor = Executor(
        comm=comm,
        pool=pool,
        model=Model(
            pool.tensor,
            rank=comm.rank,
            kv_heads=setup.kv_heads,
            tokens_per_block=setup.tokens_per_block,
        ),
        manager=manager,
        after_forward=after_forward,
        finish=setup.flavour.finish,
        adds_in_batch=setup.flavour.adds_in_batch,
        tokens_per_block=setup.tokens_per_block,
        limits=setup.limits,
    )
    return _on_event_loop(comm, lambda: _serve(setup, comm, executor, manager))


def _make_pool(setup: Setup) -> Pool:
    return Pool(
        num_blocks=setup.num_blocks,
        num_layers=setup.num_layers,
        kv_factor=setup.kv_factor,
        block_size=setup.kv_heads * setup.head_dim * setup.tokens_per_block,
        tokens_per_block=setup.tokens_per_block,
        dtype=getattr(torch, setup.dtype),
        seed=setup.seed,
        enable_block_reuse=setup.llm_args.get("kv_cache_config.enable_block_reuse", True),
        enable_partial_reuse=setup.llm_args.get("kv_cache_config.enable_partial_reuse", False),
    )


def _bring_up(
    setup: Setup, comm: Comm, args: Any, pool: Pool
) -> tuple[ConnectorManager, Callable[[], object] | None]:
    """Constructors, the forward-pass callable, warm-up, then registration."""
    worker, scheduler = _construct(setup, comm, args)
    late = setup.late_polls[comm.rank] if setup.late_polls else 0
    manager = ConnectorManager(worker, scheduler, comm, setup.flavour, late)
    after_forward = manager.start(
        "register_forward_pass_callable", worker.register_forward_pass_callable
    )
    if after_forward is not None and not callable(after_forward):
        raise ConformanceError(f"{after_forward!r} is not a forward-pass callable")
    if after_forward is not None:
        # Warm-up and graph capture run forwards before the pool is registered.
        manager.call("warm_up_callable", after_forward)
    manager.start("register_kv_caches", worker.register_kv_caches, pool.tensor)
    if scheduler is not None and hasattr(scheduler, "wait_for_initialization"):
        manager.start("wait_for_initialization", scheduler.wait_for_initialization)
    return manager, after_forward


def _construct(setup: Setup, comm: Comm, args: Any) -> tuple[Any, Any]:
    """Both at the same time: either may wait for the other. Their errors are the caller's."""
    connector = setup.connector
    assert connector is not None
    module = importlib.import_module(connector.connector_module)
    worker_class = getattr(module, connector.connector_worker_class)
    scheduler_class = getattr(module, connector.connector_scheduler_class)
    with ThreadPoolExecutor(2, initializer=mpi.enter, initargs=(comm,)) as threads:
        worker = threads.submit(worker_class, args)
        scheduler = threads.submit(scheduler_class, args) if comm.rank == 0 else None
        return worker.result(), None if scheduler is None else scheduler.result()


def _on_event_loop(comm: Comm, serve: Callable[[], RankResult]) -> RankResult:
    done: list[Any] = []

    def loop() -> None:
        mpi.enter(comm)
        try:
            done.append(serve())
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            done.append(error)

    thread = threading.Thread(target=loop, name=f"event-loop-{comm.rank}")
    thread.start()
    thread.join()
    if isinstance(done[0], BaseException):
        raise done[0]
    result: RankResult = done[0]
    return result


def _serve(
    setup: Setup, comm: Comm, executor: Executor, manager: ConnectorManager | None
) -> RankResult:
    scheduler = None if manager is None else manager.scheduler
    worker = None if manager is None else manager.worker
    state = None
    try:
        for i, wave in enumerate(setup.waves):
            if i:
                if setup.between_waves is not None and manager is not None:
                    setup.between_waves(comm.rank, scheduler, worker)
                comm.allgather("between waves", None)
                if setup.cold:
                    executor.forget_device()
            executor.run_wave(wave)
        if setup.at_end is not None and manager is not None:
            state = setup.at_end(comm.rank, scheduler, worker)
        comm.allgather("end", None)
    except BaseException:
        with suppress(ConformanceError):  # the first error counts
            _shut_down(setup, manager)
        raise
    _shut_down(setup, manager)
    return _result(executor, manager, state)


def _shut_down(setup: Setup, manager: ConnectorManager | None) -> None:
    """Releases know no hook: objects are dropped and the process ends. Later main calls
    `shutdown()` before the pools are freed; a connector's own `shutdown` or `close` is called
    here in every flavour, so that the tests leave no threads or files behind."""
    if manager is None or not setup.shuts_down:
        return
    for part in (manager.scheduler, manager.worker):
        for name in ("shutdown", "close"):
            if callable(getattr(part, name, None)):
                manager.call(name, getattr(part, name))
                break


def _result(executor: Executor, manager: ConnectorManager | None, state: Any) -> RankResult:
    ended: Sequence[Any] = executor.ended
    return RankResult(
        tokens={r.request_id: tuple(r.tokens[r.prompt_len :]) for r in ended},
        ends={r.request_id: r.end for r in ended},
        matched={r.request_id: (r.num_local, r.num_matched) for r in ended},
        counts=Counter() if manager is None else manager.counts,
        calls=[] if manager is None else manager.calls,
        num_open_saves=0 if manager is None else len(manager.saving_ids),
        num_open_loads=0 if manager is None else len(manager.loading_ids),
        state=state,
    )
