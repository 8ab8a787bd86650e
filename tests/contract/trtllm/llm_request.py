"""A request: as a test describes it, as the executor runs it, and as a connector sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class LlmRequestState(Enum):
    """Names as in `tensorrt_llm.bindings.LlmRequestState`; the values there are the C++ ones."""

    CONTEXT_INIT = 1
    GENERATION_IN_PROGRESS = 2
    GENERATION_TO_COMPLETE = 3
    GENERATION_COMPLETE = 4
    DISAGG_GENERATION_TRANS_IN_PROGRESS = 5
    DISAGG_CONTEXT_TRANS_IN_PROGRESS = 6


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    stop_token: generation ends with it. context_only: prefill and one token, as a disaggregated
    prefill engine does. arrival: the iteration of its wave in which it arrives. cancel: the phase
    in which the client gives up: "queued" (before the engine takes it up), "unscheduled" (taken up,
    no room yet), "loading" (an asynchronous load is on its way), "prefill" (after the first chunk)
    or "decode" (after two tokens). Once a request has ended, and is being saved, the engine ignores
    a cancel. An engine looks at cancels only in iterations that have a forward's results.
    """

    request_id: int
    prompt: tuple[int, ...]
    max_tokens: int = 4
    stop_token: int | None = None
    context_only: bool = False
    arrival: int = 0
    cancel: str | None = None
    cache_salt: str | None = None
    lora_task_id: int | None = None
    multimodal_hashes: tuple[tuple[int, ...], ...] = ()
    multimodal_positions: tuple[int, ...] = ()
    multimodal_lengths: tuple[int, ...] = ()
    priority: int | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What KV depends on besides the tokens. The toy model takes the salt in too, so that
        content which crosses from one salt to another gives a wrong token."""
        return (self.cache_salt, self.lora_task_id, self.multimodal_hashes)


@dataclass(eq=False)
class Sequence:
    """The executor's state of one request; the same on every rank.

    tokens: what the engine knows; under overlap it lags behind `sampled` by one. num_kv: positions
    whose KV is in the pool. is_added: it has blocks.
    """

    request: Request
    tokens: list[int]
    state: LlmRequestState = LlmRequestState.CONTEXT_INIT
    sampled: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    is_added: bool = False
    position: int = 0
    chunk_size: int = 0
    prepopulated: int = 0
    num_local: int = 0
    num_matched: int = 0
    num_kv: int = 0
    num_blocks_needed: int = 0
    is_cancelled: bool = False
    end: str | None = None

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Prompt tokens that are not computed."""
        return self.prompt_len - self.position

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def max_tokens(self) -> int:
        return 1 if self.request.context_only else self.request.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.end is not None


_COMMON = {
    "request_id": lambda s: s.request_id,
    "prompt_len": lambda s: s.prompt_len,
    "context_current_position": lambda s: s.position,
    "context_chunk_size": lambda s: s.chunk_size,
    "context_remaining_length": lambda s: s.remaining,
    "prepopulated_prompt_len": lambda s: s.prepopulated,
    "lora_task_id": lambda s: s.request.lora_task_id,
    "multimodal_hashes": lambda s: [list(h) for h in s.request.multimodal_hashes] or None,
    "multimodal_positions": lambda s: list(s.request.multimodal_positions) or None,
    "multimodal_lengths": lambda s: list(s.request.multimodal_lengths) or None,
    "is_dummy_request": lambda s: False,
    "is_finished": lambda s: s.is_finished,
    "state": lambda s: s.state,
}

_BY_FLAVOUR = {
    "cache_salt": lambda s: s.request.cache_salt,
    "cache_salt_id": lambda s: salt_id(s.request.cache_salt),
}


def salt_id(salt: str | None) -> int | None:
    """A number per salt, as the engine makes one from the string."""
    return None if salt is None else int.from_bytes(salt.encode()[:7].ljust(7, b"\0"), "little")


class LlmRequest:
    """The base class's view: these attributes and no others.

    Every hook gets a fresh one, as C++ hands out at match time: an attribute set on it is lost, and
    refused here. The other hooks get Python's subclass in the engine; the harness is stricter.
    """

    __slots__ = ("_extra", "_sequence")

    def __init__(self, sequence: Sequence, extra: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "_sequence", sequence)
        object.__setattr__(self, "_extra", extra)

    def get_tokens(self, beam: int) -> list[int]:
        if beam != 0:
            raise IndexError(f"beam {beam} of a request with one beam")
        return list(self._sequence.tokens)

    def __getattr__(self, name: str) -> Any:
        if name in _COMMON:
            return _COMMON[name](self._sequence)
        if name in self._extra:
            return _BY_FLAVOUR[name](self._sequence)
        raise AttributeError(f"the C++ request has no {name!r} here")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name!r} can't be set: the next hook gets another object")
