"""Many short packed sequences: NumPy works on batches of them, and each is as if it were alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import backends
import numpy as np
import pytest
import threadpoolctl
from test_varlen import HK, HQ, Packed, bounds_of, check_float64, check_found, expected, run

import cuflash
from cuflash import ScoreMod, _cpu_packed, _short_sequences
from cuflash._short_sequences import PADDINGS, Batch, Tokens

COUNT = 60
RNG = np.random.default_rng(5)
CROSS = ([*RNG.integers(0, 20, COUNT)], [*RNG.integers(0, 20, COUNT)], 3, 2)
SELF = ([*RNG.integers(1, 20, COUNT)],) * 2 + (0, 0)
EQUAL = ([7] * COUNT, [5] * COUNT, 4, 0)
LENGTHS = {"cross": CROSS, "self": SELF, "equal": EQUAL}

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window-offsets": {"window": (6, 3), "offset": RNG.integers(-4, 9, COUNT)},
    "softcap-scale": {"softcap": 0.9, "scale": 0.6, "causal": True, "offset": 1},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.06])},
    "alibi-by-sequence": {"alibi_slopes": RNG.random((COUNT, HQ)), "causal": True},
    "sinks": {"sinks": np.array([-1.0, 0.0, 1.0, 2.0]), "causal": True, "offset": -3},
    "large-sinks": {"sinks": np.full(HQ, 700.0)},
    "dropout": {"dropout": 0.3, "seed": 2**40 + 3, "causal": True},
    "score_mod": {
        "score_mod": ScoreMod(
            "score * (1.f + 0.1f * (float)b) + 0.01f * (float)((i - j) * h)",
            "1.f + 0.1f * (float)b",
            numpy_forward=lambda score, b, h, i, j: score * (1 + 0.1 * b) + 0.01 * (i - j) * h,
            numpy_backward=lambda score, b, h, i, j: 1 + 0.1 * b,
        )
    },
}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Those of the calls of a test."""
    found: list[Batch] = []
    divide = _short_sequences.divide

    def note(problem: Any) -> tuple[list[int], list[Batch]]:
        alone, some = divide(problem)
        found.extend(some)
        return alone, some

    monkeypatch.setattr(_cpu_packed, "divide", note)
    return found


def pad_by(monkeypatch: pytest.MonkeyPatch, *paddings: int | None) -> None:
    monkeypatch.setattr(_short_sequences, "PADDINGS", paddings)


# --------------------------------------------------------------------------------- right numbers


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("padding", [None, 1])
def test_every_option(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[Batch],
    padding: int | None,
    lengths: tuple[list[int], list[int], int, int],
    name: str,
) -> None:
    pad_by(monkeypatch, padding)
    check_float64(Packed(lengths), OPTIONS[name])
    assert batches


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(batches: list[Batch], dtype: str) -> None:
    x = Packed(CROSS, np.dtype(dtype))
    options = OPTIONS["causal"]
    check_found(run(backends.CpuBackend(), x, options), x, bounds_of(x, options))
    assert {batch.queries.longest for batch in batches} > {1}


def test_heads_first_and_arrays_with_gaps() -> None:
    x = Packed(CROSS)
    right = run(backends.CpuBackend(), x, OPTIONS["causal"])
    for name in ("q", "k", "v", "dout"):
        wide = np.full((HQ, 2 * len(getattr(x, name)), 20), np.nan)
        tokens, heads, size = getattr(x, name).shape
        wide[:heads, : 2 * tokens : 2, :size] = getattr(x, name).swapaxes(0, 1)
        setattr(x, name, wide[:heads, : 2 * tokens : 2, :size].swapaxes(0, 1))
    found = run(backends.CpuBackend(), x, OPTIONS["causal"])
    for name, array in right.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=1e-12, err_msg=name)


def test_long_sequences_among_short_ones() -> None:
    lengths = [3, 500, 4, 0, 3, 700, 4, 3]
    check_float64(Packed((lengths, lengths[::-1], 1, 1)), OPTIONS["causal"])


