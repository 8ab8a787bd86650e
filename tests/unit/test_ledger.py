from __future__ import annotations

import pytest

from kvbm_core.ledger import OpLedger
from kvbm_core.types import BlockHash, OpResult, Tier, TransferOp, pack_ids

UP, DOWN = (Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)
FROM_DISK, TO_DISK = (Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DISK)
KEYS = [BlockHash(b"k"), BlockHash(b"l")]


def ok(op: TransferOp) -> OpResult:
    return OpResult(op.op_id, 1, 0.0)


def test_ops_are_numbered_once() -> None:
    ledger = OpLedger(1)
    first = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    ledger.answer(0, ok(first))
    assert ledger.open(UP, KEYS, [0, 1], [5, 6], ("b",)).op_id == first.op_id + 1


def test_an_op_says_what_it_copies() -> None:
    ledger = OpLedger(1)
    up = ledger.open(UP, KEYS, [0, 1], [5, 6], ("a",))
    down = ledger.open(DOWN, KEYS, [7, 8], [2, 3], ("a",))
    assert (list(up.src.ids()), list(up.dst.ids()), up.is_onboard) == ([0, 1], [5, 6], True)
    assert (list(down.src.ids()), list(down.dst.ids()), down.is_onboard) == ([7, 8], [2, 3], False)


def test_an_op_ends_with_the_last_rank() -> None:
    ledger = OpLedger(3)
    op = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    assert [ledger.answer(rank, ok(op))[1] for rank in (2, 0, 1)] == [False, False, True]
    assert len(ledger) == 0


def test_one_failure_fails_the_op_and_the_first_one_is_named() -> None:
    ledger = OpLedger(3)
    op = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    ledger.answer(2, OpResult(op.op_id, 0, 0.0, "first"))
    ledger.answer(0, OpResult(op.op_id, 0, 0.0, "second"))
    record, has_ended = ledger.answer(1, ok(op))
    assert (record.error, has_ended) == ("rank 2: first", True)


@pytest.mark.parametrize("rank", [0, 7, -1])
def test_an_answer_that_nobody_owes_raises_and_changes_nothing(rank: int) -> None:
    ledger = OpLedger(2)
    op = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    ledger.answer(0, ok(op))
    with pytest.raises(KeyError):
        ledger.answer(rank, OpResult(op.op_id, 0, 0.0, "again"))
    record, has_ended = ledger.answer(1, ok(op))
    assert (record.error, has_ended) == ("", True)


def test_an_answer_to_an_unknown_op_raises() -> None:
    with pytest.raises(KeyError):
        OpLedger(1).answer(0, OpResult(1, 0, 0.0))


def test_device_blocks_lead_to_the_ops_that_use_them() -> None:
    ledger = OpLedger(1)
    first = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    second = ledger.open(UP, KEYS, [2, 3], [7, 8], ("b",))
    assert ledger.ops_on([1, 2, 3]) == set()
    assert ledger.ops_on([5, 7, 9]) == {first.op_id, second.op_id}
    ledger.answer(0, ok(first))
    assert ledger.ops_on([5, 6]) == set()


def test_the_end_of_an_op_does_not_hide_a_later_one_on_its_blocks() -> None:
    ledger = OpLedger(1)
    first = ledger.open(DOWN, KEYS, [5, 6], [0, 1], ("a",))
    second = ledger.open(DOWN, KEYS, [6, 7], [2, 3], ("b",))
    ledger.answer(0, ok(first))
    assert ledger.ops_on([6]) == {second.op_id}


def bad(op: TransferOp, *failed: int) -> OpResult:
    return OpResult(op.op_id, 0, 0.0, "bad", pack_ids(failed))


@pytest.mark.parametrize("route", [FROM_DISK, TO_DISK])
def test_a_disk_op_keeps_what_failed_on_no_rank(route: tuple[Tier, Tier]) -> None:
    ledger = OpLedger(3)
    keys = [BlockHash(bytes([i])) for i in range(4)]
    op = ledger.open(route, keys, [0, 1, 2, 3], [4, 5, 6, 7])
    ledger.answer(0, bad(op, 2))
    ledger.answer(1, ok(op))
    record, has_ended = ledger.answer(2, bad(op, 0, 2))
    assert has_ended
    assert record.split() == ([keys[1], keys[3]], [keys[0], keys[2]])


def test_a_disk_op_that_names_no_failed_block_failed_for_all() -> None:
    ledger = OpLedger(2)
    op = ledger.open(FROM_DISK, KEYS, [0, 1], [2, 3])
    ledger.answer(0, bad(op))
    record, _ = ledger.answer(1, bad(op, 1))
    assert record.split() == ([], KEYS)


@pytest.mark.parametrize("position", [2, 2**32 - 1])
def test_an_answer_that_names_blocks_the_op_does_not_have_is_a_failure_of_all(
    position: int,
) -> None:
    ledger = OpLedger(1)
    op = ledger.open(FROM_DISK, KEYS, [0, 1], [2, 3])
    record, _ = ledger.answer(0, bad(op, 0, position))
    assert record.split() == ([], KEYS)


@pytest.mark.parametrize("route", [UP, DOWN])
def test_a_copy_to_or_from_the_device_fails_for_all(route: tuple[Tier, Tier]) -> None:
    ledger = OpLedger(1)
    record, _ = ledger.answer(0, bad(ledger.open(route, KEYS, [0, 1], [5, 6]), 1))
    assert record.split() == ([], KEYS)


def test_only_ops_of_the_disk_carry_keys() -> None:
    ledger = OpLedger(1)
    assert ledger.open(TO_DISK, KEYS, [0, 1], [5, 6]).keys == b"kl"
    assert ledger.open(DOWN, KEYS, [0, 1], [5, 6]).keys == b""


def test_a_disk_op_uses_no_device_blocks() -> None:
    ledger = OpLedger(1)
    ledger.open(TO_DISK, KEYS, [0, 1], [5, 6])
    ledger.open(FROM_DISK, KEYS, [7, 8], [2, 3])
    assert ledger.ops_on(range(10)) == set()
