"""Every plan fits the GPU that it is for, and a change of the tuning is a visible diff."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _params, _plan, _plan_sm90, _traits
from cuflash._checks import MAX_HEAD_DIM
from cuflash._problem import Problem

CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
DTYPES = ("bfloat16", "float16")
PLAIN = _traits.Traits("bfloat16", 128, 128, 16, False, False, False, False)


def plain(head_dim: int, head_dim_v: int | None = None) -> _traits.Traits:
    return _traits.Traits(
        "bfloat16", head_dim, head_dim_v or head_dim, 16, False, False, False, False
    )


def every_traits() -> Iterator[_traits.Traits]:
    """All that `Traits.of` can give."""
    dims = [size for size in range(1, MAX_HEAD_DIM + 1) if size == _traits.padded(size)]
    scores = ((False, False), (True, False), (False, True))
    flags = (False, True)
    for few_rows, (
        softcap,
        scale_first,
    ), pack_group, vec, dtype, head_dim, head_dim_v in itertools.product(
        flags, scores, flags, _traits.VEC_BYTES, DTYPES, dims, dims
    ):
        traits = _traits.Traits(
            dtype, head_dim, head_dim_v, vec, pack_group, softcap, scale_first, few_rows
        )
        yield traits
        if vec == _traits.TMA_BYTES and not few_rows:
            yield replace(traits, tma=True)
            if head_dim == head_dim_v == 128 and not softcap and not scale_first:
                yield replace(traits, tma=True, dense_tiles=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_plan_fits(capability: int) -> None:
    limit = _traits.smem_limit(capability)
    count = 0
    for traits in every_traits():
        backward = _plan.backward_plan(traits, capability, True)
        kernels = (
            _plan.forward_plan(traits, capability).kernel,
            backward.prep,
            backward.main,
            backward.post,
        )
        for kernel in kernels:
            assert kernel.arch in (f"sm_{capability}", f"sm_{capability}a")
            assert kernel.arch.endswith("a") or not kernel.source.endswith("_sm90.cu")
            assert kernel.smem_bytes <= limit, (traits, kernel)
            assert kernel.threads in (128, 256, 384, 512)
        count += 1
    assert count == 64 * 2 * 3 * 2 * (4 * 2 + 1) + 2 * 2


# head_dim: (block_q, block_kv, warps) forward, (block_q, block_kv, warps, stages) backward
TILES_80 = {
    32: ((128, 64, 4), (64, 128, 8, 2)),
    64: ((128, 64, 4), (64, 128, 8, 2)),
    96: ((128, 64, 4), (64, 128, 8, 2)),
    128: ((128, 64, 4), (64, 128, 8, 2)),
    160: ((128, 64, 8), (64, 64, 8, 2)),
    192: ((128, 64, 8), (64, 64, 8, 2)),
    224: ((128, 64, 8), (64, 64, 8, 1)),
    256: ((128, 64, 8), (64, 64, 8, 1)),
}
TILES_86 = {
    32: ((128, 64, 4), (64, 128, 8, 2)),
    64: ((128, 64, 4), (64, 128, 8, 2)),
    96: ((128, 64, 4), (64, 64, 8, 2)),
    128: ((128, 32, 4), (64, 64, 8, 1)),
    160: ((128, 64, 8), (64, 64, 8, 1)),
    192: ((128, 64, 8), (32, 64, 8, 1)),
    224: ((64, 64, 4), (32, 32, 4, 1)),
    256: ((64, 64, 4), (32, 32, 4, 1)),
}


@pytest.mark.parametrize(("capability", "tiles"), [(80, TILES_80), (86, TILES_86)])
def test_chosen_tiles(capability: int, tiles: dict) -> None:
    def sizes(kernel: _traits.Kernel, *names: str) -> tuple[int, ...]:
        constants = dict(kernel.constants)
        return tuple(constants[name] for name in names)

    chosen = {}
    for head_dim in tiles:
        forward = _plan.forward_plan(plain(head_dim), capability).kernel
        backward = _plan.backward_plan(plain(head_dim), capability, True).main
        chosen[head_dim] = (
            sizes(forward, "BLOCK_Q", "BLOCK_KV", "WARPS"),
            sizes(backward, "BLOCK_Q", "BLOCK_KV", "WARPS", "STAGES"),
        )
    assert chosen == tiles


# Keys: those of a tile. A partly visible one costs twice a whole one.
DENSE_TILES_90 = {
    **{1: 128, 128: 128, 129: 176, 176: 176, 177: 128, 352: 176, 353: 128, 512: 128},
    **{528: 176, 1000: 176, 1024: 128, 2048: 128, 2112: 176, 4096: 176, 16384: 176},
}


def test_tiles_of_queries_that_see_all_keys() -> None:
    def problem(keys: int, head_dim: int = 128, head_dim_v: int = 128, **options: Any) -> Problem:
        q = np.zeros((1, 70, 2, head_dim), np.float16)
        k, v = (np.zeros((1, keys, 1, size), np.float16) for size in (head_dim, head_dim_v))
        return Problem.create("attention", "cuda", q, k, v, **options)

    def block_kv(dense_tiles: bool) -> int:
        traits = replace(PLAIN, tma=True, dense_tiles=dense_tiles)
        return _plan.forward_plan(traits, 90).tiling.block_kv

    pay = _plan_sm90.dense_tiles_pay
    assert {keys: block_kv(pay(problem(keys))) for keys in DENSE_TILES_90} == DENSE_TILES_90
    assert pay(problem(4096, 100, 97, scale=0.5, offset=3))
    ones = np.ones(2, np.float32)
    for options in (
        *({"causal": True}, {"window": (None, 5000)}, {"scale": -1.0}, {"softcap": 1.0}),
        *({"q_lens": np.full(1, 9)}, {"kv_lens": np.full(1, 4096)}, {"dropout": 0.1, "seed": 0}),
        *({"sinks": ones}, {"alibi_slopes": ones}, {"bias": np.zeros((70, 4096), np.float32)}),
        *({"mask": cuflash.masks.causal()}, {"score_mod": cuflash.ScoreMod("score")}),
        *({"head_dim": 96}, {"head_dim_v": 96}, {"head_dim": 64, "head_dim_v": 64}),
    ):
        assert not pay(problem(4096, **options)), options


def test_traits_of_a_problem() -> None:
    q = np.zeros((2, 300, 6, 40), np.float16)
    k = np.zeros((2, 300, 2, 40), np.float16)
    v = np.zeros((2, 300, 2, 65), np.float16)
    problem = Problem.create("attention", "cuda", q, k, v, softcap=3.0, scale=-1.0)
    assert _traits.Traits.of(problem, 2) == _traits.Traits(
        "float16", 64, 96, 2, pack_group=True, softcap=True, scale_first=False, few_rows=False
    )
    problem = Problem.create("attention", "cuda", q[:, :10], k, v, scale=0.0)
    traits = _traits.Traits.of(problem, 8)
    assert (traits.vec_bytes, traits.scale_first, traits.few_rows) == (8, True, True)


@pytest.mark.parametrize(("alignment", "width"), [(16, 16), (8, 8), (4, 4), (2, 2), (32, 16)])
def test_vector_width(alignment: int, width: int) -> None:
    assert _traits.vec_bytes(alignment) == width


def test_alignment_looks_at_addresses_and_strides_that_matter() -> None:
    memory = np.zeros(4096, np.float16)
    memory = memory[(-memory.ctypes.data % 16) // 2 :]
    whole = memory[:1024].reshape(2, 4, 2, 64)
    assert _params.alignment(whole) == 16
    assert _params.alignment(whole[..., 1:]) == 2
    assert _params.alignment(memory[4:1028].reshape(2, 4, 2, 64)) == 8
    assert _params.alignment(whole, memory[:1020].reshape(1, 5, 2, 102)) == 4
    # The strides of an axis of one element are never used.
    assert _params.alignment(memory[:1020].reshape(1, 10, 102)[:, :1, None, :]) == 16
    assert _params.alignment(memory[:1020].reshape(1, 10, 102)[:, :2, None, :]) == 4
    assert _params.alignment(memory[:60].reshape(1, 1, 1, 60)) == 16


def test_old_gpus_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"capability 7.5; expected 8.0 \(Ampere\)"):
        _plan.forward_plan(PLAIN, 75)
    with pytest.raises(NotImplementedError, match="cpu backend"):
        _plan.backward_plan(PLAIN, 70, True)


def test_sections_of_heads_share_the_cache() -> None:
    device = _traits.Device(90, l2_bytes=50 << 20, sms=132)
    x = np.zeros((4, 1, 16, 128), np.float16)
    keys = np.broadcast_to(x[:, :1], (4, 4096, 16, 128))  # 2 MiB of keys and values per head
    problem = Problem.create("attention", "cuda", x, keys, keys)
    assert _plan.heads_per_section(problem, device) == 12
    few = Problem.create("attention", "cuda", x, keys[:, :8], keys[:, :8])
    assert _plan.heads_per_section(few, device) == 64
    none = Problem.create("attention", "cuda", x, keys[:, :0], keys[:, :0])
    assert _plan.heads_per_section(none, device) == 64


def test_planning_needs_no_cupy() -> None:
    code = "import sys, cuflash._plan; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
