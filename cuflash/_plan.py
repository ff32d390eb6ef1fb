"""Every heuristic and tile size: (problem, device) → plan. Needs neither CuPy nor a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

from cuflash import _params
from cuflash._problem import Problem
from cuflash._program import ATTACHMENT_BYTES, Program, program

KIB = 1024
# Shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities).
_SMEM_LIMIT = {80: 163 * KIB, 87: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB, 103: 227 * KIB}
_SMALL_SMEM_LIMIT = 99 * KIB  # 8.6, 8.9, 12.x
# Beyond this many accumulators a thread of the backward spills (NVRTC 13.5, 2026-11).
_MAX_BACKWARD_ACCUMULATORS = 192
_MAX_ACCUMULATORS_BY_PAIR = 144  # likewise, where scores depend on their place
# A warp with 32 rows and a quarter of 256 columns of dq spills; 16 rows and a half do not.
_MAX_HEAD_DIM_OF_TWO_QUERY_WARPS = 128
# Two warps for each of an SM's four schedulers, so that one computes while the other waits.
_BUSY_WARPS = 8
_HEAD_DIM_STEP = 32
_HEAD_DIMS_SM90 = (64, 96, 128, 192, 256)
# Hopper: from here on the products take so long that warpgroups need no turns to hide the softmax.
_MAX_HEAD_DIM_OF_PING_PONG = 128
_STAGES_SM90 = 2
_WARPGROUP_ROWS = 64
_MASK_WARPS = 4
_PACKED_WARPS = 8
_BIAS_WARPS = 4
_SINK_WARPS = 8
_CONSUMER_WARPS_SM90 = 8  # of the backward
# Up to here the registers of a warpgroup hold dk and dv of 64 keys; above, two divide them.
_MAX_ROWS_DIM_SM90 = 128
VEC_BYTES = (16, 8, 4, 2)
TMA_BYTES = 16  # that addresses and strides are multiples of


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch depends on of a GPU."""

    capability: int  # 10 * major + minor
    l2_bytes: int
    sms: int

    @property
    def arch(self) -> str:
        """NVRTC's name for it, as sm_80."""
        return f"sm_{self.capability}"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One compiled configuration: a source file, its -D constants and what a launch of it needs."""

    source: str  # file in kernels_cu
    entry: str
    arch: str
    constants: tuple[tuple[str, int], ...]
    threads: int
    smem_bytes: int
    generated: str = ""  # the text of generated.cuh; empty: as in kernels_cu


@dataclass(frozen=True, slots=True)
class Extras:
    """What a problem has beside a band of keys and a scale: constants that are 0 without it."""

    program: Program = Program()
    alibi: bool = False
    bias_bytes: int = 0  # of an element
    sinks: bool = False
    dropout: bool = False
    packed: bool = False

    @classmethod
    def of(cls, problem: Problem) -> Extras:
        """Those of a problem; the same object for all that have none."""
        if problem.is_plain:
            return NO_EXTRAS
        return cls(
            program=program(problem.mask, problem.score_mod),
            alibi=problem.alibi_slopes is not None,
            bias_bytes=0 if problem.bias is None else problem.bias.itemsize,
            sinks=problem.sinks is not None,
            dropout=problem.dropout > 0,
            packed=problem.packing is not None,
        )

    def constants(self) -> dict[str, int]:
        """The -D constants of those that there are."""
        constants = {
            "ATTACHMENTS": self.program.attachments,
            "ALIBI": int(self.alibi),
            "BIAS_BYTES": self.bias_bytes,
            "SINKS": int(self.sinks),
            "DROPOUT": int(self.dropout),
            "PACKED": int(self.packed),
        }
        return {name: value for name, value in constants.items() if value}

    @property
    def by_pair(self) -> bool:
        """Whether scores or probabilities depend on their place, which takes registers."""
        terms = self.alibi or self.bias_bytes or self.program.has_score_mod
        return bool(terms or self.dropout or self.program.has_mask)


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class Traits:
    """What of a problem selects its kernels."""

    dtype: str
    head_dim: int  # padded
    head_dim_v: int  # padded
    vec_bytes: int  # widest access that every array's alignment allows
    pack_group: bool
    softcap: bool
    scale_first: bool
    few_rows: bool
    tma: bool = False  # what Hopper's kernels need is given
    extras: Extras = NO_EXTRAS

    @classmethod
    def of(cls, problem: Problem, alignment: int, tma: bool = False) -> Traits:
        """`alignment`: of every row of every array, in bytes."""
        return cls(
            dtype=problem.dtype.name,
            head_dim=padded(problem.head_dim),
            head_dim_v=padded(problem.head_dim_v),
            vec_bytes=vec_bytes(alignment),
            pack_group=problem.group > 1,
            softcap=problem.softcap > 0,
            scale_first=problem.scale <= 0 and not problem.softcap,
            few_rows=problem.seqlen_q * problem.group <= _FEW_ROWS.block_q,
            tma=tma,
            extras=Extras.of(problem),
        )

    def constants(self) -> dict[str, int]:
        """The -D constants that every kernel reads."""
        return {
            **self.extras.constants(),
            "BFLOAT16": int(self.dtype == "bfloat16"),
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "VEC_BYTES": self.vec_bytes,
            "PACK_GROUP": int(self.pack_group),
            "SOFTCAP": int(self.softcap),
            "SCALE_FIRST": int(self.scale_first),
        }

    def parameter_constants(self) -> dict[str, int]:
        """The -D constants of kernels that only read their parameter."""
        constants = self.extras.constants()
        return {name: constants[name] for name in ("ATTACHMENTS", "PACKED") if name in constants}

    def params_bytes(self, without_attachments: int) -> int:
        """Of a kernel's parameter."""
        attached = ATTACHMENT_BYTES * self.extras.program.attachments
        return without_attachments + attached


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts the matrix of scores."""

    block_q: int
    block_kv: int
    pack_group: bool  # rows are those of a key head's whole group


@dataclass(frozen=True, slots=True)
class ForwardPlan:
    """One kernel. sm80: one block per (query tile, key head, batch entry); sm90: as many as fit."""

    backend: str
    kernel: Kernel
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """Three kernels in a row: prep and post per query tile, main per key tile.

    sm80: the query tiles are those of key heads, whose groups are packed; sm90: of query heads.
    """

    backend: str
    prep: Kernel
    main: Kernel
    post: Kernel
    tiling: Tiling
    head_dim: int  # padded, of a row of dq's sums
    panels: tuple[int, int, int] = (0, 0, 0)  # sm90: columns of one of q, of k, of v and dout


@lru_cache(maxsize=1024)
def forward_plan(traits: Traits, capability: int) -> ForwardPlan:
    """The first tiles of the preferred ones that keep the GPU busy, else the first that fit."""
    if backend_of(capability, traits.tma) == "sm90":
        return _forward_plan_sm90(traits)
    arch = _arch(capability)
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
    kernel = _kernel(
        "flash_fwd_sm80.cu", "flash_fwd", arch, constants, tiles.warps, smem_bytes, traits
    )
    return ForwardPlan("sm80", kernel, Tiling(tiles.block_q, tiles.block_kv, traits.pack_group))


def _forward_plan_sm90(traits: Traits) -> ForwardPlan:
    """The first of the preferred tiles that fit."""
    candidates = _HOPPER_FORWARD_TILES
    if traits.extras.by_pair:
        candidates = _HOPPER_FORWARD_TILES_BY_PAIR
    tiles = next(tiles for tiles in candidates if tiles.serves(traits))
    out_over_q = not tiles.has_room_for_out(traits)
    smem_bytes = tiles.smem_bytes(traits, out_over_q)
    constants = {
        **_constants_sm90(traits),
        "CONSUMERS": tiles.consumers,
        "BLOCK_KV": tiles.block_kv,
        "PING_PONG": int(padded_sm90(traits.head_dim_v) <= _MAX_HEAD_DIM_OF_PING_PONG),
        "OUT_OVER_Q": int(out_over_q),
        "SMEM_BYTES": smem_bytes,
        "PARAMS_BYTES": traits.params_bytes(_params.FORWARD_SM90_BYTES),
    }
    warps = 4 * (1 + tiles.consumers)
    kernel = _kernel(
        "flash_fwd_sm90.cu", "flash_fwd", "sm_90a", constants, warps, smem_bytes, traits
    )
    return ForwardPlan("sm90", kernel, Tiling(tiles.block_q, tiles.block_kv, pack_group=False))


def _constants_sm90(traits: Traits) -> dict[str, int]:
    """The -D constants that Hopper's kernels share."""
    return {
        **traits.extras.constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": padded_sm90(traits.head_dim),
        "HEAD_DIM_V": padded_sm90(traits.head_dim_v),
        "SOFTCAP": int(traits.softcap),
        "SCALE_FIRST": int(traits.scale_first),
    }


