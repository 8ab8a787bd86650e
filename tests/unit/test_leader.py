"""The leader's decisions one by one; every order of them is in tests/property."""

from __future__ import annotations

import pytest

from kvbm_core.errors import IllegalTransition
from kvbm_core.eviction import Lru
from kvbm_core.hashing import chain_hashes
from kvbm_core.leader import Leader
from kvbm_core.pool import BlockPool
from kvbm_core.types import BlockHash, OpResult, Tier
from kvbm_core.wire import StepPlan, WorkerReport

SIZE = 4
KEYS = chain_hashes(b"root", list(range(40)), SIZE)


def leader_of(
    num_blocks: int = 8, num_ranks: int = 1, ready: int = 0, generated: bool = True
) -> Leader:
    """A leader whose host tier has the first `ready` of KEYS."""
    pool = BlockPool(Tier.HOST, num_blocks, Lru())
    pool.reserve(KEYS[:ready])
    pool.commit(KEYS[:ready])
    return Leader(pool, block_size=SIZE, num_ranks=num_ranks, offload_generated_blocks=generated)


def begin(leader: Leader, name: str = "a", num_keys: int = 3, keys: list[BlockHash] = KEYS) -> None:
    leader.create_slot(name, keys[:num_keys], num_keys * SIZE)


def run(leader: Leader, name: str = "a", num_keys: int = 3, *, first: int = 10) -> list[int]:
    """A request that is admitted with nothing to load."""
    begin(leader, name, num_keys)
    leader.match(name, 0)
    table = list(range(first, first + num_keys))
    leader.allocated(name, 0, table)
    return table


def step(leader: Leader, name: str, num_tokens: int, table: list[int]) -> StepPlan:
    return leader.plan_step([(name, num_tokens)], lambda _: table)


def answer(leader: Leader, op_id: int, *, rank: int = 0, error: str = "") -> None:
    leader.apply(WorkerReport(rank, (OpResult(op_id, 1, 0.0, error),)))


def load(leader: Leader, name: str = "a") -> int:
    """Start the load of all that matches, and send it."""
    begin(leader, name)
    found = leader.match(name, 0)
    assert found
    leader.allocated(name, found, [10, 11, 12])
    (op,) = leader.plan_step([], lambda _: []).ops
    return op.op_id


def test_the_longest_ready_prefix_beyond_the_devices_own_is_offered() -> None:
    leader = leader_of(ready=3)
    begin(leader, num_keys=5)
    assert [leader.match("a", n * SIZE) for n in (0, 1, 2, 3, 4)] == [12, 8, 4, 0, 0]


def test_a_match_pins_nothing_and_may_be_repeated() -> None:
    leader = leader_of(ready=3)
    begin(leader)
    assert leader.match("a", 0) == leader.match("a", 0) == 12
    assert (leader.pool.num_pinned, leader.has_work()) == (0, False)


def test_a_load_pins_its_source_until_it_ends() -> None:
    leader = leader_of(ready=3)
    op_id = load(leader)
    assert leader.pool.num_pinned == 3
    answer(leader, op_id)
    assert leader.pool.num_pinned == 0


def test_a_load_goes_to_the_blocks_after_the_devices_own() -> None:
    leader = leader_of(ready=3)
    begin(leader)
    leader.match("a", SIZE)
    leader.allocated("a", 2 * SIZE, [10, 11, 12])
    (op,) = leader.plan_step([], lambda _: []).ops
    assert list(op.dst.ids()) == [11, 12]


@pytest.mark.parametrize(("tokens", "table"), [(3, [1]), (8, [1]), (16, [1, 2, 3, 4])])
def test_a_load_that_was_not_offered_is_refused_and_changes_nothing(
    tokens: int, table: list[int]
) -> None:
    leader = leader_of(ready=3)
    begin(leader)
    leader.match("a", 0)
    with pytest.raises(IllegalTransition):
        leader.allocated("a", tokens, table)
    assert (leader.pool.num_pinned, leader.has_work()) == (0, False)
    leader.allocated("a", 0, [1, 2, 3])


