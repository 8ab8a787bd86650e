"""When parts of our connector fail, runs end with right tokens or a clear error, and never hang."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvbm_core.channel.leader_protocol import Lost
from kvbm_core.channel.timing import Timing
from kvbm_core.errors import ChannelError
from tests.contract.trtllm import harness, kvbm, late
from tests.contract.trtllm.harness import Connector
from tests.contract.trtllm.kvbm import LeaderState, again, serve, settle, wait_for
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.manager import ConformanceError
from tests.contract.trtllm.mpi import CollectiveError
from tests.contract.trtllm.test_engine import shared_prompts

PROMPT = tuple(range(100, 122))
OTHER = tuple(range(200, 222))
TWICE = [[Request(1, PROMPT)], [Request(2, PROMPT)]]
SHARED = shared_prompts(6)
LATE = {"DYN_KVBM_TRANSFER_ENGINE": late.ENGINE}
FAST = Timing(beat_seconds=0.05, timeout_seconds=2.0, resend_seconds=0.1)


@pytest.fixture(autouse=True)
def _controlled() -> Iterator[None]:
    late.CONTROL.reset()
    yield
    late.CONTROL.reset()


def fail(*_: Any, **__: Any) -> Any:
    raise OSError("planted")


def breaking(name: str, request_id: str = "") -> Callable[[int, Any, Any], None]:
    """A hook between waves: this method of the leader fails from now on, or for one request."""

    def plant(rank: int, scheduler: Any, worker: Any) -> None:
        settle(rank, scheduler, worker)
        if scheduler is None:
            return
        leader = scheduler.leader_side.leader
        method = getattr(leader, name)
        is_hit = lambda args: not request_id or args[0] == request_id  # noqa: E731
        faulty = lambda *args, **kw: (fail if is_hit(args) else method)(*args, **kw)  # noqa: E731
        setattr(leader, name, faulty)

    return plant


def leftovers(rank: int, scheduler: Any, worker: Any) -> Any:
    """`state_of` as a tuple, which `serve` does not judge."""
    state = kvbm.state_of(rank, scheduler, worker)
    return state and tuple(vars(state).items())


# Hooks of the leader


@pytest.mark.parametrize("flavour", ["1.2", "1.3"])
def test_a_match_that_fails_is_a_miss_and_leaves_nothing(flavour: str) -> None:
    outcome = serve(
        [SHARED, again(SHARED)],
        flavour,
        num_ranks=2,
        between_waves=breaking("match"),
        at_end=leftovers,
    )
    assert outcome.num_matched_tokens == 0
    wanted = LeaderState(0, 0, 0, 0, {"match": len(SHARED)}, is_off=False)
    assert dict(outcome.states[0]) == vars(wanted)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", ["allocated", "take_plan", "note_progress"])
def test_a_promised_load_that_will_not_come_stops_every_rank(name: str, mode: str) -> None:
    with pytest.raises(ConformanceError, match="requests 2 count on cached blocks"):
        serve(TWICE, "1.3", mode=mode, num_ranks=2, between_waves=breaking(name))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_promise_is_not_forgotten_when_another_request_fails(mode: str) -> None:
    """Both are allocated in one batch; the one that fails was promised nothing."""
    waves = [[Request(1, PROMPT)], [Request(2, PROMPT), Request(3, OTHER)]]
    with pytest.raises(ConformanceError, match="requests 2 count on cached blocks"):
        serve(waves, "1.3", mode=mode, between_waves=breaking("allocated", "3"))


@pytest.mark.parametrize("name", ["take_plan", "finish"])
def test_a_leader_that_fails_without_a_promise_is_off_and_serving_goes_on(name: str) -> None:
    waves = [[Request(1, PROMPT)], [Request(2, OTHER)]]
    outcome = serve(waves, num_ranks=2, between_waves=breaking(name), at_end=failures)
    hook = {"take_plan": "build_metadata", "finish": "finish"}[name]
    assert outcome.states[0] == ({hook: 1}, True)


def failures(rank: int, scheduler: Any, worker: Any) -> Any:
    side = scheduler and scheduler.leader_side
    return side and (dict(side.failed_hooks), side.is_off)


def test_what_is_in_flight_when_the_cache_goes_off_harms_nobody() -> None:
    """A load was given up, the leader fails, and the load's blocks go to others: nothing fences
    them any more."""
    first = [Request(i, PROMPT[i:] + OTHER[i:]) for i in range(3)]
    second = [
        Request(50, tuple(range(300, 309)), max_tokens=26),
        *again(first, arrival=2, cancel="loading"),
        *[
            Request(60 + i, tuple(range(400 + 20 * i, 409 + 20 * i)), 10, arrival=5)
            for i in range(7)
        ],
    ]
    late.CONTROL.num_polls = 8

    def break_later(rank: int, scheduler: Any, worker: Any) -> None:
        late.settle(rank, scheduler, worker)
        leader = scheduler.leader_side.leader
        take_plan, plans = leader.take_plan, []

        def fail_after_the_loads(**options: Any) -> Any:
            if any(op.is_onboard for plan in plans for op in plan.ops):
                fail()
            plans.append(take_plan(**options))
            return plans[-1]

        leader.take_plan = fail_after_the_loads

    outcome = serve(
        [first, second],
        "1.3",
        env=LATE,
        num_blocks=46,
        between_waves=break_later,
        at_end=failures,
    )
    assert outcome.states[0] == ({"build_metadata": 1}, True)
    assert list(outcome.ends.values()).count("cancelled") == 3


# Loads, ranks and processes


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_load_that_fails_is_an_error_and_no_wrong_token(mode: str) -> None:
    late.CONTROL.num_polls, late.CONTROL.num_loads_to_fail = 0, 1
    with pytest.raises(ConformanceError, match="could not copy cached blocks"):
        serve(TWICE, "1.3", mode=mode, num_ranks=2, env=LATE)


@pytest.mark.parametrize(("victim", "copy"), [("1", "load"), ("0", "offload")])
def test_a_process_killed_in_mid_copy_ends_the_run(victim: str, copy: str) -> None:
    env = {"DYN_KVBM_TRANSFER_ENGINE": late.KILLER, late.VICTIM: victim, late.KILL_ON: copy}
    with pytest.raises((ConformanceError, CollectiveError), match=r"died|ended|waited"):
        serve(TWICE, num_ranks=2, ranks_as="processes", env=env, deadline_seconds=8.0)


def lose(scheduler: Any, rank: int) -> None:
    """As if the leader's I/O thread had just found out."""
    scheduler.leader_side._kvbm._end._loop._events.append(Lost(rank, "planted"))


