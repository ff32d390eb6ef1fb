"""Packed sequences: each attends within itself, whatever the lengths of the others."""

from __future__ import annotations

import functools
import inspect
import re
import tracemalloc
from typing import Any

import backends
import numpy as np
import pytest
import threadpoolctl
from conftest import emulated, on_every_backend
from test_interop import jax_kind, numpy_kind, torch_kind
from unreal_gpu import Maker, readable

import cuflash
from cuflash import ScoreMod, _cpu_forward, _cpu_packed, reference
from cuflash._checks import Check
from cuflash._packed import PackedProblem
from cuflash._reference_masks import visibility
from cuflash._traits import Tiling
from cuflash.cli import oracle
from cuflash.cli.cases import Arrays

HQ, HK, D, DV = 4, 2, 8, 6

# Sequences' queries and keys, and the tokens of q and of k and v behind the last one.
LENGTHS = {
    "equal": ([40, 40], [40, 40], 0, 0),
    "one": ([70], [90], 0, 0),
    "unlike": ([3, 100, 1, 17, 30], [50, 70, 1, 33, 2], 0, 0),
    "empty-ones": ([0, 20, 0, 30, 0], [10, 0, 0, 40, 0], 0, 0),
    "tokens-behind": ([30, 20], [20, 35], 7, 9),
    "only-empty-ones": ([0, 0], [0, 0], 4, 5),
    "no-sequences": ([], [], 4, 5),
    "no-tokens": ([0], [0], 0, 0),
}
SEQUENCES = 5

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "offset": 0},
    "window": {"window": (20, 3), "offset": np.array([1, -2, 30, 4, 0])},
    "band": {"window": (50, None), "causal": True},
    "softcap-and-scale": {"softcap": 0.9, "scale": 0.6},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.06]), "causal": True},
    "alibi-per-sequence": {"alibi_slopes": np.random.default_rng(3).standard_normal((5, HQ)) / 8},
    "sinks": {"sinks": np.array([-1.0, 0.0, 1.0, 2.0]), "causal": True, "offset": -5},
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


class Packed:
    """Standard normal tokens of some sequences; NaN behind the last."""

    def __init__(
        self,
        lengths: tuple[list[int], list[int], int, int],
        dtype: Any = np.float64,
        head_dim_v: int = DV,
    ):
        rows, keys, rows_behind, keys_behind = lengths
        self.cu_seqlens = tuple(
            np.concatenate([[0], np.cumsum(x)]).astype(int) for x in (rows, keys)
        )
        self.batch = len(rows)
        rng = np.random.default_rng(0)

        def tokens(count: int, behind: int, *axes: int) -> np.ndarray:
            x = np.full((count + behind, *axes), np.nan)
            x[:count] = rng.standard_normal((count, *axes))
            return x.astype(dtype)

        self.q = tokens(sum(rows), rows_behind, HQ, D)
        self.k = tokens(sum(keys), keys_behind, HK, D)
        self.v = tokens(sum(keys), keys_behind, HK, head_dim_v)
        self.dout = tokens(sum(rows), rows_behind, HQ, head_dim_v)
        self.dlse = tokens(sum(rows), rows_behind, HQ).T.astype(np.float32)

    def options(self, name: str) -> dict[str, Any]:
        """What is per sequence, cut to their number."""
        options = dict(OPTIONS[name])
        for key in ("offset", "alibi_slopes"):
            if np.shape(options.get(key))[:1] == (SEQUENCES,):
                options[key] = options[key][: self.batch]
        return options


def run(backend: backends.Backend, x: Packed, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """out, lse and every gradient by name."""
    out, lse = backend.forward_varlen(x.q, x.k, x.v, *x.cu_seqlens, **options)
    dlse = x.dlse.astype(lse.dtype)
    grads = backend.backward_varlen(
        x.dout, x.q, x.k, x.v, *x.cu_seqlens, out, lse, dlse=dlse, **options
    )
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: array for name, array in results.items() if array is not None}


