"""Disk that hangs, is reset, or loses a rank: serving goes on, and nothing is left behind."""

from __future__ import annotations

import pytest

from kvbm_core.cascade import DEADLINE_SECONDS, MAX_FAILURES, MAX_WAIT_SECONDS
from kvbm_core.leader import Leader
from kvbm_core.types import TransferOp
from kvbm_core.wire import DiskReset
from tests.unit.tiers import (
    GENERATION,
    KEYS,
    OTHERS,
    SIZE,
    answer,
    ask,
    begin,
    below,
    is_at_rest,
    leader_of,
    plan,
    store,
)

# A disk that hangs


def hung() -> tuple[Leader, TransferOp, TransferOp]:
    """A leader whose disk has not answered a promotion and a write for longer than it may."""
    leader = leader_of(disk=KEYS[:2])
    (up,) = ask(leader, keys=KEYS[:2])
    (down,) = store(leader, OTHERS[:2])
    plan(leader, DEADLINE_SECONDS + 0.1)
    return leader, up, down


def test_a_request_is_answered_when_its_promotion_is_late_and_computes() -> None:
    leader = leader_of(disk=KEYS[:2])
    ask(leader)
    plan(leader, MAX_WAIT_SECONDS + 0.1)
    assert leader.match("a", 0) == 0


def test_an_idle_engine_may_rest_though_the_disk_hangs() -> None:
    leader = leader_of(disk=KEYS[:2])
    ask(leader)
    leader.finish("a", 0, [])
    plan(leader, DEADLINE_SECONDS)
    assert leader.has_work()
    plan(leader, DEADLINE_SECONDS + 0.1)
    assert not leader.has_work()
    assert leader.num_ops_in_flight == 1


def test_an_engine_with_other_ops_in_flight_may_not_rest() -> None:
    leader, _, _ = hung()
    begin(leader, "b", KEYS[4:5])
    leader.match("b", 0)
    leader.allocated("b", 0, [7])
    leader.plan_step([("b", SIZE)], lambda _: [7], now_seconds=DEADLINE_SECONDS + 1)
    assert leader.has_work()


def test_a_disk_out_of_service_is_neither_waited_for_nor_written() -> None:
    leader, _, _ = hung()
    begin(leader, "b", KEYS[:2])
    assert leader.match("b", 0) == 0
    assert store(leader, OTHERS[4:5], "x", first=200, now_seconds=DEADLINE_SECONDS + 1) == ()
    assert not leader.has_work()


def test_blocks_under_an_op_that_hangs_stay_held() -> None:
    leader, up, down = hung()
    disk = below(leader).disk
    assert (leader.pool.num_reserved, leader.pool.num_pinned) == (2, 2)
    assert (disk.num_reserved, disk.num_pinned) == (2, 2)
    for op in (up, down):
        answer(leader, op)
    leader.finish("a", 0, [])
    assert is_at_rest(leader)


def test_a_disk_that_answers_is_back_in_service() -> None:
    leader, up, down = hung()
    store(leader, KEYS[6:7], "x", first=200, now_seconds=DEADLINE_SECONDS + 1)
    for op in (up, down):
        answer(leader, op)
    (op,) = plan(leader, DEADLINE_SECONDS + 2)
    assert op.keys == KEYS[6]
    begin(leader, "b", KEYS[:2])
    assert leader.match("b", 0) == 2 * SIZE


def test_while_one_op_hangs_the_end_of_another_does_not_bring_disk_back() -> None:
    leader, up, down = hung()
    answer(leader, down)
    below(leader).stored(OTHERS[:1])
    begin(leader, "b", KEYS[:2])
    assert leader.match("b", 0) == 0
    assert plan(leader, DEADLINE_SECONDS + 1) == ()
    answer(leader, up)


# A host that is full of blocks which wait to be written


def choked(num_blocks: int = 2) -> tuple[Leader, list[int], TransferOp]:
    """A request whose first offload found no room, and the write that will make some."""
    leader = leader_of(host=OTHERS[:num_blocks], num_host_blocks=num_blocks, window_blocks=1)
    below(leader).stored(OTHERS[:num_blocks])
    table = [10, 11]
    begin(leader, "a", KEYS[:2])
    leader.match("a", 0)
    leader.allocated("a", 0, table)
    (write,) = leader.plan_step([("a", SIZE)], lambda _: table).ops
    assert below(leader).is_choked
    return leader, table, write


