"""What is particular to the NumPy backend: tiles, memory, threads, mask and bias."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import backends
import numpy as np
import pytest
import threadpoolctl

import cuflash
from cuflash import _cpu_forward, _cpu_short, _terms, _threads, _work, cpu, masks, reference
from cuflash._cpu_backward import GradientSums
from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash._tiles import Band, blocks, visible_tiles

TILE = 16


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.shrink_cpu_tiles(monkeypatch, TILE, 2 * TILE)


def tensors(
    rng: np.random.Generator,
    seqlen_q: int = 70,
    seqlen_k: int = 90,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, ...]:
    """q, k, v and dout with D = 8 and Dv = 6."""
    return tuple(
        rng.standard_normal((batch, seqlen, count, size)).astype(dtype)
        for seqlen, count, size in (
            (seqlen_q, heads[0], 8),
            (seqlen_k, heads[1], 8),
            (seqlen_k, heads[1], 6),
            (seqlen_q, heads[0], 6),
        )
    )


def run(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Everything that forward and backward give."""
    problem = Problem.create("attention", "cpu", q, k, v, **options)
    out, lse, _ = cpu.forward(problem)
    gradient = GradientProblem.create("attention_backward", problem, dout, out, lse, dlse)
    return named(out, lse, cpu.backward(gradient))


def expected(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """The same from the reference."""
    out, lse = reference.attention(q, k, v, **options)
    return named(out, lse, reference.attention_backward(dout, q, k, v, dlse=dlse, **options))


def named(out: np.ndarray, lse: np.ndarray, gradients: Gradients) -> dict[str, np.ndarray]:
    results = {"out": out, "lse": lse, **gradients._asdict()}
    return {name: array for name, array in results.items() if array is not None}


def assert_close(
    found: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float = 1e-11
) -> None:
    assert found.keys() == right.keys()
    for name, array in right.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(
            found[name].astype(np.float64), array, rtol=tolerance, atol=tolerance, err_msg=name
        )


def assert_equal(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    for name, array in right.items():
        assert found[name].tobytes() == array.tobytes(), name


# ------------------------------------------------------------------------------- options and tiles


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (20, 9), "offset": np.array([-7, 40])},
    "far-left-of-all-keys": {"window": (5, 5), "offset": -(10**9)},
    "wide-window": {"window": (2**62, 2**62)},
    "lengths": {"q_lens": np.array([70, 17]), "kv_lens": np.array([33, 90]), "causal": True},
    "no-length": {"q_lens": np.array([0, 70]), "kv_lens": np.array([90, 0])},
    "softcap": {"softcap": 0.8, "window": (None, 30)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (40, 1)], ids=str)
def test_float64_is_accurate_to_float64(
    rng: np.random.Generator, small_tiles: None, heads: tuple[int, int], options: dict[str, Any]
) -> None:
    x = tensors(rng, heads=heads)
    dlse = rng.standard_normal((2, heads[0], 70))
    assert_close(run(*x, dlse, **options), expected(*x, dlse, **options), 1e-10)


@pytest.mark.parametrize("shift", [-(10**4), -30, 30, 10**4])
@pytest.mark.parametrize("spread", [1, 60])
def test_scores_of_any_size(
    rng: np.random.Generator, small_tiles: None, shift: float, spread: float
) -> None:
    """The reference of a row follows its scores, wherever they lie and however they grow."""
    x = tensors(rng)
    bias = shift + spread * np.linspace(0, 20, 90) * rng.choice([-1, 1], (2, 4, 70, 1))
    assert_close(run(*x, bias=bias), expected(*x, bias=bias), 1e-9)


