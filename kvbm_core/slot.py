"""One request's states, as a literal table.

Lives here: which event moves a slot where, and what the leader remembers of a request.
Does not live here: decisions.
Invariant: a slot changes state only along TRANSITIONS; FINISHED has no way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvbm_core.errors import IllegalTransition
from kvbm_core.types import BlockHash, OpId, RequestId

NEVER = 2**63


class SlotState(Enum):
    """WAITING: holds no device blocks. LOADING: an onboard writes its device blocks.
    RUNNING: the engine computes it. DRAINING: the engine is done with it, an op is not."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHED = "finished"


class SlotEvent(Enum):
    ADMITTED = "admitted"  # device blocks, nothing to load
    LOAD_STARTED = "load started"
    LOAD_ENDED = "load ended"  # with or without success: the engine is told which
    PREEMPTED = "preempted"
    FINISHED_BUSY = "finished, ops in flight"
    FINISHED_IDLE = "finished, no op in flight"
    DRAINED = "last op ended"


_S, _E = SlotState, SlotEvent

TRANSITIONS: dict[tuple[SlotState, SlotEvent], SlotState] = {
    (_S.WAITING, _E.ADMITTED): _S.RUNNING,
    (_S.WAITING, _E.LOAD_STARTED): _S.LOADING,
    (_S.WAITING, _E.FINISHED_IDLE): _S.FINISHED,
    (_S.WAITING, _E.FINISHED_BUSY): _S.DRAINING,
    (_S.LOADING, _E.LOAD_ENDED): _S.RUNNING,
    (_S.LOADING, _E.FINISHED_BUSY): _S.DRAINING,
    (_S.RUNNING, _E.ADMITTED): _S.RUNNING,
    (_S.RUNNING, _E.PREEMPTED): _S.WAITING,
    (_S.RUNNING, _E.FINISHED_IDLE): _S.FINISHED,
    (_S.RUNNING, _E.FINISHED_BUSY): _S.DRAINING,
    (_S.DRAINING, _E.LOAD_ENDED): _S.DRAINING,
    (_S.DRAINING, _E.DRAINED): _S.FINISHED,
}


@dataclass
class Promotion:
    """Blocks of a waiting request that come up from disk.

    op_ids: ops that bring them, its own and others'; None until they are planned. is_over: the
    request waits no more.
    """

    op_ids: set[OpId] | None = None
    deadline_seconds: float = 0.0
    is_over: bool = False


@dataclass
class Slot:
    """What the leader knows of one request.

    keys: the request's block keys, owned by the connector, growing with its tokens.
    num_prompt_tokens: where generated tokens begin. num_device_tokens: in the engine's own
    cache at the last match. num_planned_blocks: leading blocks that need no more offload.
    next_offload_tokens: computed tokens from which the next block is complete (NEVER: stopped).
    num_written_tokens: whose KV the forwards planned so far produce; an engine's own count may be
    ahead of it while another connector still loads. num_cached_tokens: not computed since the last
    admission, but found.
    stored: keys of its own prefix, not to be evicted from host for its own tail.
    op_ids: its ops in flight. promotion: blocks it had brought up from disk since it last began to
    wait. priorities: of its blocks for the offload filter; beyond the last one, that one counts.
    """

    request_id: RequestId
    keys: Sequence[BlockHash]
    num_prompt_tokens: int
    state: SlotState = SlotState.WAITING
    num_device_tokens: int = 0
    num_planned_blocks: int = 0
    next_offload_tokens: int = 0
    num_written_tokens: int = 0
    num_cached_tokens: int = 0
    stored: set[BlockHash] = field(default_factory=set)
    op_ids: set[OpId] = field(default_factory=set)
    promotion: Promotion | None = None
    priorities: Sequence[int] = ()

    def move(self, event: SlotEvent) -> None:
        """Follow the table. Raises IllegalTransition where it has no such edge."""
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise IllegalTransition(
                f"request {self.request_id} is {self.state.value}: no way on {event.value!r}"
            )
        self.state = target


def diagram() -> str:
    """The table as a mermaid state diagram, for ARCHITECTURE.md."""
    edges = [
        f"    {source.name} --> {target.name}: {event.value}"
        for (source, event), target in TRANSITIONS.items()
    ]
    return "\n".join(["stateDiagram-v2", "    [*] --> WAITING", *edges, "    FINISHED --> [*]"])
