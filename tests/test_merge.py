"""Merging partial states gives what one call over all keys gives."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuflash
from cuflash import reference

B, S, H, D = 2, 6, 3, 4
OUT, LSE = (B, S, H, D), (B, H, S)


def states(
    n: int, dtype: Any = np.float32, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lse_dtype = np.float64 if dtype == np.float64 else np.float32
    outs = [rng.standard_normal(OUT).astype(dtype) for _ in range(n)]
    lses = [(10 * rng.standard_normal(LSE)).astype(lse_dtype) for _ in range(n)]
    return outs, lses


def float64_merge(outs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lse = np.logaddexp.reduce([x.astype(np.float64) for x in lses])
    weights = [np.exp(x - lse).swapaxes(1, 2)[..., None] for x in lses]
    return sum(w * x.astype(np.float64) for w, x in zip(weights, outs, strict=True)), lse


@pytest.mark.parametrize("splits", [(4,), (1, 2, 3), (0, 5), (3, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_disjoint_keys_merge_into_all_of_them(splits: tuple[int, ...], causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, B, S, H, D))
    bounds = [0, *splits, S]
    parts = [
        cuflash.attention(
            q, k[:, start:stop], v[:, start:stop], causal=causal, offset=-start, return_lse=True
        )
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    out, lse = cuflash.merge(*zip(*parts, strict=True))
    expected, expected_lse = reference.attention(q, k, v, causal=causal, offset=0)
    assert np.abs(out - expected).max() <= 1e-13
    assert np.abs(lse - expected_lse).max() <= 1e-13


def test_gradients_go_back_through_the_parts() -> None:
    """As the notes have it: the merged out and lse, sinks in one part alone, the dq added up."""
    rng = np.random.default_rng(0)
    q, dout = rng.standard_normal((2, B, S, H, D))
    k, v = rng.standard_normal((2, B, S + 3, H, D))
    sinks = rng.standard_normal(H)
    parts = []
    for keys in (slice(0, 4), slice(4, S + 3)):
        given = {"sinks": sinks} if not keys.start else {}
        parts.append(
            (q, k[:, keys], v[:, keys], {"offset": 3 - keys.start, "causal": True, **given})
        )
    states = [cuflash.attention(*x, **options, return_lse=True) for *x, options in parts]
    out, lse = cuflash.merge(*zip(*states, strict=True))
    grads = [cuflash.attention_backward(dout, *x, out, lse, **options) for *x, options in parts]
    expected = reference.attention_backward(dout, q, k, v, causal=True, sinks=sinks)
    found = (
        sum(some.dq for some in grads),
        np.concatenate([some.dk for some in grads], axis=1),
        np.concatenate([some.dv for some in grads], axis=1),
        grads[0].dsinks,
    )
    for x, right in zip(found, (*expected[:3], expected.dsinks), strict=True):
        assert np.abs(x - right).max() <= 1e-12


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_against_float64(dtype: Any, n: int) -> None:
    outs, lses = states(n, dtype)
    out, lse = cuflash.merge(outs, lses)
    expected, expected_lse = float64_merge(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, lses[0].dtype)
    roundings = float(ml_dtypes.finfo(dtype).eps) * max(1, np.abs(expected).max())
    assert np.abs(out.astype(np.float64) - expected).max() <= 4 * roundings
    assert np.abs(lse - expected_lse).max() <= 4 * np.finfo(lse.dtype).eps * np.abs(lse).max()


def test_the_inputs_are_left_alone() -> None:
    outs, lses = states(2)
    copies = [x.copy() for x in outs + lses]
    out, lse = cuflash.merge(outs[:1], lses[:1])
    assert np.array_equal(out, outs[0])
    out[...] = lse[...] = 0
    cuflash.merge(outs, lses)
    assert all(np.array_equal(x, y) for x, y in zip(outs + lses, copies, strict=True))


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_empty_states_weigh_nothing(garbage: float) -> None:
    outs, lses = states(3)
    lses[0][:, :, :4] = -np.inf
    lses[2][...] = -np.inf
    outs[0][:, :4] = outs[2][...] = garbage
    out, lse = cuflash.merge(outs, lses)
    assert np.array_equal(out[:, :4], outs[1][:, :4])
    assert np.array_equal(lse[:, :, :4], lses[1][:, :, :4])
    expected, expected_lse = float64_merge(
        [x[:, 4:] for x in outs[:2]], [x[..., 4:] for x in lses[:2]]
    )
    assert np.abs(out[:, 4:] - expected).max() <= 1e-6
    assert np.abs(lse[:, :, 4:] - expected_lse).max() <= 1e-5


@pytest.mark.filterwarnings("error")
def test_all_empty() -> None:
    out, lse = cuflash.merge(
        [np.full(OUT, np.nan, np.float16)] * 2, [np.full(LSE, -np.inf, "f4")] * 2
    )
    assert not out.any()
    assert np.isneginf(lse).all()


def test_large_lses_do_not_overflow() -> None:
    outs, lses = states(2)
    shifted = cuflash.merge(outs, [x + 1e4 for x in lses])
    expected = float64_merge(outs, [x + np.float32(1e4) for x in lses])
    assert np.abs(shifted[0] - expected[0]).max() <= 1e-2
    assert np.abs(shifted[1] - expected[1]).max() <= 1e-2


def test_order_and_grouping_do_not_matter() -> None:
    outs, lses = states(4, np.float64)
    at_once = cuflash.merge(outs, lses)
    backwards = cuflash.merge(outs[::-1], lses[::-1])
    pairs = [cuflash.merge(outs[i : i + 2], lses[i : i + 2]) for i in (0, 2)]
    in_pairs = cuflash.merge(*zip(*pairs, strict=True))
    for x in (backwards, in_pairs):
        assert np.abs(x[0] - at_once[0]).max() <= 1e-14
        assert np.abs(x[1] - at_once[1]).max() <= 1e-13


def test_nan_stays_in_its_row() -> None:
    outs, lses = states(2)
    outs[0][0, 1, 2, 3] = np.nan
    lses[1][1, 0, 4] = np.nan
    out, lse = cuflash.merge(outs, lses)
    assert np.isnan(out[0, 1, 2, 3])
    assert np.isnan(out[1, 4, 0]).all()
    assert np.isnan(out).sum() == 1 + D
    assert np.isnan(lse).sum() == 1


def test_stacked_states() -> None:
    outs, lses = states(3)
    out, lse = cuflash.merge(np.stack(outs), np.stack(lses))
    expected, expected_lse = cuflash.merge(outs, lses)
    assert np.array_equal(out, expected)
    assert np.array_equal(lse, expected_lse)


def test_strided_states() -> None:
    outs, lses = states(2)
    out, _ = cuflash.merge(
        [x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in outs], [x[::-1].copy()[::-1] for x in lses]
    )
    assert np.array_equal(out, cuflash.merge(outs, lses)[0])


@pytest.mark.parametrize("shape", [(0, S, H, D), (B, 0, H, D), (B, S, 0, D), (B, S, H, 0)])
def test_empty_axes(shape: tuple[int, int, int, int]) -> None:
    batch, seqlen, heads, _ = shape
    lse = np.zeros((batch, heads, seqlen), np.float32)
    out, merged_lse = cuflash.merge([np.zeros(shape, np.float16)] * 2, [lse] * 2)
    assert out.shape == shape
    assert merged_lse.shape == lse.shape


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    outs, lses = states(2)
    out, lse = cuflash.merge(
        [torch.from_numpy(x).bfloat16() for x in outs], [torch.from_numpy(x) for x in lses]
    )
    assert isinstance(out, torch.Tensor)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert np.abs(out.float().numpy() - float64_merge(outs, lses)[0]).max() <= 0.05


def test_jax_in_jax_out() -> None:
    jax = pytest.importorskip("jax")
    outs, lses = states(2)
    out, lse = cuflash.merge(jax.numpy.stack(outs), jax.numpy.stack(lses))
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    assert np.abs(np.asarray(out) - float64_merge(outs, lses)[0]).max() <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_cupy_in_cupy_out(dtype: Any) -> None:
    cupy = pytest.importorskip("cupy")
    outs, lses = states(3, dtype)
    lses[0][...] = -np.inf
    expected, expected_lse = cuflash.merge(outs, lses)
    out, lse = cuflash.merge([cupy.asarray(x) for x in outs], [cupy.asarray(x) for x in lses])
    assert isinstance(out, cupy.ndarray)
    difference = np.abs(out.get().astype(np.float64) - expected.astype(np.float64)).max()
    assert difference <= 4 * float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(lse.get() - expected_lse).max() <= 1e-5


# What is refused


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (None, [], TypeError, "outs is a NoneType; expected a sequence of arrays"),
        ([], 3, TypeError, "lses is a int; expected a sequence of arrays"),
        ([], [], ValueError, "outs has 0 arrays, lses has 0; expected the same number, at least 1"),
        (
            [np.zeros(OUT)],
            [np.zeros(LSE)] * 2,
            ValueError,
            "outs has 1 arrays, lses has 2; expected the same number, at least 1",
        ),
        (
            np.zeros(OUT),
            [np.zeros(LSE)] * B,
            ValueError,
            f"outs[0] has 3 axes, shape {OUT[1:]}; "
            "expected 4 axes (batch, length, heads, head size); x[None] is a batch of one, and "
            "attention_varlen takes packed sequences",
        ),
        (
            [np.zeros(OUT), np.zeros((B, S, H, 5))],
            [np.zeros(LSE)] * 2,
            ValueError,
            f"outs[1] has shape {(B, S, H, 5)}; expected {OUT}",
        ),
        (
            [np.zeros(OUT)] * 2,
            [np.zeros(LSE), np.zeros((B, S, H))],
            ValueError,
            f"lses[1] has shape {(B, S, H)}; expected {LSE}, as lses[1].swapaxes(-2, -1) has",
        ),
        (
            [np.zeros(OUT), np.zeros(OUT, "f4")],
            [np.zeros(LSE)] * 2,
            TypeError,
            "outs[1] is float32; expected float64",
        ),
        ([np.zeros(OUT)], [np.zeros(LSE, "f4")], TypeError, "lses[0] is float32; expected float64"),
        (
            [np.zeros(OUT, "f4")],
            [np.zeros(LSE)],
            TypeError,
            "lses[0] is float64; expected float32",
        ),
        (
            [np.zeros(OUT, int)],
            [np.zeros(LSE)],
            TypeError,
            "outs[0] is int64; expected one of float16, bfloat16, float32, float64 on the CPU",
        ),
        (
            [np.zeros(OUT), [0.0]],
            [np.zeros(LSE)] * 2,
            TypeError,
            "outs[1] is a list; "
            "expected an array of NumPy, CuPy, torch, JAX, or anything with __dlpack__",
        ),
    ],
)
def test_bad_states(outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("cuflash.merge: " + message) + "$"):
        cuflash.merge(outs, lses)


def test_mixed_kinds() -> None:
    torch = pytest.importorskip("torch")
    outs, lses = states(2)
    message = "outs.0. is a numpy.ndarray on cpu, lses.1. is a torch.Tensor on cpu; expected one"
    with pytest.raises(TypeError, match=message):
        cuflash.merge(outs, [lses[0], torch.from_numpy(lses[1])])
