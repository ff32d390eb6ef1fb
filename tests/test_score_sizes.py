"""Rows whose scores share one large number, or are of any sizes: results and gradients."""

from __future__ import annotations

from typing import Any

import backends
import numpy as np
import pytest

import cuflash
from cuflash import masks
from cuflash._checks import BFLOAT16
from cuflash.cli import oracle
from cuflash.cli.cases import Arrays

LOWEST = float(np.finfo(np.float32).min)
SHARED = (-1e4, -1e7, -1e9, -1e30, LOWEST, 1e4, 3e38)
DTYPES = ("float16", "bfloat16", "float32", "float64")

Results = tuple[np.ndarray, np.ndarray, cuflash.Gradients]


def four_keys(dtype: Any) -> tuple[np.ndarray, ...]:
    """One query and four keys that all score 0, with the values 0 to 7."""
    q, k = np.zeros((1, 1, 1, 2), dtype), np.zeros((1, 4, 1, 2), dtype)
    return q, k, np.arange(8, dtype=np.float32).astype(dtype).reshape(1, 4, 1, 2)


def assert_each_key_has_a_quarter(results: Results) -> None:
    out, _, grads = results
    np.testing.assert_array_equal(out.astype(np.float32).ravel(), [3, 4])
    np.testing.assert_array_equal(grads.dv.astype(np.float32), 0.25)


@pytest.mark.parametrize("shared", SHARED)
def test_equal_scores_of_any_size_share_the_probability(
    backend: backends.Backend, shared: float
) -> None:
    q, k, v = four_keys(BFLOAT16)
    bias = np.full(4, shared, np.float32)
    results = backend.both(np.ones_like(v[:, :1]), q, k, v, bias=bias)
    assert_each_key_has_a_quarter(results)
    np.testing.assert_array_equal(results[1], np.float32(shared + np.log(4)))
    np.testing.assert_array_equal(results[2].dbias, [-1.5, -0.5, 0.5, 1.5])


@pytest.mark.parametrize("scale", [1e4, 1e5, 1e7, 1e9, 1e29])
def test_equal_products_of_any_scale_share_the_probability(
    backend: backends.Backend, scale: float
) -> None:
    q, k, v = four_keys(np.float16)
    results = backend.both(np.ones_like(v[:, :1]), q + 1, k - 1, v, scale=scale)
    assert_each_key_has_a_quarter(results)
    np.testing.assert_array_equal(results[2].dq, 0)


@pytest.mark.parametrize("scale, softcap", [(1e30, 1e-30), (-1e9, 1e-30), (1e-30, 1e30)])
def test_a_softcap_beyond_any_ratio_to_the_scale(
    backend: backends.Backend, scale: float, softcap: float
) -> None:
    """Their quotient is infinite in float32, where products of 0 have to stay scores of 0."""
    q, k, v = four_keys(BFLOAT16)
    options = {"scale": scale, "softcap": softcap}
    results = backend.both(np.ones_like(v[:, :1]), q, k + BFLOAT16.type(1), v, **options)
    assert_each_key_has_a_quarter(results)
    np.testing.assert_array_equal(results[1], np.float32(np.log(4)))


def test_large_biases_that_differ_are_different(backend: backends.Backend) -> None:
    q, k, _ = four_keys(np.float16)
    v = np.array([1, 9], np.float16).reshape(1, 2, 1, 1)
    bias = np.array([-2.5e38, -3.4e38], np.float32)
    out, lse, grads = backend.both(np.ones_like(v[:, :1]), q, k[:, :2], v, bias=bias)
    assert out.item() == 1 and lse.item() == bias[0]
    np.testing.assert_array_equal(grads.dv.ravel(), [1, 0])


