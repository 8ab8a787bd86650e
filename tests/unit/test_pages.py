"""Both copiers under one contract: the same bytes, or an error and nothing written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from kvbm_core.errors import LayoutMismatch
from kvbm_core.layout import KvLayout, Plane
from kvbm_core.transfer.pages import BlockCopier, ForeachCopier, NativeCopier, cpu_copier
from tests.unit.tensors import CACHES, NUM_BLOCKS, Cache

NUM_HOST_BLOCKS = 9
COPIERS = pytest.mark.parametrize("make_copier", [NativeCopier, ForeachCopier])
Make = Callable[[KvLayout, Sequence[torch.Tensor], torch.Tensor], BlockCopier]


def random_memory(seed: int) -> tuple[KvLayout, list[torch.Tensor], torch.Tensor]:
    """A random layout with odd sizes and strides, and random bytes everywhere."""
    draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
    planes, ends = [], [0, 0, 0]
    for _ in range(draw.randint(1, 5)):
        region, page = draw.randrange(3), draw.choice([1, 7, 16, 64, 129, 1000])
        stride = page + draw.choice([0, 1, 13])
        planes.append(Plane(region, ends[region] + draw.randint(0, 3), stride, page))
        ends[region] = planes[-1].offset_bytes + stride * NUM_BLOCKS
    layout = KvLayout(tuple(planes), NUM_BLOCKS, 4, "int8")
    regions = [torch.randint(256, (end + 1,), generator=make).to(torch.uint8) for end in ends]
    host = torch.randint(256, (NUM_HOST_BLOCKS, layout.block_bytes), generator=make)
    return layout, regions, host.to(torch.uint8)


def expected(
    layout: KvLayout,
    memory: tuple[list[torch.Tensor], torch.Tensor],
    pairs: Sequence[tuple[int, int]],
    to_host: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same copy, byte range by byte range."""
    regions, host = [region.clone() for region in memory[0]], memory[1].clone()
    for device_id, host_id in pairs:
        for plane, offset in zip(layout.planes, layout.host_offsets(), strict=True):
            start = plane.offset_bytes + device_id * plane.stride_bytes
            page = regions[plane.region][start : start + plane.page_bytes]
            slot = host[host_id, offset : offset + plane.page_bytes]
            (slot if to_host else page).copy_(page if to_host else slot)
    return regions, host


@COPIERS
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_exactly_the_named_pages_are_copied(make_copier: Make, to_host: bool, seed: int) -> None:
    layout, regions, host = random_memory(seed)
    draw = random.Random(seed)
    count = draw.randint(1, NUM_BLOCKS)
    device_ids = draw.sample(range(NUM_BLOCKS), count)
    host_ids = draw.sample(range(NUM_HOST_BLOCKS), count)
    pairs = list(zip(device_ids, host_ids, strict=True))
    want_regions, want_host = expected(layout, (regions, host), pairs, to_host)
    make_copier(layout, regions, host).copy(device_ids, host_ids, to_host=to_host)
    assert torch.equal(host, want_host)
    assert all(map(torch.equal, regions, want_regions))


@COPIERS
@pytest.mark.parametrize("make_cache", CACHES)
def test_a_block_comes_back_as_it_left(make_copier: Make, make_cache: Callable[[], Cache]) -> None:
    cache = make_cache()
    before = [layer.clone() for layer in cache.layers]
    host = torch.zeros(NUM_BLOCKS, cache.layout.block_bytes, dtype=torch.uint8)
    copier = make_copier(cache.layout, cache.regions, host)
    ids = list(range(NUM_BLOCKS))
    copier.copy(ids, ids[::-1], to_host=True)
    for layer in cache.layers:
        layer.zero_()
    copier.copy(ids, ids[::-1], to_host=False)
    assert all(map(torch.equal, cache.layers, before))


@COPIERS
@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize(
    ("device_ids", "host_ids"),
    [
        ([0, NUM_BLOCKS], [0, 1]),
        ([0, 1], [0, NUM_HOST_BLOCKS]),
        ([0, 2**32 - 1], [0, 1]),
        ([0, -1], [0, 1]),
        ([0, 1], [0, -1]),
        ([0, 1], [0]),
        ([0], [0, 1]),
    ],
)
def test_bad_ids_raise_and_nothing_is_written(
    make_copier: Make, to_host: bool, device_ids: list[int], host_ids: list[int]
) -> None:
    layout, regions, host = random_memory(1)
    before = expected(layout, (regions, host), [], to_host)
    copier = make_copier(layout, regions, host)
    with pytest.raises((ValueError, IndexError, OverflowError)):
        copier.copy(device_ids, host_ids, to_host=to_host)
    assert torch.equal(host, before[1])
    assert all(map(torch.equal, regions, before[0]))


@COPIERS
def test_no_ids_copy_nothing(make_copier: Make) -> None:
    layout, regions, host = random_memory(1)
    before = host.clone()
    make_copier(layout, regions, host).copy([], [], to_host=True)
    assert torch.equal(host, before)


@COPIERS
def test_memory_smaller_than_the_layout_is_refused(make_copier: Make) -> None:
    layout, regions, host = random_memory(1)
    with pytest.raises(LayoutMismatch):
        make_copier(layout, [region[:1] for region in regions], host)


@COPIERS
def test_host_blocks_of_another_size_are_refused(make_copier: Make) -> None:
    """Else the last block would be written past the arena's end."""
    layout, regions, _ = random_memory(1)
    host: Any = torch.zeros(NUM_HOST_BLOCKS, layout.block_bytes - 1, dtype=torch.uint8)
    with pytest.raises((LayoutMismatch, ValueError)):
        make_copier(layout, regions, host)


@COPIERS
def test_a_copier_says_how_large_a_block_is(make_copier: Make) -> None:
    layout, regions, host = random_memory(3)
    assert make_copier(layout, regions, host).block_bytes == layout.block_bytes == host.shape[1]


def test_the_compiled_copier_is_used_where_it_was_built() -> None:
    assert isinstance(cpu_copier(*random_memory(1)), NativeCopier)