@lru_cache(maxsize=1024)
def backward_plan(traits: Traits, capability: int, deterministic: bool) -> BackwardPlan:
    """As `forward_plan`; the tiles must also leave the accumulators in registers."""
    if backend_of(capability, traits.tma) == "sm90":
        return _backward_plan_sm90(traits, deterministic)
    arch = _arch(capability)
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
        prep=_kernel("flash_bwd_prep.cu", "flash_bwd_prep", arch, shared, tiles.warps, 0),
        main=_kernel("flash_bwd_sm80.cu", "flash_bwd", arch, main, tiles.warps, smem_bytes, traits),
        post=_kernel("flash_bwd_post.cu", "flash_bwd_post", arch, post, tiles.warps, dq_bytes),
        tiling=Tiling(tiles.block_q, tiles.block_kv, traits.pack_group),
        head_dim=traits.head_dim,
    )


def _backward_plan_sm90(traits: Traits, deterministic: bool) -> BackwardPlan:
    """As many keys and queries as leave the accumulators in registers."""
    head_dim, head_dim_v = (_padded_to_64(x) for x in (traits.head_dim, traits.head_dim_v))
    wide = max(head_dim, head_dim_v) > _MAX_ROWS_DIM_SM90
    few_registers = max(head_dim, head_dim_v) > 64 or traits.extras.by_pair
    block_q, block_kv = (64 if few_registers else 128), (64 if wide else 128)
    shared = {
        **traits.parameter_constants(),
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "VEC_BYTES": traits.vec_bytes,
        "BLOCK_Q": block_q,
        "WARPS": _CONSUMER_WARPS_SM90,
        "QUERY_WARPS": block_q // 16,
        "SUM_FLOATS": 4,
        "PARAMS_BYTES": traits.params_bytes(_params.BACKWARD_BYTES),
    }
    both = head_dim + head_dim_v
    scores = (4 if wide else 2) * block_kv * block_q  # two buffers of ds, and of p if wide
    tiles = block_kv * both + _STAGES_SM90 * block_q * (both + 4) + scores
    smem_bytes = 2 * tiles + 8 * (2 + 4 * _STAGES_SM90) + 8  # mbarriers, the ticket
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
    warps, arch = _CONSUMER_WARPS_SM90, "sm_90a"
    source = "flash_bwd_wide_sm90.cu" if wide else "flash_bwd_sm90.cu"
    return BackwardPlan(
        backend="sm90",
        prep=_kernel("flash_bwd_prep.cu", "flash_bwd_prep", arch, shared, warps, 0),
        main=_kernel(source, "flash_bwd", arch, main, 4 + warps, smem_bytes, traits),
        post=_kernel("flash_bwd_post.cu", "flash_bwd_post", arch, post, warps, dq_bytes),
        tiling=Tiling(block_q, block_kv, pack_group=False),
        head_dim=head_dim,
        panels=_backward_panels_sm90(head_dim, head_dim_v, block_q, wide),
    )