@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize(
    "shape",
    [
        *((b, h, i, j) for b in (1, 2) for h in (1, 4) for i in (1, 70) for j in (1, 90)),
        (4, 1, 90),
        (70, 90),
        (90,),
        (),
    ],
    ids=str,
)
def test_bias_and_its_gradient_have_any_shape(
    rng: np.random.Generator, small_tiles: None, shape: tuple[int, ...], softcap: float | None
) -> None:
    x = tensors(rng)
    options = {
        "bias": rng.standard_normal(shape),
        "mask": rng.random((2, 1, 70, 90)) < 0.7,
        "window": (40, 30),
        "softcap": softcap,
    }
    assert_close(run(*x, **options), expected(*x, **options))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "softcap": 2.0}, {"window": (2, 1), "offset": 1}], ids=str
)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 9), (7, 5), (8, 8)], ids=str)
def test_many_short_batch_entries(
    rng: np.random.Generator, lengths: tuple[int, int], options: dict[str, Any], heads_first: bool
) -> None:
    """They are computed many at once, and one that is not finite leaves the others alone."""
    x = list(tensors(rng, *lengths, batch=300))
    dlse = rng.standard_normal((300, 4, lengths[0]))
    right = expected(*x, dlse, **options)
    if heads_first:
        x = [np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2) for a in x]
    problem = Problem.create("attention", "cpu", *x[:3], **options)
    assert _cpu_short.has_short_entries(problem)
    found = run(*x, dlse, **options)
    assert_close(found, right)
    for name in ("out", "dq", "dk", "dv"):
        array = found[name].swapaxes(1, 2) if heads_first else found[name]
        assert array.flags.c_contiguous, name

    memory = np.zeros((300, lengths[0], 4, 12))
    run(*x, dlse, **options, out=memory[..., 3:9])
    np.testing.assert_array_equal(memory[..., 3:9], found["out"])
    assert not memory[..., :3].any() and not memory[..., 9:].any()

    x[1][7] = np.nan
    spoilt = run(*x, dlse, **options)
    for name, array in found.items():
        others = np.delete(np.arange(300), 7)
        np.testing.assert_allclose(spoilt[name][others], array[others], 1e-9, 1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bias_dtype", ["same", "float32"])
def test_dbias_has_the_dtype_of_the_bias(
    rng: np.random.Generator, dtype: str, bias_dtype: str
) -> None:
    x = tensors(rng, dtype=dtype)
    bias = rng.standard_normal((4, 1, 90)).astype(dtype if bias_dtype == "same" else bias_dtype)
    found = run(*x, bias=bias)
    assert found["dbias"].dtype == bias.dtype
    assert_close(found, expected(*x, bias=bias), 0.05)


@pytest.mark.parametrize("shape", [(2, 4, 70, 90), (1, 4, 70, 90), (2, 1, 1, 90), (70, 1)], ids=str)
def test_mask(rng: np.random.Generator, small_tiles: None, shape: tuple[int, ...]) -> None:
    x = tensors(rng)
    mask = rng.random(shape) < 0.5
    mask[..., :20, :] = False
    assert_close(run(*x, mask=mask), expected(*x, mask=mask))


def test_rows_whose_scores_are_all_minus_infinity(
    rng: np.random.Generator, small_tiles: None
) -> None:
    x = tensors(rng)
    bias = rng.choice([0, -np.inf], (2, 1, 70, 90))
    bias[:, :, 5] = -np.inf
    found = run(*x, bias=bias)
    assert (found["out"][:, 5] == 0).all() and (found["lse"][:, :, 5] == -np.inf).all()
    assert_close(found, expected(*x, bias=bias))


def visited(band: Band, rows: int, keys: int) -> Iterator[tuple[slice, slice]]:
    for some in blocks(slice(0, band.keys), keys):
        yield from visible_tiles(band, slice(0, band.rows), some, rows)


@pytest.mark.parametrize(
    "band, count",
    [
        (Band(64, 64, None, None), 16),
        (Band(64, 64, None, 0), 10),
        (Band(64, 64, None, -1), 10),
        (Band(64, 64, None, -16), 6),
        (Band(64, 64, None, -64), 0),
        (Band(64, 64, 0, 0), 4),
        (Band(64, 64, -16, 0), 7),
        (Band(64, 64, -17, 0), 9),
        (Band(33, 17, None, None), 6),
        (Band(0, 64, None, None), 0),
        (Band(64, 0, None, None), 0),
        (Band(64, 64, 10**12, None), 0),
    ],
    ids=str,
)
def test_only_visible_tiles_are_visited(band: Band, count: int) -> None:
    tiles = list(visited(band, TILE, TILE))
    assert len(tiles) == count
    seen = np.zeros((band.rows, band.keys), int)
    for rows, keys in tiles:
        assert keys.start < keys.stop
        limit = band.limit(rows, keys, np.dtype(np.float32))
        hidden = None if limit is None else limit == 0
        assert hidden is None or hidden.any() and not hidden.all()
        seen[rows, keys] += 1 if hidden is None else ~hidden
    i, j = np.indices(seen.shape)
    visible = np.ones(seen.shape, bool)
    if band.first is not None:
        visible &= j >= i + band.first
    if band.last is not None:
        visible &= j <= i + band.last
    np.testing.assert_array_equal(seen, visible)


def test_passes_compute_the_visible_tiles_and_no_others(
    rng: np.random.Generator, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    scores = _terms.scores
    monkeypatch.setattr(_terms, "scores", lambda *a, **k: computed.append(1) or scores(*a, **k))
    x = tensors(rng, 64, 64, heads=(1, 1), batch=1)
    mask = np.ones((64, 64), bool)
    mask[16:32, :32] = False  # one of the six causal tiles of 16 x 32
    for options, tiles in (({}, 8), ({"causal": True}, 6), ({"causal": True, "mask": mask}, 5)):
        computed.clear()
        run(*x, **options)
        assert len(computed) == 2 * tiles  # forward and backward


# -------------------------------------------------------------------------------- memory and size


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0}], ids=str)
def test_memory_grows_with_the_length_and_not_its_square(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    seqlen = 6000
    x = tensors(rng, seqlen, seqlen, heads=(1, 1), batch=1, dtype=np.float32)
    tracemalloc.start()
    try:
        with threadpoolctl.threadpool_limits(2, user_api="blas"):
            run(*x, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    scores = 4 * seqlen**2
    assert peak < scores / 6


def test_more_keys_than_memory(rng: np.random.Generator) -> None:
    """2^33 elements of k and v, of one row that repeats: out is v, and lse counts the keys."""
    keys = 2**26
    q = np.zeros((1, 1, 1, 64), np.float32)
    k = np.broadcast_to(rng.standard_normal(64).astype(np.float32), (1, keys, 1, 64))
    window = (2**20, None)
    out, lse = cuflash.attention(q, k, k, window=window, return_lse=True)
    np.testing.assert_allclose(out[0, 0, 0], k[0, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(lse, np.log(2**20 + 1), rtol=1e-5)


def test_scores_are_bounded_without_a_copy_of_the_keys(rng: np.random.Generator) -> None:
    """Of 2^28 and 2^25 bytes in float32; in a window those that are seen count alone."""
    q = rng.standard_normal((1, 32, 1, 64)).astype(np.float32)
    row = rng.standard_normal(64).astype(np.float32)
    for keys, window in ((2**20, (1000, None)), (2**17, None)):
        k = np.broadcast_to(row, (1, keys, 1, 64))
        tracemalloc.start()
        cuflash.attention(q, k, k, window=window)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24


@pytest.mark.parametrize("heads_first", [False, True])
def test_results_are_laid_out_as_the_inputs(rng: np.random.Generator, heads_first: bool) -> None:
    x = tensors(rng)
    if heads_first:
        x = tuple(np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2) for a in x)
    found = run(*x)
    for name in ("out", "dq", "dk", "dv"):
        array = found[name].swapaxes(1, 2) if heads_first else found[name]
        assert array.flags.c_contiguous, name
    assert_close(found, expected(*x))


# ------------------------------------------------------------------------------------- not finite


def test_nothing_past_the_lengths_is_read(rng: np.random.Generator, small_tiles: None) -> None:
    q, k, v, dout = tensors(rng)
    dlse, bias = rng.standard_normal((2, 4, 70)), rng.standard_normal((2, 4, 70, 90))
    lens = {"q_lens": np.array([30, 16]), "kv_lens": np.array([33, 0])}
    right = expected(q, k, v, dout, dlse, bias=bias, **lens)
    for batch, (rows, keys) in enumerate(zip(*lens.values(), strict=True)):
        q[batch, rows:] = dout[batch, rows:] = np.nan
        k[batch, keys:] = v[batch, keys:] = np.nan
        dlse[batch, :, rows:] = bias[batch, :, rows:] = bias[batch, :, :, keys:] = np.nan
    out = np.full((2, 70, 4, 6), np.nan)
    found = run(q, k, v, dout, dlse, bias=bias, out=out, **lens)
    assert_close(found, right)


NOT_FINITE = [
    ("q", (0, 20, 1, 3), np.nan),
    ("q", (0, 20, 1, 3), np.inf),
    ("k", (0, 50, 1, 3), np.nan),
    ("k", (0, 50, 1, 3), -np.inf),
    ("v", (0, 50, 1, 3), np.nan),
    ("v", (0, 50, 1, 3), np.inf),
    ("dout", (0, 20, 1, 3), np.nan),
    ("dout", (0, 20, 1, 3), np.inf),
    ("bias", (0, 1, 20, 30), np.nan),
    ("bias", (0, 1, 20, 30), np.inf),
    ("bias", (0, 1, 20, 89), np.nan),  # where causal hides it
]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", [False, True], ids=["causal", "causal and mask"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name, index, value", NOT_FINITE, ids=str)
def test_what_is_not_finite_stays_with_who_sees_it(
    rng: np.random.Generator,
    small_tiles: None,
    name: str,
    index: tuple[int, ...],
    value: float,
    bias: bool,
    mask: bool,
    softcap: float | None,
) -> None:
    arrays = dict(zip(("q", "k", "v", "dout"), tensors(rng), strict=True))
    options: dict[str, Any] = {"causal": True, "softcap": softcap}
    if bias or name == "bias":
        options["bias"] = rng.standard_normal((2, 4, 70, 90))
    if mask:
        options["mask"] = rng.random((2, 1, 70, 90)) < 0.5
    (options if name == "bias" else arrays)[name][index] = value
    found, right = run(**arrays, **options), expected(**arrays, **options)
    for key, array in right.items():
        finite = np.isfinite(array)
        np.testing.assert_array_equal(np.isfinite(found[key]), finite, err_msg=key)
        np.testing.assert_allclose(
            found[key][finite], array[finite], rtol=1e-10, atol=1e-10, err_msg=key
        )


# ---------------------------------------------------------------------------------------- threads

THREADED = {
    "many heads": {"heads": (8, 4)},
    "one head": {"heads": (1, 1), "batch": 1, "seqlen_q": 200, "seqlen_k": 300},
    "multi-query": {"heads": (6, 1), "batch": 1, "seqlen_q": 50, "seqlen_k": 300},
}


@pytest.mark.parametrize("shape", THREADED.values(), ids=THREADED)
@pytest.mark.parametrize("bias_shape", [None, (1, 1, 1, 1), (1, 1, 1, -1), (1, 1, -2, -1)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(
    rng: np.random.Generator,
    small_tiles: None,
    shape: dict[str, Any],
    bias_shape: tuple[int, ...] | None,
) -> None:
    x = tensors(rng, **shape, dtype=np.float32)
    options: dict[str, Any] = {"causal": True}
    if bias_shape is not None:
        sizes = {-1: x[1].shape[1], -2: x[0].shape[1]}
        options["bias"] = rng.standard_normal([sizes.get(n, n) for n in bias_shape])
        options["bias"] = options["bias"].astype(np.float32)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        right = run(*x, **options)
    for threads in (2, 3, 8):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            assert_equal(run(*x, **options), right)


MASKS_OF_BATCH_ENTRIES = {
    "lengths": lambda rng: masks.lengths([150, 70], [150, 90]),
    "documents": lambda rng: masks.documents(np.sort(rng.integers(0, 5, (2, 150)))),
    "dense": lambda rng: masks.dense(rng.random((2, 4, 150, 150)) < 0.3),
    "blocks": lambda rng: masks.blocks(rng.random((2, 4, 5, 5)) < 0.4, 32, 32),
}


@pytest.mark.parametrize("mask", MASKS_OF_BATCH_ENTRIES.values(), ids=MASKS_OF_BATCH_ENTRIES)
@pytest.mark.parametrize("bias_shape", [(1, 1), (1, 4), (2, 1), (2, 4)], ids=str)
def test_no_two_tasks_add_to_the_same_rows_of_dbias(
    rng: np.random.Generator,
    small_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
    mask: Callable[[np.random.Generator], masks.Mask],
    bias_shape: tuple[int, int],
) -> None:
    """Batch entries and heads that share a bias need not see as much of it."""
    tasks: dict[tuple[int, int, int], set[tuple[int, int]]] = {}
    add_bias = GradientSums.add_bias

    def note(sums: GradientSums, tile: _work.Tile, split: int, dscores: np.ndarray) -> None:
        family = next(n for n, items in enumerate(sums.families) if tile.item in items)
        batch = tile.item.batch if bias_shape[0] > 1 else 0
        members = range(4)[2 * tile.item.heads.start : 2 * tile.item.heads.stop]
        for head in members[tile.item.members] if bias_shape[1] > 1 else [0]:
            for row in range(tile.rows.start, tile.rows.stop):
                tasks.setdefault((batch, head, row), set()).add((family, split))
        add_bias(sums, tile, split, dscores)

    monkeypatch.setattr(GradientSums, "add_bias", note)
    x = tensors(rng, 150, 150)
    options = {"mask": mask(rng), "bias": rng.standard_normal((*bias_shape, 150, 150))}
    assert_close(run(*x, **options), expected(*x, **options))
    assert all(len(some) == 1 for some in tasks.values())
    assert len(set.union(*tasks.values())) > 1


def test_callers_in_several_threads_get_the_same_and_blas_gets_its_threads_back(
    rng: np.random.Generator, small_tiles: None
) -> None:
    x = tensors(rng, dtype=np.float32)
    right = run(*x)
    with threadpoolctl.threadpool_limits(2, user_api="blas"), ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: run(*x), range(24)):
            assert_equal(found, right)
        assert {library.num_threads for library in _threads._blas().lib_controllers} == {2}


def test_blas_has_one_thread_whoever_calls_and_its_threads_again_whoever_leaves_last() -> None:
    def threads() -> set[int]:
        return {library.num_threads for library in _threads._blas().lib_controllers}

    with (
        threadpoolctl.threadpool_limits(2, user_api="blas"),  # set by a thread that makes no call
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as other,
    ):
        first, last = _threads._single_threaded_blas(), _threads._single_threaded_blas()
        assert one.submit(first.__enter__).result() == 2
        assert threads() == {1}
        assert other.submit(last.__enter__).result() == 2
        one.submit(first.__exit__, None, None, None).result()  # its thread lives on
        assert threads() == {1}
        other.submit(last.__exit__, None, None, None).result()
        assert threads() == {2}


@pytest.mark.parametrize(("seqlen", "tasks"), [(16, 1), (128, 2), (1024, 16)])
def test_small_problems_are_few_tasks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, seqlen: int, tasks: int
) -> None:
    """Another thread for a few scores would cost more than they do."""
    found = []

    def note(function: Callable[[Any], object], tasks: list[Any], small: bool) -> None:
        found.append(len(tasks))

    monkeypatch.setattr(_cpu_forward, "for_each", note)
    q = rng.standard_normal((1, seqlen, 8, 8))
    for options in ({}, {"mask": masks.window(seqlen, 0)}):
        cuflash.attention(q, q, q, **options)
    assert found == [tasks, tasks]


@pytest.mark.parametrize(("seqlen", "is_small"), [(1, True), (16, True), (200, False)])
def test_a_small_call_leaves_blas_and_threads_alone(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, seqlen: int, is_small: bool
) -> None:
    """That would take longer than the call."""
    calls = []
    single_threaded = _threads._single_threaded_blas
    monkeypatch.setattr(
        _threads, "_single_threaded_blas", lambda: calls.append(1) or single_threaded()
    )
    monkeypatch.setattr(_threads, "_start", lambda helpers, work, count: calls.extend([1] * count))
    x = tensors(rng, seqlen, seqlen, batch=1)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert_close(run(*x), expected(*x))
    assert bool(calls) != is_small


def test_no_thread_outlives_the_call(rng: np.random.Generator, small_tiles: None) -> None:
    before = threading.active_count()
    run(*tensors(rng))
    assert threading.active_count() == before


def test_an_error_in_a_task_reaches_the_caller_and_frees_blas() -> None:
    libraries = _threads._blas().lib_controllers
    threads = [library.num_threads for library in libraries]

    def fail(task: int) -> None:
        raise RuntimeError(f"task {task}")

    with pytest.raises(RuntimeError, match="task 0"):
        _threads.for_each(fail, range(4))
    assert [library.num_threads for library in libraries] == threads


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
def test_a_fork_after_a_call_can_call_too() -> None:
    """In a process of its own: this one may have threads that do not survive a fork."""
    program = """if True:
        import multiprocessing, numpy as np, cuflash
        x = np.ones((2, 600, 4, 8), np.float32)
        out = cuflash.attention(x, x, x)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            other = pool.apply(cuflash.attention, (x, x, x))
        assert (other == out).all()
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_no_warning_escapes(rng: np.random.Generator, small_tiles: None) -> None:
    x = tensors(rng, dtype=np.float32)
    x[0][0, 0] = np.inf
    x[2][0, 0] = np.nan
    with np.errstate(all="raise"):
        run(*x, causal=True, scale=1e30)
