"""Our connector under the harness: how it is run, when it has settled, what must be left over.

Functions here are hooks of the harness, which may run them in processes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.contract.trtllm.harness import Connector, Outcome, Waves, check_tokens, run
from tests.contract.trtllm.llm_request import Request

CONNECTOR = Connector(
    "kvbm_connectors.trtllm", "DynamoKVBMConnectorLeader", "DynamoKVBMConnectorWorker"
)
SETTLE_SECONDS = 10.0
ENV = {
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "256",
    "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "20",
}


@dataclass(frozen=True)
class LeaderState:
    """What is left on rank 0 when the engine rests."""

    num_slots: int
    num_ops: int
    num_pinned: int
    num_reserved: int
    failed_hooks: dict[str, int]
    is_off: bool


NOTHING_LEFT = LeaderState(0, 0, 0, 0, {}, is_off=False)


def serve(
    waves: Waves,
    flavour: str = "1.2",
    *,
    mode: str = "async",
    env: Mapping[str, str] | None = None,
    connector: Connector = CONNECTOR,
    **options: Any,
) -> Outcome:
    """Run our connector, check every token, and that nothing is left behind."""
    options = {"between_waves": settle, "at_end": state_of, **options}
    env = {**ENV, "DYN_KVBM_TRTLLM_LOAD_MODE": mode, **(env or {})}
    outcome = run(connector, waves, flavour, env=env, **options)
    check_tokens(outcome, waves)
    if isinstance(outcome.states[0], LeaderState):
        assert outcome.states[0] == NOTHING_LEFT
    return outcome


def settle(rank: int, scheduler: Any, worker: Any) -> None:
    """Wait until the leader knows of everything that was offloaded."""
    if scheduler is not None:
        side = scheduler.leader_side
        wait_for(lambda: (side.poll(), not side.leader.num_ops_in_flight)[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the connector does not settle"
        time.sleep(0.001)


def state_of(rank: int, scheduler: Any, worker: Any) -> LeaderState | None:
    if scheduler is None:
        return None
    settle(rank, scheduler, worker)
    side = scheduler.leader_side
    side.forget_what_is_over()
    leader = side.leader
    return LeaderState(
        leader.num_slots,
        leader.num_ops_in_flight,
        leader.pool.num_pinned,
        leader.pool.num_reserved,
        dict(side.failed_hooks),
        side.is_off,
    )


def again(requests: list[Request], **changes: Any) -> list[Request]:
    """The same prompts once more, as other requests."""
    fields = [{**vars(r), **changes, "request_id": r.request_id + 1000} for r in requests]
    return [Request(**f) for f in fields]
