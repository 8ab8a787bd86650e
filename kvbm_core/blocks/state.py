"""The states of a block in a program's hands, as a literal table.

Lives here: which event moves a block where. Does not live here: ids, bytes, tokens.
Invariant: a block changes state only along TRANSITIONS.

In its pool a RESET, PARTIAL or COMPLETE block is RESERVED without a key, a REGISTERED one READY.
"""

from __future__ import annotations

from enum import Enum

from kvbm_core.errors import IllegalTransition


class BlockState(Enum):
    """RESET: no tokens yet. PARTIAL: belongs to a sequence and takes tokens. COMPLETE: has all its
    tokens, so its key is known. REGISTERED: found by others under its key."""

    RESET = "reset"
    PARTIAL = "partial"
    COMPLETE = "complete"
    REGISTERED = "registered"


class BlockEvent(Enum):
    SEQUENCE_BEGUN = "init_sequence"
    TOKENS_ADDED = "add_tokens"
    COMMITTED = "commit"
    REGISTERED = "register"
    DROPPED = "drop"  # released by its holder; a REGISTERED one also evicted from the cache


_S, _E = BlockState, BlockEvent

TRANSITIONS: dict[tuple[BlockState, BlockEvent], BlockState] = {
    (_S.RESET, _E.SEQUENCE_BEGUN): _S.PARTIAL,
    (_S.RESET, _E.DROPPED): _S.RESET,
    (_S.PARTIAL, _E.TOKENS_ADDED): _S.PARTIAL,
    (_S.PARTIAL, _E.COMMITTED): _S.COMPLETE,
    (_S.PARTIAL, _E.DROPPED): _S.RESET,
    (_S.COMPLETE, _E.REGISTERED): _S.REGISTERED,
    (_S.COMPLETE, _E.DROPPED): _S.RESET,
    (_S.REGISTERED, _E.DROPPED): _S.RESET,
}

_REMEDIES = {
    BlockState.RESET: "Begin with init_sequence.",
    BlockState.PARTIAL: "Fill it and commit it first.",
    BlockState.COMPLETE: "Register it, or allocate another block.",
    BlockState.REGISTERED: "Its content is final: allocate another block.",
}


def moved(state: BlockState, event: BlockEvent) -> BlockState:
    """Where the table leads. Raises IllegalTransition where it has no such edge."""
    target = TRANSITIONS.get((state, event))
    if target is None:
        raise IllegalTransition(f"a {state.value} block can't {event.value}. {_REMEDIES[state]}")
    return target


def diagram() -> str:
    """The table as a mermaid state diagram, for ARCHITECTURE.md."""
    edges = [
        f"    {source.name} --> {target.name}: {event.value}"
        for (source, event), target in TRANSITIONS.items()
    ]
    return "\n".join(["stateDiagram-v2", "    [*] --> RESET", *edges])
