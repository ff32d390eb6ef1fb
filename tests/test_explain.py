"""What explain says of a call is what the call then does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import mask_cases
import numpy as np
import pytest
import unreal_gpu

import cuflash
from cuflash import _mask_blocks, _terms, masks
from cuflash._mask_blocks import TileCounts
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Problem
from cuflash._reference_masks import visibility
from cuflash.cli import launches
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
    return visibility(q, k, *map(options.get, names), mask)


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


# On a GPU

GPU_CASE = Case(batch=2, seqlen_q=300, seqlen_k=420, heads_q=4, heads_k=2, head_dim=64)
HOPPERS = "a Hopper GPU, and TMA can move q, k, v and out"
FEW = "a Hopper GPU, but 64 queries do not fill a tile of its kernels"
# name: (what the call has of its own, sm_.., what the forward and the backward pass end with, why)
GPU_CALLS = {
    "sm_80": ({}, 80, "sm80", "sm80", "the GPU is sm_80, not Hopper (sm_90)"),
    "sm_90": ({}, 90, "sm90", "sm90", HOPPERS),
    "sm_120": ({}, 120, "sm80", "sm80", "the GPU is sm_120, not Hopper (sm_90)"),
    "wide": ({"head_dim": 192}, 90, "sm90", "wide_sm90", HOPPERS),
    "few-queries": ({"seqlen_q": 64}, 90, "sm80", "sm80", FEW),
    # Rows of 40 bytes: 48 apart in q and k, but not in their gradients, which are contiguous.
    "rows-far-apart": ({"head_dim": 20, "row": 24, "head_dim_v": 24}, 90, "sm90", "sm80", HOPPERS),
    "out-off-by-two": (
        {"out_start": (1 << 30) + 2},
        *(90, "sm80", "sm90"),
        "a Hopper GPU, but out starts at an address that is no multiple of 16 bytes",
    ),
}


class AbsentGpu(launches._AbsentGpu):
    """Whose memory nobody has to have."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return unreal_gpu.array(shape, dtype)

    zeros = empty

    def as_contiguous(self, array: Any, dtype: Any) -> Any:
        return array


def gpu_arguments(changes: dict[str, Any], packed: bool) -> dict[str, Any]:
    """CuPy arrays of a GPU that need not exist; `row`: from one row of q and k to the next."""
    own = dict(changes)
    row, out_start = own.pop("row", None), own.pop("out_start", None)
    case = replace(GPU_CASE, **own)
    head_dim_v = case.head_dim_v or case.head_dim

    def array(seqlen: int, heads: int, head_dim: int, row: int | None, start: int = 0) -> Any:
        shape = (case.batch * seqlen,) if packed else (case.batch, seqlen)
        whole = unreal_gpu.array((*shape, heads, row or head_dim), address=start)
        return whole[..., :head_dim]

    arguments = {
        "q": array(case.seqlen_q, case.heads_q, case.head_dim, row),
        "k": array(case.seqlen_k, case.heads_k, case.head_dim, row),
        "v": array(case.seqlen_k, case.heads_k, head_dim_v, None),
    }
    if out_start is not None:
        arguments["out"] = array(case.seqlen_q, case.heads_q, head_dim_v, None, out_start)
    if packed:
        edges = ("cu_seqlens_q", "cu_seqlens_k")
        arguments |= {name: unreal_gpu.array((3,), np.int64) for name in edges}
    return arguments


def launched(arguments: dict[str, Any], gpu: AbsentGpu) -> dict[str, Any]:
    """The kernels of a forward and a backward pass, by entry; of packed sequences', the latter's.

    The forward of these clears out, and so needs its memory.
    """
    from cuflash import _launch, _launch_packed

    if "cu_seqlens_q" in arguments:
        problem = PackedProblem.create("attention_varlen", "cuda", **arguments)
        shape = (*problem.q.shape[:2], problem.v.shape[2])
        out = problem.out if problem.out is not None else gpu.empty(shape, np.float16)
        dout = gpu.empty(out.shape, out.dtype)
        lse = gpu.empty((GPU_CASE.heads_q, out.shape[0]), np.float32)
        gradient = PackedGradientProblem(problem, dout, out, lse, None, True)
        _launch_packed.backward(gradient, gpu)
    else:
        problem = Problem.create("attention", "cuda", **arguments)
        out, lse, _ = _launch.forward(problem, gpu)
        dout = gpu.empty(out.shape, out.dtype)
        _launch.backward(GradientProblem(problem, dout, out, lse, None, True), gpu)
    return {kernel.entry: kernel for kernel in gpu.noted}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", GPU_CALLS)
def test_of_gpu_arrays(
    name: str, packed: bool, no_gpu_needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuflash import _launch

    changes, capability, forward, backward, reason = GPU_CALLS[name]
    if packed and name == "few-queries":
        changes = {"seqlen_q": 32}  # 64 of both sequences
    gpu = AbsentGpu(capability)
    monkeypatch.setattr(_launch, "gpu", {0: gpu}.get)
    arguments = gpu_arguments(changes, packed)
    found = cuflash.explain(**arguments, causal=True)
    assert (found.backend, found.reason, found.tiles) == (forward, reason, None)
    assert found.kernel == f"flash_fwd_{forward}.cu"
    assert found.backward_kernel == f"flash_bwd_{backward}.cu"
    tile = f"{found.block_q} x {found.block_kv}"
    sentence = f"{forward}, {found.kernel}, tiles of {tile}: {reason}; backward: "
    assert str(found) == sentence + found.backward_kernel
    assert not gpu.noted

    kernels = launched(arguments, gpu)
    assert kernels["flash_bwd"].source == found.backward_kernel
    if not packed:
        assert kernels["flash_fwd"].source == found.kernel
        constants = dict(kernels["flash_fwd"].constants)
        rows = constants.get("BLOCK_Q") or 64 * constants["CONSUMERS"]
        assert (found.block_q, found.block_kv) == (rows, constants["BLOCK_KV"])


@pytest.mark.parametrize(("seqlen_k", "block_kv"), [(2048, 128), (4096, 176)])
def test_of_queries_that_see_all_keys(
    seqlen_k: int, block_kv: int, no_gpu_needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuflash import _launch

    monkeypatch.setattr(_launch, "gpu", {0: AbsentGpu(90)}.get)
    arguments = gpu_arguments({"head_dim": 128, "seqlen_k": seqlen_k}, packed=False)
    assert f"tiles of 128 x {block_kv}:" in str(cuflash.explain(**arguments))
    assert cuflash.explain(**arguments, causal=True).block_kv == 128


def test_explain_takes_no_memory_of_the_gpu(
    no_gpu_needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuflash import _launch

    gpu = AbsentGpu(90)
    monkeypatch.setattr(_launch, "gpu", {0: gpu}.get)
    monkeypatch.setattr(gpu, "empty", None)
    assert cuflash.explain(**gpu_arguments({}, packed=False)).backend == "sm90"


@pytest.mark.parametrize("derivative", [None, "1.f"])
def test_a_score_function_without_derivative_has_no_backward(
    derivative: str | None, no_gpu_needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuflash import _launch

    monkeypatch.setattr(_launch, "gpu", {0: AbsentGpu(80)}.get)
    function = cuflash.ScoreMod("score", derivative)
    found = cuflash.explain(**gpu_arguments({}, packed=False), score_mod=function)
    assert found.backward_kernel == ("flash_bwd_sm80.cu" if derivative else "")
    assert str(found).endswith(f"; backward: {found.backward_kernel}") == bool(derivative)