def test_offloads_that_found_no_room_are_tried_again_when_a_write_has_ended() -> None:
    leader, table, write = choked()
    assert leader.plan_step([("a", SIZE + 1)], lambda _: table).ops == ()
    answer(leader, write)
    routes = [op.route for op in leader.plan_step([("a", SIZE + 2)], lambda _: table).ops]
    assert routes == ["device_to_host", "host_to_disk"]
    assert leader.counters.num_refused_blocks == 0


def test_a_request_that_ends_while_host_is_full_leaves_nothing_behind() -> None:
    leader, table, write = choked()
    assert leader.finish("a", SIZE, table) is False
    answer(leader, write)
    for op in plan(leader):
        answer(leader, op)
    assert is_at_rest(leader)


def test_nobody_waits_for_room_that_a_hung_disk_was_to_make() -> None:
    leader, table, _ = choked()
    plan(leader, DEADLINE_SECONDS + 1)
    late = DEADLINE_SECONDS + 2
    (op,) = leader.plan_step([("a", SIZE + 1)], lambda _: table, now_seconds=late).ops
    assert op.route == "device_to_host"


# Reset


def test_a_reset_voids_what_the_ranks_have_before_anything_else_is_written() -> None:
    leader = leader_of(disk=KEYS[:2])
    leader.reset()
    assert leader.has_work()
    step = leader.take_plan()
    assert (step.disk_reset, step.ops) == (DiskReset(GENERATION, persists=False), ())
    assert leader.take_plan().disk_reset is None
    begin(leader)
    assert leader.match("a", 0) == 0


def test_a_tier_that_continues_nothing_begins_anew_and_may_be_continued() -> None:
    leader = leader_of()
    below(leader).start(None, persists=True)
    assert leader.take_plan().disk_reset == DiskReset(GENERATION, persists=True)


def test_a_tier_that_continues_voids_nothing() -> None:
    assert leader_of(disk=KEYS[:2]).take_plan().disk_reset is None


@pytest.mark.parametrize("error", ["", "too late"])
def test_a_reset_with_a_promotion_and_a_write_in_flight_keeps_and_leaks_nothing(error: str) -> None:
    leader = leader_of(disk=KEYS[:2])
    (up,) = ask(leader, keys=KEYS[:2])
    (down,) = store(leader, OTHERS[:2])
    leader.reset()
    plan(leader)
    for op in (up, down):
        answer(leader, op, error=error)
    assert (leader.pool.num_free, below(leader).disk.num_free) == (8, 8)
    leader.finish("a", 0, [])
    assert is_at_rest(leader)


def test_after_a_reset_nobody_waits_for_what_was_on_its_way() -> None:
    leader = leader_of(disk=KEYS[:2])
    (up,) = ask(leader)
    leader.reset()
    assert leader.match("a", 0) == 0
    answer(leader, up)
    assert leader.match("a", 0) == 0


def test_a_reset_before_the_step_that_was_to_bring_blocks_brings_none() -> None:
    leader = leader_of(disk=KEYS[:2])
    begin(leader)
    assert leader.match("a", 0) is None
    leader.reset()
    assert plan(leader) == ()
    assert leader.match("a", 0) == 0


def test_a_reset_forgets_what_waited_to_be_written() -> None:
    leader = leader_of(host=KEYS[:4])
    below(leader).stored(KEYS[:4])
    leader.reset()
    assert plan(leader) == ()


def test_a_block_is_written_anew_while_a_doomed_write_of_its_old_copy_goes_on() -> None:
    leader = leader_of()
    (old,) = store(leader, KEYS[:2])
    leader.reset()
    (new,) = store(leader, KEYS[:2], "x", first=200)
    assert not set(old.dst.ids()) & set(new.dst.ids())
    answer(leader, old)
    assert below(leader).disk.num_ready == 0
    answer(leader, new)
    assert below(leader).disk.num_ready == 2
    assert is_at_rest(leader)


# A rank that is lost


