"""Calls of one shape whose arrays, options and functions change: nothing old is used, or kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import backends
import numpy as np
import pytest
from conftest import emulated

import cuflash
from cuflash import _mask_tree, masks, reference
from cuflash._checks import BFLOAT16
from cuflash._problem import GradientProblem, Problem
from cuflash.cli import oracle
from cuflash.cli.cases import Arrays

B, S, H, D = 2, 40, 2, 8


def changing() -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]], Callable[[Any], None]]:
    """q, k and v; options that read arrays and closures; and what changes all of them."""
    x = SimpleNamespace(
        lens=np.full(B, S),
        offset=np.zeros(B, int),
        ids=np.zeros((B, S), int),
        pairs=np.ones((S, S), bool),
        blocks=np.ones((3, 3), bool),
        start=np.zeros((B, 1, S, 1), int),
        end=np.zeros((B, 1, S, 1), int),
        weights=np.ones(H, np.float32),
        bias=np.zeros((S, S)),
        row_bias=np.zeros((B, 1, 1, S)),
        factor=1.0,
    )
    q, k, v = (np.ones((B, S, H, D)) for _ in range(3))
    by_functions = cuflash.ScoreMod(
        "score",
        numpy_forward=lambda score, b, h, i, j, w: score * w[h] * x.factor,
        numpy_backward=lambda score, b, h, i, j, w: np.broadcast_to(w[h] * x.factor, score.shape),
        named={"w": x.weights},
    )
    trees = {
        "documents": masks.documents(x.ids),
        "dense": masks.dense(x.pairs),
        "blocks": masks.blocks(x.blocks, 16, 16),
        "prefix": masks.causal() | masks.prefix(x.lens),
        "intervals": masks.intervals(x.start, x.end),
        "window": masks.window(3, 2, x.offset),
        "expression": masks.expression("0", lambda b, h, i, j: (i + j) % 2 < x.factor),
    }
    options = {
        "lengths": {"kv_lens": x.lens, "q_lens": x.lens},
        "offset": {"offset": x.offset, "causal": True},
        "bias": {"bias": x.bias},
        "bias of rows": {"bias": x.row_bias},
        "per head": {"alibi_slopes": x.weights, "sinks": x.weights},
        "score_mod": {"score_mod": by_functions},
        "mask": {"mask": x.pairs},
        **{name: {"mask": mask} for name, mask in trees.items()},
    }

    def change(rng: np.random.Generator) -> None:
        for array in (q, k, v, x.bias, x.row_bias, x.weights):
            array[...] = rng.standard_normal(array.shape)
        for array, low, high in (
            *((x.lens, 0, S + 1), (x.offset, -9, 9), (x.ids, 0, 3)),
            *((x.start, 0, S // 2), (x.end, S // 2, S), (x.pairs, 0, 2), (x.blocks, 0, 2)),
        ):
            array[...] = rng.integers(low, high, array.shape)
        x.factor = float(rng.integers(0, 3))

    return {"q": q, "k": k, "v": v}, options, change


@pytest.mark.parametrize("name", list(changing()[1]))
def test_values_that_change_in_place_are_read_anew(name: str) -> None:
    arrays, options, change = changing()
    given, dout = options[name], np.ones((B, S, H, D))
    for seed in range(6):
        change(np.random.default_rng(seed))
        out, pullback = cuflash.attention_vjp(**arrays, **given)
        expected, _ = reference.attention(**arrays, **given)
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-9)
        gradients = reference.attention_backward(dout, **arrays, **given)
        for found, right in zip(pullback(dout), gradients, strict=True):
            if right is not None:
                np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)


def test_a_check_of_stale_values_would_notice() -> None:
    """A compiled mask is to keep its values: its tiles are those that it had."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 600, 1, 4))
    ids = np.repeat([[0, 1]], 300, axis=1)
    mask = masks.documents(ids).compile(q, q)
    before = cuflash.attention(q, q, q, mask=mask)
    ids[:] = 0
    after = cuflash.attention(q, q, q, mask=mask)
    right, _ = reference.attention(q, q, q, mask=mask)
    assert np.abs(before - right).max() > 1e-3 and np.abs(after - right).max() > 1e-3


# -------------------------------------------------------------------------------- compiled masks


LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 70, 100, 2, 2, 64), {}),
    ((2, 70, 100, 2, 2, 64), {}),
    ((1, 70, 100, 4, 2, 64), {}),
    ((1, 70, 100, 2, 1, 64), {}),
    ((1, 70, 100, 2, 2, 64), {"offset": -20}),
    ((1, 70, 100, 2, 2, 64), {"window": (30, 10)}),
    ((1, 70, 100, 2, 2, 64), {"kv_lens": np.array([40])}),
    ((1, 70, 100, 2, 2, 64), {"bias": np.ones((2, 70, 1), np.float32)}),
    ((1, 70, 100, 2, 2, 64), {"bias": np.zeros((1, 100), np.float32)}),
    ((1, 70, 100, 2, 2, 64), {}),
]


