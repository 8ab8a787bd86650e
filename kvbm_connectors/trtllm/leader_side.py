"""Rank 0's half of the connector: TensorRT-LLM's scheduler hooks as calls of the Leader.

Runs on the executor's event-loop thread; matching even under the engine's own lock. Invariant: no
hook raises and none waits; once a hook that changes the leader has raised, the cache is off until
restart. A load that the engine was promised reaches the workers: from its match to its plan,
nothing that could cancel it is taken in.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from kvbm_connectors.guard import guarded
from kvbm_connectors.summary import SummaryLog
from kvbm_connectors.trtllm import translate
from kvbm_connectors.trtllm.followed import Followed, first_written
from kvbm_connectors.trtllm.metadata import StepMetadata
from kvbm_core.hashing import CacheNamespace
from kvbm_core.kvbm_leader import KvbmLeader
from kvbm_core.leader import Leader
from kvbm_core.types import BlockId, RequestId
from kvbm_core.wire import StepPlan, encode

logger = logging.getLogger("kvbm_connectors.trtllm")


class LeaderSide:
    """One engine's leader behind TensorRT-LLM's scheduler hooks.

    loads_async: a request waits outside the batch for its load, else the forward waits for it.
    is_chunked: prompts may be computed in parts.
    """

    def __init__(
        self, kvbm: KvbmLeader, namespace: CacheNamespace, *, loads_async: bool, is_chunked: bool
    ) -> None:
        self.failed_hooks: Counter[str] = Counter()
        self._kvbm = kvbm
        self._namespace = namespace
        self._loads_async = loads_async
        self._is_chunked = is_chunked
        self._followed: dict[int, Followed] = {}
        self._promised: dict[RequestId, None] = {}  # loads offered, until the plan
        self._summary: SummaryLog | None = None
        self._is_off = False

    @property
    def is_off(self) -> bool:
        """Whether an unexpected exception has switched the cache off."""
        return self._is_off

    @property
    def leader(self) -> Leader:
        return self._kvbm.leader

    @property
    def _is_serving(self) -> bool:
        return self._kvbm.is_ready and not self._is_off

    def wait(self) -> None:
        """Until every rank has joined. Raises ChannelError: start-up is the time for it."""
        self._kvbm.wait()

    def _switch_off(self, *_: Any) -> None:
        if not self._is_off:
            self._is_off = True
            if self._kvbm.is_ready and self.leader.cascade is not None:
                self.leader.cascade.retire()
            logger.error("the KV cache tiers are off until restart; serving goes on without them")

    def _no_match(self, request: Any, _: int) -> tuple[int, bool]:
        """A request whose keys can't be computed costs only itself."""
        self._drop(request.request_id)
        return 0, False

    @guarded(_switch_off)
    def _drop(self, request_id: int) -> None:
        """Where even that fails, nobody is left to answer."""
        if self._is_serving and self.leader.has_slot(str(request_id)):
            self.leader.ignore(str(request_id))
        self._forget(request_id)

    @guarded(_no_match)
    def match(self, request: Any, num_device_tokens: int) -> tuple[int, bool]:
        self.poll()
        if not self._is_serving or request.is_dummy_request:
            return 0, False
        block_size = self._namespace.block_size
        followed = self._follow(request)
        is_aligned = num_device_tokens % block_size == 0
        found = self.leader.match(followed.name, num_device_tokens, may_read=is_aligned)
        # The engine wants to compute at least one token itself.
        room = max(0, followed.prompt_len - 1 - num_device_tokens) // block_size * block_size
        followed.num_offered = min(found or 0, room)
        if followed.num_offered:
            self._promised[followed.name] = None
        return followed.num_offered, bool(followed.num_offered) and self._loads_async

    @guarded(_switch_off)
    def allocated(self, request: Any, device_ids: Sequence[BlockId]) -> None:
        followed = self._followed.get(request.request_id)
        if followed is None or not self._is_serving:
            return
        # What was matched is a copy in C++, which never learns that the request is over.
        followed.request = request
        num_tokens = followed.num_offered
        self.leader.allocated(followed.name, num_tokens, device_ids)
        followed.num_offered = 0
        followed.num_loading = 0 if self._loads_async else num_tokens

    def _metadata_when_off(self, _: Any) -> StepMetadata:
        """The engine counts on the loads that it was promised, and can't be told otherwise."""
        self._switch_off()
        stranded = tuple(self._promised)
        self._promised.clear()
        return StepMetadata(stranded=stranded, is_off=True)

    @guarded(_metadata_when_off)
    def build_metadata(self, output: Any) -> StepMetadata:
        if self._is_off:
            return self._metadata_when_off(output)
        plan = self._plan(output) if self._is_serving else StepPlan()
        metadata = StepMetadata(encode(plan) if plan else b"")
        self._promised.clear()
        self.poll()
        return metadata

    def _plan(self, output: Any) -> StepPlan:
        progress: list[tuple[RequestId, int]] = []
        written: list[BlockId] = []
        followed_by = self._followed.get
        block_size = self._namespace.block_size
        for data in output.new_requests:
            if (followed := followed_by(data.request_id)) is None:
                written += first_written(data, block_size)
                continue
            written += followed.begin(data, block_size)
            progress.append((followed.name, followed.num_written(data)))
        for data in output.cached_requests:
            if (followed := followed_by(data.request_id)) is None:
                written += data.new_block_ids
                continue
            written += followed.go_on(data)
            progress.append((followed.name, followed.num_written(data)))
        if len(progress) < len(self._followed):
            self.forget_what_is_over({name for name, _ in progress})
        self.leader.note_progress(progress, self._device_table, written)
        return self.leader.take_plan(now_seconds=time.monotonic())

    def _device_table(self, name: RequestId) -> Sequence[BlockId]:
        return self._followed[int(name)].block_ids

    def forget_what_is_over(self, scheduled: Collection[RequestId] = ()) -> None:
        """From 1.2 on, requests that were cancelled or failed are gone without a word."""
        for followed in [f for f in self._followed.values() if f.name not in scheduled]:
            if translate.is_over(followed.request):
                self._forget(followed.request.request_id)

    @guarded(_switch_off)
    def finish(self, request: Any) -> None:
        """The engine frees the request's device blocks; what offloads still read is fenced."""
        self._forget(request.request_id)

    def _forget(self, request_id: int) -> None:
        """No block is offloaded at this point: no plan could be sent to an engine that rests."""
        name = str(request_id)
        self._followed.pop(request_id, None)
        self._promised.pop(name, None)
        if self._is_serving and self.leader.has_slot(name):
            self.leader.finish(name, 0, ())

    @guarded(_switch_off)
    def poll(self) -> None:
        """Take in what the workers have said. Never waits."""
        if self._is_off or self._promised:
            return
        self._kvbm.poll()
        if self._summary is not None:
            self._summary.write_if_due(self.failed_hooks.total())
        elif self._kvbm.is_ready:
            self._summary = SummaryLog(logger, self.leader.counters)

    def close(self) -> None:
        """Nothing may be asked any more."""
        self._is_off = True
        if self._summary is not None:
            self._summary.write(self.failed_hooks.total())
        self._kvbm.close()

    def _follow(self, request: Any) -> Followed:
        followed = self._followed.get(request.request_id)
        if followed is None:
            tokens, name = list(request.get_tokens(0)), str(request.request_id)
            followed = Followed(name, request, int(request.prompt_len), self._is_chunked, tokens)
            keys = translate.keys_of(request, tokens, self._namespace)
            self.leader.create_slot(name, keys, followed.prompt_len, followed.priorities)
            self._followed[request.request_id] = followed
        return followed