@lru_cache(maxsize=1024)
def mask_tiles_kernel(traits: Traits, tiling: Tiling, capability: int, whole_rows: bool) -> Kernel:
    """Finds the visible tiles; `whole_rows`: those with rows past the end are not fully visible."""
    constants = {
        **traits.parameter_constants(),
        "BLOCK_Q": tiling.block_q,
        "BLOCK_KV": tiling.block_kv,
        "PACK_GROUP": int(tiling.pack_group),
        "WHOLE_ROWS": int(whole_rows),
        "WARPS": _MASK_WARPS,
        "PARAMS_BYTES": traits.params_bytes(_params.MASK_TILES_BYTES),
    }
    arch = _arch(capability)
    return _kernel("mask_tiles.cu", "mask_tiles", arch, constants, _MASK_WARPS, 0, traits)


@cache
def packed_tiles_kernel(capability: int) -> Kernel:
    """Tells which sequence each tile is of."""
    constants = {"WARPS": _PACKED_WARPS, "PARAMS_BYTES": _params.PACKED_TILES_BYTES}
    name = "packed_tiles"
    return _kernel(f"{name}.cu", name, _arch(capability), constants, _PACKED_WARPS, 0)


@cache
def mask_lists_kernel(capability: int) -> Kernel:
    """Lists the visible tiles."""
    constants = {"WARPS": _MASK_WARPS, "PARAMS_BYTES": _params.MASK_LISTS_BYTES}
    return _kernel("mask_lists.cu", "mask_lists", _arch(capability), constants, _MASK_WARPS, 0)


