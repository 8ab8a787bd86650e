"""The entry points: run requests through a connector on one or more ranks, as threads or processes.

Also `run_without_connector`, whose tokens are what every run with a connector must give.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tests.contract.trtllm.engine import Connector, RankResult, Setup, run_rank
from tests.contract.trtllm.executor import Limits
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.manager import Call, ConformanceError
from tests.contract.trtllm.modules import FLAVOURS, installed
from tests.contract.trtllm.mpi import CollectiveError, PipeComm, ThreadComm, ThreadWorld

DEADLINE_SECONDS = 20.0

_SHAPE = (
    "num_ranks",
    "num_blocks",
    "num_layers",
    "kv_factor",
    "kv_heads",
    "head_dim",
    "tokens_per_block",
    "dtype",
)

Waves = Sequence[Request] | Sequence[Sequence[Request]]


@dataclass
class Outcome:
    """tokens, ends ("length", "stop", "cancelled", "error") and matched (local, by the connector)
    by request; counts, calls and states by rank. calls hold what went in and out of every hook;
    there are none from processes. shape: what tokens depend on besides the request."""

    tokens: dict[int, tuple[int, ...]]
    ends: dict[int, str]
    matched: dict[int, tuple[int, int]]
    counts: list[Counter[str]]
    calls: list[list[Call]]
    states: list[Any]
    num_open_saves: int
    num_open_loads: int
    shape: dict[str, Any]

    def calls_of(self, name: str, rank: int = 0) -> list[Call]:
        return [call for call in self.calls[rank] if call.name == name]

    @property
    def num_matched_tokens(self) -> int:
        """That the connector brought back, over all requests."""
        return sum(matched for _, matched in self.matched.values())


def run(
    connector: Connector | None,
    requests: Waves,
    flavour: str = "1.3",
    *,
    num_ranks: int = 1,
    ranks_as: str = "threads",
    overlap: bool = True,
    chunk_tokens: int | None = None,
    max_batch_size: int = 8,
    fail_forward: int | None = None,
    graphs: bool = False,
    finish: str | None = None,
    seed: int = 0,
    env: Mapping[str, str] | None = None,
    llm_args: Mapping[str, Any] | None = None,
    connector_packages: Sequence[str] = (),
    deadline_seconds: float = DEADLINE_SECONDS,
    **shape: Any,
) -> Outcome:
    """Serve the requests, in one wave or several, and compare what all ranks say of them.

    chunk_tokens: of a forward; None computes each prompt at once. fail_forward: the number of the
    forward that fails. graphs: decode fires no layer hooks. finish: A, B or C where another than
    the flavour's own way to end requests is wanted; see Flavour. env: set during the run.
    llm_args: overrides by dotted name ("kv_cache_config.enable_partial_reuse"). connector_packages:
    modules that import `tensorrt_llm`, besides the connector's own. shape: see Setup.

    Raises ConformanceError where the connector broke a rule, CollectiveError where ranks did not
    come together, and whatever a constructor raised.
    """
    limits = Limits(
        overlap=overlap,
        max_num_tokens=chunk_tokens,
        max_batch_size=max_batch_size,
        fail_forward=fail_forward,
        graphs=graphs,
        stall_seconds=deadline_seconds / 2,
    )
    setup = Setup(
        connector=connector,
        flavour=replace(FLAVOURS[flavour], finish=finish or FLAVOURS[flavour].finish),
        num_ranks=num_ranks,
        limits=limits,
        waves=_waves(requests),
        seed=seed,
        llm_args=dict(llm_args or {}),
        **shape,
    )
    packages = _packages(connector, connector_packages)
    in_ranks = {"threads": _in_threads, "processes": _in_processes}[ranks_as]
    with _environment(env or {}):
        return _combine(setup, in_ranks(setup, packages, deadline_seconds))


def run_without_connector(requests: Waves, flavour: str = "1.3", **options: Any) -> Outcome:
    """The same engine without a connector, whose tokens are the right ones."""
    return run(None, requests, flavour, **options)


def expected_tokens(
    requests: Waves, *, num_ranks: int = 1, **shape: Any
) -> dict[int, tuple[int, ...]]:
    """What each request gives when it is alone on a cold device and nobody cancels it."""
    single = [replace(r, cancel=None, arrival=0) for wave in _waves(requests) for r in wave]
    return _alone(tuple(single), (("num_ranks", num_ranks), *sorted(shape.items())))


@functools.lru_cache(maxsize=64)
def _alone(
    requests: tuple[Request, ...], shape: tuple[tuple[str, Any], ...]
) -> dict[int, tuple[int, ...]]:
    return run_without_connector([[r] for r in requests], **dict(shape)).tokens


def check_tokens(outcome: Outcome, requests: Waves, **options: Any) -> None:
    """Raises ConformanceError unless every token is right; those of requests that were cancelled
    or failed are right as far as they go."""
    expected = expected_tokens(requests, **{**outcome.shape, **options})
    for request_id, tokens in outcome.tokens.items():
        right = expected[request_id]
        if outcome.ends[request_id] in ("cancelled", "error"):
            right = right[: len(tokens)]
        if tokens != right:
            raise ConformanceError(f"request {request_id}: tokens {tokens}, right are {right}")


def _waves(requests: Waves) -> tuple[tuple[Request, ...], ...]:
    if all(isinstance(item, Request) for item in requests):
        return (tuple(requests),)  # type: ignore[arg-type]
    return tuple(tuple(wave) for wave in requests)  # type: ignore[arg-type]


def _packages(connector: Connector | None, others: Sequence[str]) -> tuple[str, ...]:
    return tuple(others) if connector is None else (connector.connector_module, *others)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_threads(
    setup: Setup, packages: Sequence[str], deadline_seconds: float
) -> list[RankResult | BaseException]:
    results: list[Any] = [None] * setup.num_ranks
    world = ThreadWorld(setup.num_ranks, deadline_seconds)

    def work(rank: int) -> None:
        comm = ThreadComm(world, rank)
        try:
            results[rank] = run_rank(setup, comm)
        except BaseException as error:  # noqa: BLE001 - sorted out by `_combine`
            results[rank] = error
            comm.fail()

    with installed(setup.flavour.name, packages):
        threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(setup.num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * deadline_seconds)
            if thread.is_alive():
                raise ConformanceError(f"{thread.name} hangs in a hook of the connector")
    return results


def _in_processes(
    setup: Setup, packages: Sequence[str], deadline_seconds: float
) -> list[RankResult | BaseException]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(1, setup.num_ranks)]
    ends = [[mine for mine, _ in pairs], *([theirs] for _, theirs in pairs)]
    ways = [context.Pipe(duplex=False) for _ in range(setup.num_ranks)]
    processes = [
        context.Process(
            target=_rank_process,
            args=(setup, rank, packages, ends[rank], ways[rank][1], deadline_seconds),
            daemon=True,
        )
        for rank in range(setup.num_ranks)
    ]
    for process in processes:
        process.start()
    for pipe in (end for pair in pairs for end in pair):
        pipe.close()
    try:
        return [_result_of(way, deadline_seconds, sent) for way, sent in ways]
    finally:
        for process in processes:
            process.join(deadline_seconds)
            if process.is_alive():
                process.terminate()


def _result_of(way: Any, deadline_seconds: float, sent: Any) -> Any:
    sent.close()  # so that a process that dies is an EOFError here
    if not way.poll(6 * deadline_seconds):
        return ConformanceError("a rank's process hangs")
    try:
        return way.recv()
    except EOFError:
        return ConformanceError("a rank's process died")


def _rank_process(
    setup: Setup,
    rank: int,
    packages: Sequence[str],
    pipes: Sequence[Any],
    way: Any,
    deadline_seconds: float,
) -> None:
    """A process's whole life. Errors travel as text where they can't be pickled."""
    comm = PipeComm(rank, setup.num_ranks, pipes, deadline_seconds)
    with installed(setup.flavour.name, packages):
        try:
            # Hooks' arguments are the flavour's own objects, unknown in the parent.
            way.send(replace(run_rank(setup, comm), calls=[]))
        except CollectiveError as error:
            comm.fail()
            way.send(CollectiveError(str(error)))
        except BaseException as error:  # noqa: BLE001 - the parent raises it
            comm.fail()
            kind = ConformanceError if isinstance(error, ConformanceError) else RuntimeError
            way.send(kind(f"{type(error).__name__}: {error}"))


def _combine(setup: Setup, results: Sequence[RankResult | BaseException]) -> Outcome:
    """One outcome; the ranks must agree. The cause goes before the peers' broken collectives."""
    errors = [r for r in results if isinstance(r, BaseException)]
    for error in sorted(errors, key=lambda e: isinstance(e, CollectiveError)):
        raise error
    ranks = [r for r in results if isinstance(r, RankResult)]
    first = ranks[0]
    for other in ranks[1:]:
        if (other.tokens, other.ends) != (first.tokens, first.ends):
            raise ConformanceError("the ranks disagree about what was generated")
    return Outcome(
        tokens=first.tokens,
        ends=first.ends,
        matched=first.matched,
        counts=[r.counts for r in ranks],
        calls=[r.calls for r in ranks],
        states=[r.state for r in ranks],
        num_open_saves=first.num_open_saves,
        num_open_loads=first.num_open_loads,
        shape={name: getattr(setup, name) for name in _SHAPE},
    )