def test_a_second_load_of_a_loading_request_is_refused_and_pins_nothing() -> None:
    leader = leader_of(ready=3)
    load(leader)
    with pytest.raises(IllegalTransition):
        leader.allocated("a", 2 * SIZE, [10, 11])
    assert leader.num_ops_in_flight == 1
    assert leader.pool.num_pinned == 3


def test_a_request_that_wants_a_block_on_its_way_waits_for_it() -> None:
    leader = leader_of(ready=3)
    op_id = load(leader)
    begin(leader, "b")
    assert leader.match("b", 0) is None
    answer(leader, op_id)
    assert leader.match("b", 0) == 12


def test_complete_blocks_are_offloaded_once_as_the_request_grows() -> None:
    leader = leader_of()
    table = run(leader)
    plans = [step(leader, "a", n, table) for n in (3, 4, 7, 12, 12)]
    assert [[list(op.src.ids()) for op in plan.ops] for plan in plans] == [
        [],
        [[10]],
        [],
        [[11, 12]],
        [],
    ]


def test_what_is_stored_or_on_its_way_is_not_stored_again() -> None:
    leader = leader_of(ready=1)
    first, second = run(leader, "a"), run(leader, "b", first=20)
    assert list(step(leader, "a", 8, first).ops[0].src.ids()) == [11]
    assert list(step(leader, "b", 12, second).ops[0].src.ids()) == [22]


def test_generated_blocks_stay_on_the_device_where_the_config_says_so() -> None:
    leader = leader_of(generated=False)
    leader.create_slot("a", KEYS[:3], 6)
    leader.match("a", 0)
    leader.allocated("a", 0, [10, 11, 12])
    plan = step(leader, "a", 12, [10, 11, 12])
    assert [list(op.src.ids()) for op in plan.ops] == [[10]]


def test_a_full_tier_ends_a_requests_offloads() -> None:
    """Blocks beyond a gap could never be matched."""
    leader = leader_of(num_blocks=1)
    table = run(leader)
    assert len(step(leader, "a", 12, table).ops[0].src) == 1
    assert leader.counters.num_refused_blocks == 2
    assert step(leader, "a", 12, table).ops == ()


def test_a_requests_tail_does_not_evict_its_own_head() -> None:
    leader = leader_of(num_blocks=2)
    table = run(leader)
    answer(leader, step(leader, "a", 8, table).ops[0].op_id)
    assert step(leader, "a", 12, table).ops == ()
    assert leader.pool.match(KEYS, 0) == 2


def test_a_block_is_ready_when_every_rank_has_it() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 4, run(leader)).ops[0].op_id
    answer(leader, op_id, rank=1)
    assert leader.pool.match(KEYS, 0) == 0
    answer(leader, op_id, rank=0)
    assert leader.pool.match(KEYS, 0) == 1


def test_one_failed_rank_aborts_an_offload() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 4, run(leader)).ops[0].op_id
    answer(leader, op_id, rank=1, error="disk on fire")
    answer(leader, op_id, rank=0)
    assert (leader.pool.num_free, leader.counters.num_failed_ops) == (8, 1)


def test_a_failed_load_drops_its_blocks() -> None:
    leader = leader_of(ready=3)
    answer(leader, load(leader), error="bad memory")
    assert leader.pool.match(KEYS, 0) == 0
    assert leader.counters.num_dropped_blocks == 3
    assert leader.match("a", 0) == 0


def test_reissued_blocks_are_fenced_while_an_op_uses_them() -> None:
    leader = leader_of()
    op_id = step(leader, "a", 4, run(leader)).ops[0].op_id
    assert leader.plan_step([], lambda _: [], reissued=[10, 99]).fences == (op_id,)
    answer(leader, op_id)
    assert leader.plan_step([], lambda _: [], reissued=[10]).fences == ()


