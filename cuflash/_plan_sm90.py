"""Tiles and constants of Hopper's kernels."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash import _params
from cuflash._problem import Problem
from cuflash._traits import (
    BackwardPlan,
    ForwardPlan,
    Tiling,
    Traits,
    kernel_of,
    smem_limit,
)

_HEAD_DIMS = (64, 96, 128, 192, 256)
# Hopper: from here on the products take so long that warpgroups need no turns to hide the softmax.
_MAX_HEAD_DIM_OF_PING_PONG = 128
_STAGES = 2
_WARPGROUP_ROWS = 64
_BACKWARD_WARPS = 8  # of the backward
# Up to here the registers of a warpgroup hold dk and dv of 64 keys; above, two divide them.
_MAX_ROWS_DIM = 128


def forward_plan(traits: Traits) -> ForwardPlan:
    """The first of the preferred tiles that fit."""
    candidates = _FORWARD_TILES
    if traits.extras.by_pair:
        candidates = _FORWARD_TILES_BY_PAIR
    tiles = next(tiles for tiles in candidates if tiles.serves(traits))
    out_over_q = not tiles.has_room_for_out(traits)
    smem_bytes = tiles.smem_bytes(traits, out_over_q)
    constants = {
        **_constants(traits),
        "CONSUMERS": tiles.consumers,
        "BLOCK_KV": tiles.block_kv,
        "PING_PONG": int(padded(traits.head_dim_v) <= _MAX_HEAD_DIM_OF_PING_PONG),
        "OUT_OVER_Q": int(out_over_q),
        "SMEM_BYTES": smem_bytes,
        "PARAMS_BYTES": traits.params_bytes(_params.FORWARD_SM90_BYTES),
    }
    warps = 4 * (1 + tiles.consumers)
    kernel = kernel_of(
        "flash_fwd_sm90.cu", "flash_fwd", "sm_90a", constants, warps, smem_bytes, traits
    )
    return ForwardPlan("sm90", kernel, Tiling(tiles.block_q, tiles.block_kv, pack_group=False))


def backward_plan(traits: Traits, deterministic: bool) -> BackwardPlan:
    """As many keys and queries as leave the accumulators in registers."""
    head_dim, head_dim_v = (_padded_to_64(x) for x in (traits.head_dim, traits.head_dim_v))
    wide = max(head_dim, head_dim_v) > _MAX_ROWS_DIM
    few_registers = max(head_dim, head_dim_v) > 64 or traits.softcap or traits.extras.by_pair
    block_q, block_kv = (64 if few_registers else 128), (64 if wide else 128)
    shared = {
        **traits.parameter_constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "VEC_BYTES": traits.vec_bytes,
        "BLOCK_Q": block_q,
        "WARPS": _BACKWARD_WARPS,
        "QUERY_WARPS": block_q // 16,
        "SUM_FLOATS": 4,
        "PARAMS_BYTES": traits.params_bytes(_params.BACKWARD_BYTES),
    }
    both = head_dim + head_dim_v
    scores = (4 if wide else 2) * block_kv * block_q  # two buffers of ds, and of p if wide
    tiles = block_kv * both + _STAGES * block_q * (both + 4) + scores
    smem_bytes = 2 * tiles + 8 * (2 + 4 * _STAGES) + 8  # mbarriers, the ticket
    main = {
        **shared,
        **traits.extras.constants(),
        "SOFTCAP": int(traits.softcap),
        "SCALE_FIRST": int(traits.scale_first),
        "DETERMINISTIC": int(deterministic),
        "SMEM_BYTES": smem_bytes,
        "MAPPED_PARAMS_BYTES": traits.params_bytes(_params.BACKWARD_SM90_BYTES),
    }
    dq_bytes = 2 * block_q * head_dim
    post = {**shared, "SMEM_BYTES": dq_bytes}
    warps, arch = _BACKWARD_WARPS, "sm_90a"
    source = "flash_bwd_wide_sm90.cu" if wide else "flash_bwd_sm90.cu"
    return BackwardPlan(
        backend="sm90",
        prep=kernel_of("flash_bwd_prep.cu", "flash_bwd_prep", arch, shared, warps, 0),
        main=kernel_of(source, "flash_bwd", arch, main, 4 + warps, smem_bytes, traits),
        post=kernel_of("flash_bwd_post.cu", "flash_bwd_post", arch, post, warps, dq_bytes),
        tiling=Tiling(block_q, block_kv, pack_group=False),
        head_dim=head_dim,
        panels=_backward_panels(head_dim, head_dim_v, block_q, wide),
    )


def padded(head_dim: int) -> int:
    """As `padded`, for Hopper's kernels."""
    return next(size for size in _HEAD_DIMS if head_dim <= size)


