"""What is remembered of one request between TensorRT-LLM's hooks, and what a RequestData adds.

Pure. Invariant: a token counts as written only once its value is known here and the forward that
computes its KV is the coming one or an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm_connectors.trtllm import translate
from kvbm_core.types import BlockId


@dataclass
class Followed:
    """A request that was matched.

    request: the engine's own, asked later whether it is over. tokens: known ones; its keys are over
    this list. num_offered: answered by the last match, until blocks are allocated. num_loading: to
    be loaded by the coming forward itself, which the engine's first computed position excludes.
    """

    request: Any
    prompt_len: int
    tokens: list[int]
    block_ids: list[BlockId] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    num_offered: int = 0
    num_loading: int = 0

    def take(
        self, data: Any, *, is_new: bool, block_size: int, is_chunked: bool
    ) -> tuple[int, Sequence[BlockId]]:
        """Learn from a RequestData: tokens whose KV exists after the coming forward, and the blocks
        that it writes for the first time. is_chunked: prompts may be computed in parts."""
        if is_new:
            self.tokens[:] = data.new_tokens
            self.block_ids, self.priorities[:] = [], []
        else:
            self.tokens += data.new_tokens
        num_known_blocks = len(self.block_ids)
        self.block_ids += data.new_block_ids
        self.priorities += translate.priorities_of(data)
        computed = data.computed_position + (self.num_loading if is_new else 0)
        self.num_loading = 0
        end = computed + self._num_scheduled(data, computed, is_chunked)
        first = max(computed // block_size, num_known_blocks)
        # What was drafted, and what overlap has not told yet, is not known to be right.
        return min(end, len(self.tokens)), self.block_ids[first:]

    def _num_scheduled(self, data: Any, computed: int, is_chunked: bool) -> int:
        count = translate.num_scheduled_tokens(data)
        if count is not None:
            return count
        if computed >= self.prompt_len:
            return 1
        return 0 if is_chunked else self.prompt_len - computed