def test_what_no_sequence_with_queries_has_gets_zero_gradients() -> None:
    x = Packed(([3, 0, 3, 0], [2, 5, 2, 1], 2, 3), np.float32)
    found = run(backends.CpuBackend(), x, {})
    assert not found["dk"][2:7].any() and not found["dv"][2:7].any()
    for name in ("dq", "dk", "dv"):
        assert np.isfinite(found[name]).all() and not found[name][-2:].any()


# ------------------------------------------------------------------ each as if it were alone


def test_equal_sequences_get_the_bits_that_they_get_alone(batches: list[Batch]) -> None:
    x = Packed(([9] * 20, [11] * 20, 0, 0), np.float32)
    options = {"causal": True, "sinks": np.zeros(HQ, np.float32)}
    (found_out, found_lse), packed_pullback = cuflash.attention_varlen_vjp(
        x.q, x.k, x.v, *x.cu_seqlens, return_lse=True, **options
    )
    found = packed_pullback(x.dout, x.dlse)
    assert len(batches) == 2  # forward's and backward's
    for b in range(20):
        i, j = slice(9 * b, 9 * b + 9), slice(11 * b, 11 * b + 11)
        (out, lse), pullback = cuflash.attention_vjp(
            x.q[None, i], x.k[None, j], x.v[None, j], return_lse=True, **options
        )
        grads = pullback(x.dout[None, i], x.dlse[None, :, i])
        assert found_out[i].tobytes() == out.tobytes()
        assert found_lse[:, i].tobytes() == lse.tobytes()
        for name, tokens in (("dq", i), ("dk", j), ("dv", j)):
            alone = getattr(grads, name)
            assert getattr(found, name)[tokens].tobytes() == alone.tobytes(), name


@pytest.mark.parametrize("value", [40, 1e4, np.inf, np.nan])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_bits_do_not_depend_on_what_other_sequences_hold(name: str, value: float) -> None:
    x = Packed(([9] * 20, [11] * 20, 0, 0), np.float32)
    right = run(backends.CpuBackend(), x, OPTIONS["causal"])
    length = 11 if name in "kv" else 9
    getattr(x, name)[3 * length : 4 * length] *= value
    found = run(backends.CpuBackend(), x, OPTIONS["causal"])
    for key, array in right.items():
        length = 11 if key in ("dk", "dv") else 9
        of = slice(3 * length, 4 * length)
        tokens, right_tokens = (a.T if key == "lse" else a for a in (found[key], array))
        others = [np.delete(a, of, axis=0) for a in (tokens, right_tokens)]
        assert others[0].tobytes() == others[1].tobytes(), key


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_bits_depend_neither_on_threads_nor_on_the_run(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[list[int], list[int], int, int]
) -> None:
    backends.shrink_cpu_tiles(monkeypatch, rows=64, keys=128)
    x = Packed(lengths, np.float32)
    options = {**OPTIONS["dropout"], **OPTIONS["sinks"]}
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        right = run(backends.CpuBackend(), x, options)
    for threads in (1, 3):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found = run(backends.CpuBackend(), x, options)
        for name, array in right.items():
            assert found[name].tobytes() == array.tobytes(), name


NOT_FINITE = {"q": np.nan, "k": -np.inf, "v": np.nan, "dout": np.inf}


def check_isolation(name: str, padding: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite, in one token of each second sequence, changes no other sequence."""
    pad_by(monkeypatch, padding)
    x = Packed(CROSS)
    options = OPTIONS["causal"]
    array = getattr(x, name)
    starts = x.cu_seqlens[name in "kv"]
    for b in range(0, COUNT, 2):
        array[starts[b] : starts[b + 1]][:1] = NOT_FINITE[name]
    found, right = run(backends.CpuBackend(), x, options), expected(x, options)
    for key, found_array in found.items():
        finite = np.isfinite(right[key])
        np.testing.assert_array_equal(np.isfinite(found_array), finite, err_msg=key)
        np.testing.assert_allclose(
            found_array[finite], right[key][finite], rtol=1e-10, atol=1e-10, err_msg=key
        )


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_stays_in_its_sequence(
    monkeypatch: pytest.MonkeyPatch, name: str, padding: int | None
) -> None:
    check_isolation(name, padding, monkeypatch)


def unfilled(self: Tokens, x: np.ndarray, padding: float = 0.0) -> np.ndarray:
    """As `gather`, with a sequence's first token behind its end."""
    places = self.starts[:, None] + np.where(self.missing, 0, np.arange(self.longest))
    some = x[places[:, None], np.arange(x.shape[1])[:, None]]
    return some.reshape(1, some.shape[0] * some.shape[1], *some.shape[2:]).swapaxes(1, 2)


def shows_padding(batch: Batch, problem: Any, of: Callable[..., Any] = Batch.band) -> Any:
    band = of(batch, problem)
    if band.hidden is None:
        return band
    hidden = band.hidden & ~np.repeat(batch.keys.missing[:, None, None], HK, axis=0)
    return band._replace(hidden=hidden)


@pytest.mark.parametrize(
    ("owner", "attribute", "bug"),
    [(Tokens, "gather", unfilled), (Batch, "band", shows_padding)],
    ids=["padding holds a token", "padding is seen"],
)
def test_bugs_in_padding_are_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str, bug: Any
) -> None:
    monkeypatch.setattr(owner, attribute, bug)
    pad_by(monkeypatch, 1)
    with pytest.raises(AssertionError):
        check_float64(Packed(CROSS), OPTIONS["sinks"])