def panels(traits: Traits) -> tuple[int, int]:
    """Columns of a panel (panels.cuh) of q and k, of v and out."""
    sizes = (padded(traits.head_dim), padded(traits.head_dim_v))
    return tuple(64 if size % 64 == 0 else 32 for size in sizes)


def few_queries(problem: Problem) -> bool:
    """Whether one warpgroup would hold all queries of a head: packed groups serve these better."""
    return problem.seqlen_q <= _WARPGROUP_ROWS


def _constants(traits: Traits) -> dict[str, int]:
    """The -D constants that Hopper's kernels share."""
    return {
        **traits.extras.constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": padded(traits.head_dim),
        "HEAD_DIM_V": padded(traits.head_dim_v),
        "SOFTCAP": int(traits.softcap),
        "SCALE_FIRST": int(traits.scale_first),
    }


def _backward_panels(
    head_dim: int, head_dim_v: int, block_q: int, wide: bool
) -> tuple[int, int, int]:
    """Each warpgroup reads whole panels for its part of dq and, if wide, of dk and dv."""
    half, half_v = _panel(head_dim // 2), _panel(head_dim_v // 2)
    if wide:
        return half, half, half_v
    return 64, (half if block_q == _WARPGROUP_ROWS else 64), 64


def _panel(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32


def _padded_to_64(head_dim: int) -> int:
    """As `padded`, for Hopper's backward."""
    return -(-head_dim // 64) * 64


@dataclass(frozen=True, slots=True)
class _ForwardTiles:
    consumers: int  # warpgroups of 64 rows
    block_kv: int
    max_head_dim: int
    max_head_dim_v: int

    @property
    def block_q(self) -> int:
        return _WARPGROUP_ROWS * self.consumers

    def serves(self, traits: Traits) -> bool:
        fits = self.smem_bytes(traits, out_over_q=True) <= smem_limit(90)
        few_columns = traits.head_dim <= self.max_head_dim
        return fits and few_columns and traits.head_dim_v <= self.max_head_dim_v

    def has_room_for_out(self, traits: Traits) -> bool:
        return self.smem_bytes(traits, out_over_q=False) <= smem_limit(90)

    def smem_bytes(self, traits: Traits, out_over_q: bool) -> int:
        """q, the stages of k and v, out and the barriers, as flash_fwd_sm90.cu lays them out."""
        head_dim, head_dim_v = padded(traits.head_dim), padded(traits.head_dim_v)
        per_row = max(head_dim, head_dim_v) if out_over_q else head_dim + head_dim_v
        stages = _STAGES * self.block_kv * (head_dim + head_dim_v)
        barriers = 2 * self.consumers + 4 * _STAGES
        return 2 * (self.block_q * per_row + stages) + 8 * barriers


# The registers of a consumer hold the output, the scores and the probabilities.
_FORWARD_TILES = (
    _ForwardTiles(consumers=3, block_kv=112, max_head_dim=64, max_head_dim_v=64),
    _ForwardTiles(consumers=2, block_kv=128, max_head_dim=256, max_head_dim_v=128),
    _ForwardTiles(consumers=2, block_kv=112, max_head_dim=256, max_head_dim_v=192),
    _ForwardTiles(consumers=2, block_kv=80, max_head_dim=256, max_head_dim_v=256),
)
_FORWARD_TILES_BY_PAIR = (
    _ForwardTiles(consumers=2, block_kv=96, max_head_dim=256, max_head_dim_v=128),
    _ForwardTiles(consumers=2, block_kv=80, max_head_dim=256, max_head_dim_v=192),
    _ForwardTiles(consumers=2, block_kv=64, max_head_dim=256, max_head_dim_v=256),
)
