"""The oracle itself: against finite differences, laws of attention, and other libraries."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuflash import ScoreMod, reference

B, SQ, SK, HQ, HK, D, DV = 2, 5, 7, 4, 2, 3, 2

STEEP_FAR_AWAY = ScoreMod(
    "score * slope(h, j) + 0.1f * score * score - 0.2f * (i - j) * b",
    numpy_forward=lambda score, b, h, i, j, slope: (
        score * slope[h, j] + 0.1 * score**2 - 0.2 * (i - j) * b
    ),
    numpy_backward=lambda score, b, h, i, j, slope: slope[h, j] + 0.2 * score,
    named={"slope": np.random.default_rng(6).standard_normal((HQ, SK))},
)

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "offset": {"causal": True, "offset": np.array([-1, 3])},
    "window": {"window": (2, 1), "offset": 1},
    "window-one-side": {"window": (None, 2)},
    "scale": {"scale": -0.4},
    "softcap": {"softcap": 0.7},
    "lengths": {"q_lens": np.array([5, 2]), "kv_lens": np.array([0, 6])},
    "lengths-causal": {"q_lens": np.array([5, 4]), "kv_lens": np.array([3, 7]), "causal": True},
    "mask": {"mask": np.random.default_rng(1).random((B, 1, SQ, SK)) < 0.5},
    "bias": {"bias": np.random.default_rng(2).standard_normal((B, HQ, SQ, SK))},
    "bias-broadcast": {"bias": np.random.default_rng(3).standard_normal((HQ, 1, SK))},
    "bias-softcap": {"bias": np.random.default_rng(2).standard_normal((SQ, 1)), "softcap": 0.7},
    "alibi": {"alibi_slopes": np.array([0.5, -0.25, 0.125, 1.0]), "causal": True},
    "alibi-per-batch": {
        "alibi_slopes": np.random.default_rng(7).standard_normal((B, HQ)),
        "offset": np.array([-1, 3]),
    },
    "sinks": {"sinks": np.array([-1.0, 0.0, 1.0, 2.0])},
    "sinks-of-rows-that-see-nothing": {
        "sinks": np.array([-1.0, 0.0, 1.0, 2.0]),
        "q_lens": np.array([5, 3]),
        "causal": True,
        "offset": np.array([-3, 0]),
    },
    "dropout": {"dropout": 0.4, "seed": 3, "causal": True},
    "dropout-sinks": {"dropout": 0.3, "seed": 2**40 + 5, "sinks": np.array([-1.0, 0.0, 1.0, 2.0])},
    "score_mod": {"score_mod": STEEP_FAR_AWAY},
    "score_mod-softcap": {"score_mod": STEEP_FAR_AWAY, "softcap": 0.7},
    "everything": {
        "causal": True,
        "offset": 2,
        "window": (4, 3),
        "scale": 0.8,
        "softcap": 1.5,
        "q_lens": np.array([4, 5]),
        "kv_lens": np.array([7, 5]),
        "mask": np.random.default_rng(4).random((SQ, SK)) < 0.8,
        "bias": np.random.default_rng(5).standard_normal((1, HQ, SQ, 1)),
        "alibi_slopes": np.array([0.5, -0.25, 0.125, 1.0]),
        "sinks": np.array([-1.0, 0.0, 1.0, 2.0]),
        "dropout": 0.2,
        "seed": 11,
        "score_mod": STEEP_FAR_AWAY,
    },
}


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"q": (B, SQ, HQ, D), "k": (B, SK, HK, D), "v": (B, SK, HK, DV)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_against_finite_differences(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    inputs = tensors(rng)
    inputs |= {name: options[name] for name in ("bias", "sinks") if name in options}
    rest = {name: value for name, value in options.items() if name not in inputs}
    dout = rng.standard_normal((B, SQ, HQ, DV))
    dlse = rng.standard_normal((B, HQ, SQ))

    def loss(changed: dict[str, np.ndarray]) -> float:
        out, lse = reference.attention(**changed, **rest)
        return float((dout * out).sum() + (dlse * np.where(lse == -np.inf, 0, lse)).sum())

    gradients = reference.attention_backward(dout, **inputs, **rest, dlse=dlse)
    for name, x in inputs.items():
        found = getattr(gradients, f"d{name}")
        assert found.shape == x.shape
        np.testing.assert_allclose(
            found, finite_differences(loss, inputs, name), rtol=1e-6, atol=1e-8, err_msg=name
        )


def finite_differences(
    loss: Callable[[dict[str, np.ndarray]], float], inputs: dict[str, np.ndarray], name: str
) -> np.ndarray:
    step = 1e-5
    gradient = np.empty(inputs[name].shape)
    for index in np.ndindex(gradient.shape):
        losses = []
        for sign in (1, -1):
            changed = inputs[name].copy()
            changed[index] += sign * step
            losses.append(loss({**inputs, name: changed}))
        gradient[index] = (losses[0] - losses[1]) / (2 * step)
    return gradient


def test_without_bias_and_sinks_they_have_no_gradients(rng: np.random.Generator) -> None:
    gradients = reference.attention_backward(np.ones((B, SQ, HQ, DV)), **tensors(rng))
    assert gradients.dbias is None and gradients.dsinks is None


def test_a_sink_is_one_more_key_with_the_value_0(rng: np.random.Generator) -> None:
    x, sinks = tensors(rng), rng.standard_normal(HQ)
    longer = {name: np.concatenate([a, np.zeros_like(a[:, :1])], 1) for name, a in x.items()}
    longer["q"] = x["q"]
    bias = np.zeros((HQ, 1, SK + 1))
    bias[:, 0, SK] = sinks
    found = reference.attention(**x, sinks=sinks)
    for a, b in zip(found, reference.attention(**longer, bias=bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_alibi_is_a_bias_of_distances(rng: np.random.Generator) -> None:
    x, slopes = tensors(rng), rng.standard_normal(HQ)
    distance = np.abs(np.arange(SQ)[:, None] + SK - SQ - np.arange(SK))
    found = reference.attention(**x, alibi_slopes=slopes)
    right = reference.attention(**x, bias=-slopes[:, None, None] * distance)
    for a, b in zip(found, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_dropout_leaves_lse_and_the_mean_of_many_seeds(rng: np.random.Generator) -> None:
    x, rate, seeds = tensors(rng), 0.25, 4000
    out, lse = reference.attention(**x)
    total = np.zeros_like(out)
    for seed in range(seeds):
        one, same_lse = reference.attention(**x, dropout=rate, seed=seed)
        np.testing.assert_array_equal(same_lse, lse)
        total += one
    # The variance of a sum of p v with each term dropped is at most rate / (1 - rate) max v^2.
    deviation = np.sqrt(rate / (1 - rate) / seeds) * np.abs(x["v"]).max()
    assert 0 < np.abs(total / seeds - out).max() <= 6 * deviation


def test_permuting_keys_with_their_bias_and_mask_changes_nothing(rng: np.random.Generator) -> None:
    x = tensors(rng)
    mask = rng.random((B, 1, SQ, SK)) < 0.6
    bias = rng.standard_normal((B, HQ, SQ, SK))
    order = rng.permutation(SK)
    out, lse = reference.attention(**x, mask=mask, bias=bias)
    permuted = {"q": x["q"], "k": x["k"][:, order], "v": x["v"][:, order]}
    again = reference.attention(**permuted, mask=mask[..., order], bias=bias[..., order])
    np.testing.assert_allclose(again[0], out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(again[1], lse, rtol=1e-12)


def test_merging_two_halves_of_the_keys_by_lse_gives_the_whole(rng: np.random.Generator) -> None:
    x = tensors(rng)
    out, lse = reference.attention(**x)
    halves = [
        reference.attention(x["q"], x["k"][:, keys], x["v"][:, keys])
        for keys in (slice(0, 3), slice(3, None))
    ]
    merged_lse = np.logaddexp(halves[0][1], halves[1][1])
    merged = sum(o * np.exp(one - merged_lse).swapaxes(1, 2)[..., None] for o, one in halves)
    np.testing.assert_allclose(merged_lse, lse, rtol=1e-12)
    np.testing.assert_allclose(merged, out, rtol=1e-12)


def test_a_constant_bias_shifts_lse_alone(rng: np.random.Generator) -> None:
    x = tensors(rng)
    shift = rng.standard_normal((B, HQ, SQ, 1)) * 100
    out, lse = reference.attention(**x, causal=True)
    shifted_out, shifted_lse = reference.attention(**x, causal=True, bias=shift)
    np.testing.assert_allclose(shifted_out, out, rtol=1e-11)
    np.testing.assert_allclose(shifted_lse, lse + shift[..., 0], rtol=1e-12)
    dbias = reference.attention_backward(
        np.ones((B, SQ, HQ, DV)), **x, causal=True, bias=shift
    ).dbias
    np.testing.assert_allclose(dbias, np.zeros_like(shift), atol=1e-12)


def test_equal_keys_give_the_mean_of_the_values(rng: np.random.Generator) -> None:
    x = tensors(rng)
    out, lse = reference.attention(x["q"], np.zeros((B, SK, HK, D)), x["v"])
    mean = x["v"].mean(axis=1, keepdims=True).repeat(HQ // HK, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-12)
    np.testing.assert_allclose(lse, np.log(SK))


def test_which_keys_are_seen() -> None:
    """With one-hot values, and scores of 0, out spells out the visible keys."""
    q, k = np.zeros((1, 3, 1, 1)), np.zeros((1, 5, 1, 1))
    v = np.eye(5).reshape(1, 5, 1, 5)

    def seen(**options: Any) -> list[str]:
        out, _ = reference.attention(q, k, v, **options)
        return ["".join(".x"[int(weight > 0)] for weight in row) for row in out[0, :, 0]]

    assert seen() == ["xxxxx", "xxxxx", "xxxxx"]
    assert seen(causal=True) == ["xxx..", "xxxx.", "xxxxx"]
    assert seen(causal=True, offset=0) == ["x....", "xx...", "xxx.."]
    assert seen(causal=True, offset=-2) == [".....", ".....", "x...."]
    assert seen(window=(1, 0)) == [".xx..", "..xx.", "...xx"]
    assert seen(window=(1, 1), offset=0) == ["xx...", "xxx..", ".xxx."]
    assert seen(window=(1, 1), causal=True) == [".xx..", "..xx.", "...xx"]
    assert seen(window=(2**40, None), offset=2**40) == ["xxxxx", ".xxxx", "..xxx"]
    assert seen(kv_lens=np.array([2]), causal=True) == [".....", "x....", "xx..."]
    assert seen(q_lens=np.array([2]), causal=True) == ["xxxx.", "xxxxx", "....."]
    mask = np.array([False, True, True, True, False])
    assert seen(causal=True, mask=mask) == [".xx..", ".xxx.", ".xxx."]


def test_a_row_that_sees_nothing(rng: np.random.Generator) -> None:
    x = tensors(rng)
    mask = np.ones((SQ, SK), bool)
    mask[2] = False
    out, lse = reference.attention(**x, mask=mask)
    assert (out[:, 2] == 0).all()
    assert (lse[:, :, 2] == -np.inf).all()
    dout, dlse = np.ones(out.shape), np.ones(lse.shape)
    gradients = reference.attention_backward(dout, **x, mask=mask, dlse=dlse)
    assert (gradients.dq[:, 2] == 0).all()
    assert all(np.isfinite(g).all() for g in gradients if g is not None)


def test_scores_of_minus_infinity_are_as_good_as_hidden(rng: np.random.Generator) -> None:
    x = tensors(rng)
    mask = rng.random((B, HQ, SQ, SK)) < 0.5
    mask[:, :, 1] = False
    expected = reference.attention(**x, mask=mask)
    found = reference.attention(**x, bias=np.where(mask, 0, -np.inf))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "bias"])
def test_what_is_not_finite_stays_with_the_rows_that_see_it(
    rng: np.random.Generator, name: str
) -> None:
    x = tensors(rng)
    x["bias"] = rng.standard_normal((B, HQ, SQ, SK))
    dout = rng.standard_normal((B, SQ, HQ, DV))
    clean = *reference.attention(**x, causal=True), *backward(dout, x)
    poisoned = {"dout": dout, **x}[name]
    index = (0, 0, 0, SK - 2) if name == "bias" else (0, {"q": 3, "dout": 3}.get(name, 5), 0, 0)
    poisoned[index] = np.nan
    dirty = *reference.attention(**x, causal=True), *backward(dout, x)

    rows_that_see = {"q": [3], "dout": [3], "k": [3, 4], "v": [3, 4], "bias": []}[name]
    others = [i for i in range(SQ) if i not in rows_that_see]
    out, lse, dq, dk, dv, dbias = zip(clean, dirty, strict=True)
    equal = np.testing.assert_allclose
    for before, after in (out, dq):
        equal(after[:, others], before[:, others], rtol=1e-12)
    for before, after in (lse, dbias):
        equal(after[:, :, others], before[:, :, others], rtol=1e-12)
    for before, after in (dk, dv):
        equal(after[1], before[1], rtol=1e-12)  # the other batch entry
        if rows_that_see == [3]:  # which sees keys 0 to 5
            equal(after[:, 6:], before[:, 6:], rtol=1e-12)
    assert np.isnan(dq[1][0, 3, 0]).any() == bool(rows_that_see)


def backward(dout: np.ndarray, x: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return reference.attention_backward(dout, **x, causal=True)[:4]


def test_what_lies_past_the_lengths_is_not_read(rng: np.random.Generator) -> None:
    x = tensors(rng)
    dout, dlse = rng.standard_normal((B, SQ, HQ, DV)), rng.standard_normal((B, HQ, SQ))
    bias = rng.standard_normal((B, HQ, SQ, SK))
    terms = {"bias": bias, "sinks": rng.standard_normal(HQ)}
    lens = {"q_lens": np.array([3, 0]), "kv_lens": np.array([6, 4])}

    def everything() -> tuple[np.ndarray, ...]:
        forward = reference.attention(**x, **lens, **terms)
        gradients = reference.attention_backward(dout, **x, **lens, **terms, dlse=dlse)
        return *forward, *gradients

    clean = everything()
    for batch, (rows, keys) in enumerate(zip(*lens.values(), strict=True)):
        x["q"][batch, rows:] = dout[batch, rows:] = np.nan
        x["k"][batch, keys:] = x["v"][batch, keys:] = np.nan
        dlse[batch, :, rows:] = bias[batch, :, rows:] = bias[batch, :, :, keys:] = np.nan
    for a, b in zip(everything(), clean, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.isnan(a).any()


@pytest.mark.parametrize("options", [{}, {"causal": True, "offset": 0}, {"scale": 0.3}], ids=str)
def test_agrees_with_torch(rng: np.random.Generator, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    x = {name: torch.from_numpy(a).requires_grad_() for name, a in tensors(rng).items()}
    dout = rng.standard_normal((B, SQ, HQ, DV))
    heads_first = [a.swapaxes(1, 2) for a in x.values()]
    heads_first[1:] = [a.repeat_interleave(HQ // HK, dim=1) for a in heads_first[1:]]
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal="causal" in options, scale=options.get("scale")
    ).swapaxes(1, 2)
    out.backward(torch.from_numpy(dout))

    arrays = {name: a.detach().numpy() for name, a in x.items()}
    found, _ = reference.attention(**arrays, **options)
    np.testing.assert_allclose(found, out.detach().numpy(), rtol=1e-10)
    gradients = reference.attention_backward(dout, **arrays, **options)
    for name, a in x.items():
        np.testing.assert_allclose(
            getattr(gradients, f"d{name}"), a.grad.numpy(), rtol=1e-9, atol=1e-12
        )


def test_agrees_with_scipy(rng: np.random.Generator) -> None:
    special = pytest.importorskip("scipy.special")
    x = tensors(rng)
    k, v = (x[name].repeat(HQ // HK, axis=2) for name in "kv")
    scores = np.einsum("bihd,bjhd->bhij", x["q"], k) / np.sqrt(D)
    out, lse = reference.attention(**x)
    expected = np.einsum("bhij,bjhd->bihd", special.softmax(scores, axis=-1), v)
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(lse, special.logsumexp(scores, axis=-1), rtol=1e-12)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(reference).attempted > 0
    assert doctest.testmod(reference).failed == 0
