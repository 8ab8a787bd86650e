"""What travels in TensorRT-LLM's own messages: plans with the metadata, the leader's address once
at start. Both are pickled by the engine or MPI."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepMetadata:
    """One iteration's plan, encoded; empty where there is nothing to do.

    stranded: requests whose load the engine expects and nobody will do. is_off: no more plans
    come, and so no fences: every copy must end before the engine goes on.
    """

    plan: bytes = b""
    stranded: tuple[str, ...] = ()
    is_off: bool = False


@dataclass(frozen=True)
class Meeting:
    """What rank 0 tells every rank at start. address: of the leader, encoded; identity: of what the
    blocks mean; problem: why there is no leader."""

    address: str = ""
    identity: str = ""
    problem: str = ""
