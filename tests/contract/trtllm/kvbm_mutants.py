"""Our connector with one fault each, to show that the harness notices.

Named in `Connector` instead of `kvbm_connectors.trtllm`; most need `late.late_engine` as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import torch
from tensorrt_llm._utils import mpi_rank

from kvbm_connectors.trtllm import DynamoKVBMConnectorLeader, DynamoKVBMConnectorWorker
from kvbm_connectors.trtllm.followed import Followed
from kvbm_connectors.trtllm.leader_side import LeaderSide
from kvbm_connectors.trtllm.metadata import Meeting, StepMetadata
from kvbm_connectors.trtllm.worker_side import WorkerSide
from kvbm_core.types import BlockId, RequestId
from kvbm_core.wire import decode_plan, encode

Worker, Leader = DynamoKVBMConnectorWorker, DynamoKVBMConnectorLeader


class _MutantLeader(DynamoKVBMConnectorLeader):
    side: type[LeaderSide] = LeaderSide

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self.leader_side.__class__ = self.side


class _MutantWorker(DynamoKVBMConnectorWorker):
    side: type[WorkerSide] = WorkerSide

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self.worker_side.__class__ = self.side


# Workers


class SkipsFences(_MutantWorker):
    """Goes on reading and writing blocks that were handed to somebody else."""

    class side(WorkerSide):
        def begin(self, metadata: object) -> None:
            assert isinstance(metadata, StepMetadata)
            plan = metadata.plan and encode(
                msgspec.structs.replace(decode_plan(metadata.plan), fences=())
            )
            super().begin(StepMetadata(plan, metadata.stranded, metadata.is_off))


class ReportsLoadsEarly(_MutantWorker):
    """Reports a load received when it was submitted."""

    class side(WorkerSide):
        def finished(
            self, saving_ids: Sequence[int], loading_ids: Sequence[int]
        ) -> tuple[list[int], list[int]]:
            self._received.update(map(str, loading_ids))
            return super().finished(saving_ids, loading_ids)


class WaitsForNoLoad(_MutantWorker):
    class side(WorkerSide):
        def open(self, cache: torch.Tensor, meeting: Meeting) -> None:
            super().open(cache, meeting)
            self._loads_async = True


class CopiesPartsUnderOffloads(_MutantWorker):
    """Takes fences for enough where the engine copies parts of blocks by itself."""

    class side(WorkerSide):
        def open(self, cache: torch.Tensor, meeting: Meeting) -> None:
            super().open(cache, meeting)
            self._waits_for_offloads = False


class KeepsFailedForwards(_MutantWorker):
    """Offloads in the next step what the last one left undone."""

    class side(WorkerSide):
        def open(self, cache: torch.Tensor, meeting: Meeting) -> None:
            super().open(cache, meeting)
            assert self._kvbm is not None
            self._kvbm.worker.refuse_offloads = lambda why: None  # type: ignore[method-assign]


class OffloadsBeforeTheForward(_MutantWorker):
    class side(WorkerSide):
        def start_loads(self, stream: Any) -> None:
            super().start_loads(stream)
            self.submit_offloads()


class CountsOtherTokens(_MutantWorker):
    """Takes its blocks for other ones on rank 1."""

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        if mpi_rank() == 1:
            self.worker_side._block_size *= 2
        super().register_kv_caches(kv_cache_tensor)


class NeverOpens(_MutantWorker):
    """Has no memory on rank 1."""

    class side(WorkerSide):
        def open(self, cache: torch.Tensor, meeting: Meeting) -> None:
            if self._rank != 1:
                super().open(cache, meeting)


# Leaders


class _Followed(Followed):
    """One that the leader follows from the first match on."""


class _FollowsOtherwise(LeaderSide):
    followed: type[Followed] = _Followed

    def _follow(self, request: Any) -> Followed:
        followed = super()._follow(request)
        followed.__class__ = self.followed
        return followed


class MatchesAll(_MutantLeader):
    """Leaves no token to compute."""

    class side(LeaderSide):
        def _follow(self, request: Any) -> Followed:
            followed = super()._follow(request)
            followed.prompt_len = int(request.prompt_len) + 1
            return followed


class CountsOneBlockTooMuch(_MutantLeader):
    """Takes a block for complete before it is."""

    class side(_FollowsOtherwise):
        class followed(Followed):
            def num_written(self, data: Any) -> int:
                ahead = super().num_written(data) + 4  # tokens of a block of the harness
                return min(ahead, len(self.tokens))


class LoadsBehind(_MutantLeader):
    """Lets requests wait for loads while the engine copies parts of blocks by itself."""

    class side(LeaderSide):
        def match(self, request: Any, num_device_tokens: int) -> tuple[int, bool]:
            self._loads_async = True
            return super().match(request, num_device_tokens)


class ForgetsGrownBlocks(_MutantLeader):
    """Fences the prompt's blocks only."""

    class side(_FollowsOtherwise):
        class followed(Followed):
            def go_on(self, data: Any) -> Sequence[BlockId]:
                super().go_on(data)
                return ()


class IgnoresUnfollowed(_MutantLeader):
    """Fences nothing for requests that it knows nothing of: here, every second one."""

    fences = False

    class side(LeaderSide):
        fences = False

        def match(self, request: Any, num_device_tokens: int) -> tuple[int, bool]:
            if request.request_id % 2:
                return 0, False
            return super().match(request, num_device_tokens)

        def _plan(self, output: Any) -> Any:
            if not self.fences:
                for requests in (output.new_requests, output.cached_requests):
                    requests[:] = [d for d in requests if d.request_id in self._followed]
            return super()._plan(output)


class FencesUnfollowed(_MutantLeader):
    """Its sound twin: the same, with fences."""

    class side(IgnoresUnfollowed.side):
        fences = True


class LoadsOneBlockAhead(_MutantLeader):
    """Fills device blocks with their neighbours' contents."""

    class side(LeaderSide):
        def allocated(self, request: Any, device_ids: Sequence[BlockId]) -> None:
            super().allocated(request, [*device_ids[1:], *device_ids[:1]])


class ForgetsTheMatch(_MutantLeader):
    """Takes the first position of a request that was loaded in step for the whole truth."""

    class side(LeaderSide):
        def allocated(self, request: Any, device_ids: Sequence[BlockId]) -> None:
            super().allocated(request, device_ids)
            for followed in self._followed.values():
                followed.num_loading = 0


class ForgetsNobody(_MutantLeader):
    """Waits to be told of every end."""

    class side(LeaderSide):
        def forget_what_is_over(self, scheduled: Collection[RequestId] = ()) -> None:
            pass


class _Without:
    """A request that lacks some attributes."""

    def __init__(self, request: Any, names: tuple[str, ...]) -> None:
        self._request, self._names = request, names

    def __getattr__(self, name: str) -> Any:
        return None if name in self._names else getattr(self._request, name)


class _Blind(LeaderSide):
    blind_to: tuple[str, ...] = ()

    def match(self, request: Any, num_device_tokens: int) -> tuple[int, bool]:
        return super().match(_Without(request, self.blind_to), num_device_tokens)


class MixesSalts(_MutantLeader):
    class side(_Blind):
        blind_to = ("cache_salt", "cache_salt_id")


class MixesAdapters(_MutantLeader):
    class side(_Blind):
        blind_to = ("lora_task_id",)


class MixesImages(_MutantLeader):
    class side(_Blind):
        blind_to = ("multimodal_hashes", "multimodal_positions", "multimodal_lengths")
