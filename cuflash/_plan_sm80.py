"""Tiles and constants of the kernels for every GPU from Ampere on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuflash import _params
from cuflash._traits import (
    FEW_ROWS,
    KIB,
    BackwardPlan,
    ForwardPlan,
    Tiling,
    Traits,
    arch_of,
    kernel_of,
    smem_limit,
)

# Beyond this many accumulators a thread of the backward spills (NVRTC 13.5, 2026-11).
_MAX_BACKWARD_ACCUMULATORS = 192
_MAX_ACCUMULATORS_BY_PAIR = 144  # likewise, where scores depend on their place
# A warp with 32 rows and a quarter of 256 columns of dq spills; 16 rows and a half do not.
_MAX_HEAD_DIM_OF_TWO_QUERY_WARPS = 128
# Two warps for each of an SM's four schedulers, so that one computes while the other waits.
_BUSY_WARPS = 8


def forward_plan(traits: Traits, capability: int) -> ForwardPlan:
    """With the tiles that are chosen for these traits and this GPU."""
    return forward_plan_of(forward_tiles(traits, capability), traits, capability)


def backward_plan(traits: Traits, capability: int, deterministic: bool) -> BackwardPlan:
    """As `forward_plan`."""
    tiles = backward_tiles(traits, capability)
    return backward_plan_of(tiles, traits, capability, deterministic)


def forward_tiles(traits: Traits, capability: int) -> ForwardTiles:
    """The first tiles of the preferred ones that keep the GPU busy, else the first that fit."""
    candidates = _FORWARD_BY_PAIR if traits.extras.by_pair else _FORWARD
    candidates = (_FEW_ROWS,) if traits.few_rows else candidates
    head_dim = max(traits.head_dim, traits.head_dim_v)
    fitting = [
        tiles
        for max_head_dim, tiles in candidates
        if head_dim <= max_head_dim and tiles.smem_bytes(traits) <= smem_limit(capability)
    ]
    busy = [tiles for tiles in fitting if tiles.warps_per_sm(traits, capability) >= _BUSY_WARPS]
    return (busy or fitting)[0]


def backward_tiles(traits: Traits, capability: int) -> BackwardTiles:
    """The first of the preferred ones that fit and leave the accumulators in registers."""
    by_pair = traits.extras.by_pair
    most = _MAX_ACCUMULATORS_BY_PAIR if by_pair else _MAX_BACKWARD_ACCUMULATORS
    candidates = (_with_query_warps(tiles, traits.head_dim) for tiles in _BACKWARD)
    return next(
        tiles
        for tiles in candidates
        if tiles.accumulators(traits) <= most
        and 16 * tiles.query_warps <= tiles.block_q
        and tiles.smem_bytes(traits) <= smem_limit(capability)
    )


def forward_plan_of(tiles: ForwardTiles, traits: Traits, capability: int) -> ForwardPlan:
    """With these tiles, which fit."""
    smem_bytes = tiles.smem_bytes(traits)
    constants = {
        **traits.constants(),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "WARPS": tiles.warps,
        "SMEM_BYTES": smem_bytes,
        "PARAMS_BYTES": traits.params_bytes(_params.FORWARD_BYTES),
    }
    arch = arch_of(capability)
    kernel = kernel_of(
        "flash_fwd_sm80.cu", "flash_fwd", arch, constants, tiles.warps, smem_bytes, traits
    )
    return ForwardPlan("sm80", kernel, Tiling(tiles.block_q, tiles.block_kv, traits.pack_group))


def backward_plan_of(
    tiles: BackwardTiles, traits: Traits, capability: int, deterministic: bool
) -> BackwardPlan:
    """As `forward_plan_of`."""
    arch = arch_of(capability)
    shared = {
        **traits.parameter_constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": traits.head_dim,
        "HEAD_DIM_V": traits.head_dim_v,
        "VEC_BYTES": traits.vec_bytes,
        "PACK_GROUP": int(traits.pack_group),
        "BLOCK_Q": tiles.block_q,
        "WARPS": tiles.warps,
        "QUERY_WARPS": tiles.query_warps,
        "PARAMS_BYTES": traits.params_bytes(_params.BACKWARD_BYTES),
    }
    smem_bytes = tiles.smem_bytes(traits)
    main = {
        **traits.constants(),
        **shared,
        "BLOCK_KV": tiles.block_kv,
        "STAGES": tiles.stages,
        "SCORE_WARPS": tiles.score_warps,
        "KEY_WARPS": tiles.key_warps,
        "DETERMINISTIC": int(deterministic),
        "SMEM_BYTES": smem_bytes,
    }
    dq_bytes = 2 * tiles.block_q * traits.head_dim
    post = {**shared, "SMEM_BYTES": dq_bytes}
    return BackwardPlan(
        backend="sm80",
        prep=kernel_of("flash_bwd_prep.cu", "flash_bwd_prep", arch, shared, tiles.warps, 0),
        main=kernel_of(
            "flash_bwd_sm80.cu", "flash_bwd", arch, main, tiles.warps, smem_bytes, traits
        ),
        post=kernel_of("flash_bwd_post.cu", "flash_bwd_post", arch, post, tiles.warps, dq_bytes),
        tiling=Tiling(tiles.block_q, tiles.block_kv, traits.pack_group),
        head_dim=traits.head_dim,
    )


def _with_query_warps(tiles: BackwardTiles, head_dim: int) -> BackwardTiles:
    """Two where every warp then has a multiple of 16 columns of dq, and registers for them."""
    few_columns = head_dim <= _MAX_HEAD_DIM_OF_TWO_QUERY_WARPS or tiles.block_q < 64
    columns_divide = head_dim % (16 * tiles.warps // 2) == 0
    return replace(tiles, query_warps=2 if few_columns and columns_divide else 4)


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """What may be chosen of the forward kernel."""

    block_q: int
    block_kv: int
    warps: int

    def smem_bytes(self, traits: Traits) -> int:
        """q, k and v, as flash_fwd_sm80.cu lays them out; the output takes q's place."""
        both = traits.head_dim + traits.head_dim_v
        operands = 2 * (self.block_q * traits.head_dim + self.block_kv * both)
        return max(operands, 2 * self.block_q * traits.head_dim_v)

    def warps_per_sm(self, traits: Traits, capability: int) -> int:
        """As far as shared memory limits them; each block takes 1 KiB more than it asks for."""
        blocks = (smem_limit(capability) + KIB) // (self.smem_bytes(traits) + KIB)
        return blocks * self.warps


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """What may be chosen of the backward kernel."""

    block_q: int
    block_kv: int
    warps: int
    stages: int  # of q and dout
    score_warps: int  # that divide the rows of s,
    key_warps: int  # the keys of dk and dv,
    query_warps: int = 2  # and the rows of dq

    def accumulators(self, traits: Traits) -> int:
        """Of a thread: dk and dv, s and dp."""
        both = traits.head_dim + traits.head_dim_v
        return self.block_kv * (both + 2 * self.block_q) // (32 * self.warps)

    def smem_bytes(self, traits: Traits) -> int:
        """k, v, the stages of q, dout and their statistics, p and ds, as flash_bwd_sm80.cu does."""
        both = traits.head_dim + traits.head_dim_v
        stages = self.stages * self.block_q * (both + 4)
        return 2 * (self.block_kv * both + stages + 2 * self.block_q * self.block_kv)


