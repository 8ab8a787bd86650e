"""The reference connector with one fault each, to show that the harness notices.

Those that act late do so by count of calls, not by time: a fault shows in every run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tests.contract.trtllm.reference import Copy, Leader, Metadata, Slot, Worker

# Leaders that copy the wrong thing


class LoadsNeighbours(Leader):
    """Fills device blocks with their neighbours' contents."""

    def loads_of(self, request_id: int, slot: Slot, block_ids: Sequence[int]) -> list[Copy]:
        loads = super().loads_of(request_id, slot, block_ids)
        ids = [copy.block_id for copy in loads]
        return [replace(c, block_id=i) for c, i in zip(loads, reversed(ids), strict=True)]


class SavesNeighbours(Leader):
    """Saves the block after the one it names."""

    def saves_of(self, data: Any, slot: Slot, end: int) -> list[Copy]:
        following = dict(zip(slot.block_ids, slot.block_ids[1:], strict=False))
        saves = super().saves_of(data, slot, end)
        return [replace(c, block_id=following.get(c.block_id, c.block_id)) for c in saves]


class SavesUncomputedChunks(Leader):
    """Takes all tokens it was told of for computed in this forward."""

    def valid_end(self, data: Any, position: int) -> int:
        return len(self._slots[data.request_id].tokens)


class SavesTheLastToken(Leader):
    """Takes the last token for computed when its request ends, and saves it with the next batch."""

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        slot = self._slots[request.request_id]
        slot.tokens = request.get_tokens(0)
        self._metadata.saves += self.saves_of(request, slot, len(slot.tokens))
        return super().request_finished(request, cache_block_ids)


class CountsTheMatchTwice(Leader):
    """Adds the match to a position that has it already."""

    def _progress(self, data: Any, position: int) -> list[Copy]:
        return super()._progress(data, position + self._slots[data.request_id].num_matched)


class LoadsOneBlockLess(Leader):
    """Says more than it loads."""

    def loads_of(self, request_id: int, slot: Slot, block_ids: Sequence[int]) -> list[Copy]:
        return super().loads_of(request_id, slot, block_ids)[:-1]


class ForgetsLocalLength(Leader):
    """Loads to the start of the prompt, whatever the device had."""

    def loads_of(self, request_id: int, slot: Slot, block_ids: Sequence[int]) -> list[Copy]:
        loads = super().loads_of(request_id, slot, block_ids)
        return [replace(c, block_id=i) for c, i in zip(loads, block_ids[: len(loads)], strict=True)]


class MatchesUnalignedLocal(Leader):
    """Rounds a local length within a block down, and counts its match from the local end."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        rest = num_computed_tokens % self._size
        return super().get_num_new_matched_tokens(request, num_computed_tokens - rest)


class MixesSalts(Leader):
    def root_of(self, request: Any) -> bytes:
        return repr(request.lora_task_id).encode()


class MixesAdapters(Leader):
    def root_of(self, request: Any) -> bytes:
        return repr(getattr(request, "cache_salt", None)).encode()


class MixesImages(Leader):
    def root_of(self, request: Any) -> bytes:
        return repr((getattr(request, "cache_salt", None), request.lora_task_id)).encode()


class ForgetsTheParent(Leader):
    """Names a block by its own tokens only."""

    def keys(self, root: bytes, tokens: Sequence[int]) -> list[str]:
        size = self._size
        ends = range(size, len(tokens) + 1, size)
        return [super(ForgetsTheParent, self).keys(root, tokens[e - size : e])[0] for e in ends]


# Leaders that break a rule of the interface


class MatchesAll(Leader):
    """Leaves no token to compute."""

    def count_matched(self, slot: Slot) -> int:
        super().count_matched(slot)
        return len(slot.prompt) - slot.num_local


class LoadsNothingLater(Leader):
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        super().get_num_new_matched_tokens(request, num_computed_tokens)
        return 0, True


class RaisesAtMatch(Leader):
    def count_matched(self, slot: Slot) -> int:
        raise OSError("no store")


class ReadsPythonRequest(Leader):
    """Reads what only the Python subclass of a request has."""

    def root_of(self, request: Any) -> bytes:
        return repr(request.py_request_id).encode()


class MarksRequests(Leader):
    """Keeps state on a request object that the next hook doesn't get."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        request.kvbm_slot = 1
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


class SendsCallables(Leader):
    """Puts into the metadata what can't be pickled."""

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        metadata = super().build_connector_meta(scheduler_output)
        metadata.extra = lambda: None  # type: ignore[attr-defined]
        return metadata


class AnswersNothingAtTheEnd(Leader):
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> Any:
        super().request_finished(request, cache_block_ids)


class NeverWaitsForSaves(Leader):
    """Lets the engine free blocks that are still being saved."""

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        super().request_finished(request, cache_block_ids)
        return False


# Workers


