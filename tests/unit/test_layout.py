from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvbm_core.errors import LayoutMismatch
from kvbm_core.layout import KvLayout, Plane, check_layout, merge_planes, tensor_planes
from tests.unit import tensors
from tests.unit.tensors import CACHES, NUM_BLOCKS, Cache

PAGES = {"cpu": 3, "block_outermost": 1, "head_outermost": 4, "kv_outermost": 4, "mla": 2}


@pytest.mark.parametrize("make", CACHES)
def test_the_planes_hold_every_byte_of_a_block_exactly_once(make: Callable[[], Cache]) -> None:
    cache = make()
    check_layout(cache.layout, [region.numel() for region in cache.regions])
    for index in range(NUM_BLOCKS):
        assert cache.block_by_planes(index) == cache.block(index)


@pytest.mark.parametrize("make", CACHES)
def test_blocks_do_not_overlap(make: Callable[[], Cache]) -> None:
    layout, taken = make().layout, set()
    for plane in layout.planes:
        for index in range(NUM_BLOCKS):
            start = plane.offset_bytes + index * plane.stride_bytes
            page = {(plane.region, byte) for byte in range(start, start + plane.page_bytes)}
            assert not taken & page
            taken |= page
    assert len(taken) == NUM_BLOCKS * layout.block_bytes


@pytest.mark.parametrize(("name", "num_pages"), PAGES.items())
def test_a_block_has_as_few_pages_as_its_memory_allows(name: str, num_pages: int) -> None:
    assert len(getattr(tensors, name)().layout.planes) == num_pages


def test_pages_follow_each_other_in_a_host_block() -> None:
    planes = (Plane(0, 0, 100, 10), Plane(1, 0, 100, 30), Plane(2, 0, 100, 5))
    layout = KvLayout(planes, 2, 4, "int8")
    assert layout.host_offsets() == [0, 10, 40]
    assert layout.block_bytes == 45


def test_layers_that_share_memory_are_stored_once() -> None:
    layer = tensors.cpu().layers[0]
    cache = tensors.cache_of([layer, layer], tensors.CPU_AXES)
    assert cache.layout.block_bytes == layer[0].numel() * 4


def test_neighbours_of_another_stride_or_region_stay_apart() -> None:
    planes = [Plane(0, 0, 64, 16), Plane(0, 16, 32, 16), Plane(1, 32, 64, 16)]
    assert merge_planes(planes) == tuple(planes)


def test_neighbours_that_are_another_block_stay_apart() -> None:
    """The next block begins where this plane's page ends: nothing to join."""
    planes = [Plane(0, 0, 16, 16), Plane(0, 16, 16, 16)]
    assert merge_planes(planes) == tuple(planes)


def test_the_fingerprint_depends_on_what_the_bytes_mean_and_not_on_where_they_are() -> None:
    layout = tensors.cpu().layout
    moved = msgspec.structs.replace(
        layout,
        planes=tuple(Plane(p.region, p.offset_bytes, 10**6, p.page_bytes) for p in layout.planes),
        num_device_blocks=99,
    )
    assert moved.fingerprint() == layout.fingerprint()
    for change in ({"dtype": "int8"}, {"block_size": 8}, {"planes": layout.planes[:1]}):
        changed: Any = msgspec.structs.replace(layout, **change)
        assert changed.fingerprint() != layout.fingerprint()


def test_the_golden_fingerprint() -> None:
    assert KvLayout((Plane(0, 0, 64, 64),), 4, 16, "bfloat16").fingerprint() == "ae5808a98bbb9fee"


@pytest.mark.parametrize(
    ("axes", "shape", "strides"),
    [
        (("token", "head"), (4, 2), (8, 4)),
        (("block", "block"), (4, 2), (8, 4)),
        (("block",), (4, 2), (8, 4)),
        (("block", "head"), (4, 2), (8,)),
    ],
)
def test_axes_that_do_not_name_a_block_are_refused(axes: Any, shape: Any, strides: Any) -> None:
    with pytest.raises(LayoutMismatch):
        tensor_planes(
            region=0, offset_bytes=0, axes=axes, shape=shape, strides_bytes=strides, item_bytes=4
        )


GOOD = Plane(0, 0, 16, 16)


@pytest.mark.parametrize(
    ("planes", "num_blocks"),
    [
        ((), 4),
        ((GOOD,), 0),
        ((GOOD,), 5),
        ((Plane(1, 0, 16, 16),), 4),
        ((Plane(-1, 0, 16, 16),), 4),
        ((Plane(0, -16, 16, 16),), 4),
        ((Plane(0, 1, 16, 16),), 4),
        ((Plane(0, 0, 8, 16),), 4),
        ((Plane(0, 48, -16, 16),), 4),
    ],
)
def test_a_layout_that_leaves_its_memory_is_refused(planes: Any, num_blocks: int) -> None:
    check_layout(KvLayout((GOOD,), 4, 16, "int8"), [64])
    with pytest.raises(LayoutMismatch):
        check_layout(KvLayout(planes, num_blocks, 16, "int8"), [64])


@pytest.mark.parametrize("other", [GOOD, Plane(0, 8, 32, 16)])
def test_planes_that_share_bytes_are_refused(other: Plane) -> None:
    """The module's invariant: the planes of a layout never overlap."""
    with pytest.raises(LayoutMismatch):
        check_layout(KvLayout((Plane(0, 0, 32, 16), other), 2, 16, "int8"), [64])


@pytest.mark.parametrize("stride", [0, -2])
def test_an_axis_that_repeats_or_reverses_elements_is_refused(stride: int) -> None:
    with pytest.raises(LayoutMismatch, match="repeat or reverse"):
        tensor_planes(
            region=0,
            offset_bytes=0,
            axes=("block", "head", "content"),
            shape=(2, 3, 4),
            strides_bytes=(64, stride, 2),
            item_bytes=2,
        )
