"""Tiles and constants of Hopper's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """With the tiles that are chosen for these traits."""
    return forward_plan_of(forward_tiles(traits), traits)


def backward_plan(traits: Traits, deterministic: bool) -> BackwardPlan:
    """As `forward_plan`."""
    return backward_plan_of(backward_tiles(traits), traits, deterministic)


def forward_tiles(traits: Traits) -> ForwardTiles:
    """The first of the preferred ones that fit."""
    if traits.dense_tiles:
        return DENSE_TILES
    ping_pong = padded(traits.head_dim_v) <= _MAX_HEAD_DIM_OF_PING_PONG
    extras, preferred = traits.extras, (_FORWARD_SOFTCAPPED if traits.softcap else _FORWARD)
    if extras.bias_bytes or extras.program.has_score_mod:
        preferred = _FORWARD_PER_SCORE
    elif extras.by_pair:
        preferred = _FORWARD_BY_PAIR
    return next(
        replace(tiles, ping_pong=ping_pong)
        for max_head_dim, max_head_dim_v, tiles in preferred
        if traits.head_dim <= max_head_dim
        and traits.head_dim_v <= max_head_dim_v
        and tiles.fits(traits)
    )


def backward_tiles(traits: Traits) -> BackwardTiles:
    """As many keys and queries as leave the accumulators in registers."""
    head_dim = max(_padded_to_64(x) for x in (traits.head_dim, traits.head_dim_v))
    few_registers = head_dim > 64 or traits.softcap or traits.extras.by_pair
    return BackwardTiles(
        block_q=64 if few_registers else 128,
        block_kv=64 if head_dim > _MAX_ROWS_DIM else 128,
    )


def forward_plan_of(tiles: ForwardTiles, traits: Traits) -> ForwardPlan:
    """With these tiles, which fit."""
    out_over_q = not tiles.has_room_for_out(traits)
    smem_bytes = tiles.smem_bytes(traits, out_over_q)
    constants = {
        **_constants(traits),
        "CONSUMERS": tiles.consumers,
        "BLOCK_KV": tiles.block_kv,
        "PING_PONG": int(tiles.ping_pong),
        "OUT_OVER_Q": int(out_over_q),
        "SMEM_BYTES": smem_bytes,
        "PARAMS_BYTES": _params.mapped_bytes(
            _params.FORWARD_MAPS, traits.params_bytes(_params.FORWARD_BYTES)
        ),
    }
    if tiles.stages != _STAGES:  # the kernel's own default
        constants["STAGES"] = tiles.stages
    warps = 4 * (1 + tiles.consumers)
    kernel = kernel_of(
        "flash_fwd_sm90.cu", "flash_fwd", "sm_90a", constants, warps, smem_bytes, traits
    )
    return ForwardPlan("sm90", kernel, Tiling(tiles.block_q, tiles.block_kv, pack_group=False))


def backward_plan_of(tiles: BackwardTiles, traits: Traits, deterministic: bool) -> BackwardPlan:
    """As `forward_plan_of`."""
    head_dim, head_dim_v = (_padded_to_64(x) for x in (traits.head_dim, traits.head_dim_v))
    shared = {
        **traits.parameter_constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "VEC_BYTES": traits.vec_bytes,
        "BLOCK_Q": tiles.block_q,
        "WARPS": _BACKWARD_WARPS,
        "QUERY_WARPS": tiles.block_q // 16,
        "SUM_FLOATS": 4,
        "PARAMS_BYTES": traits.params_bytes(_params.BACKWARD_BYTES),
    }
    smem_bytes = tiles.smem_bytes(traits)
    main = {
        **shared,
        **traits.extras.constants(),
        "SOFTCAP": int(traits.softcap),
        "SCALE_FIRST": int(traits.scale_first),
        "DETERMINISTIC": int(deterministic),
        "SMEM_BYTES": smem_bytes,
        "MAPPED_PARAMS_BYTES": _params.mapped_bytes(
            _params.BACKWARD_MAPS, traits.params_bytes(_params.BACKWARD_BYTES)
        ),
    }
    dq_bytes = 2 * tiles.block_q * head_dim
    post = {**shared, "SMEM_BYTES": dq_bytes}
    warps, arch = _BACKWARD_WARPS, "sm_90a"
    source = "flash_bwd_wide_sm90.cu" if tiles.wide else "flash_bwd_sm90.cu"
    return BackwardPlan(
        backend="sm90",
        prep=kernel_of("flash_bwd_prep.cu", "flash_bwd_prep", arch, shared, warps, 0),
        main=kernel_of(source, "flash_bwd", arch, main, 4 + warps, smem_bytes, traits),
        post=kernel_of("flash_bwd_post.cu", "flash_bwd_post", arch, post, warps, dq_bytes),
        tiling=Tiling(tiles.block_q, tiles.block_kv, pack_group=False),
        head_dim=head_dim,
        panels=_backward_panels(head_dim, head_dim_v, tiles),
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


def dense_tiles_pay(problem: Problem) -> bool:
    """Whether DENSE_TILES serve it, in fewer instructions than the tiles of all others."""
    if not problem.is_dense or problem.softcap > 0 or problem.scale <= 0:
        return False
    return fewer_by_dense_tiles(problem.head_dim, problem.head_dim_v, problem.seqlen_k)


def fewer_by_dense_tiles(head_dim: int, head_dim_v: int, keys: int) -> bool:
    """The same of queries that see so many keys, by head sizes."""
    if not padded(head_dim) == padded(head_dim_v) == _HEAD_DIM_OF_DENSE_TILES:
        return False
    return min(SLOTS, key=lambda block_kv: _slots(keys, block_kv)) == DENSE_TILES.block_kv


def _slots(keys: int, block_kv: int) -> int:
    """Of all tiles of the keys; one that is partly visible takes nearly as many as two."""
    return SLOTS[block_kv] * (-(-keys // block_kv) + (keys % block_kv > 0))


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


def _backward_panels(head_dim: int, head_dim_v: int, tiles: BackwardTiles) -> tuple[int, int, int]:
    """Each warpgroup reads whole panels for its part of dq and, if wide, of dk and dv."""
    half, half_v = _panel(head_dim // 2), _panel(head_dim_v // 2)
    if tiles.wide:
        return half, half, half_v
    return 64, (half if tiles.block_q == _WARPGROUP_ROWS else 64), 64


def _panel(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32


def _padded_to_64(head_dim: int) -> int:
    """As `padded`, for Hopper's backward."""
    return -(-head_dim // 64) * 64


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """What may be chosen of the forward kernel."""

    consumers: int  # warpgroups of 64 rows
    block_kv: int
    stages: int = _STAGES  # of k and of v
    ping_pong: bool = True  # the consumers take turns

    @property
    def block_q(self) -> int:
        return _WARPGROUP_ROWS * self.consumers

    def fits(self, traits: Traits) -> bool:
        """Whether shared memory holds them."""
        return self.smem_bytes(traits, out_over_q=True) <= smem_limit(90)

    def has_room_for_out(self, traits: Traits) -> bool:
        """Whether it holds the output beside q."""
        return self.smem_bytes(traits, out_over_q=False) <= smem_limit(90)

    def smem_bytes(self, traits: Traits, out_over_q: bool) -> int:
        """q, the stages of k and v, out and the barriers, as flash_fwd_sm90.cu lays them out."""
        head_dim, head_dim_v = padded(traits.head_dim), padded(traits.head_dim_v)
        per_row = max(head_dim, head_dim_v) if out_over_q else head_dim + head_dim_v
        stages = self.stages * self.block_kv * (head_dim + head_dim_v)
        barriers = 2 * self.consumers + 4 * self.stages
        return 2 * (self.block_q * per_row + stages) + 8 * barriers


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """What may be chosen of the backward kernels: (64, 128) and (128, 128), or (64, 64) if wide."""

    block_q: int
    block_kv: int

    @property
    def wide(self) -> bool:
        """Two warpgroups divide the columns of dk and dv, not the keys."""
        return self.block_kv == _WARPGROUP_ROWS

    def fits(self, traits: Traits) -> bool:
        """As ForwardTiles."""
        return self.smem_bytes(traits) <= smem_limit(90)

    def smem_bytes(self, traits: Traits) -> int:
        """As backward_sm90.cuh lays it out."""
        both = _padded_to_64(traits.head_dim) + _padded_to_64(traits.head_dim_v)
        # Two buffers of ds, and of p if wide; four floats of each query row.
        scores = (4 if self.wide else 2) * self.block_kv * self.block_q
        elements = self.block_kv * both + _STAGES * self.block_q * (both + 8) + scores
        return 2 * elements + 8 * (2 + 4 * _STAGES) + 8  # mbarriers, the ticket


# (D at most, Dv at most, tiles), in order of preference. The registers of a consumer hold the
# output, the scores and the probabilities.
_FORWARD = (
    (64, 64, ForwardTiles(consumers=3, block_kv=128)),
    (256, 128, ForwardTiles(consumers=2, block_kv=128)),
    (256, 192, ForwardTiles(consumers=2, block_kv=112)),
    (256, 256, ForwardTiles(consumers=2, block_kv=80)),
)
_FORWARD_SOFTCAPPED = ((64, 64, ForwardTiles(consumers=3, block_kv=112)), *_FORWARD[1:])
# FlashAttention-3's where queries see all keys; elsewhere more of it would be multiplied in vain.
_HEAD_DIM_OF_DENSE_TILES = 128
DENSE_TILES = ForwardTiles(consumers=2, block_kv=176)
# There, by a tile's keys: the instructions that a warp issues for one that is fully visible.
SLOTS = {128: 452, 176: 569}
# With a mask, ALiBi or dropout, which need registers for places; three consumers have none.
_FORWARD_BY_PAIR = (
    (256, 128, ForwardTiles(consumers=2, block_kv=128)),
    (256, 192, ForwardTiles(consumers=2, block_kv=96)),
    (256, 256, ForwardTiles(consumers=2, block_kv=64)),
)
# With a bias or a score_mod, which need them for an address or a function of each score.
_FORWARD_PER_SCORE = (
    (256, 128, ForwardTiles(consumers=2, block_kv=96)),
    (256, 192, ForwardTiles(consumers=2, block_kv=80)),
    (256, 256, ForwardTiles(consumers=2, block_kv=64)),
)
