"""Ranks with a model of memory instead of bytes: a block holds the tokens it stands for.

A rank runs the real Worker over `ModelTransfer`, which copies block by block, when it is told to.
Every write is checked against what is in flight, so a race shows as an assertion, not by chance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvbm_core.types import BlockId, OpId, OpResult, RequestId, Tier, TransferOp
from kvbm_core.wire import decode_plan, encode
from kvbm_core.worker import Worker

Content = tuple[int, tuple[int, ...]]
"""(epoch, all tokens up to and including the block's); complete where it ends at a block's end."""

Place = tuple[Tier, BlockId]


@dataclass(frozen=True)
class Write:
    """What one request's part of a forward does to memory.

    reads: blocks that must hold these contents already, the one being filled at least so far.
    writes: contents after the forward.
    """

    reads: tuple[tuple[BlockId, Content], ...]
    writes: tuple[tuple[BlockId, Content], ...]


@dataclass(frozen=True)
class Step:
    """A step on its way to a rank."""

    plan: bytes
    forward: tuple[Write, ...]


@dataclass(frozen=True)
class Bundle:
    """What a rank says after a step."""

    generation: int
    report: bytes | None
    received: frozenset[RequestId]
    drained: frozenset[RequestId]
    errors: frozenset[BlockId]


@dataclass
class _Moving:
    op: TransferOp
    num_done: int = 0

    def pairs(self) -> list[tuple[Place, Place]]:
        op = self.op
        ids = zip(op.src.ids(), op.dst.ids(), strict=True)
        return [((op.src.tier, src), (op.dst.tier, dst)) for src, dst in ids]

    def sources(self) -> set[Place]:
        return {src for src, _ in self.pairs()}

    def targets(self) -> set[Place]:
        return {dst for _, dst in self.pairs()}


class ModelTransfer:
    """A TransferEngine whose ops move only in `move`, `fail` and `wait`."""

    def __init__(self) -> None:
        self.memory: dict[Place, Content] = {}
        self._moving: dict[OpId, _Moving] = {}
        self._results: list[OpResult] = []

    @property
    def op_ids(self) -> list[OpId]:
        return list(self._moving)

    @property
    def offloading(self) -> set[RequestId]:
        """Requests with an offload in flight."""
        ops = [moving.op for moving in self._moving.values()]
        return {request_id for op in ops if not op.is_onboard for request_id in op.request_ids}

    def submit(self, op: TransferOp) -> None:
        new = _Moving(op)
        for other in self._moving.values():
            touched = new.targets() & (other.sources() | other.targets())
            touched |= new.sources() & other.targets()
            assert not touched, f"{op} and {other.op} in flight share {touched}"
        self._moving[op.op_id] = new
        self.move(op.op_id, 0)

    def write(self, place: Place, content: Content) -> None:
        """Write by a forward: nothing in flight may read or write that block."""
        for other in self._moving.values():
            busy = other.sources() | other.targets()
            assert place not in busy, f"a forward writes {place} under {other.op}"
        self.memory[place] = content

    def move(self, op_id: OpId, count: int) -> None:
        """Copy the next `count` blocks of an op; the last one ends it."""
        moving = self._moving[op_id]
        for src, dst in moving.pairs()[moving.num_done : moving.num_done + count]:
            self._copy(src, dst)
        moving.num_done += count
        if moving.num_done >= len(moving.op.src):
            self._end(op_id, "")

    def fail(self, op_id: OpId) -> None:
        """End an op in failure, with nothing good in what it had left to write."""
        moving = self._moving[op_id]
        for _, dst in moving.pairs()[moving.num_done :]:
            self.memory.pop(dst, None)
        self._end(op_id, "planned failure")

    def poll(self) -> list[OpResult]:
        results, self._results = self._results, []
        return results

    def wait(self, op_ids: Collection[OpId]) -> None:
        for op_id in op_ids:
            if op_id in self._moving:
                self.move(op_id, len(self._moving[op_id].op.src))

    def wait_any(self, timeout_seconds: float) -> None:
        """Always the time-out: nothing moves by itself."""

    def close(self) -> None:
        self._moving.clear()

    def _copy(self, src: Place, dst: Place) -> None:
        content = self.memory.get(src)
        if content is None:
            self.memory.pop(dst, None)
        else:
            self.memory[dst] = content

    def _end(self, op_id: OpId, error: str) -> None:
        moving = self._moving.pop(op_id)
        num_bytes = 0 if error else len(moving.op.src)
        self._results.append(OpResult(op_id, num_bytes, 0.0, error))


class Rank:
    """One rank: a queue of steps, a Worker, and the bundles it has sent.

    late: asks for results before it lets offloads be submitted, which the next step then does.
    """

    def __init__(
        self,
        index: int,
        generation: int,
        make_worker: Callable[..., Worker],
        *,
        late: bool = False,
    ) -> None:
        self.index = index
        self.late = late
        self.generation = generation
        self.steps: deque[Step] = deque()
        self.bundles: deque[Bundle] = deque()
        self.transfer = ModelTransfer()
        self._worker = make_worker(index, self.transfer)

    def device(self, block_id: BlockId) -> Content | None:
        return self.transfer.memory.get((Tier.DEVICE, block_id))

    def host(self, block_id: BlockId) -> Content | None:
        return self.transfer.memory.get((Tier.HOST, block_id))

    def run_step(self) -> None:
        """Execute the oldest queued step in vLLM's order of calls."""
        step, worker = self.steps.popleft(), self._worker
        worker.begin(decode_plan(step.plan))
        for part in step.forward:
            self._forward(part)
        worker.submit_onboards()
        if not self.late:
            worker.submit_offloads()
        worker.poll()
        drained, received = worker.take_drained(), worker.take_received()
        assert not drained & self.transfer.offloading, "drained while an offload reads its blocks"
        errors, report = worker.take_load_errors(), worker.take_report()
        payload = None if report is None else encode(report)
        self.bundles.append(
            Bundle(
                self.generation, payload, frozenset(received), frozenset(drained), frozenset(errors)
            )
        )

    def _forward(self, part: Write) -> None:
        for block_id, (epoch, tokens) in part.reads:
            found = self.device(block_id)
            good = found is not None and found[0] == epoch and found[1][: len(tokens)] == tokens
            assert good, f"rank {self.index} reads {found} where {tokens} of epoch {epoch} belongs"
        for block_id, content in part.writes:
            self.transfer.write((Tier.DEVICE, block_id), content)
