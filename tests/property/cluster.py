"""Ranks with a model of memory instead of bytes: a block holds the tokens it stands for.

A rank runs the real Worker over `ModelTransfer`, which copies block by block, when it is told to.
Every write is checked against what is in flight, so a race shows as an assertion, not by chance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from kvbm_core.types import (
    KEY_BYTES,
    BlockHash,
    BlockId,
    OpId,
    OpResult,
    RequestId,
    Tier,
    TransferOp,
    pack_ids,
)
from kvbm_core.wire import decode_plan, encode
from kvbm_core.worker import Worker
from tests.property.content import Content
from tests.property.model_disk import ModelDisk

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
    """generation: of the disk when the op was submitted."""

    op: TransferOp
    generation: bytes = b""
    num_done: int = 0
    failed: list[int] = field(default_factory=list)

    def pairs(self) -> list[tuple[Place, Place]]:
        op = self.op
        ids = zip(op.src.ids(), op.dst.ids(), strict=True)
        return [((op.src.tier, src), (op.dst.tier, dst)) for src, dst in ids]

    def sources(self) -> set[Place]:
        return {src for src, _ in self.pairs()}

    def targets(self) -> set[Place]:
        return {dst for _, dst in self.pairs()}

    def key(self, position: int) -> BlockHash:
        return key_at(self.op, position)


def key_at(op: TransferOp, position: int) -> BlockHash:
    """Of an op that touches disk."""
    return BlockHash(op.keys[position * KEY_BYTES : (position + 1) * KEY_BYTES])


class ModelTransfer:
    """A TransferEngine whose ops move only in `move`, `fail` and `wait`.

    is_hung: ops of the disk neither move nor fail, as copies in memory always do sooner or later.
    """

    def __init__(self, disk: ModelDisk | None = None) -> None:
        self.memory: dict[Place, Content] = {}
        self.disk = disk
        self.is_hung = False
        self._moving: dict[OpId, _Moving] = {}
        self._results: list[OpResult] = []

    @property
    def op_ids(self) -> list[OpId]:
        return list(self._moving)

    @property
    def offloading(self) -> set[RequestId]:
        """Requests with an offload in flight."""
        ops = [moving.op for moving in self._moving.values()]
        offloads = [op for op in ops if op.src.tier is Tier.DEVICE]
        return {request_id for op in offloads for request_id in op.request_ids}

    def submit(self, op: TransferOp) -> None:
        new = _Moving(op, b"" if self.disk is None else self.disk.index.generation)
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
        if self._hangs(moving):
            return
        num_blocks = len(moving.op.src)
        end = min(num_blocks, moving.num_done + count)
        for position, (src, dst) in list(enumerate(moving.pairs()))[moving.num_done : end]:
            self._copy(moving, position, src, dst)
        moving.num_done = end
        if end == num_blocks:
            self._end(op_id)

    def fail(self, op_id: OpId) -> None:
        """End an op in failure, with nothing good in what it had left to write."""
        moving = self._moving[op_id]
        if self._hangs(moving):
            return
        for position, (src, dst) in list(enumerate(moving.pairs()))[moving.num_done :]:
            self._spoil(src, dst)
            moving.failed.append(position)
        self._end(op_id, "planned failure")

    def kill(self) -> None:
        """The process dies: of the block that each write was at, some bytes are written."""
        for moving in self._moving.values():
            for _, (tier, block_id) in moving.pairs()[moving.num_done :][:1]:
                if tier is Tier.DISK:
                    self._disk.tear(block_id)
        self._moving.clear()

    def poll(self) -> list[OpResult]:
        results, self._results = self._results, []
        return results

    def wait(self, op_ids: Collection[OpId]) -> None:
        for op_id in op_ids:
            if op_id in self._moving:
                assert self._moving[op_id].op.touches_device, "an engine would wait for a disk"
                self.move(op_id, len(self._moving[op_id].op.src))

    def wait_any(self, timeout_seconds: float) -> None:
        """Always the time-out: nothing moves by itself."""

    def close(self) -> None:
        self._moving.clear()

    @property
    def _disk(self) -> ModelDisk:
        assert self.disk is not None, "a disk op on a rank without a disk"
        return self.disk

    def _hangs(self, moving: _Moving) -> bool:
        return self.is_hung and not moving.op.touches_device

    def _copy(self, moving: _Moving, position: int, src: Place, dst: Place) -> None:
        from_disk = src[0] is Tier.DISK
        if from_disk:
            content = self._disk.read(src[1], moving.key(position))
        else:
            content = self.memory.get(src)
        if dst[0] is Tier.DISK:
            self._disk.write(dst[1], moving.key(position), content, moving.generation)
        elif content is not None:
            self.memory[dst] = content
        else:
            self.memory.pop(dst, None)
            moving.failed += [position] if from_disk else []

    def _spoil(self, src: Place, dst: Place) -> None:
        if src[0] is Tier.DISK:
            self._disk.forget(src[1])
        if dst[0] is Tier.DISK:
            self._disk.tear(dst[1])
        else:
            self.memory.pop(dst, None)

    def _end(self, op_id: OpId, error: str = "") -> None:
        moving = self._moving.pop(op_id)
        num_blocks = len(moving.op.src)
        error = error or ("planned corruption" if moving.failed else "")
        # That all of them failed may be said either way.
        is_partial = not moving.op.touches_device and len(moving.failed) < num_blocks
        failed = pack_ids(moving.failed) if is_partial else b""
        self._results.append(OpResult(op_id, num_blocks - len(moving.failed), 0.0, error, failed))


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
        disk: ModelDisk | None = None,
    ) -> None:
        self.index = index
        self.late = late
        self.generation = generation
        self.steps: deque[Step] = deque()
        self.bundles: deque[Bundle] = deque()
        self.disk = disk
        self.transfer = ModelTransfer(disk)
        self._worker = make_worker(index, self.transfer, disk=disk)

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
