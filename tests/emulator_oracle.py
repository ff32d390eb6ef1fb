"""Random inputs, float64 references and error bounds for what runs on the emulator.

Attention tensors are (B, S, H, D), statistics (B, H, S). The bounds are per element and first
order: one rounding to the input's type per probability (or score gradient) and per output, plus
what float32 arithmetic loses.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
from emulator import guarded

DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}
# Relative to the sum of absolute products: a few hundred float32 roundings, mostly cancelling.
FLOAT32_SLACK = 2.0**-17
# float16 probabilities below 2**-14 are rounded to a grid, not relatively.
ABSOLUTE_SLACK = 1e-5


def random_tensor(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Standard normal values, read-only, in memory that is guarded on both sides."""
    tensor = guarded(shape, DTYPES[dtype])
    tensor[...] = rng.standard_normal(shape)
    tensor.flags.writeable = False  # a kernel that writes here is in error
    return tensor


def assert_within(found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> None:
    """Every element is finite and within its tolerance."""
    error = np.abs(found.astype(np.float64) - expected)
    worst = np.max(np.where(np.isnan(error), np.inf, error - tolerance))
    assert worst <= 0, f"error exceeds its bound by {worst:.3g}; largest error {np.max(error):.3g}"


@dataclasses.dataclass(frozen=True)
class Forward:
    """Softmax attention in float64, heads before rows inside."""

    out: np.ndarray  # (B, S, H, D)
    lse: np.ndarray  # (B, H, S)
    out_tolerance: np.ndarray
    lse_tolerance: float


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, dtype: str) -> Forward:
    probs, lse = _probabilities(q, k, causal)
    v64 = _by_head(v)
    out = probs @ v64
    roundoff = UNIT_ROUNDOFF[dtype] + FLOAT32_SLACK
    tolerance = roundoff * (probs @ np.abs(v64) + np.abs(out)) + ABSOLUTE_SLACK
    return Forward(_by_row(out), lse, _by_row(tolerance), ABSOLUTE_SLACK)


@dataclasses.dataclass(frozen=True)
class Backward:
    """Gradients in float64, what the kernel needs from the forward, and error bounds."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    lse: np.ndarray  # (B, H, S)
    delta: np.ndarray  # (B, H, S), rowsum(out * dout)
    dq_tolerance: np.ndarray
    dk_tolerance: np.ndarray
    dv_tolerance: np.ndarray


def backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, causal: bool, dtype: str
) -> Backward:
    probs, lse = _probabilities(q, k, causal)
    q64, k64, v64, dout64 = (_by_head(x) for x in (q, k, v, dout))
    scale = 1.0 / math.sqrt(q.shape[-1])
    delta = np.sum(probs @ v64 * dout64, axis=-1)
    dprobs = dout64 @ v64.swapaxes(-1, -2)
    dscores = probs * (dprobs - delta[..., None])

    # What rounding adds to dscores: to the input's type, and float32 before the cancellation
    dscores_error = UNIT_ROUNDOFF[dtype] * np.abs(dscores)
    dscores_error += FLOAT32_SLACK * probs * (np.abs(dprobs) + np.abs(delta[..., None]))
    probs_error = (UNIT_ROUNDOFF[dtype] + FLOAT32_SLACK) * probs
    transposed = dscores_error.swapaxes(-1, -2)
    tolerances = (
        scale * dscores_error @ np.abs(k64),
        scale * transposed @ np.abs(q64),
        probs_error.swapaxes(-1, -2) @ np.abs(dout64),
    )
    gradients = (
        scale * dscores @ k64,
        scale * dscores.swapaxes(-1, -2) @ q64,
        probs.swapaxes(-1, -2) @ dout64,
    )
    return Backward(
        *(_by_row(gradient) for gradient in gradients),
        lse,
        delta,
        *(_by_row(tolerance) + ABSOLUTE_SLACK for tolerance in tolerances),
    )


def _probabilities(q: np.ndarray, k: np.ndarray, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of the scaled scores (B, H, S, S) and its log-sum-exp (B, H, S)."""
    scores = _by_head(q) @ _by_head(k).swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    row_max = np.max(scores, axis=-1, keepdims=True)
    lse = row_max + np.log(np.sum(np.exp(scores - row_max), axis=-1, keepdims=True))
    return np.exp(scores - lse), lse[..., 0]


def _by_head(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).swapaxes(1, 2)


def _by_row(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2)
