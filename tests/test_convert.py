"""Conversions between types on a GPU, by a kernel of our own: against NumPy's, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import EmulatedGpu
from conftest import emulated

pytest.importorskip("cupy", reason="launches need CuPy")

from cuflash import _packed_tiles  # noqa: E402
from cuflash._checks import BFLOAT16  # noqa: E402
from cuflash._convert import TYPES, as_contiguous  # noqa: E402

FLOATS = (np.float16, BFLOAT16, np.float32, np.float64)
# What integers, slopes, sinks and lse are read as, and what the sinks' gradient is given as.
PAIRS = [(x, np.int64) for x in TYPES[:8]]
PAIRS += [(x, np.float32) for x in FLOATS] + [(np.float32, x) for x in FLOATS]


def name_of(value: Any) -> str:
    return np.dtype(value).name


def values(dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """(3, 50, 7) of every size, and numbers at the ends of the type."""
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        x = rng.integers(ends.min, ends.max, (3, 50, 7), dtype, endpoint=True)
        x[0, 0, :2] = ends.min, min(ends.max, np.iinfo(np.int64).max)
        return x
    x = rng.standard_normal((3, 50, 7)) * 10.0 ** rng.integers(-6, 6, (3, 50, 7))
    x = np.clip(x, -65504, 65504).astype(dtype)
    x[0, 0, :4] = np.inf, -np.inf, -0.0, 1 + 2**-9
    return x


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=name_of)
def test_a_conversion_is_numpys(source: Any, target: Any, rng: np.random.Generator) -> None:
    emulated()
    x = values(np.dtype(source), rng)
    some = [x, x[::-1, ::2], x.T, x[1, 4, ::3], x[None, :, :0], x[:1, :1, :1]]
    gpu = EmulatedGpu(80, "lazy", 0, [x])
    found = [as_contiguous(array, np.dtype(target), gpu) for array in some]
    gpu.synchronize()
    for array, copy in zip(some, found, strict=True):
        with np.errstate(all="ignore"):
            expected = array.astype(target)
        assert copy.flags.c_contiguous and copy.dtype == target
        assert copy.tobytes() == expected.tobytes()


def test_what_is_right_is_not_copied() -> None:
    x = np.zeros((2, 3))
    assert as_contiguous(x, x.dtype) is x


@pytest.mark.parametrize("cu", [[0, 5, 30], [3, 5, 30], [0, 40], [0], [9]], ids=str)
def test_the_rest_of_packed_tokens(cu: list[int]) -> None:
    """Of 40 tokens, before the first sequence too, where lengths on a GPU start there."""
    backend, tokens, heads, size = emulated(), 40, 2, 33
    q = np.random.default_rng(0).standard_normal((tokens, heads, size)).astype(np.float16)
    wider = np.full((tokens, heads, 40), np.nan, np.float16)
    edges = np.array(cu)
    if cu[0]:  # which is refused on the host
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cuflash._checks.Check.never_decreasing", lambda *_: None)
            out, lse = backend.forward_varlen(q, q, q, edges, edges, out=wider[..., :size])
    else:
        out, lse = backend.forward_varlen(q, q, q, edges, edges, out=wider[..., :size])
    inside = np.zeros(tokens, bool)
    inside[cu[0] : cu[-1]] = True
    assert (out[~inside] == 0).all() and np.isneginf(lse[:, ~inside]).all()
    assert np.isfinite(out[inside]).all() and np.isfinite(lse[:, inside]).all()
    assert np.isnan(wider[..., size:]).all()


def test_a_rest_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_rest = _packed_tiles.fill_rest
    monkeypatch.setattr("cuflash._launch.fill_rest", lambda *_: None)
    q, edges = np.zeros((4, 1, 32), np.float16), np.array([0, 3])
    _, lse = emulated().forward_varlen(q, q, q, edges, edges)
    assert np.isnan(lse[0, 3])
    monkeypatch.setattr("cuflash._launch.fill_rest", fill_rest)
    _, lse = emulated().forward_varlen(q, q, q, edges, edges)
    assert np.isneginf(lse[0, 3])
