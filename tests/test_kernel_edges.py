"""Corners of masks and terms on the kernels: empty keys, extreme numbers, several expressions."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import emulated

import cuflash
from cuflash import masks

HEAD_DIM = 32


def _arrays(seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return tuple(rng.standard_normal((1, n, 1, HEAD_DIM)).astype(np.float16) for n in lengths)


def test_expressions_without_arrays_are_functions_of_their_own() -> None:
    even_rows, even_keys = masks.expression("i % 2 == 0"), masks.expression("j % 2 == 0")
    visible = np.zeros((32, 32), bool)
    visible[::2, ::2] = True
    backend, arrays = emulated(capability=80), _arrays(32, 32)
    found = backend.forward(*arrays, mask=even_rows & even_keys)
    expected = backend.forward(*arrays, mask=visible)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_keys_under_a_dense_mask() -> None:
    out, lse = emulated(capability=80).forward(*_arrays(16, 0), mask=np.ones((16, 0), bool))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_no_keys_under_a_bias_and_sinks() -> None:
    q, k, v = _arrays(16, 0)
    options = {"bias": np.zeros((16, 0), np.float32), "sinks": np.ones(1, np.float32)}
    backend = emulated(capability=80)
    out, lse = backend.forward(q, k, v, **options)
    grads = backend.backward(out, q, k, v, out, lse, **options)
    assert grads.dbias.shape == (16, 0)
    assert not grads.dq.any()


def test_blocks_larger_than_any_array() -> None:
    backend, arrays = emulated(capability=80), _arrays(16, 32)
    found = backend.forward(*arrays, mask=masks.blocks(np.ones((1, 1), bool), 1 << 40, 1 << 40))
    expected = backend.forward(*arrays)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_documents_of_the_lowest_number() -> None:
    q_ids, kv_ids = np.full((1, 16), 5), np.full((1, 128), 5)
    q_ids[0, 0] = np.iinfo(np.int64).min
    _, lse = emulated(capability=80).forward(*_arrays(16, 128), mask=masks.documents(q_ids, kv_ids))
    assert np.isneginf(lse[0, 0, 0])
    assert np.isfinite(lse[0, 0, 1:]).all()


@pytest.mark.parametrize("term", ["bias", "score_mod", "sinks"])
def test_nan_passes_terms(term: str) -> None:
    q, k, v = _arrays(16, 32)
    options = {}
    if term == "bias":
        options["bias"] = np.zeros((16, 32), np.float32)
        options["bias"][3, 5] = np.nan
    elif term == "sinks":
        options["sinks"] = np.full(1, np.nan, np.float32)
    else:
        q[0, 3] = np.nan
        options["score_mod"] = cuflash.ScoreMod("score", "1.f")
    out, lse = emulated(capability=80).forward(q, k, v, **options)
    assert np.isnan(lse[0, 0, 3])
    assert np.isnan(out[0, 3].astype(np.float32)).all()


def test_the_largest_bias_stays_finite() -> None:
    q, k, v = _arrays(16, 32)
    bias = np.zeros((16, 32), np.float32)
    bias[3, 5] = np.finfo(np.float32).max
    out, _ = emulated(capability=80).forward(q, k, v, bias=bias)
    np.testing.assert_array_equal(out[0, 3], v[0, 5])
