"""What explain says of a call on the CPU is what the call then does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import mask_cases
import numpy as np
import pytest

import cuflash
from cuflash import _mask_blocks, _terms, masks, reference
from cuflash._mask_blocks import TileCounts
from cuflash.cli.cases import Case

SIZE = 128
CASE = Case(
    np.dtype(np.float32),
    *(2, 300, 420),  # batch, queries, keys
    heads_q=4,
    heads_k=2,
    head_dim=4,
    head_dim_v=4,
)


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v, *_ = case.arrays()
    return q, k, v


def tiles(visible: np.ndarray) -> np.ndarray:
    """How much of each tile is visible: (B, Hq, of rows, of keys), from 0 to 1."""
    rows, keys = (range(0, n, SIZE) for n in visible.shape[2:])
    shares = [[visible[:, :, i : i + SIZE, j : j + SIZE].mean((2, 3)) for j in keys] for i in rows]
    return np.moveaxis(np.array(shares), (0, 1), (2, 3))


def visible(q: np.ndarray, k: np.ndarray, mask: masks.Mask, **options: Any) -> np.ndarray:
    names = ("causal", "offset", "window", "q_lens", "kv_lens")
    return reference._visible(q, k, *map(options.get, names), mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["causal", "window", "lengths", "prefix", "blocks", "dense"])
def test_tiles_of_these_masks_are_counted_exactly(name: str, seed: int) -> None:
    q, k, v = arrays(CASE)
    mask = mask_cases.LEAVES[name](np.random.default_rng(seed), CASE)
    share = tiles(visible(q, k, mask))
    expected = (share == 0, (share > 0) & (share < 1), share == 1)
    assert cuflash.explain(q, k, v, mask=mask).tiles == tuple(int(x.sum()) for x in expected)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_called_hidden_or_full_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = arrays(CASE)
    mask = mask_cases.tree(rng, CASE, depth=3)
    options: dict[str, Any] = {"window": (200, 50)} if seed % 2 else {"causal": True}
    share = tiles(visible(q, k, mask, **options))
    found = cuflash.explain(q, k, v, mask=mask, **options).tiles
    assert sum(found) == share.size
    assert found.hidden <= (share == 0).sum() and found.full <= (share == 1).sum()


def test_tiles_past_the_lengths_are_hidden() -> None:
    q, k, v = arrays(CASE)
    every = masks.dense(np.ones((1, 1), bool))
    # Of 3 x 4 tiles: all, and 1 x 2, for each of four heads.
    lens = {"q_lens": [300, 128], "kv_lens": [420, 129]}
    assert cuflash.explain(q, k, v, mask=every, **lens).tiles == TileCounts(4 * 10, 0, 4 * 14)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_hidden_is_not_computed(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(replace(CASE, seqlen_q=420))
    ids = np.repeat([[0, 1, 2]], [128, 256, 36], axis=1).repeat(2, axis=0)
    mask = masks.documents(ids)
    mask = mask.compile(q, k) if compiled else mask
    pairs = []
    scores = _terms.scores

    def counted(*arguments: Any) -> np.ndarray:
        result = scores(*arguments)
        pairs.append(result.size)
        return result

    monkeypatch.setattr(_terms, "scores", counted)
    cuflash.attention(q, k, v, mask=mask)
    found = cuflash.explain(q, k, v, mask=mask)
    assert found.tiles == TileCounts(hidden=8 * 10, partial=0, full=8 * 6)
    assert sum(pairs) == 8 * (128**2 + 256**2 + 36**2)


def test_a_compiled_masks_tiles_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(CASE)
    mask = masks.causal().compile(q, k)
    found = cuflash.explain(q, k, v, mask=mask)
    monkeypatch.setattr(_mask_blocks, "classify", None)
    assert cuflash.explain(q, k, v, mask=mask) == found


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["full", "causal"])
def test_the_size_of_a_tile_is_that_of_the_largest(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = arrays(replace(CASE, seqlen_q=1200, seqlen_k=1300))
    sizes = []
    scores = _terms.scores

    def seen(tile: Any, *arguments: Any) -> np.ndarray:
        sizes.append([x.stop - x.start for x in (tile.rows, tile.runs[0].keys)])
        return scores(tile, *arguments)

    monkeypatch.setattr(_terms, "scores", seen)
    cuflash.attention(q, k, v, **options)
    found = cuflash.explain(q, k, v, **options)
    assert [found.block_q, found.block_kv] == np.max(sizes, axis=0).tolist()
    tile = f"{found.block_q} x {found.block_kv}"
    assert str(found) == f"cpu, tiles of {tile}: the arrays are in the memory of the CPU"


def test_the_size_of_a_packed_tile_is_that_of_the_largest() -> None:
    q, k, v = (np.zeros((1500, heads, 8), np.float32) for heads in (4, 2, 2))
    queries, keys = [0, 70, 70, 1000, 1500], [0, 30, 200, 1500, 1500]
    sequences = [
        cuflash.explain(q[None, i:j], k[None, m:n], v[None, m:n], causal=True)
        for (i, j), (m, n) in zip(pairwise(queries), pairwise(keys), strict=True)
        if i < j
    ]
    found = cuflash.explain(q, k, v, queries, keys, causal=True)
    assert found.block_q == max(x.block_q for x in sequences) > 70
    assert found.block_kv == max(x.block_kv for x in sequences) > 200
    assert found.backend == "cpu" and found.tiles is None


def test_sequences_without_tokens_have_no_tiles() -> None:
    q, k, v = np.zeros((3, 5, 1, 8), np.float32)
    found = cuflash.explain(q, k, v, [0, 0, 0], [0, 2, 5])
    assert (found.block_q, found.block_kv) == (0, 0)


def test_explain_takes_sequences_or_masks() -> None:
    q, k, v = np.zeros((3, 5, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"cuflash\.explain: mask is given beside cu_seqlens;"):
        cuflash.explain(q, k, v, [0, 5], [0, 5], mask=masks.causal())


@pytest.mark.parametrize("axis", ["batch", "seqlen_q", "seqlen_k"])
def test_a_call_without_pairs_has_no_tiles(axis: str) -> None:
    q, k, v = arrays(replace(CASE, **{axis: 0}))
    mask = masks.causal()
    assert cuflash.attention(q, k, v, mask=mask).shape == q.shape
    assert cuflash.explain(q, k, v, mask=mask).tiles is None
