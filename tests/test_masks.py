"""What masks mean, on every backend, and what the NumPy backend computes of them."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import backends
import mask_cases
import numpy as np
import pytest
import threadpoolctl
from conftest import on_every_backend

import cuflash
from cuflash import _mask_blocks, _mask_rules, _terms, _work, masks, reference
from cuflash._mask_blocks import ALL, NOTHING, Grid, classify
from cuflash._mask_tree import ScoresShape
from cuflash._reference_masks import visibility
from cuflash.cli import oracle
from cuflash.cli.cases import Case
from cuflash.masks import Mask

FLOAT64 = np.dtype(np.float64)
BLOCK = 16
SMALL = Case(
    FLOAT64, batch=2, seqlen_q=70, seqlen_k=90, heads_q=4, heads_k=2, head_dim=8, head_dim_v=6
)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.shrink_cpu_tiles(monkeypatch, BLOCK, 4 * BLOCK)


def run(backend: backends.Backend, case: Case, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """out, lse and every gradient by name."""
    q, k, v, dout, dlse = case.arrays()
    q, k, v, dout = (case.place(x, np) for x in (q, k, v, dout))
    options = {**case.options, **options}
    return named(*backend.both(dout, q, k, v, dlse, **options))


def expected(case: Case, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """The same from the reference."""
    q, k, v, dout, dlse = case.arrays()
    options = {**case.options, **options}
    out, lse = reference.attention(q, k, v, **options)
    return named(out, lse, reference.attention_backward(dout, q, k, v, dlse=dlse, **options))


def named(out: np.ndarray, lse: np.ndarray, grads: cuflash.Gradients) -> dict[str, np.ndarray]:
    results = {"out": out, "lse": lse, **grads._asdict()}
    return {name: x for name, x in results.items() if x is not None}


def assert_close(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert found.keys() == right.keys()
    for name, x in right.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-9, atol=1e-9, err_msg=name)


def check_float64(case: Case, mask: Any, **options: Any) -> None:
    """What the CPU finds in float64 is accurate to float64."""
    options["mask"] = mask
    assert_close(run(backends.CpuBackend(), case, options), expected(case, options))


# ------------------------------------------------------------------------- on every backend


BFLOAT16 = Case(batch=2, seqlen_q=150, seqlen_k=200, head_dim=32)
BESIDE = {  # what the kernels are specialised for
    "alone": {},
    "causal": {"causal": True},
    "gqa": {"heads_q": 4},
    "head-dims": {"head_dim_v": 64},
}
SOME_MASKS = {
    "window-of-offsets": (BFLOAT16, masks.window(30, 5, offset=[20, -40])),
    "empty-lengths": (BFLOAT16, masks.lengths([200, 65], [0, 150])),
    "same-documents": (
        replace(BFLOAT16, seqlen_k=150, causal=True),
        masks.documents(np.repeat([[0, 1, 2], [5, 4, 5]], 50, axis=1)),
    ),
    "prefix-lm": (BFLOAT16, masks.causal() | masks.prefix([130, 10])),
}


def every_kind() -> dict[str, tuple[Case, Mask]]:
    """Each leaf alone, with causal, with grouped heads and with D other than Dv; and trees."""
    cases = dict(SOME_MASKS)
    seed = 18  # shows and hides something of every batch entry in each of them
    for name, leaf in mask_cases.LEAVES.items():
        for beside, changes in BESIDE.items():
            case = replace(BFLOAT16, **changes)
            cases[f"{name}-{beside}"] = (case, leaf(np.random.default_rng(seed), case))
    rng = np.random.default_rng(3)
    gqa = replace(BFLOAT16, heads_q=4, heads_k=2, batch=1, head_dim_v=64)
    for name in ("intervals", "blocks", "expression"):
        mask = mask_cases.LEAVES[name](rng, gqa)
        cases[f"gqa-{name}-and-causal"] = (gqa, mask & masks.causal())
    for number in range(3):
        cases[f"gqa-tree-{number}"] = (gqa, mask_cases.tree(rng, gqa, depth=4))
    cases["gqa-every-leaf"] = (replace(gqa, window=(150, 60)), mask_cases.every_leaf(rng, gqa))
    cases["nothing-visible"] = (BFLOAT16, masks.dense(np.zeros((150, 200), bool)))
    return cases


@pytest.mark.parametrize(
    "backend, case, mask",
    on_every_backend(
        every_kind(), always=("emulated-80-gqa-every-leaf", "emulated-90-gqa-every-leaf")
    ),
    indirect=["backend"],
)
def test_on_every_backend(backend: backends.Backend, case: Case, mask: Mask) -> None:
    found = run(backend, case, {"mask": mask})
    for name, bound in oracle.expect(case.arrays(), {**case.options, "mask": mask}).items():
        error = bound.error(found[name])
        assert error <= bound.allowed, f"{name}: error {error:.2e}, allowed {bound.allowed:.2e}"


# ------------------------------------------------------------------------- on the CPU


HEADS = {"one-to-one": (2, 2), "gqa": (4, 2), "multi-query": (5, 1)}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("kind", mask_cases.LEAVES)
def test_every_leaf_alone_inverted_and_with_causal(
    rng: np.random.Generator, small_tiles: None, kind: str, causal: bool, heads: tuple[int, int]
) -> None:
    case = replace(SMALL, heads_q=heads[0], heads_k=heads[1], causal=causal)
    for _ in range(2):
        mask = mask_cases.LEAVES[kind](rng, case)
        check_float64(case, mask)
        check_float64(case, ~mask)


def companions(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Some other options of a call."""
    bias_shape = [n if rng.random() < 0.6 else 1 for n in (2, case.heads_q, *lengths_of(case))]
    every = {
        "causal": True,
        "window": (int(rng.integers(0, 60)), None),
        "offset": rng.integers(-50, 50, case.batch),
        "q_lens": rng.integers(0, case.seqlen_q + 1, case.batch),
        "kv_lens": rng.integers(0, case.seqlen_k + 1, case.batch),
        "softcap": 1.5,
        "bias": rng.standard_normal(bias_shape),
        "alibi_slopes": rng.standard_normal(case.heads_q) / 8,
        "sinks": rng.standard_normal(case.heads_q),
        "dropout": 0.3,
    }
    some = {name: x for name, x in every.items() if rng.random() < 0.2}
    return {**some, "seed": 5} if "dropout" in some else some


