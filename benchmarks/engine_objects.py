"""Stand-ins for vLLM's objects, with the fields that the connector reads, as vLLM fills them.

Shaped like vllm/v1/core/sched/output.py and vllm/v1/request.py of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class ConstantTokens(Sequence[int]):
    """vLLM's read-only view of a request's tokens: every access is a Python call."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[index]


@dataclass
class Request:
    request_id: str
    all_token_ids: Sequence[int]
    block_hashes: Sequence[bytes]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    prompt_embeds: None = None
    resumable: bool = False
    lora_request: None = None
    cache_salt: None = None
    mm_features: list[Any] = field(default_factory=list)
    skip_reading_prefix_cache: bool = False
    priority: int = 0
    kv_transfer_params: None = None


@dataclass
class NewRequest:
    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass
class CachedRequests:
    req_ids: list[str]
    resumed_req_ids: set[str]
    new_block_ids: list[tuple[list[int], ...] | None]
    num_computed_tokens: list[int]


@dataclass
class BlockState:
    req_ids: set[str]
    resolve_block_ids: Callable[[str], tuple[list[int], ...]]

    def get_block_ids(self, req_id: str) -> tuple[list[int], ...] | None:
        return self.resolve_block_ids(req_id) if req_id in self.req_ids else None


@dataclass
class SchedulerOutput:
    scheduled_new_reqs: list[NewRequest]
    scheduled_cached_reqs: CachedRequests
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    kv_connector_block_state: BlockState

    @classmethod
    def empty(cls) -> SchedulerOutput:
        """A step without a forward."""
        nothing = BlockState(set(), lambda name: ([],))
        return cls([], CachedRequests([], set(), [], []), {}, 0, nothing)


@dataclass
class AllocatedBlocks:
    """vLLM's KVCacheBlocks."""

    block_ids: list[int]

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (self.block_ids,)
