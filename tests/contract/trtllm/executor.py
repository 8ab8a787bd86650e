"""One rank's executor: TensorRT-LLM's loop with the connector's hooks in their order.

From `py_executor.py` (`_executor_loop`, `_executor_loop_overlap`) and the V1 KV-cache manager.
Every rank runs the same loop on the same requests, so that all decisions are the same everywhere.
Not modelled: the leak of B-type versions that unpin only the first of several saved requests per
iteration; and what cancelled requests leave in the radix tree beyond blocks that were computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.contract.trtllm.llm_request import LlmRequestState, Request
from tests.contract.trtllm.llm_request import Sequence as Running
from tests.contract.trtllm.manager import ConformanceError, ConnectorManager
from tests.contract.trtllm.model import Model, token_of
from tests.contract.trtllm.mpi import Comm
from tests.contract.trtllm.pool import Pool

State = LlmRequestState


@dataclass(frozen=True)
class Limits:
    """max_num_tokens: per forward; None computes a prompt at once. fail_forward: the number of the
    forward that fails after its first layer. graphs: decode-only forwards fire no layer hooks."""

    overlap: bool = True
    max_num_tokens: int | None = None
    max_batch_size: int = 8
    max_active: int = 32
    fail_forward: int | None = None
    graphs: bool = False
    stall_seconds: float = 10.0


class ForwardError(Exception):
    """The injected fault."""


@dataclass
class Batch:
    context: list[Running]
    generation: list[Running]

    @property
    def all(self) -> list[Running]:
        return [*self.context, *self.generation]


class Executor:
    """finish, adds_in_batch: see Flavour. manager: None runs without a connector. after_forward:
    what the worker registered for the end of each forward."""

    def __init__(
        self,
        *,
        comm: Comm,
        pool: Pool,
        model: Model,
        manager: ConnectorManager | None,
        after_forward: Callable[[], object] | None,
        finish: str,
        adds_in_batch: bool,
        tokens_per_block: int,
        limits: Limits,
    ) -> None:
        self._comm = comm
        self._pool = pool
        self._model = model
        self._manager = manager
        self._after_forward = after_forward
        self._finish = finish
        self._adds_in_batch = adds_in_batch
        self._size = tokens_per_block
        self._limits = limits
        self._waiting: list[Running] = []
        self._active: list[Running] = []
        self._previous: Batch | None = None
        self._pins: dict[int, list[int]] = {}
        self._deferred: dict[int, Running] = {}
        self._num_forwards = 0
        self.ended: list[Running] = []

    def run_wave(self, requests: Sequence[Request]) -> None:
        """Iterate until all have ended; then the engine is idle and polls nothing."""
        arrivals = sorted(requests, key=lambda r: r.arrival)
        for request in arrivals:
            self._pool.check_fits(len(request.prompt) + request.max_tokens)
        iteration, progress = 0, (0, time.monotonic())
        while arrivals or self._waiting or self._active or self._previous:
            if not (self._waiting or self._active or self._previous):
                iteration = max(iteration, arrivals[0].arrival)
            while arrivals and arrivals[0].arrival <= iteration:
                self._waiting.append(Running(arrivals[0], list(arrivals.pop(0).prompt)))
            self._iterate()
            iteration += 1
            progress = self._check_progress(progress)

    def _check_progress(self, last: tuple[int, float]) -> tuple[int, float]:
        """Empty iterations are the engine's spinning while it waits for a connector."""
        now = (self._num_forwards + len(self.ended), time.monotonic())
        if now[0] != last[0]:
            return now
        if now[1] - last[1] > self._limits.stall_seconds:
            states = {r.request_id: r.state.name for r in self._active}
            raise ConformanceError(f"nothing happened for {now[1] - last[1]:.0f} s: {states}")
        time.sleep(0.0005)
        return last

    def forget_device(self) -> None:
        self._pool.forget()

    # An iteration

    def _iterate(self) -> None:
        self._fetch()
        batch = self._schedule()
        if batch.all:
            self._prepare(batch)
        if self._limits.overlap:
            self._finish_overlapped(batch)
        else:
            self._finish_in_order(batch)
        if self._manager is not None:
            for running in self._manager.poll():
                self._end_transfer(running)

    def _finish_in_order(self, batch: Batch) -> None:
        if not batch.all:
            return
        parts = self._forward(batch)
        if parts is not None:
            self._sample(batch, parts)
            self._update(batch)
        self._send(batch)
        self._cancel()
        self._respond()

    def _finish_overlapped(self, batch: Batch) -> None:
        parts = self._forward(batch) if batch.all else None
        previous, self._previous = self._previous, None
        if previous is not None:
            self._update(previous)
            self._send(previous)
        if parts is not None:
            self._sample(batch, parts)
            self._previous = batch
        if previous is not None:
            self._cancel()
        self._respond()

    # Fetch and schedule

    def _fetch(self) -> None:
        """Cancelled requests leave the waiting queue here; active ones end in `_cancel`."""
        for running in [r for r in self._waiting if r.request.cancel == "queued"]:
            self._waiting.remove(running)
            self._end(running, "cancelled")
            self.ended.append(running)
        room = self._limits.max_active - len(self._active)
        self._active += self._waiting[:room]
        del self._waiting[:room]

    def _schedule(self) -> Batch:
        """GUARANTEED_NO_EVICT: a request starts when all its blocks are sure to be there."""
        generation = [r for r in self._active if r.state is State.GENERATION_IN_PROGRESS]
        batch = Batch([], generation[: self._limits.max_batch_size])
        budget = (self._limits.max_num_tokens or 1 << 30) - len(batch.generation)
        spare = self._pool.num_available - sum(
            r.num_blocks_needed - len(r.block_ids) for r in self._active if r.is_added
        )
        for running in self._active:
            if running.state is not State.CONTEXT_INIT:
                continue
            if not running.is_added:
                running.num_blocks_needed = self._pool.num_blocks_for(
                    running.prompt_len + running.max_tokens
                )
                if running.num_blocks_needed > spare:
                    break
            chunk = self._chunk(running, budget)
            if len(batch.all) == self._limits.max_batch_size or not chunk:
                break
            running.chunk_size = chunk
            budget -= chunk
            spare -= 0 if running.is_added else running.num_blocks_needed
            batch.context.append(running)
        return batch

    def _chunk(self, running: Running, budget: int) -> int:
        if running.remaining <= budget:
            return running.remaining
        end = running.position + budget
        return max(0, end // self._size * self._size - running.position)

    # Prepare

    def _prepare(self, batch: Batch) -> None:
        new = [running for running in batch.context if not running.is_added]
        for group in [new] if self._adds_in_batch else [[running] for running in new]:
            for running in group:
                self._add(running)
            for running in group:
                if self._manager is not None:
                    self._manager.allocated(running)
        for running in batch.generation:
            self._pool.extend(running, running.prompt_len + len(running.sampled))
        if self._manager is None:
            self._pool.spoil(set())
            return
        self._manager.build_output(batch.context, batch.generation)
        added = [r for r in batch.context if r.num_matched]
        batch.context = self._manager.take_loading(batch.context)
        self._manager.exchange_metadata()
        self._pool.spoil({b for r in added for b in self._matched_blocks(r)})

    def _add(self, running: Running) -> None:
        self._pool.add(running)
        running.num_kv = running.num_local
        if self._manager is not None:
            running.num_matched = self._manager.match(running, running.num_local)
        running.prepopulated = running.num_local + running.num_matched
        running.position = running.prepopulated
        end = running.position + running.chunk_size
        if end < running.prompt_len:
            running.chunk_size = end // self._size * self._size - running.position
        running.chunk_size = min(running.chunk_size, running.remaining)

    def _matched_blocks(self, running: Running) -> list[int]:
        first = running.num_local // self._size
        return running.block_ids[first : self._pool.num_blocks_for(running.prepopulated)]

    # Forward

    def _forward(self, batch: Batch) -> list[int] | None:
        """Each request's output on this rank; None where the forward failed."""
        self._num_forwards += 1
        try:
            parts = self._run_layers(batch)
        except ForwardError:
            self._fail_active()
            return None
        for running, start, stop in self._ranges(batch):
            assert running.num_kv <= stop and start <= stop
            running.num_kv = stop
        return parts

    def _ranges(self, batch: Batch) -> list[tuple[Running, int, int]]:
        context = [(r, r.position, r.position + r.chunk_size) for r in batch.context]
        ends = [(r, r.prompt_len + len(r.sampled)) for r in batch.generation]
        return [*context, *((r, end - 1, end) for r, end in ends)]

    def _run_layers(self, batch: Batch) -> list[int]:
        hooks = self._manager
        if self._limits.graphs and not batch.context:
            hooks = None
        ranges = self._ranges(batch)
        hidden = [self._model.hidden(r, start, stop) for r, start, stop in ranges]
        for layer in range(self._model.num_layers):
            if layer == 1 and self._num_forwards == self._limits.fail_forward:
                raise ForwardError
            if hooks is not None:
                hooks.before_layer(layer)
            for i, (running, start, _) in enumerate(ranges):
                hidden[i] = self._model.layer(layer, running.block_ids, start, hidden[i])
            if hooks is not None:
                hooks.after_layer(layer)
        if self._manager is not None:
            if self._after_forward is not None:
                self._manager.call("forward_pass_callable", self._after_forward)
            self._manager.wait_for_save()
        return [xs[-1] for xs in hidden]

    def _fail_active(self) -> None:
        """All active requests get the error; those that were never added too."""
        self._previous = None
        for running in self._active:
            self._end(running, "error")
        for running in self._active:
            self._terminate(running)
        self.ended += self._active
        self._active = []

    # Sample and update

    def _sample(self, batch: Batch, parts: list[int]) -> None:
        ranks = self._comm.allgather("logits", parts)
        tokens = [token_of(column) for column in zip(*ranks, strict=True)]
        for running, token in zip(batch.all, tokens, strict=True):
            if running.state is State.CONTEXT_INIT:
                running.position += running.chunk_size
                if running.remaining:
                    continue
                self._pool.store(running)
            running.sampled.append(token)
            is_last = self._limits.overlap and len(running.sampled) >= running.max_tokens
            if not running.is_finished:
                running.state = (
                    State.GENERATION_TO_COMPLETE if is_last else State.GENERATION_IN_PROGRESS
                )

    def _update(self, batch: Batch) -> None:
        """Let the engine know the batch's tokens; drop those of requests that have ended."""
        for running in batch.all:
            if running.is_finished or running.num_generated == len(running.sampled):
                continue
            token = running.sampled[running.num_generated]
            running.tokens.append(token)
            if token == running.request.stop_token:
                self._end(running, "stop")
            elif running.num_generated == running.max_tokens:
                self._end(running, "length")

    # Ends

    def _end(self, running: Running, end: str) -> None:
        running.end = end
        running.state = State.GENERATION_COMPLETE

    def _send(self, batch: Batch) -> None:
        """Variant C: requests of the batch that ended normally are offered to the connector."""
        if self._manager is None or self._finish != "C":
            return
        for running in batch.all:
            is_normal = running.end in ("stop", "length")
            if is_normal and running in self._active and self._manager.finished(running):
                if self._pool.keeps_blocks:
                    self._pin(running)
                else:
                    self._deferred[running.request_id] = running

    def _cancel(self) -> None:
        for running in self._active:
            if not running.is_finished and _is_cancelled(running):
                self._end(running, "cancelled")

    def _respond(self) -> None:
        for running in [r for r in self._active if r.is_finished]:
            self._active.remove(running)
            self.ended.append(running)
            self._terminate(running)

    def _terminate(self, running: Running) -> None:
        if running.request_id in self._deferred:
            return
        is_told = self._manager is None
        if self._manager is not None and self._finish != "C" and running.is_added:
            is_told = True
            if self._manager.finished(running):
                if self._finish == "A":
                    self._deferred[running.request_id] = running
                    return
                self._pin(running)
        elif self._finish == "C":
            is_told = running.end in ("stop", "length")
        self._pool.free(running, told=is_told)

    def _pin(self, running: Running) -> None:
        """Store for reuse and pin what is stored; the rest is freed with the request."""
        self._pins[running.request_id] = stored = self._pool.store(running)
        self._pool.pin(stored)

    def _end_transfer(self, running: Running) -> None:
        if running.request_id in self._deferred:
            self._pool.free(self._deferred.pop(running.request_id), told=True)
        else:
            self._pool.unpin(self._pins.pop(running.request_id))


def _is_cancelled(running: Running) -> bool:
    """Whether the client's wish to cancel has arrived: by phase, so the same on every rank."""
    phase = running.request.cancel
    if phase == "unscheduled":
        return not running.is_added
    if phase == "loading":
        return running.state is State.DISAGG_GENERATION_TRANS_IN_PROGRESS
    if phase == "prefill":
        return running.position > running.prepopulated
    return phase == "decode" and running.num_generated >= 2