def lengths_of(case: Case) -> tuple[int, int]:
    return case.seqlen_q, case.seqlen_k


@pytest.mark.parametrize("seed", range(150))
def test_random_trees_with_random_options(small_tiles: None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads_q, heads_k = list(HEADS.values())[seed % 3]
    seqlen_q, seqlen_k = (int(x) for x in rng.integers(1, 100, 2))
    case = replace(SMALL, heads_q=heads_q, heads_k=heads_k, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    mask = mask_cases.tree(rng, case, depth=int(rng.integers(0, 6)))
    check_float64(case, mask, **companions(rng, case))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_blocks_of_full_size(rng: np.random.Generator, dtype: str) -> None:
    case = replace(SMALL, dtype=np.dtype(dtype), batch=1, seqlen_q=300, seqlen_k=700)
    for mask in (mask_cases.documents(rng, case), mask_cases.blocks(rng, case)):
        found = run(backends.CpuBackend(), case, {"mask": mask})
        for name, bound in oracle.expect(case.arrays(), {**case.options, "mask": mask}).items():
            error = bound.error(found[name])
            assert error <= bound.allowed, name


@pytest.mark.parametrize("layout", ["BHSD", "unaligned"])
def test_layouts(rng: np.random.Generator, small_tiles: None, layout: str) -> None:
    check_float64(replace(SMALL, layout=layout), mask_cases.tree(rng, SMALL, depth=3))


NOTHING_VISIBLE = {
    "dense": masks.dense(np.zeros((70, 90), bool)),
    "lengths": masks.lengths([0, 0]),
    "contradiction": masks.causal(0) & ~masks.causal(0),
    "documents": masks.documents(np.zeros((2, 70), int), np.ones((2, 90), int)),
    "found-late": masks.expression("false", lambda b, h, i, j: np.zeros((1, 1), bool)),
}


@pytest.mark.parametrize("mask", NOTHING_VISIBLE.values(), ids=NOTHING_VISIBLE)
def test_nothing_visible_gives_zeros_and_costs_nothing(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch, mask: Mask
) -> None:
    monkeypatch.setattr(_terms, "scores", None)  # nothing calls it
    found = run(backends.CpuBackend(), SMALL, {"mask": mask})
    assert (found.pop("lse") == -np.inf).all()
    assert not any(x.any() for x in found.values())


def test_no_keys(small_tiles: None) -> None:
    case = replace(SMALL, seqlen_k=0)
    mask = masks.documents(np.zeros((2, 70), int), np.zeros((2, 0), int)) | masks.prefix([0, 0])
    check_float64(case, mask)


# Masks with rows that see no key and keys that no row sees.
HIDING = {
    "causal": masks.causal(-20),
    "window": masks.window(5, 3, 40),
    "lengths": masks.lengths([60, 0], [70, 33]),
    "documents": masks.documents(np.arange(140).reshape(2, 70), np.arange(180).reshape(2, 90) + 9),
    "prefix": ~masks.prefix([50, 90]),
    "intervals": masks.intervals(
        *(np.repeat([[[[a]] * 50 + [[b]] * 40]], 2, axis=0) for a, b in ((0, 30), (70, 70)))
    ),
    "blocks": masks.blocks(np.diag([True, False, True]), 30, 30),
    "dense": masks.dense(np.outer(np.arange(70) % 5 > 1, np.arange(90) % 7 > 3)),
    "expression": masks.expression("i % 3 > 0 && j > i", lambda b, h, i, j: (i % 3 > 0) & (j > i)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask", HIDING.values(), ids=HIDING)
def test_what_a_mask_hides_may_be_nan(small_tiles: None, mask: Mask, dtype: str) -> None:
    """Everywhere that nobody sees, in k and v, and where nothing is seen, in q, dout and dlse."""
    case = replace(SMALL, dtype=np.dtype(dtype))
    q, k, v, dout, dlse = case.arrays()
    visible = visibility(q, k, False, None, None, None, None, mask)
    right = expected(case, {"mask": mask})
    blind = ~visible.any(axis=3).swapaxes(1, 2)  # (B, Sq, Hq)
    unseen = ~visible.reshape(2, 2, 2, 70, 90).any(axis=(2, 3)).swapaxes(1, 2)  # (B, Sk, Hk)
    assert visible.any() and (blind.any() or unseen.any())
    q[blind] = dout[blind] = k[unseen] = v[unseen] = np.nan
    dlse = np.where(blind.swapaxes(1, 2), np.nan, dlse).astype(dtype)
    out, lse = cuflash.attention(q, k, v, mask=mask, return_lse=True)
    grads = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, mask=mask)
    tolerance = 1e-9 if dtype == "float64" else 1e-4
    for name, x in named(out, lse, grads).items():
        np.testing.assert_allclose(x, right[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_bits_do_not_depend_on_the_number_of_threads(
    rng: np.random.Generator, small_tiles: None
) -> None:
    case = replace(SMALL, dtype=np.dtype(np.float32), batch=1)
    options = {"mask": mask_cases.tree(rng, case, 3), "bias": np.ones((4, 1, 90), np.float32)}
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        right = run(backends.CpuBackend(), case, options)
    for threads in (2, 5):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            found = run(backends.CpuBackend(), case, options)
        assert all(found[name].tobytes() == x.tobytes() for name, x in right.items())


# ------------------------------------------------------------------------- which blocks are visited


def blocks_of(visible: np.ndarray) -> np.ndarray:
    """(B, Hq, Sq, Sk) to (B, Hq, blocks of rows, blocks of keys): how many pairs are visible."""
    for axis in (2, 3):
        starts = np.arange(0, visible.shape[axis], BLOCK)
        visible = np.add.reduceat(visible, starts, axis=axis, dtype=int)
    return visible


@pytest.fixture
def visited(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> list[_work.Tile]:
    """The tiles whose scores are computed."""
    tiles: list[_work.Tile] = []
    scores = _terms.scores

    def counted(tile: _work.Tile, *others: Any) -> np.ndarray:
        tiles.append(tile)
        return scores(tile, *others)

    monkeypatch.setattr(_terms, "scores", counted)
    return tiles


def visits(tiles: list[_work.Tile]) -> Counter[tuple[int, int, int, int]]:
    """How often each block of each head is visited."""
    counter: Counter[tuple[int, int, int, int]] = Counter()
    for tile in {id(tile): tile for tile in tiles}.values():  # once where scores come twice
        b, h, i, j = tile.places()
        spans = np.unique(i // BLOCK), np.unique(j // BLOCK)
        counter.update(
            (int(b[0]), int(head), int(r), int(c)) for head in h for r in spans[0] for c in spans[1]
        )
    return counter


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", [*mask_cases.LEAVES, "tree"])
def test_visited_blocks_are_the_visible_ones(
    rng: np.random.Generator,
    visited: list[_work.Tile],
    kind: str,
    heads: tuple[int, int],
    causal: bool,
) -> None:
    """In each pass the blocks of which something is visible, each once, and no others."""
    case = replace(SMALL, heads_q=heads[0], heads_k=heads[1], kv_lens=(90, 50))
    for _ in range(3):
        is_tree = kind == "tree"
        mask = mask_cases.tree(rng, case, 3) if is_tree else mask_cases.LEAVES[kind](rng, case)
        q, k, v, dout, _ = case.arrays()
        options = {**case.options, "causal": causal, "mask": mask}
        visible = visibility(q, k, causal, None, None, None, case.options["kv_lens"], mask)
        right = {tuple(map(int, place)) for place in np.argwhere(blocks_of(visible))}
        visited.clear()
        out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        assert visits(visited) == Counter(right)
        visited.clear()
        cuflash.attention_backward(dout, q, k, v, out, lse, **options)
        assert visits(visited) == Counter(right)


@pytest.mark.parametrize("kind", [*mask_cases.LEAVES, "tree"])
def test_classification_is_never_wrong(rng: np.random.Generator, kind: str) -> None:
    """A block without anything visible may be called partly visible; no other error is allowed."""
    sure = {"causal", "window", "lengths", "prefix", "blocks", "dense"}
    for _ in range(10):
        is_tree = kind == "tree"
        mask = mask_cases.tree(rng, SMALL, 4) if is_tree else mask_cases.LEAVES[kind](rng, SMALL)
        q, k, *_ = SMALL.arrays()
        counts = blocks_of(visibility(q, k, False, None, None, None, None, mask))
        sizes = blocks_of(np.ones((2, 4, 70, 90), bool))
        grid = Grid(ScoresShape(2, 4, 2, 70, 90), np.array([20, 20]), (BLOCK, BLOCK))
        states = classify(mask, grid)
        states = np.broadcast_to(states, (2, 2, 2, *states.shape[3:])).reshape(counts.shape)
        assert not counts[states == NOTHING].any()
        assert (counts == sizes)[states == ALL].all()
        if kind in sure:
            np.testing.assert_array_equal(states != NOTHING, counts > 0)
            np.testing.assert_array_equal(states == ALL, counts == sizes)


def test_tiles_gather_blocks_that_lie_apart(
    visited: list[_work.Tile],
) -> None:
    """Four blocks of keys, wherever they lie, are one product."""
    seen = np.zeros((5, 6), bool)
    seen[0, [0, 2, 3, 5]] = seen[3, [1, 4]] = True
    case = replace(SMALL, heads_q=1, heads_k=1, batch=1)
    cuflash.attention(*case.arrays()[:3], mask=masks.blocks(seen, BLOCK, BLOCK))
    widths = sorted(sum(run.keys.stop - run.keys.start for run in tile.runs) for tile in visited)
    assert widths == [2 * BLOCK, 3 * BLOCK + 90 % BLOCK]


def test_heads_with_one_mask_share_tiles_and_others_do_not(visited: list[_work.Tile]) -> None:
    case = replace(SMALL, batch=20)
    for lead, heads in (((1, 1), 2), ((1, 4), 1)):
        visited.clear()
        mask = masks.blocks(np.ones((*lead, 5, 6), bool), BLOCK, BLOCK)
        cuflash.attention(*case.arrays()[:3], mask=mask)
        assert {tile.item.group for tile in visited} == {heads}


def test_full_blocks_evaluate_nothing(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mask_rules, "visible", None)  # nothing calls it
    seen = np.eye(6, dtype=bool)[:5]
    mask = masks.blocks(seen, BLOCK, BLOCK) & ~masks.lengths([0, 0]) & masks.prefix([90, 90])
    check_float64(SMALL, mask)


# ------------------------------------------------------------------------- compiled masks


@pytest.fixture
def classified(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    """The masks that are classified, one after the other."""
    found: list[Mask] = []
    original = _mask_blocks.classify
    monkeypatch.setattr(
        _mask_blocks, "classify", lambda mask, grid: found.append(mask) or original(mask, grid)
    )
    return found


def test_a_compiled_mask_is_classified_once(
    rng: np.random.Generator, small_tiles: None, classified: list[Mask]
) -> None:
    mask = mask_cases.tree(rng, SMALL, 3)
    q, k, *_ = SMALL.arrays()
    compiled = mask.compile(q, k)
    assert not classified
    for _ in range(3):
        check_float64(SMALL, compiled)
    assert len(classified) == 1
    check_float64(replace(SMALL, causal=True), compiled)
    check_float64(replace(SMALL, head_dim=5), compiled)
    assert len(classified) == 2


@pytest.mark.parametrize(
    "options",
    [{"q_lens": np.array([9, 70])}, {"kv_lens": np.array([3, 70])}, {"offset": np.array([4, 9])}],
    ids=str,
)
def test_lengths_and_offsets_of_a_call_are_not_kept(
    rng: np.random.Generator, small_tiles: None, options: dict[str, Any]
) -> None:
    q, k, *_ = SMALL.arrays()
    compiled = masks.causal().compile(q, k)
    check_float64(SMALL, compiled)
    check_float64(SMALL, compiled, **options)
    check_float64(SMALL, compiled, offset=3)
    assert len(compiled.tables) == 2


def test_a_compiled_mask_is_a_mask(rng: np.random.Generator, small_tiles: None) -> None:
    q, k, *_ = SMALL.arrays()
    compiled = mask_cases.tree(rng, SMALL, 3).compile(q, k)
    check_float64(SMALL, compiled & masks.causal() | ~compiled)
    check_float64(SMALL, compiled.compile(q, k))


@pytest.mark.gpu
def test_a_compiled_mask_on_a_gpu(rng: np.random.Generator) -> None:
    """Gives the bits of the mask itself, when its tiles are found and when they are known."""
    import cupy

    case = replace(BFLOAT16, heads_q=4)
    q, k, v, dout, dlse = map(cupy.asarray, case.arrays())
    mask = mask_cases.every_leaf(rng, case)
    compiled = mask.compile(q, k)

    def results(mask: Mask) -> dict[str, bytes]:
        options = {"mask": mask, "window": (150, 60)}
        (out, lse), pullback = cuflash.attention_vjp(q, k, v, return_lse=True, **options)
        found = named(out, lse, pullback(dout, dlse))
        return {name: cupy.asnumpy(x).tobytes() for name, x in found.items()}

    right = results(mask)
    assert not compiled.tables
    assert results(compiled) == right
    tables = dict(compiled.tables)
    assert results(compiled) == right
    assert compiled.tables == tables and tables
    with cupy.cuda.Stream(non_blocking=True):
        assert results(compiled) == right
    assert len(compiled.tables) == 2 * len(tables)  # each stream has its own


# ------------------------------------------------------------------------- memory


@pytest.mark.parametrize("own_heads", [False, True], ids=["shared", "a-mask-per-head"])
def test_memory_grows_with_the_length_and_not_its_square(own_heads: bool) -> None:
    seqlen, heads = 4096, 4
    case = replace(SMALL, dtype=np.dtype(np.float32), batch=1, seqlen_q=seqlen, seqlen_k=seqlen)
    mask = masks.causal() & masks.documents(np.arange(seqlen)[None] // 700)
    if own_heads:
        near = masks.expression("i - j <= 1000 * h", lambda b, h, i, j: i - j <= 1000 * h)
        mask = mask & near | masks.window(9, 9)
    q, k, v, dout, _ = case.arrays()
    tracemalloc.start()
    try:
        with threadpoolctl.threadpool_limits(2, user_api="blas"):
            _, pullback = cuflash.attention_vjp(q, k, v, mask=mask)
            pullback(dout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * heads * seqlen**2 / 10
