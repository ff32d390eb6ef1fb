"""What is added to scores, probabilities and their sum: slopes, sinks, dropout, score functions."""

from __future__ import annotations

import doctest
import itertools
import math
import re
from dataclasses import replace
from typing import Any

import backends
import numpy as np
import pytest
import threadpoolctl
from conftest import on_every_backend
from test_masks import BESIDE
from unreal_gpu import HK, HQ, SQ, B, D, Maker, refused

import cuflash
from cuflash import ScoreMod, _random, _work, cpu, reference, score_mod
from cuflash._problem import GradientProblem, Problem
from cuflash.cli import oracle
from cuflash.cli.cases import Case

FLOAT16, FLOAT64 = np.dtype(np.float16), np.dtype(np.float64)
ROWS, KEYS = 45, 70
SMALL = Case(
    FLOAT64, batch=2, seqlen_q=ROWS, seqlen_k=KEYS, heads_q=4, heads_k=2, head_dim=8, head_dim_v=6
)


def score_function(case: Case) -> ScoreMod:
    """Depends on the score, its place and an array, and so does its derivative."""
    gain = np.random.default_rng(1).standard_normal((case.heads_q, case.seqlen_k))
    return ScoreMod(
        "score * gain(h, j) + 0.1f * score * score - 0.02f * (float)(i - j) * (float)b",
        "gain(h, j) + 0.2f * score",
        numpy_forward=lambda score, b, h, i, j, gain: (
            score * gain[h, j] + 0.1 * score**2 - 0.02 * (i - j) * b
        ),
        numpy_backward=lambda score, b, h, i, j, gain: gain[h, j] + 0.2 * score,
        named={"gain": gain.astype(np.float32)},
    )


def terms(case: Case, *names: str) -> dict[str, Any]:
    """The options of these names for a case, as `attention` and the reference take them."""
    rng = np.random.default_rng(2)
    heads, batch = case.heads_q, case.batch
    bias_dtype = np.float64 if case.dtype == FLOAT64 else np.float32
    every = {
        "alibi": {"alibi_slopes": 2.0 ** -np.arange(1, heads + 1).astype(np.float32)},
        "alibi-per-batch": {"alibi_slopes": rng.standard_normal((batch, heads), np.float32) / 8},
        "sinks": {"sinks": rng.standard_normal(heads, np.float32) + 2},
        "dropout": {"dropout": 0.3, "seed": 2**40 + 7},
        "score_mod": {"score_mod": score_function(case)},
        "bias": {"bias": rng.standard_normal((heads, 1, case.seqlen_k)).astype(bias_dtype)},
    }
    return {option: value for name in names for option, value in every[name].items()}


