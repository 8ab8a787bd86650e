from __future__ import annotations

import pytest

from kvbm_core.types import Blocks, OpResult, Tier, TransferOp, pack_ids, unpack_ids

HOST, DEVICE = Blocks.of(Tier.HOST, [1]), Blocks.of(Tier.DEVICE, [2])


def test_ids_are_packed_as_little_endian_u32() -> None:
    assert pack_ids([1, 258]) == b"\x01\0\0\0\x02\x01\0\0"


@pytest.mark.parametrize("block_id", [-1, 2**32])
def test_an_id_that_is_no_u32_cannot_be_packed(block_id: int) -> None:
    with pytest.raises(OverflowError):
        pack_ids([block_id])


def test_half_an_id_cannot_be_unpacked() -> None:
    with pytest.raises(ValueError):
        unpack_ids(b"\0\0\0\0\0")


def test_blocks_know_their_number_and_keep_their_order() -> None:
    blocks = Blocks.of(Tier.HOST, [5, 3, 5])
    assert (len(blocks), list(blocks.ids())) == (3, [5, 3, 5])


def test_an_op_to_the_device_is_an_onboard() -> None:
    assert TransferOp(1, ("r",), HOST, DEVICE).is_onboard
    assert not TransferOp(1, ("r",), DEVICE, HOST).is_onboard


def test_a_route_names_both_tiers() -> None:
    assert TransferOp(1, ("r",), HOST, DEVICE).route == "host_to_device"


def test_a_result_is_ok_exactly_without_an_error() -> None:
    assert OpResult(1, 0, 0.0).ok
    assert not OpResult(1, 0, 0.0, "why").ok