def expected(x: Packed, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same from the reference."""
    arguments = (x.q, x.k, x.v, *x.cu_seqlens)
    out, lse = reference.attention_varlen(*arguments, **options)
    grads = reference.attention_varlen_backward(x.dout, *arguments, dlse=x.dlse, **options)
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: array for name, array in results.items() if array is not None}


def check_float64(x: Packed, options: dict[str, Any]) -> None:
    found, right = run(backends.CpuBackend(), x, options), expected(x, options)
    assert found.keys() == right.keys()
    for name, array in right.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-10, atol=1e-10, err_msg=name)


def bounds_of(x: Packed, options: dict[str, Any]) -> dict[str, oracle.Bound]:
    """Those of the batch, padded to one length."""
    rows, keys = x.cu_seqlens
    lens = {"q_lens": np.diff(rows), "kv_lens": np.diff(keys)}
    dense = Arrays(
        *(reference._padded(a, cu) for a, cu in ((x.q, rows), (x.k, keys), (x.v, keys))),
        reference._padded(x.dout, rows),
        reference._padded(x.dlse.T, rows).swapaxes(1, 2),
    )
    return oracle.expect(dense, {**lens, **options})


def check_found(found: dict[str, np.ndarray], x: Packed, bounds: dict[str, oracle.Bound]) -> None:
    """What a run found lies within the bounds."""
    rows, keys = x.cu_seqlens
    for name, bound in bounds.items():
        array = found[name]
        if name != "dsinks":
            cu = keys if name in ("dk", "dv") else rows
            array = reference._padded(array.T if name == "lse" else array, cu)
        if name == "lse":
            array = array.swapaxes(1, 2)
            for one, length in zip(array, np.diff(rows), strict=True):
                one[:, length:] = -np.inf
        error = bound.error(array)
        assert error <= bound.allowed, f"{name}: error {error:.2e}, allowed {bound.allowed:.2e}"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.shrink_cpu_tiles(monkeypatch, rows=16, keys=32)


# ------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_option_on_every_batch(
    small_tiles: None, lengths: tuple[list[int], list[int], int, int], name: str
) -> None:
    x = Packed(lengths)
    check_float64(x, x.options(name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(small_tiles: None, dtype: str) -> None:
    x = Packed(LENGTHS["unlike"], np.dtype(dtype))
    options = x.options("causal")
    check_found(run(backends.CpuBackend(), x, options), x, bounds_of(x, options))


# Of several tiles, whose places count from the sequence and from the array.
LONG = ([200, 0, 5, 210], [150, 7, 0, 290], 9, 11)
# Hopper's own kernels move rows of whole multiples of 16 bytes, for more than 64 tokens.
DV_OF_HOPPER = 16

ON_EVERY_BACKEND = {
    "unlike-window-sinks": ("unlike", DV_OF_HOPPER, ("window", "sinks")),
    "tokens-behind-causal": ("tokens-behind", DV, ("causal",)),
    "empty-ones-causal": ("empty-ones", DV, ("causal",)),
    "only-empty-ones-causal": ("only-empty-ones", DV, ("causal",)),
    "no-sequences-causal": ("no-sequences", DV, ("causal",)),
    "long-band-sinks": ("long", DV_OF_HOPPER, ("sinks", "band")),
    "long-dropout-sinks": ("long", DV_OF_HOPPER, ("dropout", "sinks")),
    "long-causal": ("long", DV_OF_HOPPER, ("causal",)),
    "long-alibi": ("long", DV_OF_HOPPER, ("alibi",)),
    "unlike-dropout-alibi": ("unlike", DV, ("dropout", "alibi-per-sequence")),
    "empty-ones-score_mod-softcap": ("empty-ones", DV, ("score_mod", "softcap-and-scale")),
}
ALWAYS = [
    f"emulated-{capability}-{name}"
    for capability in (80, 90)
    for name in list(ON_EVERY_BACKEND)[: 1 + list(ON_EVERY_BACKEND).index("long-dropout-sinks")]
]


@pytest.mark.parametrize(
    "backend, lengths, head_dim_v, names",
    on_every_backend(ON_EVERY_BACKEND, always=ALWAYS),
    indirect=["backend"],
)
def test_on_every_backend(
    backend: backends.Backend, lengths: str, head_dim_v: int, names: tuple[str, ...]
) -> None:
    x, options, bounds = problem_and_bounds(lengths, head_dim_v, names)
    check_found(run(backend, x, options), x, bounds)


@functools.cache
def problem_and_bounds(
    lengths: str, head_dim_v: int, names: tuple[str, ...]
) -> tuple[Packed, dict[str, Any], dict[str, oracle.Bound]]:
    """One for all backends: bounds of long sequences take longer than kernels."""
    x = Packed({**LENGTHS, "long": LONG}[lengths], np.float16, head_dim_v)
    options = {k: v for name in names for k, v in x.options(name).items()}
    return x, options, bounds_of(x, options)


def visible_tiles(x: Packed, options: dict[str, Any], tiling: Tiling) -> list[np.ndarray]:
    """Of each sequence, (query tiles, key tiles): which of them any query of theirs sees.

    Each is as many rows and keys as it has, or 0: (2, query tiles, key tiles).
    """
    group = HQ // HK if tiling.pack_group else 1
    window = options.get("window")
    found = []
    for b in range(x.batch):
        i, j = (slice(*cu[b : b + 2]) for cu in x.cu_seqlens)
        place = (x.q[None, i], x.k[None, j], options["causal"], options.get("offset"), window)
        visible = visibility(*place, None, None, None)[0, 0].repeat(group, axis=0)
        if not visible.size:
            continue
        rows, keys = (
            np.arange(0, n, block)
            for n, block in zip(visible.shape, (tiling.block_q, tiling.block_kv), strict=True)
        )
        tiles = np.logical_or.reduceat(np.logical_or.reduceat(visible, rows), keys, axis=1)
        heights, widths = (
            np.diff(x, append=n) for x, n in zip((rows, keys), visible.shape, strict=True)
        )
        found.append(tiles * np.stack(np.broadcast_arrays(heights[:, None], widths)))
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_visible_tiles_are_loaded_and_no_others(capability: int) -> None:
    """By the kernels of that architecture, of sequences of any length, and of them alone."""
    backend, x = emulated(capability=capability), Packed(LONG, np.float16, DV_OF_HOPPER)
    options = {**x.options("sinks"), **x.options("band")}
    run(backend, x, options)
    forward, backward = (
        next(one for one in backend.launches if one.kernel.entry == name)
        for name in ("flash_fwd", "flash_bwd")
    )
    assert forward.kernel.source == f"flash_fwd_sm{capability}.cu"
    assert backward.kernel.source == f"flash_bwd_sm{capability}.cu"

    group, heads = (2, HK) if forward.tiling.pack_group else (1, HQ)
    # One block for each place that a tile may have: none waits for another's.
    assert forward.blocks == heads * (len(x.q) * group // forward.tiling.block_q + x.batch)
    tiles = visible_tiles(x, options, forward.tiling)
    loaded = heads * sum(widths.sum() for _, widths in tiles)
    assert forward.bytes_read(x.k) == loaded * x.k[0, 0].nbytes
    assert forward.bytes_read(x.v) == loaded * x.v[0, 0].nbytes

    heads = HK if backward.tiling.pack_group else HQ
    tiles = visible_tiles(x, options, backward.tiling)
    loaded = heads * sum(heights.sum() for heights, _ in tiles)
    assert backward.bytes_read(x.q) == loaded * x.q[0, 0].nbytes
    assert backward.bytes_read(x.dout) == loaded * x.dout[0, 0].nbytes
    loaded = HK * sum(widths.max(axis=0).sum() for _, widths in tiles)
    assert backward.bytes_read(x.k) == loaded * x.k[0, 0].nbytes
    assert backward.bytes_read(x.v) == loaded * x.v[0, 0].nbytes


FAR = 2**62
WILD_EDGES = {  # of q and of k, and where they lie inside 151 and 156 tokens
    "beyond": (
        ([5, -3, 90, 40, 2**40, 10], [5, 5, 90, 90, 151, 151]),
        ([-FAR, 20, 10, 60, FAR, 0], [0, 20, 20, 60, 156, 156]),
    ),
    "negative": (([-9, -8, -7, -6, -5, -FAR], [0] * 6), ([400, 300, 200, 0, 1, 2], [156] * 6)),
    "backwards": (([100, 80, 60, 40, 20, 0], [100] * 6), ([FAR, 3, 0, 7, 9, 4], [156] * 6)),
}


@pytest.mark.parametrize("edges", WILD_EDGES.values(), ids=WILD_EDGES)
@pytest.mark.parametrize("capability", [80, 90])
def test_edges_of_any_data_stay_inside(
    capability: int, edges: tuple[tuple[list[int], list[int]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU cu_seqlens is not read by the host: the tables hold it inside the arrays."""
    x = Packed(LENGTHS["unlike"], np.float16, DV_OF_HOPPER)
    options = {**x.options("window"), **x.options("sinks")}
    monkeypatch.setattr(Check, "cu_seqlens", lambda self, name, array, tokens: array)
    x.cu_seqlens = tuple(np.array(wild) for wild, _ in edges)
    found = run(emulated(capability=capability), x, options)
    # The running maximum, inside the array.
    x.cu_seqlens = tuple(np.array(inside) for _, inside in edges)
    check_found(found, x, bounds_of(x, options))
    for cu, names in zip(x.cu_seqlens, (("out", "dq"), ("dk", "dv")), strict=True):
        for name in names:
            assert not found[name][: cu[0]].any() and not found[name][cu[-1] :].any(), name


def test_the_reference_is_a_loop_over_sequences() -> None:
    x = Packed(LENGTHS["unlike"])
    options = {**x.options("alibi"), **x.options("sinks")}
    out, lse = reference.attention_varlen(x.q, x.k, x.v, *x.cu_seqlens, **options)
    rows, keys = x.cu_seqlens
    for b in range(x.batch):
        i, j = slice(*rows[b : b + 2]), slice(*keys[b : b + 2])
        one, one_lse = reference.attention(x.q[None, i], x.k[None, j], x.v[None, j], **options)
        np.testing.assert_allclose(out[i], one[0], rtol=1e-13)
        np.testing.assert_allclose(lse[:, i], one_lse[0], rtol=1e-13)


def test_one_sequence_is_a_dense_batch_of_one(small_tiles: None) -> None:
    x = Packed(LENGTHS["one"], np.float32)
    options = {**x.options("sinks"), **x.options("dropout")}
    dense = [a[None] for a in (x.q, x.k, x.v)]
    out, pullback = cuflash.attention_vjp(*dense, **options)
    grads = pullback(x.dout[None])
    found, packed_pullback = cuflash.attention_varlen_vjp(x.q, x.k, x.v, *x.cu_seqlens, **options)
    found_grads = packed_pullback(x.dout)
    np.testing.assert_array_equal(found, out[0])
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(found_grads, name), getattr(grads, name)[0])
    np.testing.assert_array_equal(found_grads.dsinks, grads.dsinks)


