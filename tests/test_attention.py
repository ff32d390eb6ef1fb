"""One suite for every backend: forward and all gradients against float64, over every option.

The emulated backend runs the PTX of the kernels that ship, with every access checked. Its cases
keep to few head sizes, because each new one is compiled; `test_kernels.py` compiles the others.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import backends
import numpy as np
import pytest
from conftest import emulated

from cuflash.cli import calls, oracle
from cuflash.cli.cases import Case, spread

BFLOAT16, FLOAT16 = np.dtype("bfloat16"), np.dtype("float16")
SMALL = Case(batch=1, seqlen_q=77, seqlen_k=150, head_dim=32)

CASES = {
    "plain": SMALL,
    "causal": replace(SMALL, causal=True),
    "causal-top-left": replace(SMALL, causal=True, offset=0),
    "causal-empty-rows": replace(SMALL, seqlen_q=150, seqlen_k=77, causal=True),
    "offset-per-batch": replace(SMALL, batch=2, causal=True, offset=(-30, 200)),
    "nobody-sees-anything": replace(SMALL, causal=True, offset=-1000),
    "window": replace(SMALL, window=(20, 10)),
    "window-left-only": replace(SMALL, window=(70, None)),
    "window-of-one": replace(SMALL, window=(0, 0), offset=64),
    "window-and-causal": replace(SMALL, window=(40, 7), causal=True),
    "lengths": replace(SMALL, batch=3, q_lens=(77, 0, 40), kv_lens=(150, 129, 0)),
    "lengths-and-causal": replace(
        SMALL, batch=3, q_lens=(64, 77, 65), kv_lens=(127, 64, 1), causal=True
    ),
    "lengths-and-window": replace(SMALL, batch=2, kv_lens=(65, 64), window=(12, 3)),
    "scale": replace(SMALL, scale=0.7),
    "scale-negative": replace(SMALL, scale=-0.3, causal=True),
    "scale-zero": replace(SMALL, scale=0.0, causal=True),
    "softcap": replace(SMALL, softcap=2.0, scale=0.5, causal=True),
    "softcap-far-above-the-scores": replace(SMALL, dtype=FLOAT16, softcap=1e6),
    "scale-tiny": replace(SMALL, scale=1e-30),
    "float16": replace(SMALL, dtype=FLOAT16, causal=True),
    "gqa": replace(SMALL, heads_q=6, heads_k=2, causal=True),
    "mqa-one-query": replace(SMALL, batch=2, heads_q=5, heads_k=1, seqlen_q=1, kv_lens=(150, 33)),
    "gqa-window-lengths": replace(
        SMALL, batch=2, heads_q=4, window=(30, 5), q_lens=(77, 20), kv_lens=(150, 64)
    ),
    "heads-first": replace(SMALL, layout="BHSD", heads_q=4, heads_k=2, causal=True),
    "odd-head-dim": replace(SMALL, head_dim=17, head_dim_v=23, causal=True),
    "even-head-dim": replace(SMALL, head_dim=26, head_dim_v=30),
    "head-dim-1": replace(SMALL, head_dim=1, head_dim_v=1, seqlen_q=20, seqlen_k=33),
    "unaligned": replace(SMALL, layout="unaligned", causal=True),
    "one-by-one": replace(SMALL, seqlen_q=1, seqlen_k=1),
    "tile-edge-below": replace(SMALL, seqlen_q=127, seqlen_k=127, causal=True),
    "tile-edge": replace(SMALL, seqlen_q=128, seqlen_k=128, causal=True),
    "tile-edge-above": replace(SMALL, seqlen_q=129, seqlen_k=129, causal=True),
    "nondeterministic": replace(SMALL, causal=True, deterministic=False),
    "no-queries": replace(SMALL, seqlen_q=0),
    "no-keys": replace(SMALL, seqlen_k=0),
    "no-batch": replace(SMALL, batch=0),
    "no-heads": replace(SMALL, heads_q=0, heads_k=0),
    "head-dim-64": replace(SMALL, head_dim=64, causal=True),
    "head-dim-128": replace(SMALL, head_dim=128, causal=True),
    "head-dims-96-32": replace(SMALL, head_dim=96, head_dim_v=32, dtype=FLOAT16, window=(30, 30)),
    "head-dim-256": replace(SMALL, head_dim=256, seqlen_q=70, seqlen_k=70),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(backend: backends.Backend, case: Case) -> None:
    check(backend, case)


@pytest.mark.parametrize("schedule", [("eager", 0), ("random", 0), ("random", 1)], ids=str)
@pytest.mark.parametrize("name", ["causal", "gqa", "lengths", "window"])
def test_kernels_under_other_schedules(name: str, schedule: tuple[str, int]) -> None:
    check(emulated(schedule=schedule[0], seed=schedule[1]), CASES[name])


@pytest.mark.full
@pytest.mark.parametrize("case", list(spread()), ids=str)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("capability", [80, 90])
def test_every_case_of_check_emulated(
    monkeypatch: pytest.MonkeyPatch, capability: int, case: Case, seed: int
) -> None:
    """By the calls that check makes, also with compiled masks and of packed sequences."""
    backend = emulated(capability=capability, schedule="random", seed=seed)
    functions = SimpleNamespace(
        attention=lambda *q_k_v, return_lse, **options: backend.forward(*q_k_v, **options),
        attention_backward=backend.backward,
        attention_varlen=lambda *arrays, return_lse, **options: backend.forward_varlen(
            *arrays, **options
        ),
        attention_varlen_backward=backend.backward_varlen,
    )
    monkeypatch.setattr(calls, "cuflash", functions)
    arrays = case.arrays()
    compare(calls.results(case, arrays, np), oracle.expect(arrays, case.options))


@pytest.mark.full
@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("head_dim", range(32, 257, 32))
def test_tiles_of_other_gpus(capability: int, head_dim: int) -> None:
    case = replace(SMALL, head_dim=head_dim, heads_q=2, heads_k=1, causal=True)
    check(emulated(capability=capability), case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(backend: backends.Backend, dtype: str) -> None:
    if dtype not in backend.dtypes:
        with pytest.raises(TypeError, match=f"q is {dtype}; expected one of float16, bfloat16"):
            backend.forward(*[np.zeros((1, 2, 1, 8), dtype)] * 3)
        return
    check(backend, replace(SMALL, dtype=np.dtype(dtype), causal=True))


def test_offsets_beyond_two_to_the_31_elements() -> None:
    case = replace(SMALL, batch=2, causal=True)
    far = [far_apart(x, np) for x in case.arrays()[:4]]
    assert far[0].strides[0] // far[0].itemsize > 2**31
    for backend in (backends.CpuBackend(), emulated()):
        check(backend, case, far)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_elements_on_a_gpu() -> None:
    import cupy

    import cuflash

    case = replace(SMALL, batch=2, causal=True)
    arrays = case.arrays()
    q, k, v, dout = (far_apart(x, cupy) for x in arrays[:4])
    out, pullback = cuflash.attention_vjp(q, k, v, causal=True)
    grads = pullback(dout)
    bounds = oracle.expect(arrays._replace(dlse=None), case.options)
    found = {"out": out, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    for name, array in found.items():
        assert bounds[name].error(array.get()) <= bounds[name].allowed, name


def far_apart(array: np.ndarray, xp: Any) -> Any:
    """The same values, batch entries 2^31 elements apart, in memory mostly untouched."""
    batch, seq, heads, dim = array.shape
    view = xp.empty((batch, 2**20 + seq, 16, 128), array.dtype)[:, :seq, :heads, :dim]
    view[...] = xp.asarray(array)
    return view


def test_out_is_written(backend: backends.Backend, rng: np.random.Generator) -> None:
    case = replace(SMALL, causal=True)
    arrays = case.arrays()
    memory = np.full((1, 77, 5, 40), 7, case.dtype)
    out = memory[:, :, 1:3, :32]
    found, _ = backend.forward(arrays.q, arrays.k, arrays.v, out=out, causal=True)
    expected, _ = backend.forward(arrays.q, arrays.k, arrays.v, causal=True)
    np.testing.assert_array_equal(bits(found), bits(expected))
    if backend.name != "gpu":  # there the test's array is not the one that was written
        np.testing.assert_array_equal(bits(out), bits(expected))
    assert (memory[:, :, 0] == 7).all() and (memory[..., 32:] == 7).all()


def test_backward_is_bit_equal_from_run_to_run(backend: backends.Backend) -> None:
    case = replace(SMALL, seqlen_q=200, seqlen_k=300, heads_q=2, heads_k=1)
    runs = [run(backend, case) for _ in range(3)]
    for other in runs[1:]:
        for name in ("out", "lse", "dq", "dk", "dv"):
            np.testing.assert_array_equal(bits(runs[0][name]), bits(other[name]), err_msg=name)


def test_backward_is_bit_equal_under_any_schedule() -> None:
    case = replace(SMALL, seqlen_q=200, seqlen_k=300)
    runs = [run(emulated(schedule="random", seed=seed), case) for seed in range(3)]
    for other in runs[1:]:
        for name in ("dq", "dk", "dv"):
            np.testing.assert_array_equal(bits(runs[0][name]), bits(other[name]), err_msg=name)


# What is not finite in one place reaches the rows that see it and no other. (array, index) in
# (batch, position, head, column).
NON_FINITE = {
    "v-nan": ("v", (0, 70, 0, 3), np.nan),
    "v-inf": ("v", (0, 70, 0, 3), np.inf),
    "v-minus-inf": ("v", (0, 140, 0, 31), -np.inf),
    "k-nan": ("k", (0, 70, 0, 3), np.nan),
    "k-inf": ("k", (0, 100, 0, 0), np.inf),
    "k-minus-inf": ("k", (0, 75, 0, 0), -np.inf),
    "q-nan": ("q", (0, 5, 0, 9), np.nan),
    "q-inf": ("q", (0, 60, 0, 9), np.inf),
    "dout-nan": ("dout", (0, 33, 0, 1), np.nan),
    "dout-inf": ("dout", (0, 33, 0, 1), -np.inf),
}


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (9, 4)}, {}], ids=str)
@pytest.mark.parametrize("where", NON_FINITE.values(), ids=NON_FINITE)
def test_non_finite_reaches_only_what_sees_it(
    backend: backends.Backend, where: tuple[str, tuple[int, ...], float], options: dict[str, Any]
) -> None:
    check_non_finite(backend, replace(SMALL, **options), where)


def check_non_finite(
    backend: backends.Backend,
    case: Case,
    where: tuple[str, tuple[int, ...], float],
    **options: Any,
) -> None:
    """One value that is not finite reaches what it should, and the rest is within its bounds."""
    name, index, value = where
    clean = case.arrays()
    dirty = clean._replace(**{name: getattr(clean, name).copy()})
    getattr(dirty, name)[index] = value

    found = run(backend, case, dirty, **options)
    options = {**case.options, **options}
    with np.errstate(all="ignore"):
        expected = oracle.expect(dirty._replace(dlse=None), options)
    bounds = oracle.expect(clean._replace(dlse=None), options)
    for key, bound in expected.items():
        spoilt = ~np.isfinite(bound.exact)
        if key == "lse":
            spoilt &= bound.exact != -np.inf
        result = found[key].astype(np.float64)
        found_spoilt = ~np.isfinite(result) & (result != -np.inf if key == "lse" else True)
        np.testing.assert_array_equal(found_spoilt, spoilt, key)
        # Differences of infinities depend on the order of sums: in the lse of an infinite score,
        # and on dout's way to dq and dk through delta.
        if key != "lse" and (name != "dout" or key == "dv"):
            np.testing.assert_array_equal(result[spoilt], bound.exact[spoilt], key)
        compared = ~spoilt & np.isfinite(bound.exact)
        error = np.abs(result[compared] - bound.exact[compared]).max(initial=0)
        magnitude = np.abs(bound.exact[np.isfinite(bound.exact)]).max(initial=1)
        assert error <= bounds[key].allowed + bound.roundoff * magnitude, key


def check(
    backend: backends.Backend,
    case: Case,
    placed: list[np.ndarray] | None = None,
    **options: Any,
) -> None:
    """Forward and all gradients of one case, and more options, are within the oracle's bounds.

    `placed`: the case's q, k, v and dout in other memory.
    """
    arrays = case.arrays()
    placed = [*placed, None] if placed else arrays
    found = run(backend, case, placed, dlse=arrays.dlse, **options)
    compare(found, oracle.expect(arrays, {**case.options, **options}))


def compare(found: dict[str, np.ndarray], bounds: dict[str, oracle.Bound]) -> None:
    """Every result is within its bound."""
    for name, bound in bounds.items():
        error = bound.error(found[name])
        assert error <= bound.allowed, f"{name}: error {error:.2e}, allowed {bound.allowed:.2e}"


def run(
    backend: backends.Backend,
    case: Case,
    arrays: Any = None,
    dlse: np.ndarray | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """out, lse and every gradient by name."""
    options = {**case.options, **options}
    q, k, v, dout, _ = arrays or case.arrays()
    q, k, v, dout = (case.place(x, np) for x in (q, k, v, dout))
    out, lse, grads = backend.both(dout, q, k, v, dlse, case.deterministic, **options)
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: x for name, x in results.items() if x is not None}


def bits(array: np.ndarray) -> np.ndarray:
    """For comparisons that tell -0 from 0 and take equal NaNs for equal."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
