"""What goes down to disk and what comes up, one decision at a time; see also tests/property."""

from __future__ import annotations

from kvbm_core.admission import FrequencyFilter
from kvbm_core.cascade import (
    DEADLINE_SECONDS,
    MAX_FAILURES,
    MAX_WAIT_SECONDS,
    PAUSE_SECONDS,
    SLOW_SECONDS,
)
from kvbm_core.types import Tier
from tests.unit.tiers import (
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

# Down


def test_admitted_blocks_are_written_with_their_keys() -> None:
    leader = leader_of()
    (op,) = store(leader, KEYS[:2])
    assert op.route == "host_to_disk"
    assert op.keys == b"".join(KEYS[:2])
    assert leader.pool.num_pinned == 2
    answer(leader, op)
    assert below(leader).disk.match(KEYS, 0) == 2
    assert is_at_rest(leader)


def test_a_block_is_on_disk_when_every_rank_has_written_it() -> None:
    leader = leader_of(host=KEYS[:1], num_ranks=2)
    below(leader).stored(KEYS[:1])
    (op,) = plan(leader)
    answer(leader, op, ranks=[1])
    assert not below(leader).disk.is_ready(KEYS[0])
    answer(leader, op)
    assert below(leader).disk.is_ready(KEYS[0])


def test_a_block_that_is_on_disk_or_on_its_way_is_not_written_again() -> None:
    leader = leader_of(host=KEYS[:3], disk=KEYS[:1])
    below(leader).stored(KEYS[:2])
    (op,) = plan(leader)
    assert op.keys == KEYS[1]
    below(leader).stored(KEYS[:2])
    assert plan(leader) == ()


def test_what_the_filter_does_not_admit_stays_in_host_only() -> None:
    leader = leader_of(host=KEYS[:2], admission=FrequencyFilter())
    below(leader).stored(KEYS[:2])
    assert plan(leader) == ()
    begin(leader)
    leader.allocated("a", leader.match("a", 0) or 0, [1, 2])
    assert [op.route for op in plan(leader)] == ["host_to_device", "host_to_disk"]


def test_no_more_than_a_window_is_being_written() -> None:
    leader = leader_of(host=KEYS[:5], window_blocks=2)
    below(leader).stored(KEYS[:5])
    sizes = []
    while ops := plan(leader):
        assert plan(leader) == ()
        sizes.append(len(ops[0].src))
        answer(leader, ops[0])
    assert sizes == [2, 2, 1]


def test_a_full_disk_makes_room_with_what_was_used_longest_ago() -> None:
    leader = leader_of(host=OTHERS[:1], disk=KEYS[:3], num_disk_blocks=3)
    below(leader).disk.touch([KEYS[2]])
    below(leader).stored(OTHERS[:1])
    (op,) = plan(leader)
    answer(leader, op)
    assert set(below(leader).disk.ready_keys()) == {KEYS[0], KEYS[2], OTHERS[0]}
    assert leader.counters.num_disk_evicted_blocks == 1


def test_a_block_that_is_being_read_is_not_evicted_from_disk() -> None:
    leader = leader_of(host=OTHERS[:2], disk=KEYS[:2], num_disk_blocks=2)
    (up,) = ask(leader)
    below(leader).stored(OTHERS[:2])
    assert plan(leader) == ()
    assert below(leader).disk.num_ready == 2
    answer(leader, up)
    (down,) = plan(leader)
    assert set(down.dst.ids()) == set(up.src.ids())


def test_a_failed_write_is_given_up() -> None:
    leader = leader_of()
    (op,) = store(leader, KEYS[:3])
    answer(leader, op, failed=[1])
    assert below(leader).disk.ready_keys() == [KEYS[0], KEYS[2]]
    assert leader.pool.num_ready == 3
    assert is_at_rest(leader)


def test_three_failures_in_a_row_pause_writes_for_a_while() -> None:
    leader = leader_of(host=KEYS[: MAX_FAILURES + 1])
    for key in KEYS[:MAX_FAILURES]:
        below(leader).stored([key])
        (op,) = plan(leader)
        answer(leader, op, error="no space")
    below(leader).stored([KEYS[MAX_FAILURES]])
    assert plan(leader, PAUSE_SECONDS - 1) == ()
    assert not leader.has_work()
    assert len(plan(leader, PAUSE_SECONDS)) == 1


def test_a_success_in_between_pauses_nothing() -> None:
    leader = leader_of(host=KEYS[: MAX_FAILURES + 2])
    for i, key in enumerate(KEYS[: MAX_FAILURES + 1]):
        below(leader).stored([key])
        (op,) = plan(leader)
        answer(leader, op, error="" if i == 1 else "no space")
    below(leader).stored([KEYS[MAX_FAILURES + 1]])
    assert len(plan(leader)) == 1


# Room in host


def test_a_block_is_not_evicted_before_it_is_written() -> None:
    leader = leader_of(host=OTHERS[:2], num_host_blocks=2, window_blocks=1)
    below(leader).stored(OTHERS[:2])
    table = [10, 11, 12, 13]
    begin(leader)
    leader.match("a", 0)
    leader.allocated("a", 0, table)
    (write,) = leader.plan_step([("a", SIZE)], lambda _: table).ops
    assert write.dst.tier is Tier.DISK
    assert leader.pool.num_ready == 2
    answer(leader, write)
    step = leader.plan_step([("a", SIZE)], lambda _: table)
    assert [op.route for op in step.ops] == ["device_to_host", "host_to_disk"]
    assert step.ops[0].dst.ids() == write.src.ids()
    assert leader.counters.num_refused_blocks == 0


def test_while_disk_is_out_of_service_host_evicts_what_it_must() -> None:
    leader = leader_of(host=OTHERS[:2], num_host_blocks=2, window_blocks=1)
    below(leader).stored(OTHERS[:2])
    plan(leader)
    plan(leader, DEADLINE_SECONDS + 1)
    table = [10, 11, 12, 13]
    begin(leader)
    leader.match("a", 0)
    leader.allocated("a", 0, table)
    late = DEADLINE_SECONDS + 2
    (op,) = leader.plan_step([("a", SIZE)], lambda _: table, now_seconds=late).ops
    assert op.route == "device_to_host"


# Up


def test_a_match_that_goes_on_on_disk_waits_for_it_to_come_up() -> None:
    leader = leader_of(host=KEYS[:1], disk=KEYS[:3])
    (op,) = ask(leader)
    assert (op.route, op.keys) == ("disk_to_host", b"".join(KEYS[1:3]))
    assert leader.match("a", 0) is None
    answer(leader, op)
    assert leader.match("a", 0) == 3 * SIZE


def test_what_the_device_has_is_not_brought_up() -> None:
    leader = leader_of(disk=KEYS[:3])
    begin(leader)
    assert leader.match("a", SIZE) is None
    (op,) = plan(leader)
    assert op.keys == b"".join(KEYS[1:3])


def test_a_promotion_comes_in_windows_and_is_awaited_as_a_whole() -> None:
    leader = leader_of(disk=KEYS[:3], window_blocks=2)
    first, second = ask(leader)
    assert (len(first.src), len(second.src)) == (2, 1)
    answer(leader, first)
    assert leader.match("a", 0) is None
    answer(leader, second)
    assert leader.match("a", 0) == 3 * SIZE


def test_a_promotion_goes_on_beyond_blocks_that_host_has() -> None:
    leader = leader_of(host=KEYS[1:2], disk=KEYS[:3])
    (op,) = ask(leader)
    assert op.keys == KEYS[0] + KEYS[2]
    answer(leader, op)
    assert leader.match("a", 0) == 3 * SIZE


def test_two_requests_share_one_promotion() -> None:
    leader = leader_of(disk=KEYS[:3])
    (op,) = ask(leader, "a", KEYS[:2])
    (rest,) = ask(leader, "b", KEYS[:3])
    assert rest.keys == KEYS[2]
    answer(leader, rest)
    assert leader.match("b", 0) is None
    answer(leader, op)
    assert (leader.match("a", 0), leader.match("b", 0)) == (2 * SIZE, 3 * SIZE)


def test_a_promotion_larger_than_room_in_host_brings_the_leading_part() -> None:
    leader = leader_of(disk=KEYS[:4], num_host_blocks=2)
    (op,) = ask(leader)
    assert op.keys == b"".join(KEYS[:2])
    answer(leader, op)
    assert leader.match("a", 0) == 2 * SIZE


def test_the_part_that_host_has_is_not_evicted_for_the_rest() -> None:
    leader = leader_of(host=[*OTHERS[:1], *KEYS[:2]], disk=KEYS[:4], num_host_blocks=3)
    (op,) = ask(leader)
    assert op.keys == KEYS[2]
    answer(leader, op)
    assert leader.match("a", 0) == 3 * SIZE


def test_a_part_in_host_beyond_a_gap_is_not_evicted_for_the_gap() -> None:
    leader = leader_of(host=KEYS[1:2], disk=[KEYS[0], KEYS[2]], num_host_blocks=2)
    (op,) = ask(leader)
    assert op.keys == KEYS[0]
    answer(leader, op)
    assert leader.match("a", 0) == 2 * SIZE


def test_blocks_that_failed_on_any_rank_are_dropped_and_the_others_kept() -> None:
    leader = leader_of(disk=KEYS[:4], num_ranks=2)
    (op,) = ask(leader)
    answer(leader, op, ranks=[0], failed=[2])
    answer(leader, op, ranks=[1], failed=[3])
    assert leader.match("a", 0) == 2 * SIZE
    assert below(leader).disk.ready_keys() == [KEYS[1], KEYS[0]]
    assert leader.counters.num_bad_blocks == 2
    assert (leader.pool.num_free, below(leader).disk.num_free) == (6, 6)


def test_a_promotion_that_failed_is_not_awaited_nor_tried_again() -> None:
    leader = leader_of(disk=KEYS[:2])
    (op,) = ask(leader)
    answer(leader, op, error="unplugged")
    assert leader.match("a", 0) == 0
    assert plan(leader) == ()


def test_nobody_waits_longer_than_computing_would_take() -> None:
    leader = leader_of(disk=KEYS[:4])
    below(leader).rate.tokens_per_second = 8.0
    ask(leader)
    plan(leader, 2.0)
    assert leader.match("a", 0) is None
    plan(leader, 2.1)
    assert leader.match("a", 0) == 0
    assert leader.counters.num_late_promotions == 1


def test_nobody_waits_long_for_disk_though_computing_would_take_longer() -> None:
    leader = leader_of(disk=KEYS[:4])
    below(leader).rate.tokens_per_second = 0.01
    ask(leader)
    plan(leader, MAX_WAIT_SECONDS + 0.1)
    assert leader.match("a", 0) == 0


def test_blocks_that_come_for_others_count_for_the_patience() -> None:
    leader = leader_of(disk=KEYS[:4])
    below(leader).rate.tokens_per_second = 8.0
    ask(leader, "a", KEYS[:4])
    assert ask(leader, "b", KEYS[:4], 1.0) == ()
    plan(leader, 3.0)
    assert leader.match("b", 0) is None
    plan(leader, 3.1)
    assert leader.match("b", 0) == 0


def test_a_request_that_may_not_read_neither_waits_nor_brings_anything_up() -> None:
    leader = leader_of(host=KEYS[:1], disk=KEYS[:3])
    begin(leader)
    assert leader.match("a", 0, may_read=False) == 0
    assert plan(leader) == ()


def test_before_the_rate_is_known_the_first_wait_is_bounded() -> None:
    leader = leader_of(disk=KEYS[:4])
    ask(leader)
    plan(leader, MAX_WAIT_SECONDS)
    assert leader.match("a", 0) is None
    plan(leader, MAX_WAIT_SECONDS + 0.1)
    assert leader.match("a", 0) == 0


def test_after_a_late_promotion_nobody_waits_for_a_while() -> None:
    leader = leader_of(disk=[*KEYS[:2], *OTHERS[:4]])
    ask(leader, "a", KEYS[:2])
    late = MAX_WAIT_SECONDS + 1
    plan(leader, late)
    assert leader.match("a", 0) == 0
    begin(leader, "b", OTHERS[:2])
    assert leader.match("b", 0) == 0
    assert plan(leader, late + SLOW_SECONDS) == ()
    assert leader.match("b", 0) is None


def test_an_aborted_request_leaves_its_promotion_to_the_next_one() -> None:
    leader = leader_of(disk=KEYS[:4])
    (op,) = ask(leader)
    assert leader.finish("a", 0, []) is False
    assert leader.num_slots == 0
    answer(leader, op)
    assert is_at_rest(leader)
    begin(leader, "b")
    assert leader.match("b", 0) == 4 * SIZE


def test_a_request_aborted_before_the_step_asks_for_nothing() -> None:
    leader = leader_of(disk=KEYS[:4])
    begin(leader)
    assert leader.match("a", 0) is None
    leader.finish("a", 0, [])
    assert plan(leader) == ()
    assert is_at_rest(leader)


def test_a_preempted_request_may_bring_blocks_up_again() -> None:
    leader = leader_of(disk=KEYS[:2])
    (op,) = ask(leader)
    answer(leader, op, error="unplugged")
    leader.allocated("a", leader.match("a", 0) or 0, [1, 2, 3, 4])
    below(leader).disk.reserve(KEYS[:2])
    below(leader).disk.commit(KEYS[:2])
    assert leader.match("a", 0) is None
    assert len(plan(leader)) == 1


def test_an_engine_that_cannot_wait_is_never_told_to_and_nothing_comes_up_for_it() -> None:
    leader = leader_of(can_wait=False)
    below(leader).disk.reserve(KEYS[:2])
    below(leader).disk.commit(KEYS[:2])
    begin(leader)
    assert leader.match("a", 0) == 0
    assert plan(leader) == ()


def test_a_request_asks_for_its_blocks_once() -> None:
    leader = leader_of(disk=KEYS[:4])
    begin(leader)
    assert [leader.match("a", 0) for _ in range(2)] == [None, None]
    assert [len(plan(leader)) for _ in range(3)] == [1, 0, 0]


# An engine that can't wait


def test_an_engine_that_cannot_wait_gets_back_at_start_what_host_has_room_for() -> None:
    leader = leader_of(disk=KEYS[:6], num_host_blocks=4, window_blocks=3, can_wait=False)
    brought = []
    while ops := plan(leader):
        (op,) = ops
        assert plan(leader) == (), "no more than a window at a time"
        brought.append(op.keys)
        answer(leader, op)
    assert brought == [b"".join(KEYS[:3]), KEYS[3]], "used last, first brought"
    assert leader.pool.match(KEYS, 0) == 4
    assert is_at_rest(leader)


def test_an_engine_that_can_wait_gets_nothing_unasked() -> None:
    assert plan(leader_of(disk=KEYS[:4])) == ()


def test_what_comes_back_at_start_drives_nothing_out_and_ends_with_a_reset() -> None:
    leader = leader_of(host=OTHERS[:2], disk=KEYS[:6], num_host_blocks=4, can_wait=False)
    (op,) = plan(leader)
    assert op.keys == b"".join(KEYS[:2])
    answer(leader, op)
    assert leader.pool.match(OTHERS, 0) == 2
    leader = leader_of(disk=KEYS[:6], window_blocks=2, can_wait=False)
    (op,) = plan(leader)
    leader.reset()
    answer(leader, op)
    assert plan(leader) == ()
    assert is_at_rest(leader)