def of_layout(sizes: tuple[int, ...]) -> Arrays:
    rng = np.random.default_rng(sum(sizes))
    batch, seqlen_q, seqlen_k, heads_q, heads_k, size = sizes
    rows, keys = (batch, seqlen_q, heads_q, size), (batch, seqlen_k, heads_k, size)
    arrays = (rng.standard_normal(x).astype(BFLOAT16) for x in (rows, keys, keys, rows))
    return Arrays(*arrays, None)


def some_mask() -> cuflash.masks.Mask:
    """Of any sizes; it is another for each head."""
    scattered = masks.expression("j % 7 == 0 && h != 1", lambda b, h, i, j: (j % 7 == 0) & (h != 1))
    return masks.causal() | scattered


def on_cpu(mask: Any) -> Iterator[dict[str, np.ndarray]]:
    for sizes, options in LAYOUTS:
        q, k, v, dout, _ = of_layout(sizes)
        (out, lse), pullback = cuflash.attention_vjp(q, k, v, mask=mask, return_lse=True, **options)
        yield {"out": out, "lse": lse, **pullback(dout)._asdict()}


def on_emulated(mask: Any, capability: int) -> Iterator[dict[str, np.ndarray]]:
    """All by one GPU, whose tables the mask has."""
    emulated()
    from cuflash import _launch

    gpu = backends.EmulatedGpu(capability, "lazy", 0, [])
    for sizes, options in LAYOUTS:
        q, k, v, dout, _ = of_layout(sizes)
        problem = Problem.create("attention", "cuda", q, k, v, mask=mask, **options)
        gpu.buffers += [*backends._arrays_of(problem), dout]
        out, lse, stats = _launch.forward(problem, gpu, wants_stats=True)
        gradient = GradientProblem.create("attention", problem, dout, out, lse, stats=stats)
        gradients = _launch.backward(gradient, gpu)
        gpu.synchronize()
        yield {"out": out, "lse": lse, **gradients._asdict()}


@pytest.mark.parametrize(
    "run",
    [
        on_cpu,
        pytest.param(lambda mask: on_emulated(mask, 80), marks=pytest.mark.full, id="sm80"),
        pytest.param(lambda mask: on_emulated(mask, 90), marks=pytest.mark.full, id="sm90"),
    ],
)
def test_a_compiled_mask_serves_calls_of_any_layout(run: Callable[[Any], Any]) -> None:
    """Its tables are of one layout each, and one call's do for no other."""
    mask = some_mask()
    q = np.zeros((1, 4, 1, 8), BFLOAT16)
    for (sizes, options), found in zip(LAYOUTS, run(mask.compile(q, q)), strict=True):
        bounds = oracle.expect(of_layout(sizes), {**options, "mask": mask})
        wrong = [n for n, bound in bounds.items() if not bound.error(found[n]) <= bound.allowed]
        assert not wrong, (sizes, options)


def test_a_compiled_mask_keeps_so_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many offsets and lengths a decoder has."""
    monkeypatch.setattr(_mask_tree, "MAX_TABLES", 4)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 1, 1, 4)), rng.standard_normal((1, 30, 1, 4))
    mask = masks.causal().compile(q, k)
    for seqlen_k in range(1, 30):
        keys = k[:, :seqlen_k]
        for offset in (0, seqlen_k - 1):
            out = cuflash.attention(q, keys, keys, mask=mask, offset=offset)
            expected, _ = reference.attention(q, keys, keys, causal=True, offset=offset)
            np.testing.assert_allclose(out, expected, rtol=1e-9)
            assert len(mask.tables) <= 4


# ------------------------------------------------------------------------------- what is let go


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What is let go is let go at once: nothing waits for the collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(call: Callable[[dict[str, np.ndarray]], Any], shape: tuple[int, ...]) -> list[str]:
    """Which arrays outlive a call of its own results and these arrays."""
    arrays = {name: np.ones(shape, np.float32) for name in "qkv"}
    given = {name: weakref.ref(x) for name, x in arrays.items()}
    given |= {f"result {n}": weakref.ref(x) for n, x in enumerate(call(arrays))}
    del arrays
    return [name for name, x in given.items() if x() is not None]


def both(options: dict[str, Any]) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    def call(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        out, pullback = cuflash.attention_vjp(**arrays, **options)
        return [out, *pullback(out)[:3]]

    return call


@pytest.mark.parametrize("shape", [(1, 600, 2, 8), (2, 40, 2, 8), (40, 5, 2, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": masks.causal()}], ids=str)
def test_no_array_outlives_its_call(
    no_gc: None, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    assert not alive(both(options), shape)
    held: list[Any] = []
    call = both(options)
    assert alive(lambda arrays: held.append(arrays) or call(arrays), shape) == ["q", "k", "v"]


@pytest.mark.parametrize("shape", [(1, 600, 2, 8), (2, 5, 1, 8)], ids=str)
def test_no_array_outlives_a_call_that_raises(no_gc: None, shape: tuple[int, ...]) -> None:
    raising = cuflash.ScoreMod("score", numpy_forward=lambda score, b, h, i, j: {}[0])

    def call(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        with pytest.raises(KeyError) as error:
            cuflash.attention(**arrays, score_mod=raising)
        del error
        return []

    assert not alive(call, shape)