def test_a_function_is_asked_about_no_pair_that_is_not_there(batches: list[Batch]) -> None:
    """Its arrays may end with the last sequence."""
    x = Packed(CROSS)
    *starts, end = x.cu_seqlens[1]
    table = np.random.default_rng(0).standard_normal(end + 20)

    def adds(table: np.ndarray) -> dict[str, Any]:
        by_token = ScoreMod(
            "score",
            numpy_forward=lambda score, b, h, i, j: score + table[np.array(starts)[b] + j],
            numpy_backward=lambda score, b, h, i, j: np.ones_like(score),
        )
        return {"score_mod": by_token}

    found, right = run(backends.CpuBackend(), x, adds(table[:end])), expected(x, adds(table))
    for name, array in right.items():  # the reference pads
        np.testing.assert_allclose(found[name], array, rtol=1e-10, atol=1e-10, err_msg=name)
    assert batches


# ---------------------------------------------------------------------------------- what it takes


def calls(lengths: np.ndarray) -> int:
    """How many functions a forward and a backward call, of Python and of C."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    cu_seqlens = np.append(0, np.cumsum(lengths))
    q, k, v, dout = np.ones((4, cu_seqlens[-1], 1, 4), np.float32)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):  # other threads are not counted
        for profile in (None, note):
            sys.setprofile(profile)
            try:
                _, pullback = cuflash.attention_varlen_vjp(q, k, v, cu_seqlens, cu_seqlens)
                pullback(dout)
            finally:
                sys.setprofile(None)
    return count


def test_python_does_as_much_for_many_equal_sequences_as_for_few() -> None:
    few, many = (calls(np.full(count, 4)) for count in (2000, 8000))
    assert many == few


def test_python_does_little_for_many_sequences_of_any_lengths() -> None:
    few, many = (calls(np.random.default_rng(0).integers(1, 17, count)) for count in (300, 3000))
    assert many < 2 * few and many < 4 * 3000


def test_lengths_are_padded_only_where_that_takes_less(batches: list[Batch]) -> None:
    def most_padding(rows: Any, keys: Any) -> float:
        """Of what is computed, the share that is padding."""
        batches.clear()
        x = Packed(([*rows], [*keys], 0, 0), np.float32)
        cuflash.attention_varlen(x.q, x.k, x.v, *x.cu_seqlens)
        computed = sum(batch.scores for batch in batches)
        there = sum(int(batch.queries.lengths @ batch.keys.lengths) for batch in batches)
        return 1 - there / computed

    rng = np.random.default_rng(0)
    assert most_padding([13] * 300, [13] * 300) == 0
    assert most_padding([13, 16] * 300, [13, 16] * 300) == 0
    rows, keys = rng.integers(1, 65, (2, 400))
    assert 0 < most_padding(rows, keys) < 0.6
    assert len(batches) < 400 / 4


@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_lengths_are_few_and_near(padding: int | None) -> None:
    lengths = np.arange(513)
    padded = _short_sequences._padded(lengths, padding)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    if padding is not None:
        assert (padded <= lengths * (1 + 1 / padding)).all()
        assert np.unique(padded).size <= 2 + 9 * padding
