from __future__ import annotations

import pytest
import torch

from kvbm_core.blocks.geometry import BlockGeometry, check_count, geometry_of
from kvbm_core.errors import ConfigError


def geometry(**changes: object) -> BlockGeometry:
    given = {"num_layer": 5, "outer_dim": 2, "page_size": 4, "inner_dim": 13, "dtype": "fp16"}
    return geometry_of(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", "float16"),
        ("FP32", "float32"),
        ("bf16", "bfloat16"),
        ("half", "float16"),
        ("torch.bfloat16", "bfloat16"),
        (torch.float32, "float32"),
        (None, "float16"),
    ],
)
def test_a_dtype_has_several_names(name: object, dtype: str) -> None:
    assert geometry(dtype=name).dtype == dtype


def test_bytes_follow_from_the_numbers() -> None:
    one = geometry(dtype="fp32")
    assert (one.layer_bytes, one.block_bytes) == (2 * 4 * 13 * 4, 5 * 2 * 4 * 13 * 4)
    assert geometry(outer_dim=1).block_bytes == 5 * 4 * 13 * 2


def test_shapes_are_those_of_the_binding() -> None:
    assert geometry().block_shape == (1, 5, 2, 4, 13)
    assert geometry().layer_shape == (1, 1, 2, 4, 13)


def test_device_blocks_lie_side_by_side() -> None:
    layout = geometry().layout(3)
    assert layout.block_bytes == geometry().block_bytes
    assert layout.planes[0].stride_bytes == geometry().block_bytes


def test_keys_begin_differently_for_another_geometry_or_salt() -> None:
    roots = [geometry().root(""), geometry().root("a"), geometry(num_layer=4).root("")]
    roots += [geometry(dtype="bf16").root(""), geometry(page_size=2).root("")]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize("option", ["num_layer", "outer_dim", "page_size", "inner_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True, None])
def test_a_length_that_is_no_positive_integer_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option}=.*Give an integer of 1 or more"):
        geometry(**{option: value})


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"dtype='fp7'.*fp16.*bf16"):
        geometry(dtype="fp7")


def test_a_count_may_be_its_least() -> None:
    check_count("count", 0, least=0)
    with pytest.raises(ConfigError, match="count=-1: is less than 0"):
        check_count("count", -1, least=0)
