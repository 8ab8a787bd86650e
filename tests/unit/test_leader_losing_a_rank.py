"""A rank is gone: what it owed has failed, what it held is forgotten, and others are waited for."""

from __future__ import annotations

from tests.unit.test_leader import KEYS, SIZE, answer, begin, leader_of, load, run, step


def test_nothing_stored_survives() -> None:
    leader = leader_of(num_ranks=2, ready=3)
    leader.lose_rank(1)
    assert (leader.pool.num_free, leader.counters.num_dropped_blocks) == (8, 3)


def test_what_it_owed_has_failed_once_the_others_have_answered() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 8, run(leader)).ops[0].op_id
    leader.lose_rank(1)
    assert leader.num_ops_in_flight == 1
    answer(leader, op_id, rank=0)
    assert (leader.num_ops_in_flight, leader.pool.num_free) == (0, 8)


def test_what_it_had_answered_is_not_kept_either() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 8, run(leader)).ops[0].op_id
    answer(leader, op_id, rank=1)
    leader.lose_rank(1)
    answer(leader, op_id, rank=0)
    assert leader.pool.match(KEYS, 0) == 0


def test_its_late_answers_change_nothing() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 8, run(leader)).ops[0].op_id
    leader.lose_rank(1)
    answer(leader, op_id, rank=1)
    assert (leader.counters.num_bad_reports, leader.num_ops_in_flight) == (1, 1)


def test_a_load_it_owed_ends_in_failure() -> None:
    leader = leader_of(ready=3)
    load(leader)
    leader.lose_rank(0)
    assert leader.match("a", 0) == 0
    assert (leader.pool.num_pinned, leader.counters.num_failed_ops) == (0, 1)


def test_an_offload_that_was_not_sent_yet_is_not_sent_after_it_has_failed() -> None:
    """Its host blocks may be somebody else's by then."""
    leader = leader_of()
    leader.finish("a", 3 * SIZE, run(leader))
    leader.lose_rank(0)
    assert leader.num_ops_in_flight == 0
    assert leader.plan_step([], lambda _: []).ops == ()


def test_a_load_that_was_not_sent_yet_is_not_sent_after_it_has_failed() -> None:
    """Its device blocks may be somebody else's by then."""
    leader = leader_of(ready=3)
    begin(leader)
    leader.match("a", 0)
    leader.allocated("a", 3 * SIZE, [10, 11, 12])
    leader.lose_rank(0)
    assert leader.num_ops_in_flight == 0
    assert leader.plan_step([], lambda _: []).ops == ()


def test_while_it_is_lost_nothing_new_is_stored_and_nothing_hangs() -> None:
    leader = leader_of(num_ranks=2)
    leader.lose_rank(1)
    table = run(leader, "b")
    assert not step(leader, "b", 3 * SIZE, table)
    leader.finish("b", 3 * SIZE, table)
    assert (leader.has_work(), leader.num_ops_in_flight, leader.num_slots) == (False, 0, 0)


def test_when_it_is_back_new_requests_are_stored_and_those_that_ran_are_not() -> None:
    """Its device memory may be empty: what they computed before is not there."""
    leader = leader_of(num_ranks=2)
    leader.lose_rank(1)
    old = run(leader, "old")
    step(leader, "old", 2 * SIZE, old)
    leader.regain_rank(1)
    assert step(leader, "old", 3 * SIZE, old).ops == ()
    new = run(leader, "new", first=20)
    (op,) = step(leader, "new", 3 * SIZE, new).ops
    answer(leader, op.op_id, rank=0)
    answer(leader, op.op_id, rank=1)
    assert leader.pool.match(KEYS, 0) == 3


def test_caching_begins_anew_only_when_all_lost_ranks_are_back() -> None:
    leader = leader_of(num_ranks=3)
    leader.lose_rank(1)
    leader.lose_rank(2)
    leader.regain_rank(2)
    table = run(leader)
    assert step(leader, "a", 3 * SIZE, table).ops == ()


def test_losing_it_twice_is_losing_it_once() -> None:
    leader = leader_of(num_ranks=2, ready=3)
    leader.lose_rank(1)
    leader.lose_rank(1)
    leader.regain_rank(1)
    assert step(leader, "a", 3 * SIZE, run(leader)).ops


def test_device_blocks_that_it_may_still_use_are_fenced_after_its_ops_have_failed() -> None:
    """It may be alive, and only silent."""
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 8, run(leader)).ops[0].op_id
    leader.lose_rank(1)
    answer(leader, op_id, rank=0)
    assert leader.num_ops_in_flight == 0
    assert leader.plan_step([], lambda _: [], reissued=[10]).fences == (op_id,)
    leader.regain_rank(1)
    assert leader.plan_step([], lambda _: []).fences == (op_id,)
    assert leader.plan_step([], lambda _: [], reissued=[10]).fences == ()