def test_a_load_into_blocks_that_an_op_reads_is_fenced() -> None:
    leader = leader_of(ready=1)
    begin(leader, "b", 1)
    op_id = step(leader, "a", 8, run(leader)).ops[0].op_id
    leader.match("b", 0)
    leader.allocated("b", SIZE, [11])
    assert leader.plan_step([], lambda _: []).fences == (op_id,)


def written(leader: Leader) -> list[int]:
    """A request whose blocks were written before their keys were known."""
    keys: list[BlockHash] = []
    leader.create_slot("a", keys, 12)
    leader.match("a", 0)
    leader.allocated("a", 0, [10, 11, 12])
    assert not step(leader, "a", 12, [10, 11, 12]).ops
    keys += KEYS[:3]
    return [10, 11, 12]


def test_finish_keeps_complete_blocks_and_says_that_they_are_read() -> None:
    leader = leader_of()
    assert leader.finish("a", 12, written(leader)) is True
    plan = leader.plan_step([], lambda _: [])
    assert (len(plan.ops[0].src), plan.drain) == (3, ("a",))
    answer(leader, plan.ops[0].op_id)
    assert (leader.num_slots, leader.has_work()) == (0, False)


def test_finish_with_nothing_in_flight_forgets_the_request() -> None:
    leader = leader_of(ready=3)
    assert leader.finish("a", 0, run(leader)) is False
    assert not leader.has_slot("a")


def test_finish_while_loading_leaves_the_end_to_the_load() -> None:
    leader = leader_of(ready=3)
    op_id = load(leader)
    assert leader.finish("a", 12, [10, 11, 12]) is False
    assert leader.plan_step([], lambda _: []).drain == ()
    assert leader.num_slots == 1
    answer(leader, op_id)
    assert (leader.num_slots, leader.pool.num_pinned) == (0, 0)


def test_finish_of_an_unknown_request_or_twice_is_no_matter() -> None:
    leader = leader_of()
    assert leader.finish("nobody", 0, []) is False
    table = written(leader)
    assert [leader.finish("a", 12, table) for _ in range(2)] == [True, False]


def test_finish_keeps_nothing_that_no_forward_wrote() -> None:
    """An engine counts tokens as computed while another connector still loads them."""
    leader = leader_of()
    assert leader.finish("a", 12, run(leader)) is False
    assert not leader.has_work()


def test_blocks_under_an_offload_are_fenced_whoever_writes_them_next() -> None:
    leader = leader_of()
    table = run(leader)
    (op,) = step(leader, "a", 12, table).ops
    leader.create_slot("b", [], 0)
    leader.match("b", 0)
    leader.allocated("b", 0, table)
    assert leader.plan_step([], lambda _: []).fences == (op.op_id,)


def test_a_preempted_request_that_gets_its_own_blocks_back_is_fenced_too() -> None:
    leader = leader_of()
    table = run(leader)
    (op,) = step(leader, "a", 12, table).ops
    leader.match("a", 0)
    leader.allocated("a", 0, table)
    assert leader.plan_step([], lambda _: []).fences == (op.op_id,)


def test_an_engine_that_holds_no_blocks_is_told_of_no_drain() -> None:
    pool = BlockPool(Tier.HOST, 3, Lru())
    leader = Leader(pool, block_size=SIZE, num_ranks=1, engine_holds_blocks=False)
    assert leader.finish("a", 12, written(leader)) is False
    plan = leader.plan_step([], lambda _: [])
    assert (len(plan.ops), plan.drain) == (1, ())
    answer(leader, plan.ops[0].op_id)
    assert (leader.num_slots, pool.num_ready) == (0, 3)