def test_disk_ops_that_a_lost_rank_owed_fail_and_keep_nothing() -> None:
    leader = leader_of(disk=KEYS[:2], num_ranks=2)
    (up,) = ask(leader, keys=KEYS[:2])
    leader.lose_rank(1)
    assert leader.match("a", 0) == 0
    answer(leader, up)
    leader.finish("a", 0, [])
    leader.take_plan()
    assert is_at_rest(leader)
    assert (leader.pool.num_free, below(leader).disk.num_free) == (8, 8)


def test_a_lost_rank_is_no_reason_to_leave_the_disk_alone() -> None:
    """What it owed did not fail on its disk (see MAX_FAILURES)."""
    leader = leader_of(host=OTHERS[:MAX_FAILURES], num_ranks=2)
    for key in OTHERS[:MAX_FAILURES]:
        below(leader).stored([key])
        (op,) = plan(leader)
        answer(leader, op)
    leader.lose_rank(1)
    assert leader.num_ops_in_flight == 0
    leader.regain_rank(1)
    begin(leader, "a", KEYS[:1])
    leader.match("a", 0)
    leader.allocated("a", 0, [7])
    (offload,) = leader.plan_step([("a", SIZE)], lambda _: [7]).ops
    answer(leader, offload, ranks=(0, 1))
    assert [op.route for op in plan(leader)] == ["host_to_disk"]


# Books that can't be trusted


def test_a_tier_that_is_retired_sends_nothing_more_and_leaves_nothing_to_the_next_process() -> None:
    leader = leader_of(host=OTHERS[:2], disk=KEYS[:2])
    below(leader).stored(OTHERS[:2])
    begin(leader)
    assert leader.match("a", 0) is None
    below(leader).retire()
    step = leader.take_plan()
    assert (step.disk_reset, step.ops) == (DiskReset(GENERATION, persists=False), ())
    below(leader).stored(OTHERS[:2])
    assert (plan(leader), leader.has_work()) == ((), False)


def test_a_block_that_comes_for_another_request_is_waited_for_as_one_block() -> None:
    leader = leader_of(disk=KEYS[:4], window_blocks=1000)
    below(leader).rate.tokens_per_second = 10.0 * SIZE  # a block: a tenth of a second
    ask(leader, "a", KEYS[:1], 1.0)
    ask(leader, "b", KEYS[:1], 1.0)
    plan(leader, 2.0)
    leader.match("a", 0)
    assert leader.match("b", 0) == 0


def test_nobody_waits_for_a_disk_that_is_out_of_service() -> None:
    leader = leader_of(disk=KEYS[:4])
    ask(leader, "a", KEYS[:4], 1.0)
    plan(leader, 2.0 + DEADLINE_SECONDS)
    assert below(leader).num_overdue_ops == 1
    assert leader.match("a", 0) == 0


def test_patience_has_an_end_whatever_the_rate() -> None:
    leader = leader_of(disk=KEYS[:4])
    below(leader).rate.tokens_per_second = 1e-3
    ask(leader, "a", KEYS[:4], 1.0)
    plan(leader, 1.5 + MAX_WAIT_SECONDS)
    assert leader.match("a", 0) == 0


def test_what_was_cached_is_not_counted_as_computed() -> None:
    leader = leader_of(host=KEYS[:4])
    leader.create_slot("a", KEYS[:6], 6 * SIZE)
    assert leader.match("a", 0) == 4 * SIZE
    leader.allocated("a", 4 * SIZE, list(range(6)))
    leader.note_progress([("a", 6 * SIZE)], lambda _: list(range(6)))
    assert leader._num_step_tokens == 2 * SIZE


def test_a_request_that_may_not_read_the_cache_promotes_nothing() -> None:
    leader = leader_of(disk=KEYS[:3])
    leader.create_slot("a", KEYS[:3], 3 * SIZE)
    assert leader.match("a", 0, may_read=False) == 0
    assert plan(leader) == ()


def test_a_retired_cascade_sends_nothing_and_voids_what_is_on_disk() -> None:
    leader = leader_of(host=KEYS[:2], disk=KEYS[2:3])
    below(leader).stored(KEYS[:2])
    below(leader).retire()
    sent = leader.take_plan(now_seconds=1.0)
    assert sent.ops == ()
    assert sent.disk_reset is not None
    assert not sent.disk_reset.persists
