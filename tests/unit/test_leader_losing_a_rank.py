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
