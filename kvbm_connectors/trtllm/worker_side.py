"""A rank's half of the connector: TensorRT-LLM's worker hooks as calls of the Worker.

Runs on the executor's event-loop thread, save for a thread that reports what ended while the engine
rests; a lock keeps them apart. Hooks raise on the unexpected: the engine can't be told that a load
failed, and a fence or load that failed in silence could yield a wrong token.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

import torch

from kvbm_connectors.trtllm.layout import layout_of
from kvbm_connectors.trtllm.metadata import Meeting, StepMetadata
from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ChannelError, StorageError
from kvbm_core.kvbm_worker import KvbmWorker
from kvbm_core.types import RequestId
from kvbm_core.wire import StepPlan, decode_plan

REST_SECONDS = 0.05
_FAILED_FORWARD = "the forward that was to write its blocks has failed"


class WorkerSide:
    """One rank's worker; it exists once TensorRT-LLM has registered its KV pool.

    block_size: tokens. loads_async: requests wait for their load outside the batch.
    waits_for_offloads: the engine writes blocks in ways that no fence could know of.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        block_size: int,
        rank: int,
        num_ranks: int,
        ranks_per_node: int,
        loads_async: bool,
        waits_for_offloads: bool,
    ) -> None:
        self._config = config
        self._block_size = block_size
        self._rank = rank
        self._num_ranks = num_ranks
        self._ranks_per_node = ranks_per_node
        self._loads_async = loads_async
        self._waits_for_offloads = waits_for_offloads
        self._kvbm: KvbmWorker | None = None
        self._loading: set[RequestId] = set()
        self._received: set[RequestId] = set()
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self._reporter: threading.Thread | None = None

    def open(self, cache: torch.Tensor, meeting: Meeting) -> None:
        """Take the engine's pool, open memory, begin to join. Raises any KvbmError."""
        if meeting.problem:
            raise ChannelError(meeting.problem)
        layout, regions = layout_of(cache, block_size=self._block_size)
        kvbm = KvbmWorker(
            self._config,
            rank=self._rank,
            num_ranks=self._num_ranks,
            ranks_per_node=self._ranks_per_node,
            identity=meeting.identity,
            address=LeaderAddress.decode(meeting.address),
        )
        kvbm.open(layout, regions)
        self._kvbm = kvbm
        self._reporter = threading.Thread(target=self._report, name="kvbm-reports", daemon=True)
        self._reporter.start()

    def _report(self) -> None:
        """An engine that rests calls no hook, and what it offloaded last would stay unknown."""
        while not self._is_closing.wait(REST_SECONDS):
            with self._lock:
                if self._kvbm is not None:
                    self._kvbm.poll()

    def begin(self, metadata: object) -> None:
        """Before the forward and before anything writes device blocks.

        Offloads of an earlier plan that nobody has submitted are void: its forward has failed, the
        engine goes on, and their blocks are half written.
        """
        assert isinstance(metadata, StepMetadata)
        if metadata.stranded:
            raise RuntimeError(
                f"requests {', '.join(metadata.stranded)} count on cached blocks that will not "
                "come, since a hook of the KV cache leader failed; its log has the traceback"
            )
        with self._lock:
            if self._kvbm is None:
                return
            worker = self._kvbm.worker
            worker.refuse_offloads(_FAILED_FORWARD)
            worker.begin(decode_plan(metadata.plan) if metadata.plan else StepPlan())
            if metadata.is_off:
                worker.wait_onboards()
                worker.wait_offloads()

    def start_loads(self, stream: Any) -> None:
        """Submit loads; where the forward itself needs them, wait for them."""
        with self._lock, _on(stream):
            if self._kvbm is None:
                return
            self._kvbm.worker.submit_onboards()
            if not self._loads_async:
                self._kvbm.worker.wait_onboards()
                self._kvbm.poll()
                self._kvbm.worker.take_received()
                self._check_loads(self._kvbm)

    def submit_offloads(self) -> None:
        """The forward has been launched on the current stream; before registration, nothing."""
        with self._lock:
            if self._kvbm is not None:
                self._kvbm.worker.submit_offloads()

    def end_forward(self, stream: Any) -> None:
        """As `submit_offloads`, on the engine's stream."""
        with _on(stream):
            self.submit_offloads()
        if self._waits_for_offloads:
            with self._lock:
                if self._kvbm is not None:
                    self._kvbm.worker.wait_offloads()

    def finished(
        self, saving_ids: Sequence[int], loading_ids: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Requests whose saves and loads have ended, each once and only after it was named here.

        No request waits for its saves: see LeaderSide.finish.
        """
        self._loading.update(map(str, loading_ids))
        with self._lock:
            if self._kvbm is not None:
                self._kvbm.worker.refuse_offloads(_FAILED_FORWARD)
                self._kvbm.poll()
                self._received |= self._kvbm.worker.take_received()
                self._check_loads(self._kvbm)
        loaded = self._loading & self._received
        self._loading -= loaded
        self._received -= loaded
        return list(saving_ids), [int(request_id) for request_id in loaded]

    def _check_loads(self, kvbm: KvbmWorker) -> None:
        if device_ids := kvbm.worker.take_load_errors():
            raise StorageError(
                f"rank {self._rank} could not copy cached blocks to device blocks "
                f"{sorted(device_ids)[:8]}: TensorRT-LLM can't be told to compute them, so it must "
                "stop. The log names the copy's error"
            )

    def close(self) -> None:
        """End copies in flight, then free the memory under them."""
        self._is_closing.set()
        if self._reporter is not None:
            self._reporter.join()
        if self._kvbm is not None:
            self._kvbm.close()
        self._kvbm, self._reporter = None, None


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Make the engine's stream the current one; on a CPU there is none."""
    if torch.cuda.is_available() and isinstance(stream, torch.cuda.Stream):
        return torch.cuda.stream(stream)
    return contextlib.nullcontext()
