from __future__ import annotations

import msgspec
import pytest

from kvbm_core import wire
from kvbm_core.errors import WireError
from kvbm_core.types import Blocks, OpResult, Tier, TransferOp
from kvbm_core.wire import StepPlan, WorkerReport, decode_plan, decode_report, encode


def plan_of(src: Blocks, dst: Blocks) -> bytes:
    return encode(StepPlan(ops=(TransferOp(1, ("r",), src, dst),)))


def test_a_plan_with_everything_survives() -> None:
    op = TransferOp(7, ("é", "b"), Blocks.of(Tier.DEVICE, [1, 2]), Blocks.of(Tier.HOST, [3, 4]))
    plan = StepPlan(ops=(op,), fences=(5,), drain=("a",), idle=True)
    assert decode_plan(encode(plan)) == plan


def test_a_report_survives() -> None:
    report = WorkerReport(3, (OpResult(1, 2, 0.5), OpResult(2, 0, 0.1, "no")))
    assert decode_report(encode(report)) == report


def test_an_empty_plan_is_false_and_any_part_makes_it_true() -> None:
    assert not StepPlan()
    assert all([StepPlan(fences=(1,)), StepPlan(drain=("a",)), StepPlan(idle=True)])


def test_a_message_of_another_version_says_so() -> None:
    with pytest.raises(WireError, match="version 2, this process speaks 1"):
        decode_plan(encode(StepPlan(version=2)))
    with pytest.raises(WireError, match="version 9"):
        decode_report(encode(WorkerReport(0, (), version=9)))


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(WireError, match="rank -1"):
        decode_report(encode(WorkerReport(-1, ())))


def test_an_op_with_more_sources_than_destinations_is_refused() -> None:
    with pytest.raises(WireError, match="op 1"):
        decode_plan(plan_of(Blocks.of(Tier.HOST, [1, 2]), Blocks.of(Tier.DEVICE, [1])))


def test_ids_that_are_no_whole_numbers_of_u32_are_refused() -> None:
    with pytest.raises(WireError, match="op 1"):
        decode_plan(plan_of(Blocks(Tier.HOST, b"abc"), Blocks(Tier.DEVICE, b"abc")))


def test_an_op_within_one_tier_is_refused() -> None:
    with pytest.raises(WireError, match="within the host tier"):
        decode_plan(plan_of(Blocks.of(Tier.HOST, [1]), Blocks.of(Tier.HOST, [2])))


def test_an_unknown_tier_is_refused() -> None:
    op = (1, ("r",), ("attic", b""), ("host", b""))
    with pytest.raises(WireError, match="attic"):
        decode_plan(msgspec.msgpack.encode((1, (op,))))


def test_a_message_above_the_limit_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 3)
    with pytest.raises(WireError, match="exceeds the limit of 3"):
        decode_plan(encode(StepPlan()))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91", b"\xff" * 100])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="malformed"):
        decode_plan(data)
    with pytest.raises(WireError, match="malformed"):
        decode_report(data)