# --------------------------------------------------------------------------- memory and threads


def test_what_lies_behind_the_last_sequence_gets_nothing() -> None:
    x = Packed(LENGTHS["tokens-behind"])
    x.out = np.full((57, HQ, DV), 7.0)
    out, lse = cuflash.attention_varlen(
        x.q, x.k, x.v, *x.cu_seqlens, return_lse=True, out=x.out, sinks=np.zeros(HQ)
    )
    assert out is x.out
    assert (out[50:] == 0).all() and (lse[:, 50:] == -np.inf).all()
    found = run(backends.CpuBackend(), x, {})
    assert (found["dq"][50:] == 0).all()
    assert (found["dk"][55:] == 0).all() and (found["dv"][55:] == 0).all()


def test_tokens_behind_each_other_in_memory_or_heads(small_tiles: None) -> None:
    x = Packed(LENGTHS["unlike"])
    right = run(backends.CpuBackend(), x, {})
    for name in ("q", "k", "v", "dout"):
        heads_first = np.ascontiguousarray(getattr(x, name).swapaxes(0, 1))
        setattr(x, name, heads_first.swapaxes(0, 1))
    found = run(backends.CpuBackend(), x, {})
    for name, array in right.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for name in ("out", "dq", "dk", "dv"):
        assert found[name].swapaxes(0, 1).flags.c_contiguous, name