def test_a_rank_lost_between_a_promise_and_its_blocks_breaks_no_promise() -> None:
    def plant(rank: int, scheduler: Any, worker: Any) -> None:
        settle(rank, scheduler, worker)
        if scheduler is not None:
            leader = scheduler.leader_side.leader
            match = leader.match

            def lose_after(*args: Any, **options: Any) -> Any:
                found = match(*args, **options)
                leader.match = match
                lose(scheduler, 1)
                return found

            leader.match = lose_after

    waves = [[Request(1, PROMPT)], [Request(2, PROMPT), Request(3, OTHER)]]
    outcome = serve(waves, "1.3", num_ranks=2, between_waves=plant)
    assert outcome.matched[2] == (0, 20)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_lost_in_mid_load_harms_nobody(mode: str) -> None:
    late.CONTROL.num_polls = 20

    def plant(rank: int, scheduler: Any, worker: Any) -> None:
        late.settle(rank, scheduler, worker)
        if scheduler is not None:
            leader = scheduler.leader_side.leader
            take_plan = leader.take_plan

            def lose_after(**options: Any) -> Any:
                plan = take_plan(**options)
                if any(op.is_onboard for op in plan.ops):
                    leader.take_plan = take_plan
                    lose(scheduler, 1)
                return plan

            leader.take_plan = lose_after

    running = Request(50, tuple(range(300, 309)), max_tokens=26)
    second = [running, *again(SHARED, arrival=2, cancel="loading"), *again(again(SHARED))]
    outcome = serve(
        [SHARED, second],
        "1.3",
        mode=mode,
        num_ranks=2,
        env=LATE,
        between_waves=plant,
        at_end=late.state_of,
        num_blocks=26,
    )
    assert outcome.num_matched_tokens


def test_a_rank_that_falls_silent_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing is cached; after it is back, caching begins anew."""
    for module in ("kvbm_leader", "kvbm_worker"):
        monkeypatch.setattr(f"kvbm_core.{module}.Timing", lambda: FAST)
    num_pauses = {0: 0, 1: 0}

    def pause(rank: int, scheduler: Any, worker: Any) -> None:
        num_pauses[rank] += 1
        settle(rank, scheduler, worker)
        if rank == 1:
            sockets = worker.worker_side._kvbm._end._sockets
            if num_pauses[1] == 1:
                sockets.send = sockets.protocol.outgoing.clear
            elif num_pauses[1] == 2:
                del sockets.send
        elif num_pauses[0] < 3:
            lost = {1} if num_pauses[0] == 1 else set()
            side = scheduler.leader_side
            wait_for(lambda: (side.poll(), side._kvbm.lost_ranks == lost)[1])

    waves = [SHARED]
    for _ in range(3):
        waves.append(again(waves[-1]))
    outcome = serve(waves, "1.3", num_ranks=2, between_waves=pause)
    matched = [sum(outcome.matched[r.request_id][1] for r in wave) for wave in waves]
    assert matched[:3] == [0, 0, 0]
    assert matched[3] > 20


# Bring-up


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank ended with."""
    found: list[Any] = []
    combine = harness._combine

    def keep(setup: Any, results: Any) -> Any:
        found.extend(results)
        return combine(setup, results)

    monkeypatch.setattr(harness, "_combine", keep)
    return found


def test_a_leader_without_a_port_is_the_same_error_on_every_rank(errors: list[Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {
            "DYN_KVBM_LEADER_ZMQ_HOST": "127.0.0.1",
            "DYN_KVBM_LEADER_ZMQ_PUB_PORT": port,
            "DYN_KVBM_LEADER_ZMQ_ACK_PORT": "0",
        }
        with pytest.raises(ChannelError, match="rank 0 has no leader"):
            serve(TWICE, num_ranks=2, env=env)
    assert [type(error) for error in errors] == [ChannelError, ChannelError]
    assert str(errors[0]) == str(errors[1])
    assert port in str(errors[0])


@pytest.mark.parametrize(
    ("worker", "why"), [("CountsOtherTokens", "blocks are of 8 tokens"), ("NeverOpens", "logs")]
)
def test_a_rank_that_does_not_join_is_named(worker: str, why: str, errors: list[Any]) -> None:
    connector = Connector("tests.contract.trtllm.kvbm_mutants", "Leader", worker)
    with pytest.raises((ChannelError, CollectiveError)):
        serve(
            TWICE,
            "1.3",
            num_ranks=2,
            connector=connector,
            connector_packages=("kvbm_connectors.trtllm",),
            env={"DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "1"},
        )
    assert isinstance(errors[0], ChannelError)
    assert "ranks [1] of 2 have not joined" in str(errors[0])
    assert why in str(errors[0])
