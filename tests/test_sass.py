"""The instructions that the hot loops of Hopper's kernels issue, and the counter of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sass
from injection import put_in
from test_kernels import run_tool, traits

from cuflash import _jit, _plan, _plan_sm90
from cuflash._traits import Kernel

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

# (pass, D): (queries of a warpgroup, keys of its tile), the issue slots of a turn at most. They are
# FlashAttention-3's on the same tile, in the wheels fa3-fwd 0.0.3 and xformers 0.0.32.post2; it has
# no backward for D = 256, where they are what was reached, and some for another compiler.
SLOTS = {
    ("forward", 64): ((64, 128), 417),
    ("forward", 128): ((64, 128), 455),
    ("forward", 256): ((64, 80), 449),
    ("dense forward", 128): ((64, 176), 580),
    ("backward", 64): ((64, 128), 669),
    ("backward", 128): ((64, 64), 483),
    ("backward", 256): ((32, 64), 450),
}

A_LOOP = """
.L_x_1:
        /*0000*/                   UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_2:
        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0030*/                   MUFU.EX2 R1, R1 ;
        /*0040*/               @P1 BRA P2, `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0060*/                   NANOSLEEP 0x20 ;
        /*0070*/                   BRA `(.L_x_3) ;
"""


def test_the_inner_loop_is_counted_past_the_slow_sides_of_waits() -> None:
    loop = sass.hot_loop(A_LOOP)
    assert loop.opcodes == {"HGMMA": 1, "BRA": 2, "MUFU": 1}
    assert (loop.slots, loop.flops) == (4, 2 * 64 * 8 * 16)
    more = A_LOOP.replace("MUFU.EX2 R1, R1 ;", "MUFU.EX2 R1, R1 ;\n /*0038*/ R2UR UR4, R1 ;")
    assert sass.hot_loop(more).slots == 5


TWO_SIDES = """
.L_x_1:
        /*0000*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R32, gdesc[UR8], R32 ;
        /*0030*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   NOP ;
.L_x_3:
        /*0050*/               @P1 BRA `(.L_x_1) ;
"""


def test_a_turn_takes_the_side_with_products() -> None:
    assert sass.hot_loop(TWO_SIDES).opcodes == {"HGMMA": 2, "BRA": 3}


def kernel_of(direction: str, head_dim: int) -> Kernel:
    chosen = replace(traits(head_dim, head_dim, "plain"), tma=True)
    if direction == "dense forward":
        chosen = replace(chosen, dense_tiles=True)
    if direction.endswith("forward"):
        return _plan.forward_plan(chosen, 90).kernel
    return _plan.backward_plan(chosen, 90, deterministic=True).main


@pytest.mark.parametrize("cell", SLOTS, ids=str)
def test_hot_loops_issue_no_more_than_flash_attention_3(cell: tuple[str, int]) -> None:
    direction, head_dim = cell
    (queries, keys), slots = SLOTS[cell]
    cubin = _jit.cached_cubin(kernel_of(direction, head_dim))
    assert not cubin.resources.notes and not cubin.resources.spill_bytes, cubin.log
    loop = sass.hot_loop(run_tool("nvdisasm", cubin.image, "-c"))
    # Two products of the forward; five of the backward, of which each warpgroup does its half.
    assert loop.flops == (10 if direction == "backward" else 4) * queries * keys * head_dim
    assert loop.slots <= slots, loop.opcodes.most_common()


def test_the_planner_knows_what_its_tiles_issue() -> None:
    """Relative to each other, by which it chooses: compilers differ in either by a few percent."""
    found = {}
    for direction in ("forward", "dense forward"):
        kernel = kernel_of(direction, 128)
        image = _jit.cached_cubin(kernel).image
        slots = sass.hot_loop(run_tool("nvdisasm", image, "-c")).slots
        found[dict(kernel.constants)["BLOCK_KV"]] = slots
    assert found.keys() == _plan_sm90.SLOTS.keys()
    known = {keys: slots / _plan_sm90.SLOTS[128] for keys, slots in _plan_sm90.SLOTS.items()}
    assert {keys: x / found[128] for keys, x in found.items()} == pytest.approx(known, rel=0.02)


def test_a_search_that_is_not_uniform_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = "holds_non_finite(smem.v(at), own_barrier(index))"
    put_in("flash_fwd_sm90.cu", f"warp_uniform({search})", search, tmp_path, monkeypatch)
    image = _jit.cached_cubin(kernel_of("forward", 128)).image
    loop = sass.hot_loop(run_tool("nvdisasm", image, "-c"))
    assert loop.slots > SLOTS["forward", 128][1] and loop.opcodes["R2UR"] > 16