class LateWorker(Worker):
    """Acts `polls` polls after it was asked to, so that what comes too late does so always."""

    polls = 3

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._queue: list[tuple[int, Callable[[Copy], None], Copy]] = []
        self._num_polls = 0

    def _submit(self, futures: Any, act: Callable[[Copy], None], copy: Copy) -> None:
        self._queue.append((self._num_polls + self.polls, act, copy))

    def act(self) -> None:
        self._num_polls += 1
        due = [item for item in self._queue if item[0] <= self._num_polls]
        self._queue = [item for item in self._queue if item[0] > self._num_polls]
        for _, act, copy in due:
            act(copy)

    def is_pending(self, request_id: int) -> bool:
        return any(copy.request_id == request_id for _, _, copy in self._queue)

    def settle(self) -> None:
        while self._queue:
            self.act()

    def fence(self, block_ids: Any) -> None:
        used = {copy.block_id for _, _, copy in self._queue}
        while used & set(block_ids):
            self.act()
            used = {copy.block_id for _, _, copy in self._queue}

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self._saving.update(finished_gen_req_ids)
        self._loading.update(started_loading_req_ids)
        self.act()
        done = [
            [i for i in waiting if not self.is_pending(i)]
            for waiting in (self._saving, self._loading)
        ]
        self._saving.difference_update(done[0])
        self._loading.difference_update(done[1])
        return done[0], done[1]


class LoadsEarly(LateWorker):
    """Reports a load received when it was submitted."""

    def is_pending(self, request_id: int) -> bool:
        return request_id not in self._loading and super().is_pending(request_id)


class SavesEarly(LateWorker):
    """Reports a request saved while its blocks are still being read."""

    polls = 5

    def is_pending(self, request_id: int) -> bool:
        return request_id not in self._saving and super().is_pending(request_id)


class SkipsFences(LateWorker):
    """Goes on reading and writing blocks that were handed to somebody else."""

    polls = 6

    def fence(self, block_ids: Any) -> None:
        pass


class SavesBeforeTheForward(Worker):
    def start_load_kv(self, stream: Any) -> None:
        super().start_load_kv(stream)
        for copy in self._metadata.saves:
            self.save(copy)

    def wait_for_save(self, stream: Any) -> None:
        pass


class LoadsAfterTheForward(Worker):
    def start_load_kv(self, stream: Any) -> None:
        pass

    def wait_for_save(self, stream: Any) -> None:
        super().start_load_kv(stream)
        super().wait_for_save(stream)


class LoadsOneLayer(Worker):
    """Brings back the first layer only."""

    def load(self, copy: Copy) -> None:
        assert self._pool is not None
        before = self._pool[copy.block_id].clone()
        super().load(copy)
        self._pool[copy.block_id, 1:] = before[1:]


class ForgetsOneByte(Worker):
    """Loses the last byte of a block."""

    def load(self, copy: Copy) -> None:
        assert self._pool is not None
        super().load(copy)
        self._pool[copy.block_id, -1, -1, -1] ^= 1


class LoadsOtherRanks(Worker):
    """Every rank loads what rank 0 has."""

    def load(self, copy: Copy) -> None:
        rank, self.rank = self.rank, 0
        super().load(copy)
        self.rank = rank


class WritesOverOthers(Worker):
    """Uses device block 0 as its buffer."""

    def save(self, copy: Copy) -> None:
        assert self._pool is not None
        super().save(copy)
        self._pool[0] = self._pool[copy.block_id]


class ReportsTwice(Worker):
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        saved, loaded = super().get_finished(finished_gen_req_ids, started_loading_req_ids)
        return saved * 2, loaded * 2


class ReportsUnknown(Worker):
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        super().get_finished(finished_gen_req_ids, started_loading_req_ids)
        return [99], []


class NeverReports(Worker):
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        return [], []


class RaisesOnOneRank(Worker):
    def wait_for_save(self, stream: Any) -> None:
        if self.rank == 1:
            raise OSError("disk full")
        super().wait_for_save(stream)


class SkipsACollective(Worker):
    """Waits for a peer that never comes."""

    def start_load_kv(self, stream: Any) -> None:
        from tensorrt_llm._utils import mpi_barrier

        if self.rank == 0:
            mpi_barrier()
        super().start_load_kv(stream)


class NeedsThePoolInTheCallable(Worker):
    """Takes for granted that the pool is registered when a forward ends."""

    def register_forward_pass_callable(self) -> Callable[[], Any]:
        return lambda: self._pool.data_ptr()  # type: ignore[union-attr]


class NeverComesBack(Worker):
    def wait_for_save(self, stream: Any) -> None:
        threading.Event().wait()


# Those that refuse the engine


class RefusesTheArguments(Leader):
    def __init__(self, llm_args: Any) -> None:
        raise PermissionError("refused")


class RefusesThePool(Worker):
    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        raise PermissionError("refused")
