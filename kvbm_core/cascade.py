"""Host and disk: which blocks go down, and which come back up before anybody claims them.

    host ──admitted──▶ queue ──write──▶ disk        (written behind, a window at a time)
    host ◀──────── promotion ────────── disk        (checked on the way; claimed from host only)

Lives here: the queue of admitted blocks, promotions and who waits for them, a tier out of service.
Does not live here: device blocks, bytes, clocks (the caller says what time it is).
Invariant: a block that was admitted leaves host only once it is on disk, or while disk is out of
service; what an op in flight reads or writes is pinned or reserved until that op has really
ended, however late; nobody waits for a promotion longer than computing its tokens would take.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbm_core.admission import AdmissionFilter
from kvbm_core.ledger import OpLedger, OpRecord
from kvbm_core.metrics import Counters
from kvbm_core.pool import BlockPool
from kvbm_core.prefill import PrefillRate
from kvbm_core.slot import Promotion, Slot
from kvbm_core.types import BlockHash, BlockId, OpId, RequestId, Tier, TransferOp
from kvbm_core.wire import DiskReset

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 30.0
MAX_WAIT_SECONDS = 10.0
MIN_WAIT_SECONDS = 0.1
MAX_FAILURES = 3
PAUSE_SECONDS = 60.0
SLOW_SECONDS = 10.0
_UP, _DOWN = (Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DISK)


@dataclass(frozen=True)
class DiskTier:
    """What a leader needs for a disk tier.

    window_blocks: in one op, and in all writes in flight. new_generation: GENERATION_BYTES of
    randomness. can_wait: the engine takes "not yet" for an answer; else blocks come up at start.
    """

    pool: BlockPool
    admission: AdmissionFilter
    window_blocks: int
    new_generation: Callable[[], bytes]
    can_wait: bool = True


class Cascade:
    """Decides between `host` and a disk tier; shares the leader's ledger and counters, and is
    called from its thread. block_size: tokens."""

    def __init__(
        self,
        host: BlockPool,
        tier: DiskTier,
        ledger: OpLedger,
        counters: Counters,
        block_size: int,
    ) -> None:
        self.disk = tier.pool
        self.rate = PrefillRate()
        self._tier = tier
        self._host = host
        self._ledger = ledger
        self._counters = counters
        self._block_size = block_size
        self._reset: DiskReset | None = None
        self._queue: OrderedDict[BlockHash, None] = OrderedDict()
        self._asked: dict[RequestId, tuple[Slot, int]] = {}
        self._promoting: dict[BlockHash, OpId] = {}
        # To be brought back unasked, the last one first.
        self._left_by_earlier: list[BlockHash] = []
        self._flights: dict[OpId, float] = {}
        self._num_writing_blocks = 0
        self._num_failures = 0
        self._now_seconds = 0.0
        self._paused_until_seconds = 0.0
        self._is_overdue = False
        self._slow_until_seconds = 0.0
        self._is_choked = False
        self._is_retired = False

    # Asked by the leader

    @property
    def has_work(self) -> bool:
        """Whether a step could send something down."""
        return bool((self._queue and self._can_write) or self._asked or self._reset)

    @property
    def num_overdue_ops(self) -> int:
        """Ops that nobody should keep an idle engine stepping for."""
        return len(self._flights) if self._is_overdue else 0

    @property
    def is_choked(self) -> bool:
        """Whether host is full of blocks that wait to be written; over when a write has ended."""
        return self._is_choked and self._makes_room

    def must_stay(self, key: BlockHash) -> bool:
        """Whether host may not evict the block yet."""
        return key in self._queue and self._can_write

    def awaits(self, slot: Slot, block: int) -> bool:
        """Whether the request should wait for its blocks from `block` on to come up from disk.

        The first answer notes the wish, which the next `take_ops` fulfils. A disk that was too slow
        for one request is not waited for by others for a while.
        """
        promotion = slot.promotion
        if promotion is None:
            if block >= len(slot.keys) or not self._can_come(slot.keys[block]):
                return False
            slot.promotion = Promotion()
            self._asked[slot.request_id] = slot, block
            return True
        if self._is_overdue:
            promotion.is_over = True
        if promotion.is_over or promotion.op_ids is None:
            return not promotion.is_over
        if self._flights.keys().isdisjoint(promotion.op_ids):
            promotion.is_over = True
        elif self._now_seconds > promotion.deadline_seconds:
            promotion.is_over = True
            self._slow_until_seconds = self._now_seconds + SLOW_SECONDS
            self._counters.num_late_promotions += 1
        return not promotion.is_over

    # Told by the leader

    def tick(self, num_new_tokens: int, now_seconds: float) -> None:
        """A step that computes that many tokens is planned now."""
        self._now_seconds = now_seconds
        self.rate.step(num_new_tokens, now_seconds)
        self._tier.admission.tick(now_seconds)
        oldest_seconds = next(iter(self._flights.values()), now_seconds)
        is_overdue = now_seconds - oldest_seconds > DEADLINE_SECONDS
        if is_overdue != self._is_overdue:
            self._is_overdue = is_overdue
            if is_overdue:
                logger.error(
                    "disk has not answered for %.0f s: the disk tier is out of service until it "
                    "does; %d ops wait. Serving goes on",
                    DEADLINE_SECONDS,
                    len(self._flights),
                )
            else:
                logger.warning("disk answers again: the disk tier is back in service")

    def stored(self, keys: Sequence[BlockHash]) -> None:
        """Blocks came to host from the device."""
        self._enqueue(self._tier.admission.stored(keys))

    def used(self, keys: Sequence[BlockHash]) -> None:
        """Blocks of host were claimed."""
        self._enqueue(self._tier.admission.hit(keys))
        self.disk.touch(keys)

    def choke(self) -> bool:
        """Host has no room; True where writes will make some, so that asking again pays."""
        self._is_choked = True
        return self.is_choked

    def forget(self, slot: Slot, *, is_last: bool = False) -> None:
        """The request is gone; what was begun for it goes on. is_last: the engine may rest now."""
        self._asked.pop(slot.request_id, None)
        slot.promotion = None
        if is_last:
            self.rate.rest()

    def retire(self) -> None:
        """The leader's books can't be trusted any more: send nothing, leave nothing behind."""
        self._is_retired = True
        self._queue.clear()
        self._asked.clear()
        self.begin_anew(persists=False)

    def start(self, blocks: Sequence[tuple[BlockHash, BlockId]] | None, *, persists: bool) -> None:
        """Go on with what an earlier process left on every rank, or (None) with nothing."""
        if blocks is None:
            self.begin_anew(persists=persists)
        else:
            self.disk.restore(blocks)
            if not self._tier.can_wait:
                self._left_by_earlier = [key for key, _ in blocks]

    def begin_anew(self, *, persists: bool) -> None:
        """Void what the ranks' files hold. persists: a later process may use what comes now."""
        self._reset = DiskReset(self._tier.new_generation(), persists)

    def take_reset(self) -> DiskReset | None:
        """To be carried out before the ops of the same plan."""
        reset, self._reset = self._reset, None
        return reset

    def reset(self) -> None:
        """Forget every block; ops in flight end without keeping theirs.

        The weights may have changed: what is computed from here on has no name that a later
        process could know.
        """
        self.begin_anew(persists=False)
        self._queue.clear()
        self._left_by_earlier.clear()
        self._counters.num_dropped_blocks += self.disk.drop(self.disk.ready_keys())
        for slot, _ in list(self._asked.values()):
            self.forget(slot)
        for record in self._ledger.records():
            if record.op.op_id in self._flights and not record.doomed:
                record.doomed = True
                (self._host if record.op.is_upward else self.disk).orphan(record.keys)
        self._promoting.clear()

    def take_ops(self) -> list[TransferOp]:
        """Promotions, then writes of admitted blocks."""
        ops: list[TransferOp] = []
        if self._is_retired:
            return ops
        for slot, block in self._asked.values():
            ops += self._promote(slot, block)
        self._asked.clear()
        if self._left_by_earlier:
            ops += self._warm_up()
        return ops + self._write()

    def end(self, record: OpRecord) -> None:
        """An op between host and disk has its last answer."""
        del self._flights[record.op.op_id]
        if not record.error:
            self._num_failures = 0
        elif not record.doomed:  # else it says nothing of the disk: a rank may be lost
            self._count_failure(record)
        if record.op.is_upward:
            self._end_promotion(record)
        else:
            self._end_write(record)

    # Down

    @property
    def _can_write(self) -> bool:
        is_paused = self._now_seconds < self._paused_until_seconds
        return not (self._is_overdue or is_paused or self._is_retired)

    @property
    def _makes_room(self) -> bool:
        return bool(self._num_writing_blocks or self._queue) and self._can_write

    def _enqueue(self, keys: Sequence[BlockHash]) -> None:
        host, disk, queue = self._host, self.disk, self._queue
        for key in keys:
            if key not in disk and host.is_ready(key):
                queue[key] = None
        while len(queue) > host.num_blocks:  # what left host while disk was out of service
            queue.popitem(last=False)

    def _write(self) -> list[TransferOp]:
        room = self._tier.window_blocks - self._num_writing_blocks
        if room <= 0 or not self._queue or not self._can_write:
            return []
        keys: list[BlockHash] = []
        while self._queue and len(keys) < room:
            key, _ = self._queue.popitem(last=False)
            if key not in self.disk and self._host.is_ready(key):
                keys.append(key)
        disk_ids, evicted = self.disk.reserve(keys)
        self._counters.num_disk_evicted_blocks += len(evicted)
        keys, left = keys[: len(disk_ids)], keys[len(disk_ids) :]
        for key in reversed(left):
            self._queue[key] = None
            self._queue.move_to_end(key, last=False)
        if not keys:
            return []
        self._num_writing_blocks += len(keys)
        op = self._ledger.open(_DOWN, keys, self._host.pin(keys), disk_ids)
        self._flights[op.op_id] = self._now_seconds
        return [op]

    def _end_write(self, record: OpRecord) -> None:
        self._num_writing_blocks -= len(record.keys)
        self._is_choked = False
        self._host.unpin(record.src_ids)
        if record.doomed:
            self.disk.free_unkeyed(record.dst_ids)
            return
        good, bad = record.split()
        self.disk.commit(good)
        self.disk.abort(bad)

    # Up

    def _can_come(self, key: BlockHash) -> bool:
        is_waited_for = self._tier.can_wait and self._now_seconds >= self._slow_until_seconds
        is_there = self.disk.is_ready(key) or key in self._promoting
        return is_there and is_waited_for and not self._is_overdue

    def _promote(self, slot: Slot, block: int) -> list[TransferOp]:
        """Ops that bring the prefix on from `block`, as far as the tiers and room in host reach.

        Blocks that come for somebody else are waited for, not brought twice.
        """
        assert slot.promotion is not None
        wanted, shared, end = self._reach(slot, block)
        own_prefix = set(slot.keys[:end])
        host_ids, evicted = self._host.reserve(
            wanted, lambda key: key in own_prefix or self.must_stay(key)
        )
        self._counters.num_evicted_blocks += len(evicted)
        ops, size = [], self._tier.window_blocks
        num_blocks = len(host_ids) + len(shared)
        deadline = self._now_seconds + self._patience_seconds(num_blocks)
        for start in range(0, len(host_ids), size):
            targets = host_ids[start : start + size]
            keys = wanted[start : start + len(targets)]
            ops.append(self._bring(keys, targets, (slot.request_id,)))
        self.disk.touch(wanted[: len(host_ids)])
        slot.promotion.op_ids = {self._promoting[key] for key in shared} | {op.op_id for op in ops}
        slot.promotion.deadline_seconds = deadline
        return ops

    def _bring(
        self,
        keys: Sequence[BlockHash],
        host_ids: Sequence[BlockId],
        request_ids: tuple[RequestId, ...] = (),
    ) -> TransferOp:
        op = self._ledger.open(_UP, keys, self.disk.pin(keys), host_ids, request_ids)
        self._promoting.update(dict.fromkeys(keys, op.op_id))
        self._flights[op.op_id] = self._now_seconds
        return op

    def _warm_up(self) -> list[TransferOp]:
        """Bring back what an earlier process left, as far as host is empty, for an engine that can
        not wait for it later."""
        host, left = self._host, self._left_by_earlier
        keys: list[BlockHash] = []
        room = min(self._tier.window_blocks - len(self._promoting), host.num_free)
        while left and self._can_write and len(keys) < room:
            key = left.pop()
            if self.disk.is_ready(key) and key not in host:
                keys.append(key)
        if not host.num_free:
            left.clear()
        return [self._bring(keys, host.reserve(keys)[0])] if keys else []

    def _reach(self, slot: Slot, block: int) -> tuple[list[BlockHash], list[BlockHash], int]:
        """Keys to bring from disk for the longest prefix, those that come for others, its end."""
        wanted: list[BlockHash] = []
        shared: list[BlockHash] = []
        end = block
        for key in slot.keys[block:]:
            if key in self._promoting:
                shared.append(key)
            elif self.disk.is_ready(key) and key not in self._host:
                wanted.append(key)
            elif not self._host.is_ready(key):
                break
            end += 1
        return wanted, shared, end

    def _patience_seconds(self, num_blocks: int) -> float:
        """What computing these blocks would take, within bounds."""
        rate = self.rate.tokens_per_second
        if rate is None:
            return MAX_WAIT_SECONDS
        return min(MAX_WAIT_SECONDS, max(MIN_WAIT_SECONDS, num_blocks * self._block_size / rate))

    def _end_promotion(self, record: OpRecord) -> None:
        self.disk.unpin(record.src_ids)
        for key in record.keys:
            if self._promoting.get(key) == record.op.op_id:
                del self._promoting[key]
        if record.doomed:
            self._host.free_unkeyed(record.dst_ids)
            return
        good, bad = record.split()
        self._host.commit(good)
        self._host.abort(bad)
        self._counters.num_bad_blocks += len(bad)
        self.disk.drop(bad)

    def _count_failure(self, record: OpRecord) -> None:
        """A disk that fails every time is left alone for a while: each try costs a block."""
        self._num_failures += 1
        if not record.op.is_upward and self._num_failures >= MAX_FAILURES:
            self._paused_until_seconds = self._now_seconds + PAUSE_SECONDS
            self._num_failures = 0
            logger.error(
                "%d disk ops failed in a row (%s): no writes to disk for %.0f s. "
                "Serving goes on with the tiers that are left",
                MAX_FAILURES,
                record.error,
                PAUSE_SECONDS,
            )
