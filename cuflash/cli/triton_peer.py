"""Triton's attention as a contender: checked by the oracle, then timed at its best tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from cuflash.cli import triton_kernels
from cuflash.cli.cases import Case
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.oracle import expect
from cuflash.cli.timing import Contender, warm_up

LOG2_E = math.log2(math.e)
DELTA_ROWS = 64  # of a program of attention_delta
CHECKED_LENGTH = 200  # no multiple of any tile


class Tiles(NamedTuple):
    """What one compilation is for."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


# Which are fastest depends on the cell and the GPU. Not all of them fit with every head size.
SMALL = Tiles(64, 64, 4, 2)
TILES = {
    "forward": (
        Tiles(128, 128, 8, 3),
        Tiles(128, 128, 8, 2),
        Tiles(128, 64, 8, 2),
        Tiles(128, 64, 4, 3),
        SMALL,
    ),
    "backward": (
        Tiles(64, 128, 8, 2),
        Tiles(128, 64, 8, 2),
        Tiles(32, 128, 8, 2),
        SMALL,
        Tiles(32, 64, 8, 1),
    ),
}


def contender(clock: Any, cell: Cell, inputs: Inputs) -> Contender:
    """The fastest tiles for this cell."""
    q, k, v, dout = map(torch.from_dlpack, (inputs.q, inputs.k, inputs.v, inputs.dout))
    if cell.direction == "forward":
        run = partial(forward, q, k, v, cell.causal)
    else:
        out, lse = forward(q, k, v, cell.causal, SMALL)
        run = partial(backward, dout, q, k, v, out, lse, cell.causal)
    small = replace(cell, batch=1, seqlen=CHECKED_LENGTH, heads=2)
    milliseconds = {}
    for tiles in TILES[cell.direction]:
        try:
            check(small, tiles, q.device)
            milliseconds[tiles] = warm_up(Contender(partial(run, tiles), clock))
        except triton.runtime.errors.OutOfResources as error:
            too_large = error
    if not milliseconds:
        raise too_large
    return Contender(partial(run, min(milliseconds, key=milliseconds.get)), clock)


@cache
def check(cell: Cell, tiles: Tiles, device: torch.device) -> None:
    """Fail where the result is further from float64 than `python -m cuflash check` lets ours be."""
    case = Case(
        dtype=np.dtype(cell.dtype),
        batch=cell.batch,
        seqlen_q=cell.seqlen,
        seqlen_k=cell.seqlen,
        heads_q=cell.heads,
        heads_k=cell.heads,
        head_dim=cell.head_dim,
        causal=cell.causal,
    )
    arrays = case.arrays()
    dtype = getattr(torch, cell.dtype)
    q, k, v, dout = (torch.tensor(x.astype(np.float32)).to(device, dtype) for x in arrays[:4])
    if cell.direction == "forward":
        found = {"out": forward(q, k, v, cell.causal, tiles)[0]}
    else:
        out, lse = forward(q, k, v, cell.causal, SMALL)
        gradients = backward(dout, q, k, v, out, lse, cell.causal, tiles)
        found = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    bounds = expect(arrays._replace(dlse=None), case.options)
    for name, tensor in found.items():
        error, allowed = bounds[name].error(tensor.float().cpu().numpy()), bounds[name].allowed
        if not error <= allowed:
            raise ArithmeticError(f"{name} is off by {error:.2g}, allowed {allowed:.2g} ({tiles})")


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out, and lse to the base 2."""
    batch, seqlen, heads, head_dim = q.shape
    out, lse = torch.empty_like(q), q.new_empty((batch, heads, seqlen), dtype=torch.float32)
    triton_kernels.attention_forward[(triton.cdiv(seqlen, tiles.block_q), batch * heads)](
        *(q, k, v, out, lse, LOG2_E / math.sqrt(head_dim), seqlen, heads, heads * head_dim),
        *(tiles.block_q, tiles.block_kv, head_dim, causal),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dq, dk and dv."""
    batch, seqlen, heads, head_dim = q.shape
    sizes, scale = (seqlen, heads, heads * head_dim), 1 / math.sqrt(head_dim)
    delta = torch.empty_like(lse)
    triton_kernels.attention_delta[(triton.cdiv(seqlen, DELTA_ROWS), batch * heads)](
        *(out, dout, delta, *sizes, DELTA_ROWS, head_dim)
    )
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    triton_kernels.attention_backward[(triton.cdiv(seqlen, tiles.block_kv), batch * heads)](
        *(q, k, v, dout, lse, delta, dq, dk, dv, scale, LOG2_E * scale, *sizes),
        *(tiles.block_q, tiles.block_kv, head_dim, causal),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return dq.to(q.dtype), dk, dv