@pytest.mark.parametrize("shared", [*SHARED, -1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_of_every_dtype(dtype: str, shared: float) -> None:
    """Through the pullback, of dense and of packed arrays."""
    dtype = np.dtype(dtype) if dtype != "bfloat16" else BFLOAT16
    if dtype != np.float64:
        shared = max(shared, LOWEST)
    q, k, v = four_keys(dtype)
    bias = np.full(4, shared, np.float64 if dtype == np.float64 else np.float32)
    out, pullback = cuflash.attention_vjp(q, k, v, bias=bias)
    assert_each_key_has_a_quarter((out, None, pullback(np.ones_like(out))))

    scale = abs(shared) / 2 if abs(shared) <= 1e30 else 1e30
    edges = np.array([0, 1, 1]), np.array([0, 4, 4])
    q, k = q[0] + np.ones_like(q[0]), k[0] - np.ones_like(k[0])
    out, pullback = cuflash.attention_varlen_vjp(q, k, v[0], *edges, scale=scale)
    assert_each_key_has_a_quarter((out, None, pullback(np.ones_like(out))))


@pytest.mark.parametrize("shared, found", [(-1e9, 1), (LOWEST, 1), (3e38, 1)])
def test_lse_alone_says_less(shared: float, found: float) -> None:
    """The probabilities are at most 1 then, and the checks above would notice."""
    q, k, v = four_keys(np.float32)
    options = {"bias": np.full(4, shared, np.float32)}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    grads = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse, **options)
    np.testing.assert_array_equal(grads.dv, np.float32(found))


def test_a_row_of_nan_beside_scores_of_minus_infinity_is_nan(backend: backends.Backend) -> None:
    """It sees keys, although no score of its own is above -inf."""
    q, k, v = four_keys(np.float16)
    score_mod = cuflash.ScoreMod(
        "j < 2 ? __int_as_float(0xff800000) : score",
        "1.f",
        numpy_forward=lambda score, b, h, i, j: np.where(j < 2, -np.inf, score),
        numpy_backward=lambda score, b, h, i, j: np.ones_like(score),
    )
    options = {"score_mod": score_mod}
    results = backend.both(np.ones_like(v[:, :1]), q * np.float16(np.nan), k, v, **options)
    assert all(np.isnan(x).all() for x in (*results[:2], results[2].dv))


TERMS = {
    "sinks": {"sinks": np.float32([0])},
    "softcap": {"softcap": 2.0},
    "mask": {"mask": masks.causal() & masks.window(3, 0)},
    "dropout": {"dropout": 0.3, "seed": 5},
    "alibi": {"alibi_slopes": np.float32([1e9])},
    "score_mod": {
        "score_mod": cuflash.ScoreMod(
            "2.f * score",
            "2.f",
            numpy_forward=lambda score, b, h, i, j: 2 * score,
            numpy_backward=lambda score, b, h, i, j: np.full_like(score, 2),
        )
    },
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("shared", SHARED[:-1])
def test_large_scores_beside_other_terms(
    rng: np.random.Generator, terms: dict[str, Any], shared: float
) -> None:
    check(normal(rng, 20, 24), bias=np.full((20, 24), shared, np.float32), **terms)


@pytest.mark.parametrize("sink", SHARED)
def test_a_sink_shares_with_scores_of_its_size(rng: np.random.Generator, sink: float) -> None:
    sinks = np.float32([sink, 0])
    bias = np.full((2, 1, 1), sink, np.float32)
    check(normal(rng, 5, 7, heads=(2, 1)), bias=bias, sinks=sinks)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rows_of_mixed_magnitudes(monkeypatch: pytest.MonkeyPatch, seed: int, dtype: str) -> None:
    """Padded keys, rows that see nothing else, offsets of any size, by row, by key and by pair."""
    backends.shrink_cpu_tiles(monkeypatch, 16, 32)
    rng = np.random.default_rng(seed)
    rows, keys = int(rng.integers(1, 60)), int(rng.integers(1, 90))
    bias = np.zeros((2, 1, rows, keys))
    for shape in ((2, 1, rows, 1), (1, 1, 1, keys), (1, 1, rows, keys)):
        magnitudes = rng.choice([0, 1, 40, 1e3, 1e5, 1e9, 1e30, 3e37], shape, p=[0.93, *[0.01] * 7])
        bias += magnitudes * rng.choice([-1, 1], shape)
    bias[0, :, : rows // 2] += -1e9
    bias[1, :, :, keys // 2 :] += rng.choice([-1e4, -1e9, LOWEST / 4])
    options: dict[str, Any] = {"scale": float(rng.choice([0.3, 3, 30]))}
    if seed % 2:
        options["causal"] = True
    if seed % 3 == 0:
        options["sinks"] = rng.choice([-1e9, 0, 1e3], 4).astype(np.float32)
    if seed % 4 == 0:
        options["mask"] = rng.random((rows, keys)) < 0.7
    bias = bias.astype(np.float64 if dtype == "float64" else np.float32)
    check(normal(rng, rows, keys, (4, 2), batch=2, dtype=dtype), bias=bias, **options)


@pytest.mark.parametrize("std", [1, 12, 40])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_logits_of_any_spread(rng: np.random.Generator, std: float, options: dict) -> None:
    """Of tiles that are large enough for bounds of their scores to be looked for."""
    arrays = normal(rng, 300, 600)
    check(arrays._replace(q=arrays.q * np.float32(std)), **options)


def test_stats_are_the_largest_score_and_the_sum_relative_to_it(rng: np.random.Generator) -> None:
    for std, rows in ((1, 300), (40, 300), (1, 3)):
        arrays = normal(rng, rows, 700, heads=(2, 1))
        q, k, v = arrays.q * np.float32(std), arrays.k, arrays.v
        for options in ({}, {"window": (40, 0), "offset": -20, "sinks": np.float32([1, 60])}):
            out, lse, stats = cuflash.attention(q, k, v, return_stats=True, **options)
            scores = np.einsum("bihd,bjkd->bhij", q, k, dtype=np.float64) / np.sqrt(8)
            if options:
                i, j = np.indices(scores.shape[2:])
                hidden = (j > i - 20) | (j < i - 60)
                scores = np.where(hidden, -np.inf, scores)
                sinks = np.broadcast_to(options["sinks"][:, None, None], (1, 2, rows, 1))
                scores = np.concatenate([scores, sinks], axis=-1)
            largest = scores.max(axis=-1)
            total = np.exp(scores - largest[..., None]).sum(axis=-1)
            np.testing.assert_allclose(stats[0], largest, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(stats[1], total, rtol=1e-3)
            np.testing.assert_allclose(lse, stats[0] + np.log(stats[1]), rtol=1e-5, atol=1e-5)
            plain = cuflash.attention(q, k, v, **options)
            np.testing.assert_array_equal(plain, out)  # stats are no reason for other bits


# --------------------------------------------------------------------------------------- one key


def test_one_key_gives_its_value_to_the_bit(rng: np.random.Generator) -> None:
    exponents = rng.uniform(-37, 38, 200)
    for dtype, most in ((np.float32, 1), (np.float64, 8)):
        signs = rng.choice([-1, 1], exponents.size)
        v = (signs * 10.0 ** (most * exponents)).astype(dtype).reshape(-1, 1, 1, 1)
        q = (10 ** rng.uniform(-3, 8, v.shape)).astype(dtype)
        k = rng.standard_normal(v.shape).astype(dtype)
        out, pullback = cuflash.attention_vjp(q, k, v, scale=1.0)
        np.testing.assert_array_equal(out, v)
        grads = pullback(np.ones_like(out))
        np.testing.assert_array_equal(grads.dv, 1)


@pytest.mark.parametrize(
    "score, value", [(15, 1e33), (2, 1e38), (-15, 1e-36), (-16, 1e-38), (0, 3.4e38)]
)
def test_one_key_in_a_tile_of_many(score: float, value: float) -> None:
    """The first row of a causal tile sees the first key alone; other rows see small values."""
    q, k = np.ones((1, 512, 1, 1), np.float32), np.zeros((1, 512, 1, 1), np.float32)
    k[:, 0] = score
    v = np.full((1, 512, 1, 1), 1e-3 * value, np.float32)
    v[:, 0] = value
    for options in ({"offset": 0, "causal": True}, {"mask": masks.causal()}):
        out = cuflash.attention(q, k, v, scale=1.0, **options)
        assert out[0, 0, 0, 0] == np.float32(value)


def test_values_near_the_largest_number_behind_the_first_keys(rng: np.random.Generator) -> None:
    """What the first keys say of a row's scores would let what comes later overflow."""
    q = np.ones((1, 600, 1, 1), np.float32)
    k = rng.uniform(-1, 1, (1, 600, 1, 1)).astype(np.float32)
    v = np.ones((1, 600, 1, 1), np.float32)
    k[:, 599], v[:, 599] = 20, 3e38
    out = cuflash.attention(q, k, v, scale=1.0)
    right = oracle.reference.attention(q, k, v, scale=1.0)[0]
    np.testing.assert_allclose(out, right, rtol=1e-5)


# ----------------------------------------------------------------------------------------- helpers


def normal(
    rng: np.random.Generator,
    rows: int,
    keys: int,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    dtype: str = "float32",
) -> Arrays:
    shapes = ((rows, heads[0]), (keys, heads[1]), (keys, heads[1]), (rows, heads[0]))
    dtype = BFLOAT16 if dtype == "bfloat16" else dtype
    arrays = (rng.standard_normal((batch, *shape, 8)).astype(dtype) for shape in shapes)
    dlse = rng.standard_normal((batch, heads[0], rows))
    return Arrays(*arrays, dlse.astype(np.float64 if dtype == "float64" else np.float32))


def check(arrays: Arrays, **options: Any) -> None:
    """Results and gradients are within the oracle's bounds."""
    q, k, v, dout, dlse = arrays
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True, **options)
    found = {"out": out, "lse": lse, **pullback(dout, dlse)._asdict()}
    for name, bound in oracle.expect(arrays, options).items():
        # The oracle's residue of float32 is for numbers of size 1.
        largest = np.abs(bound.exact[np.isfinite(bound.exact)]).max(initial=1)
        error, allowed = bound.error(found[name]), bound.allowed + 4e-7 * largest
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
