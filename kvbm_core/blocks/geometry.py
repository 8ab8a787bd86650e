"""The shape of a block that a library user describes in numbers.

Lives here: those numbers, their bounds, what follows from them. Does not live here: memory.
Invariant: a BlockGeometry that exists has positive lengths and a known dtype; a block is one
contiguous run of bytes, layers one after another.
"""

from __future__ import annotations

import msgspec

from kvbm_core.errors import ConfigError
from kvbm_core.hashing import CacheNamespace
from kvbm_core.layout import KvLayout, Plane

DTYPES = {
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
}
"""Names a caller may give, with the torch name of each."""

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class BlockGeometry(msgspec.Struct, frozen=True):
    """page_size: tokens of a block. dtype: torch's name of the elements."""

    num_layer: int
    outer_dim: int
    page_size: int
    inner_dim: int
    dtype: str

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (1, self.num_layer, self.outer_dim, self.page_size, self.inner_dim)

    @property
    def layer_shape(self) -> tuple[int, int, int, int, int]:
        return (1, 1, self.outer_dim, self.page_size, self.inner_dim)

    @property
    def layer_bytes(self) -> int:
        return self.outer_dim * self.page_size * self.inner_dim * _ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layer * self.layer_bytes

    def layout(self, num_device_blocks: int) -> KvLayout:
        """Device blocks side by side in one region."""
        plane = Plane(0, 0, self.block_bytes, self.block_bytes)
        return KvLayout((plane,), num_device_blocks, self.page_size, self.dtype)

    def root(self, salt: str) -> bytes:
        """First bytes of every key of this geometry and salt."""
        shape = f"{self.num_layer}x{self.outer_dim}x{self.page_size}x{self.inner_dim}"
        return CacheNamespace("", "", self.dtype, shape, self.page_size, "").root(salt=salt)


def geometry_of(
    *, num_layer: int, outer_dim: int, page_size: int, inner_dim: int, dtype: object
) -> BlockGeometry:
    """Check what a caller gave. Raises ConfigError.

    dtype: a name of DTYPES in any case, with or without ``torch.``, a torch.dtype, or None for
    fp16.
    """
    lengths = {
        "num_layer": num_layer,
        "outer_dim": outer_dim,
        "page_size": page_size,
        "inner_dim": inner_dim,
    }
    for option, value in lengths.items():
        check_count(option, value, least=1)
    name = "fp16" if dtype is None else str(dtype).lower().removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError("dtype", dtype, "is none we know", f"Give one of {', '.join(DTYPES)}.")
    return BlockGeometry(**lengths, dtype=DTYPES[name])


def check_count(option: str, value: object, *, least: int) -> None:
    """Raise ConfigError unless the value is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(option, value, "is no integer", f"Give an integer of {least} or more.")
    if value < least:
        problem = f"is less than {least}"
        raise ConfigError(option, value, problem, f"Give an integer of {least} or more.")