# (D and Dv at most, tiles), in order of preference. Two 16-row tiles per warp (128 rows, 4 warps)
# read a key fragment once for both; above a head size of 128 the output needs the registers of
# eight warps.
_FORWARD = (
    (128, ForwardTiles(block_q=128, block_kv=64, warps=4)),
    (128, ForwardTiles(block_q=128, block_kv=32, warps=4)),
    (256, ForwardTiles(block_q=128, block_kv=64, warps=8)),
    (256, ForwardTiles(block_q=64, block_kv=64, warps=4)),
)
_FEW_ROWS = (256, ForwardTiles(block_q=FEW_ROWS, block_kv=64, warps=4))
# Where scores depend on their place, finding it takes registers.
_FORWARD_BY_PAIR = (
    (256, ForwardTiles(block_q=128, block_kv=64, warps=8)),
    (256, ForwardTiles(block_q=64, block_kv=64, warps=4)),
)
_BACKWARD = (
    BackwardTiles(64, 128, warps=8, stages=2, score_warps=2, key_warps=4),
    BackwardTiles(64, 128, warps=8, stages=1, score_warps=2, key_warps=4),
    BackwardTiles(64, 64, warps=8, stages=2, score_warps=2, key_warps=4),
    BackwardTiles(64, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    BackwardTiles(32, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    BackwardTiles(32, 32, warps=4, stages=1, score_warps=2, key_warps=2),
)
