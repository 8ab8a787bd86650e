"""Where the bytes of a KV block are: pure geometry, axes named by the connector.

Lives here: planes (the contiguous runs a block consists of) and how they are derived.
Does not live here: tensors, addresses, copies.
Invariant: the planes of a layout never overlap, and together hold every byte of a block
exactly once; a host block is their pages one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import combinations, product

import msgspec

from kvbm_core.errors import LayoutMismatch


class Plane(msgspec.Struct, frozen=True, order=True):
    """One contiguous run of bytes that every block has.

    Block b's page is `page_bytes` bytes at `offset_bytes + b * stride_bytes` of memory
    region `region`.
    """

    region: int
    offset_bytes: int
    stride_bytes: int
    page_bytes: int


class KvLayout(msgspec.Struct, frozen=True):
    """Geometry of the KV cache of one rank.

    block_size: tokens. dtype: of the elements. order: of the axes inside a page, in memory, in the
    connector's words.
    """

    planes: tuple[Plane, ...]
    num_device_blocks: int
    block_size: int
    dtype: str
    order: str = ""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank, over all layers."""
        return sum(plane.page_bytes for plane in self.planes)

    def host_offsets(self) -> list[int]:
        """Byte offset of each plane's page inside a host block."""
        offsets, end = [], 0
        for plane in self.planes:
            offsets.append(end)
            end += plane.page_bytes
        return offsets

    def fingerprint(self) -> str:
        """16 hex digits that are equal where stored blocks mean the same bytes."""
        pages = tuple(plane.page_bytes for plane in self.planes)
        shape = (pages, self.block_size, self.dtype, self.order)
        return hashlib.blake2b(msgspec.msgpack.encode(shape), digest_size=8).hexdigest()


def tensor_planes(
    *,
    region: int,
    offset_bytes: int,
    axes: Sequence[str],
    shape: Sequence[int],
    strides_bytes: Sequence[int],
    item_bytes: int,
) -> list[Plane]:
    """Planes of one tensor whose axis named ``block`` counts blocks.

    The other axes may be in any order and of any stride: what is contiguous becomes one page,
    what is not becomes a plane for each index. Raises LayoutMismatch on a tensor without a
    block axis, with two axes of one name, or with a length that differs from its axes.
    """
    if len(set(axes)) != len(axes) or len(axes) != len(shape) or len(axes) != len(strides_bytes):
        raise LayoutMismatch(f"axes {axes} do not name the shape {shape} with {strides_bytes}")
    if "block" not in axes:
        raise LayoutMismatch(f"no axis of {axes} is named 'block'")
    block = axes.index("block")
    inner = sorted(
        (stride, length)
        for axis, (stride, length) in enumerate(zip(strides_bytes, shape, strict=True))
        if axis != block and length > 1
    )
    if inner and inner[0][0] < item_bytes:
        raise LayoutMismatch(f"strides {strides_bytes} of shape {shape} repeat or reverse elements")
    page_bytes = item_bytes
    while inner and inner[0][0] == page_bytes:
        page_bytes *= inner.pop(0)[1]
    return [
        Plane(region, offset_bytes + extra, strides_bytes[block], page_bytes)
        for extra in _offsets(inner)
    ]


def merge_planes(planes: Sequence[Plane]) -> tuple[Plane, ...]:
    """Planes in address order, without repeats (layers that share memory), neighbours joined."""
    merged: list[Plane] = []
    for plane in sorted(set(planes)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.region == plane.region
            and last.stride_bytes == plane.stride_bytes
            and last.offset_bytes + last.page_bytes == plane.offset_bytes
            and last.page_bytes + plane.page_bytes <= plane.stride_bytes
        ):
            joined = last.page_bytes + plane.page_bytes
            merged[-1] = Plane(last.region, last.offset_bytes, last.stride_bytes, joined)
        else:
            merged.append(plane)
    return tuple(merged)


def check_layout(layout: KvLayout, region_bytes: Sequence[int]) -> None:
    """Raise LayoutMismatch where a block would reach outside its region or into another page."""
    if not layout.planes or layout.num_device_blocks < 1:
        raise LayoutMismatch(
            f"layout has {len(layout.planes)} planes and {layout.num_device_blocks} blocks"
        )
    for plane in layout.planes:
        end = plane.offset_bytes + (layout.num_device_blocks - 1) * plane.stride_bytes
        if not 0 <= plane.region < len(region_bytes):
            raise LayoutMismatch(f"{plane} is in none of {len(region_bytes)} memory regions")
        if plane.offset_bytes < 0 or end + plane.page_bytes > region_bytes[plane.region]:
            raise LayoutMismatch(
                f"{plane} with {layout.num_device_blocks} blocks ends at byte "
                f"{end + plane.page_bytes} of a region of {region_bytes[plane.region]} bytes"
            )
        if plane.stride_bytes < plane.page_bytes:
            raise LayoutMismatch(f"pages of {plane} overlap")
    for first, second in combinations(layout.planes, 2):
        if first.region == second.region and _share_bytes(first, second, layout.num_device_blocks):
            raise LayoutMismatch(f"{first} and {second} share bytes")


def _share_bytes(first: Plane, second: Plane, num_blocks: int) -> bool:
    """Whether any pages of two planes overlap; of unlike strides: whether they interleave."""
    distance, stride = second.offset_bytes - first.offset_bytes, first.stride_bytes
    if stride != second.stride_bytes:
        span = num_blocks - 1
        first_end = first.offset_bytes + span * stride + first.page_bytes
        second_end = second.offset_bytes + span * second.stride_bytes + second.page_bytes
        return first.offset_bytes < second_end and second.offset_bytes < first_end
    nearest = (distance // stride, distance // stride + 1)  # blocks of `first` beside block 0
    return any(
        abs(blocks) < num_blocks
        and -second.page_bytes < distance - blocks * stride < first.page_bytes
        for blocks in nearest
    )


def _offsets(axes: Sequence[tuple[int, int]]) -> Iterator[int]:
    ranges = [range(0, stride * length, stride) for stride, length in reversed(axes)]
    return (sum(steps) for steps in product(*ranges))