def test_memory_grows_with_the_tokens() -> None:
    x = Packed(([6000] + [3] * 300, [6000] + [3] * 300, 0, 0), np.float32)
    tracemalloc.start()
    try:
        with threadpoolctl.threadpool_limits(2, user_api="blas"):
            run(backends.CpuBackend(), x, {"causal": True})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * HQ * 6000**2 / 12


def test_long_sequences_make_many_tasks_and_short_ones_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[list[int]] = []

    def note(function: Any, tasks: Any, small: bool) -> None:
        tasks = list(tasks)
        sizes.append([sum(item.pairs(rows)) for item, rows, *_ in tasks])
        for task in tasks:
            function(task)

    monkeypatch.setattr(_cpu_forward, "for_each", note)
    x = Packed(([2000, *[16] * 50, 500], [2000, *[16] * 50, 500], 0, 0), np.float32)
    cuflash.attention_varlen(x.q, x.k, x.v, *x.cu_seqlens)
    (costs,) = sizes
    assert costs == sorted(costs, reverse=True)  # the largest come first
    assert max(costs) <= sum(costs) / 8
    assert len(costs) <= 100


def test_bits_do_not_depend_on_the_number_of_threads(small_tiles: None) -> None:
    x = Packed(LENGTHS["unlike"], np.float32)
    options = {**x.options("sinks"), **x.options("dropout")}
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        right = run(backends.CpuBackend(), x, options)
    for threads in (2, 5):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found = run(backends.CpuBackend(), x, options)
        for name, array in right.items():
            assert found[name].tobytes() == array.tobytes(), name