@cache
def mask_bits_kernel(capability: int) -> Kernel:
    """Packs a boolean array."""
    constants = {"WARPS": _MASK_WARPS, "PARAMS_BYTES": _params.MASK_BITS_BYTES}
    return _kernel("mask_bits.cu", "mask_bits", _arch(capability), constants, _MASK_WARPS, 0)


@dataclass(frozen=True, slots=True)
class BiasGradientPlan:
    """Two kernels in a row: parts of the sums, and these in one."""

    kernel: Kernel
    sum: Kernel
    tiling: Tiling


@lru_cache(maxsize=1024)
def bias_gradient_plan(traits: Traits, capability: int) -> BiasGradientPlan:
    """Tiles of 64 x 64 where shared memory holds them, else of 32 x 32."""
    both = traits.head_dim + traits.head_dim_v
    block = 64 if 2 * 2 * 64 * both <= smem_limit(capability) else 32
    smem_bytes = max(2 * 2 * block * both, 4 * block * block)
    constants = {
        **traits.constants(),
        "PACK_GROUP": 0,
        "BLOCK_Q": block,
        "BLOCK_KV": block,
        "WARPS": _BIAS_WARPS,
        "QUERY_WARPS": 2,
        "SCORE_WARPS": 2,
        "BIAS_PARAMS_BYTES": traits.params_bytes(_params.BIAS_GRADIENT_BYTES),
        "SMEM_BYTES": smem_bytes,
    }
    sum_constants = {
        "BFLOAT16": int(traits.dtype == "bfloat16"),
        "BIAS_BYTES": traits.extras.bias_bytes,
        "WARPS": _BIAS_WARPS,
        "PARAMS_BYTES": _params.BIAS_SUM_BYTES,
    }
    arch, warps = _arch(capability), _BIAS_WARPS
    name, sum_name = "flash_bwd_bias", "flash_bwd_bias_sum"
    return BiasGradientPlan(
        _kernel(f"{name}.cu", name, arch, constants, warps, smem_bytes, traits),
        _kernel(f"{sum_name}.cu", sum_name, arch, sum_constants, warps, 0),
        Tiling(block, block, pack_group=False),
    )