def test_a_namesake_of_a_finished_request_has_its_own_keys() -> None:
    pool = BlockPool(Tier.HOST, 6, Lru())
    leader = Leader(pool, block_size=SIZE, num_ranks=1, engine_holds_blocks=False)
    leader.finish("a", 12, written(leader))
    (op,) = leader.plan_step([], lambda _: []).ops
    others = chain_hashes(b"other", list(range(12)), SIZE)
    begin(leader, "a", keys=others)
    assert leader.match("a", 0) == 0
    leader.allocated("a", 0, [20, 21, 22])
    (own,) = step(leader, "a", 12, [20, 21, 22]).ops
    for op_id in (op.op_id, own.op_id):
        answer(leader, op_id)
    assert set(pool.ready_keys()) == {*KEYS[:3], *others}


def test_loads_of_one_prefix_go_side_by_side_where_the_engine_shares_no_blocks() -> None:
    pool = BlockPool(Tier.HOST, 3, Lru())
    pool.reserve(KEYS[:3])
    pool.commit(KEYS[:3])
    leader = Leader(pool, block_size=SIZE, num_ranks=1, engine_shares_blocks=False)
    begin(leader, "a")
    begin(leader, "b")
    leader.match("a", 0)
    leader.allocated("a", 12, [10, 11, 12])
    assert leader.match("b", 0) == 12


def test_a_block_is_stored_anew_while_a_doomed_offload_still_writes_its_old_copy() -> None:
    leader = leader_of(num_blocks=6)
    (old,) = step(leader, "a", 12, run(leader)).ops
    leader.reset()
    (new,) = step(leader, "b", 12, run(leader, "b", first=20)).ops
    assert not set(old.dst.ids()) & set(new.dst.ids())
    answer(leader, old.op_id)
    assert leader.pool.num_ready == 0
    answer(leader, new.op_id)
    assert (leader.pool.num_ready, leader.pool.num_reserved) == (3, 0)


def test_an_ignored_request_is_neither_matched_nor_kept() -> None:
    leader = leader_of(ready=3)
    table = run(leader)
    leader.ignore("a")
    assert leader.match("a", 0) == 0
    leader.allocated("a", 0, table)
    assert not step(leader, "a", 12, table).ops


def test_a_preempted_request_is_matched_again_and_offloads_from_its_start() -> None:
    leader = leader_of()
    answer(leader, step(leader, "a", 8, run(leader)).ops[0].op_id, error="lost")
    assert leader.match("a", 0) == 0
    leader.allocated("a", 0, [20, 21, 22])
    assert list(step(leader, "a", 8, [20, 21, 22]).ops[0].src.ids()) == [20, 21]


def test_reset_forgets_what_is_stored_and_what_is_on_its_way() -> None:
    leader = leader_of(ready=1)
    table = run(leader)
    op_id = step(leader, "a", 8, table).ops[0].op_id
    leader.reset()
    answer(leader, op_id)
    assert leader.pool.num_free == 8
    assert step(leader, "a", 12, table).ops == ()


def test_an_answer_that_nobody_owes_is_counted_and_changes_nothing() -> None:
    leader = leader_of(num_ranks=2)
    op_id = step(leader, "a", 4, run(leader)).ops[0].op_id
    for _ in range(3):
        answer(leader, op_id, rank=1)
    answer(leader, 999)
    assert leader.counters.num_bad_reports == 3
    assert (leader.num_ops_in_flight, leader.pool.num_ready) == (1, 0)


def test_a_request_cannot_be_followed_twice() -> None:
    leader = leader_of()
    begin(leader)
    with pytest.raises(IllegalTransition, match="has a slot already"):
        begin(leader)


def test_only_a_step_with_ops_in_flight_is_idle() -> None:
    leader = leader_of()
    assert not leader.plan_step([], lambda _: [], idle=True).idle
    step(leader, "a", 4, run(leader))
    assert leader.plan_step([], lambda _: [], idle=True).idle


def test_the_device_table_is_asked_only_where_a_block_became_complete() -> None:
    asked: list[str] = []
    leader = leader_of()
    table = run(leader)
    for num_tokens in (1, 2, 3, 4, 5):
        leader.plan_step([("a", num_tokens)], lambda name: asked.append(name) or table)
    assert asked == ["a"]