def test_threads_share_the_room_for_tiles() -> None:
    x = Packed(LENGTHS["unlike"])
    problem = PackedProblem.create("f", "cpu", x.q, x.k, x.v, *x.cu_seqlens)
    works = _cpu_packed._works(problem, list(range(5)), splits_rows=True)
    assert len(works) == 5 and len({id(work.scratch) for work in works.values()}) == 1


# ------------------------------------------------------------------------------- kinds of arrays


@pytest.mark.parametrize("kind", [numpy_kind, torch_kind, jax_kind])
@pytest.mark.parametrize("as_list", [False, True])
def test_arrays_of_any_kind(kind: Any, as_list: bool) -> None:
    kind, x = kind(), Packed(LENGTHS["unlike"], np.float32)
    cu_seqlens = [a.tolist() if as_list else kind.make(a) for a in x.cu_seqlens]
    (out, lse), pullback = cuflash.attention_varlen_vjp(
        *map(kind.make, (x.q, x.k, x.v)), *cu_seqlens, causal=True, return_lse=True
    )
    grads = pullback(kind.make(x.dout), dlse=kind.make(x.dlse))
    right = expected(x, {"causal": True})
    for name, found in {"out": out, "lse": lse, **grads._asdict()}.items():
        if name in right:
            assert isinstance(found, kind.array_class)
            np.testing.assert_allclose(kind.read(found), right[name], rtol=1e-4, atol=1e-4)


def test_vjp_returns_lse_on_demand_and_errors_name_it() -> None:
    x = Packed(LENGTHS["equal"])
    out, pullback = cuflash.attention_varlen_vjp(x.q, x.k, x.v, *x.cu_seqlens)
    assert out.shape == (80, HQ, DV)
    message = (
        "cuflash.attention_varlen_vjp's pullback: dout has shape (79, 4, 6); expected (80, 4, 6)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pullback(out[1:])


# ------------------------------------------------------------------------------------- bad input


def bad(error: type[Exception], message: str, function: str = "attention_varlen"):
    return pytest.raises(error, match=f"^cuflash.{function}: {re.escape(message)}$")


FROM_0 = "expected 0, and then the running sums of the lengths"
BAD_SEQLENS = [
    ([1, 40, 80], ValueError, f"starts at 1; {FROM_0}"),
    ([-1, 40, 80], ValueError, f"starts at -1; {FROM_0}"),
    (
        [0, 50, 40],
        ValueError,
        "falls from 50 to 40 at sequence 1; expected values that never decrease",
    ),
    ([0, 40, 81], ValueError, "ends at 81; expected at most 80, the tokens"),
    ([0.0, 40.0, 80.0], TypeError, "is float64; expected an array of integers"),
    ([False, True, True], TypeError, "is bool; expected an array of integers"),
    ([], ValueError, "has shape (0,); expected (sequences + 1,)"),
    ([[0, 40, 80]], ValueError, "has shape (1, 3); expected (sequences + 1,)"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_SEQLENS)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_cu_seqlens(name: str, values: Any, error: type[Exception], message: str) -> None:
    x = Packed(LENGTHS["equal"])
    given = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), x.cu_seqlens, strict=True))
    given[name] = np.array(values) if values else np.zeros(0, int)
    with bad(error, f"{name} {message}"):
        cuflash.attention_varlen(x.q, x.k, x.v, **given)
    with bad(error, f"{name} {message}", "validate"):
        cuflash.validate(x.q, x.k, x.v, **given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"cu_seqlens_k": [0, 80]},
            ValueError,
            "cu_seqlens_k has shape (2,), cu_seqlens_q has (3,); expected the same",
        ),
        (
            {"cu_seqlens_q": None},
            TypeError,
            "cu_seqlens_q is NoneType; expected an array of integers",
        ),
        ({"cu_seqlens_q": 3}, TypeError, "cu_seqlens_q is int; expected an array of integers"),
        (
            {"q": np.zeros((1, 80, HQ, D))},
            ValueError,
            "q has 4 axes, shape (1, 80, 4, 8); expected 3 axes (tokens, heads, head size); "
            "attention takes batches",
        ),
        (
            {"k": np.zeros((80, 3, D)), "v": np.zeros((80, 3, DV))},
            ValueError,
            "q has 4 heads, k has 3; expected a number of q heads that is a multiple of k's",
        ),
        ({"k": np.zeros((80, HK, 7))}, ValueError, "k has head size 7, q has 8; expected the same"),
        (
            {"offset": np.array([1, 2, 3])},
            ValueError,
            "offset has shape (3,); expected (2,), one per batch entry",
        ),
        (
            {"alibi_slopes": np.zeros((3, HQ))},
            ValueError,
            "alibi_slopes has shape (3, 4); expected (4,) or (2, 4), per query head",
        ),
        (
            {"out": np.zeros((80, HQ, D))},
            ValueError,
            "out has shape (80, 4, 8); expected (80, 4, 6)",
        ),
        ({"dropout": 0.5}, ValueError, "seed is None; expected an integer, with dropout"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x = Packed(LENGTHS["equal"])
    given = {"q": x.q, "k": x.k, "v": x.v}
    given |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), x.cu_seqlens, strict=True))
    with bad(error, message):
        cuflash.attention_varlen(**(given | changes))


