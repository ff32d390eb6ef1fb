"""Tiles and constants of the kernels for every GPU from Ampere on."""

from __future__ import annotations

from dataclasses import dataclass

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
    """The first tiles of the preferred ones that keep the GPU busy, else the first that fit."""
    arch = arch_of(capability)
    candidates = _FORWARD_TILES_BY_PAIR if traits.extras.by_pair else _FORWARD_TILES
    candidates = (_FEW_ROWS,) if traits.few_rows else candidates
    fitting = [
        tiles
        for tiles in candidates
        if tiles.serves(traits) and tiles.smem_bytes(traits) <= smem_limit(capability)
    ]
    busy = [tiles for tiles in fitting if tiles.warps_per_sm(traits, capability) >= _BUSY_WARPS]
    tiles = (busy or fitting)[0]
    smem_bytes = tiles.smem_bytes(traits)
    constants = {
        **traits.constants(),
        "BLOCK_Q": tiles.block_q,
        "BLOCK_KV": tiles.block_kv,
        "WARPS": tiles.warps,
        "SMEM_BYTES": smem_bytes,
        "PARAMS_BYTES": traits.params_bytes(_params.FORWARD_BYTES),
    }
    kernel = kernel_of(
        "flash_fwd_sm80.cu", "flash_fwd", arch, constants, tiles.warps, smem_bytes, traits
    )
    return ForwardPlan("sm80", kernel, Tiling(tiles.block_q, tiles.block_kv, traits.pack_group))


def backward_plan(traits: Traits, capability: int, deterministic: bool) -> BackwardPlan:
    """As `forward_plan`; the tiles must also leave the accumulators in registers."""
    arch = arch_of(capability)
    tiles = next(
        tiles
        for tiles in _BACKWARD_TILES
        if tiles.serves(traits) and tiles.smem_bytes(traits) <= smem_limit(capability)
    )
    shared = {
        **traits.parameter_constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": traits.head_dim,
        "HEAD_DIM_V": traits.head_dim_v,
        "VEC_BYTES": traits.vec_bytes,
        "PACK_GROUP": int(traits.pack_group),
        "BLOCK_Q": tiles.block_q,
        "WARPS": tiles.warps,
        "QUERY_WARPS": tiles.query_warps(traits.head_dim),
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


@dataclass(frozen=True, slots=True)
class _ForwardTiles:
    block_q: int
    block_kv: int
    warps: int
    max_head_dim: int

    def serves(self, traits: Traits) -> bool:
        return max(traits.head_dim, traits.head_dim_v) <= self.max_head_dim

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
class _BackwardTiles:
    block_q: int
    block_kv: int
    warps: int
    stages: int
    score_warps: int  # that divide the rows of s, the keys of dk and dv, the rows of dq
    key_warps: int

    def query_warps(self, head_dim: int) -> int:
        """Two where every warp then has a multiple of 16 columns of dq, and registers for them."""
        few_columns = head_dim <= _MAX_HEAD_DIM_OF_TWO_QUERY_WARPS or self.block_q < 64
        return 2 if few_columns and self._columns_divide(head_dim) else 4

    def serves(self, traits: Traits) -> bool:
        threads = 32 * self.warps
        both = traits.head_dim + traits.head_dim_v
        accumulators = self.block_kv * (both + 2 * self.block_q) // threads
        by_pair = traits.extras.by_pair
        most = _MAX_ACCUMULATORS_BY_PAIR if by_pair else _MAX_BACKWARD_ACCUMULATORS
        query_rows = 16 * self.query_warps(traits.head_dim)
        return accumulators <= most and query_rows <= self.block_q

    def _columns_divide(self, head_dim: int) -> bool:
        return head_dim % (16 * self.warps // 2) == 0

    def smem_bytes(self, traits: Traits) -> int:
        """k, v, the stages of q, dout and their statistics, p and ds, as flash_bwd_sm80.cu does."""
        both = traits.head_dim + traits.head_dim_v
        stages = self.stages * self.block_q * (both + 4)
        return 2 * (self.block_kv * both + stages + 2 * self.block_q * self.block_kv)


# In order of preference. Two 16-row tiles per warp (128 rows, 4 warps) read a key fragment once for
# both; above a head size of 128 the output needs the registers of eight warps.
_FORWARD_TILES = (
    _ForwardTiles(block_q=128, block_kv=64, warps=4, max_head_dim=128),
    _ForwardTiles(block_q=128, block_kv=32, warps=4, max_head_dim=128),
    _ForwardTiles(block_q=128, block_kv=64, warps=8, max_head_dim=256),
    _ForwardTiles(block_q=64, block_kv=64, warps=4, max_head_dim=256),
)
_FEW_ROWS = _ForwardTiles(block_q=FEW_ROWS, block_kv=64, warps=4, max_head_dim=256)
# Where scores depend on their place, finding it takes registers.
_FORWARD_TILES_BY_PAIR = (
    _ForwardTiles(block_q=128, block_kv=64, warps=8, max_head_dim=256),
    _ForwardTiles(block_q=64, block_kv=64, warps=4, max_head_dim=256),
)
_BACKWARD_TILES = (
    _BackwardTiles(64, 128, warps=8, stages=2, score_warps=2, key_warps=4),
    _BackwardTiles(64, 128, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(64, 64, warps=8, stages=2, score_warps=2, key_warps=4),
    _BackwardTiles(64, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(32, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(32, 32, warps=4, stages=1, score_warps=2, key_warps=2),
)