@lru_cache(maxsize=1024)
def sink_gradient_kernel(traits: Traits, capability: int) -> Kernel:
    """Sums over the rows of each head."""
    constants = {
        **traits.parameter_constants(),
        "SINKS": 1,
        "WARPS": _SINK_WARPS,
        "SINK_PARAMS_BYTES": traits.params_bytes(_params.SINK_GRADIENT_BYTES),
    }
    name = "flash_bwd_sinks"
    return _kernel(f"{name}.cu", name, _arch(capability), constants, _SINK_WARPS, 0)


def _backward_panels_sm90(
    head_dim: int, head_dim_v: int, block_q: int, wide: bool
) -> tuple[int, int, int]:
    """Each warpgroup reads whole panels for its part of dq and, if wide, of dk and dv."""
    half, half_v = _panel_sm90(head_dim // 2), _panel_sm90(head_dim_v // 2)
    if wide:
        return half, half, half_v
    return 64, (half if block_q == _WARPGROUP_ROWS else 64), 64


def _panel_sm90(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32


def heads_per_section(problem: Problem, device: Device) -> int:
    """(batch, key head) pairs whose keys and values together fill half of the L2 cache."""
    bytes_per_head = problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * 2
    heads = problem.batch * problem.heads_k
    return max(1, min(heads, device.l2_bytes // 2 // max(1, bytes_per_head)))


def backend_of(capability: int, tma: bool = False) -> str:
    """The backend that serves a GPU of this compute capability (10 * major + minor).

    `tma`: the arrays are such as Hopper's kernels take.
    """
    if capability < 80:
        raise NotImplementedError(
            f"the GPU has compute capability {capability / 10}; "
            "expected 8.0 (Ampere) or newer; the cpu backend (NumPy arrays) needs no GPU"
        )
    return "sm90" if tma and capability == 90 else "sm80"


def kernels_for(
    arch: str,
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    *,
    group: int = 1,
    softcap: bool = False,
    backward: bool = True,
    deterministic: bool = True,
) -> list[Kernel]:
    """Every kernel that calls of these sizes launch on contiguous arrays of any length."""
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    widest = vec_bytes((2 * head_dim | 2 * head_dim_v | 16) & 30)
    long = Traits(
        dtype=dtype,
        head_dim=padded(head_dim),
        head_dim_v=padded(head_dim_v),
        vec_bytes=widest,
        pack_group=group > 1,
        softcap=softcap,
        scale_first=False,
        few_rows=False,
    )
    kernels = [forward_plan(replace(long, few_rows=True), capability).kernel]
    for tma in (False, True)[: 1 + (backend_of(capability, widest == TMA_BYTES) == "sm90")]:
        traits = replace(long, tma=tma)
        kernels.append(forward_plan(traits, capability).kernel)
        if backward:
            plan = backward_plan(traits, capability, deterministic)
            kernels += [plan.prep, plan.main, plan.post]
    return list(dict.fromkeys(kernels))


def padded(head_dim: int) -> int:
    """The head size that the kernels compute with: the columns beyond the true one are zeros."""
    return -(-head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP


def _padded_to_64(head_dim: int) -> int:
    """As `padded`, for Hopper's backward."""
    return -(-head_dim // 64) * 64


def padded_sm90(head_dim: int) -> int:
    """As `padded`, for Hopper's kernels."""
    return next(size for size in _HEAD_DIMS_SM90 if head_dim <= size)


def panels(traits: Traits) -> tuple[int, int]:
    """Columns of a panel (panels.cuh) of q and k, of v and out."""
    sizes = (padded_sm90(traits.head_dim), padded_sm90(traits.head_dim_v))
    return tuple(64 if size % 64 == 0 else 32 for size in sizes)


def few_queries(problem: Problem) -> bool:
    """Whether one warpgroup would hold all queries of a head: packed groups serve these better."""
    return problem.seqlen_q <= _WARPGROUP_ROWS


def vec_bytes(alignment: int) -> int:
    """The widest access that the alignment (a number of bytes, any multiple) allows."""
    return next(width for width in VEC_BYTES if alignment % width == 0)


def smem_limit(capability: int) -> int:
    """Bytes of shared memory that one block may have."""
    return _SMEM_LIMIT.get(capability, _SMALL_SMEM_LIMIT)


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


@dataclass(frozen=True, slots=True)
class _HopperForwardTiles:
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
        head_dim, head_dim_v = padded_sm90(traits.head_dim), padded_sm90(traits.head_dim_v)
        per_row = max(head_dim, head_dim_v) if out_over_q else head_dim + head_dim_v
        stages = _STAGES_SM90 * self.block_kv * (head_dim + head_dim_v)
        barriers = 2 * self.consumers + 4 * _STAGES_SM90
        return 2 * (self.block_q * per_row + stages) + 8 * barriers


# In order of preference. Two 16-row tiles per warp (128 rows, 4 warps) read a key fragment once for
# both; above a head size of 128 the output needs the registers of eight warps.
_FORWARD_TILES = (
    _ForwardTiles(block_q=128, block_kv=64, warps=4, max_head_dim=128),
    _ForwardTiles(block_q=128, block_kv=32, warps=4, max_head_dim=128),
    _ForwardTiles(block_q=128, block_kv=64, warps=8, max_head_dim=256),
    _ForwardTiles(block_q=64, block_kv=64, warps=4, max_head_dim=256),
)
_FEW_ROWS = _ForwardTiles(block_q=64, block_kv=64, warps=4, max_head_dim=256)
# The registers of a consumer hold the output, the scores and the probabilities.
_HOPPER_FORWARD_TILES = (
    _HopperForwardTiles(consumers=3, block_kv=112, max_head_dim=64, max_head_dim_v=64),
    _HopperForwardTiles(consumers=2, block_kv=128, max_head_dim=256, max_head_dim_v=128),
    _HopperForwardTiles(consumers=2, block_kv=112, max_head_dim=256, max_head_dim_v=192),
    _HopperForwardTiles(consumers=2, block_kv=80, max_head_dim=256, max_head_dim_v=256),
)
# Where scores depend on their place, finding it takes registers.
_FORWARD_TILES_BY_PAIR = (
    _ForwardTiles(block_q=128, block_kv=64, warps=8, max_head_dim=256),
    _ForwardTiles(block_q=64, block_kv=64, warps=4, max_head_dim=256),
)
_HOPPER_FORWARD_TILES_BY_PAIR = (
    _HopperForwardTiles(consumers=2, block_kv=96, max_head_dim=256, max_head_dim_v=128),
    _HopperForwardTiles(consumers=2, block_kv=80, max_head_dim=256, max_head_dim_v=192),
    _HopperForwardTiles(consumers=2, block_kv=64, max_head_dim=256, max_head_dim_v=256),
)
_BACKWARD_TILES = (
    _BackwardTiles(64, 128, warps=8, stages=2, score_warps=2, key_warps=4),
    _BackwardTiles(64, 128, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(64, 64, warps=8, stages=2, score_warps=2, key_warps=4),
    _BackwardTiles(64, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(32, 64, warps=8, stages=1, score_warps=2, key_warps=4),
    _BackwardTiles(32, 32, warps=4, stages=1, score_warps=2, key_warps=2),
)


def _arch(capability: int) -> str:
    backend_of(capability)
    return f"sm_{capability}"


def _kernel(
    source: str,
    entry: str,
    arch: str,
    constants: dict[str, int],
    warps: int,
    smem_bytes: int,
    traits: Traits | None = None,
) -> Kernel:
    """`traits`: of a kernel that reads the call's own source."""
    generated = "" if traits is None else traits.extras.program.source
    named = tuple(sorted(constants.items()))
    return Kernel(source, entry, arch, named, 32 * warps, smem_bytes, generated)
