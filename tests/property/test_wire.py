"""What was encoded is decoded as it was; anything else is refused with WireError."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_core.errors import WireError
from kvbm_core.types import KEY_BYTES, Blocks, OpResult, Tier, TransferOp, pack_ids, unpack_ids
from kvbm_core.wire import (
    GENERATION_BYTES,
    DiskReset,
    StepPlan,
    WorkerReport,
    decode_plan,
    decode_report,
    encode,
)

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=6)
NUMBERS = st.integers(0, 2**63 - 1)


PAIRS = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
NAMES = st.lists(st.text(max_size=8), max_size=3).map(tuple)
ROUTES = [(src, dst) for src in Tier for dst in Tier if src is not dst]


@st.composite
def ops(draw: st.DrawFn) -> TransferOp:
    src, dst = draw(st.sampled_from(ROUTES))
    pairs = draw(st.lists(PAIRS, max_size=3))
    return TransferOp(
        draw(NUMBERS),
        draw(NAMES),
        Blocks.of(src, [a for a, _ in pairs]),
        Blocks.of(dst, [b for _, b in pairs]),
        bytes(KEY_BYTES * len(pairs)) if Tier.DISK in (src, dst) else b"",
    )


PLANS = st.builds(
    StepPlan,
    ops=st.lists(ops(), max_size=3).map(tuple),
    fences=st.lists(NUMBERS, max_size=3).map(tuple),
    drain=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    idle=st.booleans(),
    disk_reset=st.none()
    | st.builds(
        DiskReset, st.binary(min_size=GENERATION_BYTES, max_size=GENERATION_BYTES), st.booleans()
    ),
)
SECONDS = st.floats(allow_nan=False)
RESULTS = st.builds(OpResult, NUMBERS, NUMBERS, SECONDS) | st.builds(
    OpResult, NUMBERS, NUMBERS, SECONDS, st.text(min_size=1, max_size=8), IDS.map(pack_ids)
)
REPORTS = st.builds(WorkerReport, NUMBERS, st.lists(RESULTS, max_size=3).map(tuple))
DECODERS = pytest.mark.parametrize("decode", [decode_plan, decode_report])


@given(PLANS)
def test_a_plan_survives_the_wire(plan: StepPlan) -> None:
    assert decode_plan(encode(plan)) == plan


@given(REPORTS)
def test_a_report_survives_the_wire(report: WorkerReport) -> None:
    assert decode_report(encode(report)) == report


@given(IDS)
def test_packed_ids_survive(ids: list[int]) -> None:
    assert list(unpack_ids(pack_ids(ids))) == ids
    assert len(Blocks.of(Tier.HOST, ids)) == len(ids)


@given(st.binary(max_size=GENERATION_BYTES + 4), st.booleans())
def test_only_generations_of_the_right_size_are_accepted(generation: bytes, persists: bool) -> None:
    plan = StepPlan(disk_reset=DiskReset(generation, persists))
    if len(generation) == GENERATION_BYTES:
        assert decode_plan(encode(plan)) == plan
    else:
        with pytest.raises(WireError, match="disk generation"):
            decode_plan(encode(plan))


@given(ops(), st.integers(0, 3 * KEY_BYTES + 1))
def test_an_op_has_one_key_a_block_if_it_touches_disk_and_else_none(
    op: TransferOp, num_bytes: int
) -> None:
    plan = StepPlan(ops=(msgspec.structs.replace(op, keys=bytes(num_bytes)),))
    if num_bytes == len(op.keys):
        assert decode_plan(encode(plan)) == plan
    else:
        with pytest.raises(WireError, match="bytes of keys"):
            decode_plan(encode(plan))


@given(st.binary(max_size=13))
def test_failed_blocks_are_whole_numbers(failed: bytes) -> None:
    report = WorkerReport(0, (OpResult(1, 0, 0.0, "bad", failed),))
    if len(failed) % 4:
        with pytest.raises(WireError, match="failed blocks"):
            decode_report(encode(report))
    else:
        assert decode_report(encode(report)) == report


def test_failed_blocks_without_an_error_are_refused() -> None:
    report = WorkerReport(0, (OpResult(1, 0, 0.0, "", pack_ids([3])),))
    with pytest.raises(WireError, match="no error"):
        decode_report(encode(report))


@DECODERS
@given(data=st.binary(max_size=80))
def test_random_bytes_decode_or_raise_wire_error(
    decode: Callable[[bytes], object], data: bytes
) -> None:
    _decodes_or_refuses(decode, data)


@DECODERS
@given(
    message=st.one_of(PLANS, REPORTS),
    places=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 20),
)
def test_mutated_messages_decode_or_raise_wire_error(
    decode: Callable[[bytes], object],
    message: StepPlan | WorkerReport,
    places: list[tuple[int, int]],
    cut: int,
) -> None:
    data = bytearray(encode(message))
    for place, byte in places:
        data[place % len(data)] = byte
    _decodes_or_refuses(decode, bytes(data[: len(data) - cut]))


MSGPACK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats())
    | st.text(max_size=4)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@DECODERS
@given(value=st.lists(MSGPACK, max_size=6).map(lambda rest: [1, *rest]))
def test_other_msgpack_decodes_or_raises_wire_error(
    decode: Callable[[bytes], object], value: object
) -> None:
    _decodes_or_refuses(decode, msgspec.msgpack.encode(value))


def _decodes_or_refuses(decode: Callable[[bytes], object], data: bytes) -> None:
    """What is accepted is usable: its ids unpack, and it can be sent on."""
    try:
        message = decode(data)
    except WireError:
        return
    assert isinstance(message, StepPlan | WorkerReport)
    for op in getattr(message, "ops", ()):
        assert len(op.src.ids()) == len(op.dst.ids())
    assert decode(encode(message)) is not None