def test_bad_results_in_backward() -> None:
    x = Packed(LENGTHS["equal"])
    out, lse = cuflash.attention_varlen(x.q, x.k, x.v, *x.cu_seqlens, return_lse=True)
    expected = "expected (4, 80), as lse.swapaxes(-2, -1) has"
    with bad(ValueError, f"lse has shape (80, 4); {expected}", "attention_varlen_backward"):
        cuflash.attention_varlen_backward(x.dout, x.q, x.k, x.v, *x.cu_seqlens, out, lse.T)


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        (np.asarray, "cu_seqlens_q is float64", "an array of integers"),
        (list, "out is a list", "an array of NumPy, CuPy, torch, JAX, or anything with __dlpack__"),
    ],
)
def test_results_before_edges_name_the_order(kind: Any, found: str, expected: str) -> None:
    """As `attention_backward` has them, and packed libraries."""
    x = Packed(LENGTHS["equal"])
    out, lse = cuflash.attention_varlen(x.q, x.k, x.v, *x.cu_seqlens, return_lse=True)
    parameters = inspect.signature(cuflash.attention_varlen_backward).parameters.values()
    order = ", ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    message = f"{found}; expected {expected}; the order is {order}"
    with bad(TypeError, message, "attention_varlen_backward"):
        cuflash.attention_varlen_backward(x.dout, x.q, x.k, x.v, out, lse, *map(kind, x.cu_seqlens))


def test_out_overlaps_no_input() -> None:
    x = np.zeros((4, 1, D))
    with bad(ValueError, "out overlaps q; expected memory of its own"):
        cuflash.attention_varlen(x, x.copy(), x.copy(), [0, 4], [0, 4], out=x)


# --------------------------------------------------------------------------------------- validate


def test_validate_takes_sequences_or_lengths() -> None:
    x = Packed(LENGTHS["equal"])
    assert cuflash.validate(x.q, x.k, x.v, *x.cu_seqlens) is None
    message = "q_lens is given beside cu_seqlens; expected none with packed sequences"
    with bad(ValueError, message, "validate"):
        cuflash.validate(x.q, x.k, x.v, *x.cu_seqlens, q_lens=[1, 2])


@pytest.mark.parametrize(("values", "error", "message"), BAD_SEQLENS[:4])
def test_validate_reads_what_lies_on_a_gpu(
    no_gpu_needed: None,
    values: Any,
    error: type[Exception],
    message: str,
) -> None:
    make = Maker("cuda")
    q, k, v = make((80, HQ, D)), make((80, HK, D)), make((80, HK, DV))
    fine = readable([0, 40, 80])
    assert cuflash.validate(q, k, v, fine, fine) is None
    with bad(error, f"cu_seqlens_k {message}", "validate"):
        cuflash.validate(q, k, v, fine, readable(values))
    unread = readable(values)
    PackedProblem.create("attention_varlen", "cuda", q, k, v, unread, unread)
    assert unread.reads == []