TERMS = ("alibi", "alibi-per-batch", "sinks", "dropout", "score_mod", "bias")
PAIRS = [pair for pair in itertools.combinations(TERMS, 2) if pair != TERMS[:2]]
COMPANIONS = {
    "alone": {},
    "causal": {"causal": True},
    "rows-that-see-nothing": {"causal": True, "offset": (-20, -1000)},
    "softcap": {"softcap": 0.8},
    "window": {"window": (20, 9), "offset": (-7, 40)},
    "lengths": {"q_lens": (ROWS, 17), "kv_lens": (33, 0), "causal": True},
    "one-key-head": {"heads_q": 6, "heads_k": 1},
    "heads-first": {"layout": "BHSD"},
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.shrink_cpu_tiles(monkeypatch, rows=16, keys=32)


def run(backend: backends.Backend, case: Case, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """out, lse and every gradient by name."""
    q, k, v, dout, dlse = case.arrays()
    q, k, v, dout = (case.place(x, np) for x in (q, k, v, dout))
    out, lse, grads = backend.both(dout, q, k, v, dlse, **case.options, **options)
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: x for name, x in results.items() if x is not None}


def expected(case: Case, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same from the reference."""
    q, k, v, dout, dlse = case.arrays()
    options = {**case.options, **options}
    out, lse = reference.attention(q, k, v, **options)
    grads = reference.attention_backward(dout, q, k, v, dlse=dlse, **options)
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: x for name, x in results.items() if x is not None}


def check_float64(case: Case, options: dict[str, Any]) -> None:
    """What the CPU finds in float64 is accurate to float64, but for arrays of other dtypes."""
    found, right = run(backends.CpuBackend(), case, options), expected(case, options)
    assert found.keys() == right.keys()
    for name, x in right.items():
        tolerance = 1e-10 if found[name].dtype == FLOAT64 else 1e-6
        np.testing.assert_allclose(
            found[name],
            x,
            rtol=tolerance,
            atol=tolerance * np.abs(x[np.isfinite(x)]).max(initial=1),
        )


def check_bounds(backend: backends.Backend, case: Case, options: dict[str, Any]) -> None:
    """All results are within the oracle's bounds."""
    found = run(backend, case, options)
    bounds = oracle.expect(case.arrays(), {**case.options, **options})
    assert found.keys() == bounds.keys()
    for name, bound in bounds.items():
        error = bound.error(found[name])
        assert error <= bound.allowed, f"{name}: error {error:.2e}, allowed {bound.allowed:.2e}"


# ------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("companion", COMPANIONS.values(), ids=COMPANIONS)
@pytest.mark.parametrize("name", TERMS)
def test_each_term_with_each_option(
    small_tiles: None, name: str, companion: dict[str, Any]
) -> None:
    case = replace(SMALL, **companion)
    check_float64(case, terms(case, name))


@pytest.mark.parametrize("batch_and_heads", [(2, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_each_term_with_a_mask(
    small_tiles: None, name: str, batch_and_heads: tuple[int, int]
) -> None:
    mask = np.random.default_rng(5).random((*batch_and_heads, ROWS, KEYS)) < 0.6
    mask[..., 16:32, :] = False  # rows that see nothing
    mask[..., 32:64] = False  # whole blocks, behind which keys are seen
    case = replace(SMALL, window=(50, None))
    check_float64(case, {**terms(case, name), "mask": mask})


@pytest.mark.parametrize("names", [*PAIRS, TERMS[1:]], ids="+".join)
def test_terms_together(small_tiles: None, names: tuple[str, ...]) -> None:
    case = replace(SMALL, causal=True, softcap=1.5)
    check_float64(case, terms(case, *names))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", TERMS)
def test_dtypes(small_tiles: None, name: str, dtype: str) -> None:
    case = replace(SMALL, dtype=np.dtype(dtype), causal=True)
    check_bounds(backends.CpuBackend(), case, terms(case, name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_slopes_and_sinks_of_any_floating_dtype(small_tiles: None, dtype: str) -> None:
    case = replace(SMALL, dtype=FLOAT16)
    options = {n: x.astype(dtype) for n, x in terms(case, "alibi-per-batch", "sinks").items()}
    check_bounds(backends.CpuBackend(), case, options)
    assert run(backends.CpuBackend(), case, options)["dsinks"].dtype == dtype


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", [(2, 4, ROWS, KEYS), (4, 1, KEYS), (2, 1, ROWS, 1), (1,)])
def test_a_float32_bias_beside_float64(
    small_tiles: None, shape: tuple[int, ...], masked: bool
) -> None:
    """All else is as accurate as float64, and dbias is float32 as the bias is."""
    rng = np.random.default_rng(4)
    case = replace(SMALL, causal=True, softcap=1.5)
    options = {"bias": rng.standard_normal(shape, np.float32)}
    if masked:
        options["mask"] = rng.random((ROWS, KEYS)) < 0.7
    check_float64(case, options)
    dtypes = {name: x.dtype for name, x in run(backends.CpuBackend(), case, options).items()}
    assert dtypes.pop("dbias") == np.float32 and set(dtypes.values()) == {FLOAT64}


def each_term() -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """Alone, with causal, with grouped heads and with D other than Dv."""
    return {
        f"{name}-{beside}": ((name,), changes)
        for name in TERMS
        for beside, changes in BESIDE.items()
    }


TOGETHER = {
    "alibi-per-batch": (("alibi-per-batch",), {"window": (40, 30), "heads_q": 4, "heads_k": 2}),
    "sinks-causal-gqa": (("sinks",), {"causal": True, "heads_q": 4, "heads_k": 2}),
    "sinks-of-rows-that-see-nothing": (("sinks",), {"causal": True, "offset": (-50, -1000)}),
    "sinks-and-lengths": (("sinks",), {"q_lens": (77, 0), "kv_lens": (0, 150)}),
    "dropout-and-grouped-heads": (("dropout",), {"heads_q": 4, "heads_k": 1, "head_dim_v": 24}),
    "score_mod-and-softcap": (
        ("score_mod",),
        {"softcap": 2.0, "window": (40, 30), "heads_q": 4, "heads_k": 2},
    ),
    "bias-and-softcap": (("bias",), {"softcap": 2.0, "head_dim_v": 24}),
    "everything": (TERMS[1:], {"causal": True, "heads_q": 4, "heads_k": 2}),
}


@pytest.mark.parametrize(
    "backend, names, changes",
    on_every_backend(
        TOGETHER | each_term(),
        always=("emulated-80-alibi-per-batch", "emulated-90-score_mod-and-softcap"),
    ),
    indirect=["backend"],
)
def test_on_every_backend(
    backend: backends.Backend, names: tuple[str, ...], changes: dict[str, Any]
) -> None:
    case = replace(Case(batch=2, seqlen_q=77, seqlen_k=150, head_dim=32), **changes)
    check_bounds(backend, case, terms(case, *names))


# -------------------------------------------------------------------------------------- sinks


@pytest.mark.parametrize(
    "backend", ["cpu", "emulated-80", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)
def test_without_a_gradient_of_the_bias(backend: backends.Backend) -> None:
    q, k, v, dout, _ = Case(seqlen_q=40, seqlen_k=70, dtype=FLOAT16, head_dim=32).arrays()
    bias = np.random.default_rng(2).standard_normal((2, 1, 70)).astype(FLOAT16)
    out, lse = backend.forward(q, k, v, bias=bias)
    every, others = (
        backend.backward(dout, q, k, v, out, lse, bias=bias, bias_gradient=wanted)
        for wanted in (True, False)
    )
    assert every.dbias.any() and others.dbias is None
    for with_dbias, without in zip(every[:3], others[:3], strict=True):
        assert with_dbias.any() and np.allclose(
            with_dbias.astype(np.float32), without.astype(np.float32), atol=1e-3
        )


def test_a_row_that_sees_nothing_has_the_lse_of_its_sink() -> None:
    case = replace(SMALL, causal=True, offset=(-20, -1000))
    options = terms(case, "sinks")
    found = run(backends.CpuBackend(), case, options)
    assert (found["out"][0, :20] == 0).all() and (found["out"][1] == 0).all()
    sinks = np.broadcast_to(options["sinks"][:, None], (4, ROWS))
    np.testing.assert_allclose(found["lse"][1], sinks, rtol=1e-15)
    np.testing.assert_allclose(found["lse"][0, :, :20], sinks[:, :20], rtol=1e-15)
    assert (found["dq"][1] == 0).all() and (found["dk"][1] == 0).all()
    without = run(backends.CpuBackend(), case, {})
    assert (without["lse"][1] == -np.inf).all() and "dsinks" not in without


def test_rows_past_the_lengths_have_no_sink() -> None:
    case = replace(SMALL, q_lens=(30, 0))
    found = run(backends.CpuBackend(), case, terms(case, "sinks"))
    assert (found["lse"][0, :, 30:] == -np.inf).all() and (found["lse"][1] == -np.inf).all()
    assert np.isfinite(found["lse"][0, :, :30]).all()


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 200.0, 1e38])
def test_sinks_of_any_size(sink: float) -> None:
    case = replace(SMALL, dtype=np.dtype(np.float32), causal=True, offset=-5)
    options = {"sinks": np.full(4, sink, np.float32)}
    found, right = run(backends.CpuBackend(), case, options), expected(case, options)
    for name, x in right.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("empty", [{"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0}], ids=str)
def test_sinks_without_queries_keys_or_batch(empty: dict[str, int]) -> None:
    case = replace(SMALL, **empty)
    check_float64(case, terms(case, "sinks"))


# ------------------------------------------------------------------------------------- dropout


def probabilities(case: Case, options: dict[str, Any]) -> np.ndarray:
    """(B, Hq, Sq, Sk), seen through values that are the unit vectors."""
    q, k, *_ = case.arrays()
    v = np.broadcast_to(np.eye(KEYS)[None, :, None], (case.batch, KEYS, case.heads_k, KEYS))
    return cuflash.attention(q, k, v, **case.options, **options).swapaxes(1, 2)


def test_exactly_the_elements_that_their_bits_say_are_dropped(small_tiles: None) -> None:
    options = terms(SMALL, "dropout")
    grid = map(np.arange, (2, 4, ROWS, KEYS))
    bits = _random.random_bits(options["seed"], *grid)
    dropped = bits < math.floor(options["dropout"] * 2**32)
    all_probs, probs = probabilities(SMALL, {}), probabilities(SMALL, options)
    np.testing.assert_array_equal(probs == 0, dropped)
    np.testing.assert_allclose(probs[~dropped], all_probs[~dropped] / 0.7, rtol=1e-12)


@pytest.mark.parametrize("tile", [(16, 32), (7, 11), (64, 512)])
def test_tiles_do_not_change_what_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    case = replace(SMALL, causal=True)
    options = terms(case, "dropout")
    whole = probabilities(case, options)
    monkeypatch.setattr(_work, "TILE", tile)
    monkeypatch.setattr(_work, "TILE_OF_BAND", tile)
    np.testing.assert_array_equal(probabilities(case, options) == 0, whole == 0)
    check_float64(case, options)


def test_as_much_is_kept_as_the_rate_says() -> None:
    case = replace(SMALL, batch=8)
    for rate in (0.1, 0.5, 0.9):
        kept = (probabilities(case, {"dropout": rate, "seed": 0}) != 0).mean()
        deviation = math.sqrt(rate * (1 - rate) / (8 * 4 * ROWS * KEYS))
        assert abs(kept - (1 - rate)) < 6 * deviation


def test_a_rate_of_0_drops_nothing_and_lse_is_without_dropout() -> None:
    q, k, v, *_ = SMALL.arrays()
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    same, _ = cuflash.attention(q, k, v, dropout=0.0, seed=3, return_lse=True)
    np.testing.assert_array_equal(same, out)
    other, same_lse = cuflash.attention(q, k, v, dropout=0.5, seed=3, return_lse=True)
    np.testing.assert_array_equal(same_lse, lse)
    assert not np.allclose(other, out)


def test_the_seed_decides_what_is_dropped() -> None:
    def dropped(seed: int) -> np.ndarray:
        return probabilities(SMALL, {"dropout": 0.5, "seed": seed}) == 0

    np.testing.assert_array_equal(dropped(5), dropped(5))
    for other in (6, 5 + 2**32, 5 + 2**63):
        assert abs((dropped(5) == dropped(other)).mean() - 0.5) < 0.05


# ------------------------------------------------------------------------------------ score_mod


def test_a_score_function_sees_natural_scores_and_global_places(small_tiles: None) -> None:
    q, k, v, *_ = SMALL.arrays()
    seen = np.full((2, 4, ROWS, KEYS), np.nan)

    def note(score: np.ndarray, *place: np.ndarray) -> np.ndarray:
        seen[tuple(np.broadcast_arrays(*place))] = score
        return score

    cuflash.attention(q, k, v, scale=0.5, score_mod=ScoreMod("score", numpy_forward=note))
    k = k.repeat(2, axis=2)
    np.testing.assert_allclose(seen, 0.5 * np.einsum("bihd,bjhd->bhij", q, k), rtol=1e-12)


def test_a_score_function_that_hides_everything() -> None:
    q, k, v, dout, _ = SMALL.arrays()
    nothing = ScoreMod(
        "-INFINITY",
        numpy_forward=lambda score, b, h, i, j: np.float32(-np.inf),
        numpy_backward=lambda score, b, h, i, j: 0,
    )
    (out, lse), pullback = cuflash.attention_vjp(q, k, v, score_mod=nothing, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()
    assert not any(x.any() for x in pullback(dout)[:3])


def test_a_score_of_the_lowest_number_is_no_mask() -> None:
    q, k, v, *_ = replace(SMALL, dtype=np.dtype(np.float32)).arrays()
    lowest = np.finfo(np.float32).min
    function = ScoreMod("-3.4e38f", numpy_forward=lambda score, *place: np.full(1, lowest))
    out = cuflash.attention(q, k, v, score_mod=function)
    np.testing.assert_allclose(out[:, :, 0], out[:, :1, 0].repeat(ROWS, 1), rtol=1e-5)
    np.testing.assert_allclose(out[:, 0, ::2], v.mean(axis=1), rtol=1e-4, atol=1e-5)


def test_a_score_function_must_not_write_its_score() -> None:
    def write(score: np.ndarray, *place: np.ndarray) -> np.ndarray:
        score += 1
        return score

    q, k, v, *_ = SMALL.arrays()
    with pytest.raises(ValueError, match="read-only"):
        cuflash.attention(q, k, v, score_mod=ScoreMod("score + 1", numpy_forward=write))


def test_a_score_function_of_another_shape() -> None:
    q, k, v, *_ = SMALL.arrays()
    function = ScoreMod("score", numpy_forward=lambda score, *place: score[..., :3])
    message = (
        "cuflash.ScoreMod: numpy_forward gave shape (2, 4, 45, 3) for scores of shape "
        "(2, 4, 45, 70); expected one that broadcasts to it"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        reference.attention(q, k, v, score_mod=function)
    with pytest.raises(ValueError, match="^cuflash.ScoreMod: numpy_forward gave shape"):
        cuflash.attention(q, k, v, score_mod=function)


def test_nan_behind_a_mask_stays_there(small_tiles: None) -> None:
    case = replace(SMALL, causal=True)
    options = terms(case, "alibi", "sinks", "dropout", "score_mod")
    clean = expected(case, options)
    arrays = case.arrays()
    last = ROWS - 1  # the only row that sees the last key

    for name in ("k", "v"):
        dirty = arrays._replace(**{name: getattr(arrays, name).copy()})
        getattr(dirty, name)[:, -1] = np.nan
        problem = Problem.create("attention", "cpu", *dirty[:3], **case.options, **options)
        out, lse, _ = cpu.forward(problem)
        dlse = dirty.dlse.astype(np.float64)
        gradient = GradientProblem.create("f", problem, dirty.dout, out, lse, dlse)
        dq = cpu.backward(gradient).dq
        for found, right in ((out, clean["out"]), (dq, clean["dq"])):
            np.testing.assert_allclose(found[:, :last], right[:, :last], rtol=1e-9, atol=1e-11)
            assert np.isnan(found[:, last]).any()


# ------------------------------------------------------------------------------------- threads


def test_bits_do_not_depend_on_the_number_of_threads(small_tiles: None) -> None:
    case = replace(SMALL, dtype=np.dtype(np.float32), seqlen_k=300, batch=1, causal=True)
    options = terms(case, *TERMS[1:])
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        right = run(backends.CpuBackend(), case, options)
    for threads in (2, 5):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found = run(backends.CpuBackend(), case, options)
        for name, x in right.items():
            assert found[name].tobytes() == x.tobytes(), name


def test_the_callers_error_state_is_not_asked() -> None:
    q, k, v, dout, _ = replace(SMALL, dtype=FLOAT16).arrays()
    options = terms(SMALL, "alibi", "sinks", "dropout", "score_mod")
    options["sinks"] = np.full(4, 1e300)
    with np.errstate(all="raise"):
        _, pullback = cuflash.attention_vjp(q, k, v, **options)
        pullback(dout)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dropout": -0.1, "seed": 0},
            ValueError,
            "dropout is -0.1; expected at least 0 and less than 1",
        ),
        (
            {"dropout": 1.0, "seed": 0},
            ValueError,
            "dropout is 1.0; expected at least 0 and less than 1",
        ),
        ({"dropout": math.nan}, ValueError, "dropout is nan; expected a finite number"),
        ({"dropout": True}, TypeError, "dropout is True (bool); expected a real number"),
        ({"dropout": "0"}, TypeError, "dropout is '0' (str); expected a real number"),
        ({"dropout": 0.5}, ValueError, "seed is None; expected an integer, with dropout"),
        ({"dropout": 0.5, "seed": -1}, ValueError, "seed is -1; expected 0 to 2^64 - 1"),
        ({"seed": 2**64}, ValueError, f"seed is {2**64}; expected 0 to 2^64 - 1"),
        ({"seed": 1.5}, TypeError, "seed is 1.5 (float); expected an integer"),
        ({"seed": True}, TypeError, "seed is True (bool); expected an integer"),
        (
            {"sinks": np.zeros(HK)},
            ValueError,
            f"sinks has shape ({HK},); expected ({HQ},), per query head",
        ),
        (
            {"sinks": np.zeros((B, HQ))},
            ValueError,
            f"sinks has shape ({B}, {HQ}); expected ({HQ},), per query head",
        ),
        (
            {"sinks": np.zeros(HQ, np.int64)},
            TypeError,
            "sinks is int64; expected one of float16, bfloat16, float32, float64",
        ),
        (
            {"alibi_slopes": np.zeros(HK)},
            ValueError,
            f"alibi_slopes has shape ({HK},); expected ({HQ},) or ({B}, {HQ}), per query head",
        ),
        (
            {"alibi_slopes": np.zeros((1, HQ))},
            ValueError,
            f"alibi_slopes has shape (1, {HQ}); expected ({HQ},) or ({B}, {HQ}), per query head",
        ),
        (
            {"alibi_slopes": np.zeros(HQ, bool)},
            TypeError,
            "alibi_slopes is bool; expected one of float16, bfloat16, float32, float64",
        ),
        (
            {"score_mod": np.tanh},
            TypeError,
            "score_mod is a ufunc; expected a cuflash.ScoreMod",
        ),
        (
            {"score_mod": ScoreMod("score")},
            NotImplementedError,
            "score_mod has no numpy_forward; the cpu backend evaluates a NumPy function",
        ),
        (
            {"score_mod": ScoreMod("score", named={"x": np.zeros(3, np.int8)})},
            TypeError,
            "score_mod x is int8; expected one of bool, int32, int64, float16, bfloat16, float32",
        ),
        (
            {"score_mod": ScoreMod("score", named={"x": np.zeros((1,) * 5, np.float32)})},
            ValueError,
            "score_mod x has 5 axes; expected 1 to 4",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with refused(error, message):
        Maker("cpu").problem(**options)


def test_a_seed_without_dropout_is_no_contradiction() -> None:
    assert Maker("cpu").problem(seed=2**64 - 1).seed == 2**64 - 1
    assert Maker("cpu").problem().seed == 0


def test_out_overlaps_no_slopes_or_sinks() -> None:
    memory = np.zeros((B, SQ, HQ, 6), np.float16)
    for name in ("sinks", "alibi_slopes"):
        with refused(ValueError, f"out overlaps {name}; expected memory of its own"):
            Maker("cpu").problem(out=memory, **{name: memory[0, 0, :, 0]})


def test_a_missing_derivative_is_named_where_it_is_needed() -> None:
    q, k, v = (np.zeros((B, SQ, HQ, D), np.float32) for _ in range(3))
    function = ScoreMod("score", numpy_forward=lambda score, *place: score)
    out, lse = cuflash.attention(q, k, v, return_lse=True, score_mod=function)
    message = (
        "score_mod has no numpy_backward; the cpu backend evaluates the derivative as a NumPy "
        "function"
    )
    for name, call in {
        "attention_backward": lambda: cuflash.attention_backward(
            out, q, k, v, out, lse, score_mod=function
        ),
        "attention_vjp": lambda: cuflash.attention_vjp(q, k, v, score_mod=function),
    }.items():
        with pytest.raises(NotImplementedError, match=f"^cuflash.{name}: {re.escape(message)}$"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"forward": None},
            TypeError,
            "forward is a NoneType; expected a CUDA C++ expression, a string",
        ),
        ({"forward": " \n"}, ValueError, "forward is empty; expected a CUDA C++ expression"),
        (
            {"forward": "score", "backward": 1.0},
            TypeError,
            "backward is a float; expected a CUDA C++ expression, a string",
        ),
        (
            {"forward": "score", "backward": ""},
            ValueError,
            "backward is empty; expected a CUDA C++ expression",
        ),
        *(
            (
                {"forward": "score", "named": {name: np.zeros(3)}},
                ValueError,
                f"{name!r} names an array; expected a C identifier other than b, h, i, j, score",
            )
            for name in ("score", "i", "two words", "1st", "", 3)
        ),
    ],
)
def test_bad_score_mods(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^cuflash.ScoreMod: {re.escape(message)}$"):
        ScoreMod(**arguments)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(score_mod)
    assert result.attempted > 0 and result.failed == 0
