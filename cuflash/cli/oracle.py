"""How far off a result may be: twice the error of the textbook computed in the inputs' dtype.

To that comes one rounding of the result itself, and what float32 leaves of a sum that is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cuflash import reference
from cuflash._problem import Gradients
from cuflash._reference_masks import centers_of, group_of, visibility
from cuflash.cli.cases import Arrays

FLOAT32_RESIDUE = 2e-5  # of sums of products of standard normal numbers, in absolute terms
WALKS = 4  # what few sums stay below, in standard deviations
LSE_TOLERANCE = 1e-5  # lse is float32 throughout; relative where it is over 1

VISIBILITY = ("causal", "offset", "window", "q_lens", "kv_lens", "mask")


@dataclass(frozen=True, slots=True)
class Bound:
    """One array as it should be, and how far off it may be."""

    exact: np.ndarray  # float64
    roundoff: float  # relative, of one rounding to the array's dtype
    allowed: float

    def error(self, found: np.ndarray) -> float:
        """The largest deviation beyond a rounding; NaN where one side alone is NaN."""
        found = np.asarray(found).astype(np.float64)
        if found.shape != self.exact.shape:
            return float("nan")
        same = (found == self.exact) | (np.isnan(found) & np.isnan(self.exact))
        with np.errstate(invalid="ignore"):
            deviation = np.abs(found - self.exact) - self.roundoff * np.abs(self.exact)
        return float(np.where(same, 0.0, deviation).max(initial=0.0))


def expect(arrays: Arrays, options: dict[str, Any]) -> dict[str, Bound]:
    """Bounds of out, lse and every gradient, by name; `options` are those of cuflash.reference."""
    q, k, v, dout, dlse = arrays
    out, lse = reference.attention(q, k, v, **options)
    gradients = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    textbook_out, textbook_gradients = textbook(arrays, options)
    largest_lse = np.abs(lse[np.isfinite(lse)]).max(initial=1.0)
    bounds = {
        "out": _bound(out, textbook_out, q.dtype),
        "lse": Bound(lse, 0.0, LSE_TOLERANCE * largest_lse),
    }
    # dq and dk are such sums times the scale.
    scale = max(1.0, abs(reference._scale(options.get("scale"), q)))
    for name, x, size in (("dq", q, scale), ("dk", k, scale), ("dv", v, 1.0)):
        exact, rounded = getattr(gradients, name), getattr(textbook_gradients, name)
        bounds[name] = _bound(exact, rounded, x.dtype, size)
    summed = {name: options.get(name) for name in ("bias", "sinks")}
    if any(x is not None for x in summed.values()):
        doubles = Arrays(*(None if x is None else x.astype(np.float64) for x in arrays))
        _, terms = textbook(doubles, options)
        for name, x in summed.items():
            if x is not None:
                name = f"d{name}"
                errors = getattr(textbook_gradients, name) - getattr(terms, name)
                bounds[name] = _bound_of_sums(getattr(gradients, name), errors, x.dtype)
    return bounds


def textbook(arrays: Arrays, options: dict[str, Any]) -> tuple[np.ndarray, Gradients]:
    """The reference's formulas, each matrix between two products rounded to the inputs' dtype.

    Products of float32 are summed in float32, one by one; all others in float64.
    dbias and dsinks are their terms: of each score and, (B, 1, Sq, Hq), of each row.
    """
    q, k, v, dout, dlse = arrays
    dtype, group = q.dtype, group_of(q, k)
    sums = np.float32 if dtype == np.float32 else np.float64

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(sums)

    def sum_over_rows(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        by_head = _matmul(weights.swapaxes(2, 3), x)
        return rounded(reference._sum_groups(by_head, group)).swapaxes(1, 2)

    given = options.get
    bias, sinks = given("bias"), given("sinks")
    visible = visibility(q, k, *map(given, VISIBILITY))
    centers = centers_of(q, k, *map(given, ("offset", "q_lens", "kv_lens")))
    added = reference._added(centers, k, given("alibi_slopes"), bias)
    scale = reference._scale(given("scale"), q)
    q, dout = (reference._heads_first(x, given("q_lens")) for x in (q, dout))
    k, v = (reference._heads_first(x, given("kv_lens"), group) for x in (k, v))
    q, k, v, dout, added = (np.asarray(x).astype(sums) for x in (q, k, v, dout, added))
    softcap, score_mod = given("softcap"), given("score_mod")
    scores, slope = reference._scores(
        q, k, scale, softcap, score_mod, added, differentiate=True, matmul=_matmul
    )
    sink_scores = reference._sink_scores(sinks, q, given("q_lens"))
    probs, _, sink_probs = reference._softmax(rounded(scores), visible, sink_scores)
    probs = rounded(probs)
    kept = reference._kept(probs.shape, given("dropout", 0.0), given("seed"))
    out = rounded(_matmul(kept * probs, v))

    dprobs = kept * np.where(visible, rounded(_matmul(dout, v.swapaxes(2, 3))), 0)
    means = (dout * out).sum(axis=3, keepdims=True)
    if dlse is not None:
        means = means - np.asarray(dlse, np.float64)[..., None]
    dscores = np.where(visible, probs * (dprobs - means), 0)
    dproducts = rounded(np.where(visible, scale * slope * dscores, 0))
    gradients = Gradients(
        dq=rounded(_matmul(dproducts, k)).swapaxes(1, 2),
        dk=sum_over_rows(dproducts, q),
        dv=sum_over_rows(kept * probs, dout),
        dbias=None if bias is None else rounded(dscores),
        dsinks=None if sinks is None else reference._dsinks(sink_probs, means),
    )
    return out.swapaxes(1, 2), gradients


def _matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of float32 as a loop sums it: how well BLAS does depends on the shapes."""
    if a.dtype != np.float32:
        return a @ b
    sums = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    for i in range(a.shape[-1]):
        sums += a[..., i, None] * b[..., i, None, :]
    return sums


def _bound(exact: np.ndarray, textbook: np.ndarray, dtype: np.dtype, size: float = 1.0) -> Bound:
    """`size`: by which sums of products of standard normal numbers are multiplied."""
    roundoff = float(ml_dtypes.finfo(dtype).eps) / 2
    worst = np.abs(textbook - exact).max(initial=0.0)
    return Bound(exact, roundoff, 2 * float(worst) + size * FLOAT32_RESIDUE)


def _bound_of_sums(exact: np.ndarray, errors: np.ndarray, dtype: np.dtype) -> Bound:
    """Of few sums of many terms one may be right by luck: what counts is the terms' random walk."""
    roundoff = float(ml_dtypes.finfo(dtype).eps) / 2
    walks = np.sqrt(reference._sum_to_shape(errors**2, exact.shape))
    steps = WALKS if errors.size > exact.size else 2
    return Bound(exact, roundoff, steps * float(walks.max(initial=0.0)) + FLOAT32_RESIDUE)
