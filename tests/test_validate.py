"""validate: reads what attention leaves unread on a GPU, and says what is out of range."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from unreal_gpu import HK, SHAPES, SK, SQ, B, Maker, readable

import cuflash
from cuflash import _mask_tree as tree
from cuflash._checks import MAX_OFFSET, Check


def refused(message: str):
    return pytest.raises(ValueError, match=f"^cuflash.validate: {re.escape(message)}$")


OUT_OF_RANGE = [
    ("q_lens", [0, SQ + 1], f"q_lens holds {SQ + 1}; expected 0 to {SQ}"),
    ("kv_lens", [-1, SK], f"kv_lens holds -1; expected 0 to {SK}"),
    ("offset", [0, 2**61], f"offset holds {2**61}; expected {-MAX_OFFSET} to {MAX_OFFSET}"),
]


@pytest.mark.parametrize(("name", "values", "message"), OUT_OF_RANGE)
def test_values_on_the_host(name: str, values: list[int], message: str) -> None:
    tensors = {n: np.zeros(shape, np.float32) for n, shape in SHAPES.items()}
    for given in (values, np.array(values)):
        with refused(message):
            cuflash.validate(**tensors, **{name: given})
    assert cuflash.validate(**tensors, **{name: [0, 1]}) is None


@pytest.mark.parametrize(("name", "values", "message"), OUT_OF_RANGE)
def test_values_on_a_gpu(no_gpu_needed: None, name: str, values: list[int], message: str) -> None:
    make = Maker("cuda")
    tensors = {n: make(shape) for n, shape in SHAPES.items()}
    with refused(message):
        cuflash.validate(**tensors, **{name: readable(values)})
    fine = readable([0, 1])
    assert cuflash.validate(**tensors, **{name: fine}) is None
    assert fine.reads == ["min", "max"]


def test_attention_reads_nothing_on_a_gpu(no_gpu_needed: None) -> None:
    lengths = readable([0, 99])
    assert Maker("cuda").problem(kv_lens=lengths).kv_lens is lengths
    assert lengths.reads == []


START = np.zeros((B, HK, SK, 2), np.int32)
MASKS = {
    "prefix": (
        lambda place: tree.Prefix(place([0, SK + 1])),
        f"mask leaf 0 (prefix) n holds {SK + 1}; expected 0 to {SK}",
    ),
    "lengths": (
        lambda place: tree.Lengths(place([0, SK]), place([0, -2])),
        f"mask leaf 0 (lengths) q_lens holds -2; expected 0 to {SQ}",
    ),
    "intervals": (
        lambda place: ~tree.Intervals(place(START), place(START + SQ + 1)),
        f"mask leaf 0 (intervals) end holds {SQ + 1}; expected 0 to {SQ}",
    ),
    "window": (
        lambda place: tree.Prefix(place([0, 1])) | tree.Band(3, 0, place([0, 2**62])),
        f"mask leaf 1 (window) offset holds {2**62}; expected {-MAX_OFFSET} to {MAX_OFFSET}",
    ),
}


@pytest.mark.parametrize("place", [np.asarray, readable], ids=["host", "device"])
@pytest.mark.parametrize(("make", "message"), MASKS.values(), ids=MASKS)
def test_values_of_masks(no_gpu_needed: None, place: Any, make: Any, message: str) -> None:
    on_gpu = Maker("cuda")
    tensors = {n: on_gpu(shape) for n, shape in SHAPES.items()}
    with refused(message):
        cuflash.validate(**tensors, mask=make(place))
    if place is readable:  # attention lets it pass unread
        mask = make(place)
        assert on_gpu.problem(mask=mask).mask is mask
        assert not any(x.reads for x in mask.arrays().values())


def test_masks_on_a_gpu_that_are_possible(no_gpu_needed: None) -> None:
    on_gpu, n = Maker("cuda"), readable([0, SK])
    mask = ~tree.Prefix(n) & tree.Intervals(readable(START), readable(START + SQ))
    assert cuflash.validate(**{n: on_gpu(shape) for n, shape in SHAPES.items()}, mask=mask) is None
    assert n.reads == ["min", "max"]


def test_an_interval_that_ends_before_it_starts_is_none() -> None:
    mask = tree.Intervals(START + SQ, START)
    mask.check(Check("validate", "cpu"), tree.ScoresShape(B, 2 * HK, HK, SQ, SK))


def test_what_attention_refuses() -> None:
    x = np.zeros((1, 3, 1, 4))
    with refused("dropout is 1.0; expected at least 0 and less than 1"):
        cuflash.validate(x, x, x, dropout=1.0)
    with pytest.raises(TypeError, match="^cuflash.validate: k is float32, q is float64; expected"):
        cuflash.validate(x, x.astype(np.float32), x)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "values", "message"), OUT_OF_RANGE)
def test_values_of_a_real_gpu(name: str, values: list[int], message: str) -> None:
    import cupy

    tensors = {n: cupy.zeros(shape, np.float16) for n, shape in SHAPES.items()}
    with refused(message):
        cuflash.validate(**tensors, **{name: cupy.asarray(values)})
    assert cuflash.validate(**tensors, **{name: cupy.asarray([0, 1])}) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "message"), MASKS.values(), ids=MASKS)
def test_values_of_masks_on_a_real_gpu(make: Any, message: str) -> None:
    import cupy

    tensors = {n: cupy.zeros(shape, np.float16) for n, shape in SHAPES.items()}
    with refused(message):
        cuflash.validate(**tensors, mask=make(cupy.asarray))
    assert not cuflash.attention(**tensors, mask=make(cupy.asarray)).get().any()  # it is clipped
