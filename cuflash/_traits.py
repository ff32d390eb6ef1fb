"""What plans are made of: the GPU, the kernel, what of a problem selects it."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash._problem import Problem
from cuflash._program import ATTACHMENT_BYTES, Program, program

KIB = 1024
# Shared memory that one block may have (CUDA C++ Programming Guide, compute capabilities).
_SMEM_LIMIT = {80: 163 * KIB, 87: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB, 103: 227 * KIB}
_SMALL_SMEM_LIMIT = 99 * KIB  # 8.6, 8.9, 12.x
_HEAD_DIM_STEP = 32
FEW_ROWS = 64  # up to here one small tile holds all rows of a key head
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
    dense_tiles: bool = False  # Hopper's larger ones, where queries see all keys, pay
    extras: Extras = NO_EXTRAS

    @classmethod
    def of(
        cls, problem: Problem, alignment: int, tma: bool = False, dense_tiles: bool = False
    ) -> Traits:
        """`alignment`: of every row of every array, in bytes."""
        return cls(
            dtype=problem.dtype.name,
            head_dim=padded(problem.head_dim),
            head_dim_v=padded(problem.head_dim_v),
            vec_bytes=vec_bytes(alignment),
            pack_group=problem.group > 1,
            softcap=problem.softcap > 0,
            scale_first=problem.scale <= 0 and not problem.softcap,
            few_rows=problem.seqlen_q * problem.group <= FEW_ROWS,
            tma=tma,
            dense_tiles=dense_tiles,
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


def arch_of(capability: int) -> str:
    backend_of(capability)
    return f"sm_{capability}"


def kernel_of(
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


def padded(head_dim: int) -> int:
    """The head size that the kernels compute with: the columns beyond the true one are zeros."""
    return -(-head_dim // _HEAD_DIM_STEP) * _HEAD_DIM_STEP


def vec_bytes(alignment: int) -> int:
    """The widest access that the alignment (a number of bytes, any multiple) allows."""
    return next(width for width in VEC_BYTES if alignment % width == 0)


def smem_limit(capability: int) -> int:
    """Bytes of shared memory that one block may have."""
    return _SMEM_LIMIT.get(capability, _SMALL_SMEM_LIMIT)
