"""What is remembered of one request between TensorRT-LLM's hooks, and what a RequestData adds.

Pure. Invariant: a token counts as written only once its value is known here and the forward that
computes its KV is the coming one or an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm_connectors.trtllm import translate
from kvbm_core.types import BlockId, RequestId


def first_written(data: Any, block_size: int, num_loaded: int = 0) -> Sequence[BlockId]:
    """Blocks of a request's first RequestData that its forwards write; before them come those that
    the engine or the connector found."""
    written: Sequence[BlockId] = data.new_block_ids[
        (data.computed_position + num_loaded) // block_size :
    ]
    return written


@dataclass
class Followed:
    """A request that was matched.

    name: the leader's for it. request: once blocks are allocated the engine's own, asked whether it
    is over. is_chunked: prompts may be computed in parts. tokens: known ones; its keys are over
    this list. num_offered: answered by the last match, until blocks are allocated. num_loading: to
    be loaded by the coming forward itself, which the engine's first computed position excludes;
    num_loaded: of the RequestData taken last.
    """

    name: RequestId
    request: Any
    prompt_len: int
    is_chunked: bool
    tokens: list[int]
    block_ids: list[BlockId] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    num_offered: int = 0
    num_loading: int = 0
    num_loaded: int = 0

    def begin(self, data: Any, block_size: int) -> Sequence[BlockId]:
        """Take a RequestData that tells all of the request. Blocks that the coming forward writes
        for the first time."""
        self.tokens[:] = data.new_tokens
        self.block_ids, self.priorities[:] = [*data.new_block_ids], translate.priorities_of(data)
        self.num_loaded, self.num_loading = self.num_loading, 0
        return first_written(data, block_size, self.num_loaded)

    def go_on(self, data: Any) -> Sequence[BlockId]:
        """As `begin`, of a RequestData that tells what is new."""
        self.num_loaded = 0
        self.tokens += data.new_tokens
        if data.new_block_ids:
            self.block_ids += data.new_block_ids
            self.priorities += translate.priorities_of(data)
        return data.new_block_ids

    def num_written(self, data: Any) -> int:
        """Tokens whose KV exists after the coming forward, of the RequestData taken last.

        What was drafted, and what overlap has not told yet, is not known to be right.
        """
        computed = data.computed_position + self.num_loaded
        count = getattr(data, "num_scheduled_tokens", None)
        if count is None:  # before 1.2.0rc2
            count = 1
            if computed < self.prompt_len:
                count = 0 if self.is_chunked else self.prompt_len - computed
        end, num_known = computed + count, len(self.tokens)
        return end if end < num_known else num_known
