"""Random problems over every option and many shapes, for `check` and for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from cuflash._checks import BFLOAT16, FLOAT16
from cuflash.cli import extras

HEAD_DIMS = (1, 8, 31, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
HEAD_DIM_PAIRS = ((64, 128), (192, 128), (32, 256), (256, 32), (17, 90))
LENGTHS = ((1, 1), (1, 339), (64, 128), (128, 64), (127, 129), (239, 1), (799, 3), (1023, 1024))
WINDOWS = ((0, 0), (None, 5), (17, None), (64, 0), (300, 300))


class Arrays(NamedTuple):
    """One problem, as contiguous NumPy arrays; what lies past the lengths is NaN."""

    q: np.ndarray  # (B, Sq, Hq, D)
    k: np.ndarray  # (B, Sk, Hk, D)
    v: np.ndarray  # (B, Sk, Hk, Dv)
    dout: np.ndarray  # (B, Sq, Hq, Dv)
    dlse: np.ndarray | None  # (B, Hq, Sq)


@dataclass(frozen=True, slots=True)
class Case:
    """One problem: sizes, the order of its arrays in memory, the options that `attention` takes."""

    dtype: np.dtype = BFLOAT16
    batch: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 203
    heads_q: int = 2
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # None: as head_dim
    layout: str = "BSHD"  # or "BHSD", or "unaligned": heads one element apart in a wider array
    causal: bool = False
    offset: int | tuple[int, ...] | None = None
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    extras: tuple[str, ...] = ()  # names of extras.MASKS and extras.TERMS
    deterministic: bool = True
    # The function, or the mask's: packed takes the valid rows, one sequence behind the other.
    call: Literal["attention", "compiled", "packed"] = "attention"

    def __str__(self) -> str:
        head_dim_v = self.head_dim_v or self.head_dim
        sizes = (
            f"{self.dtype} B{self.batch} S{self.seqlen_q}x{self.seqlen_k} "
            f"H{self.heads_q}/{self.heads_k} D{self.head_dim}/{head_dim_v}"
        )
        others = [self.layout] if self.layout != "BSHD" else []
        others += [f"{name}={value}" for name, value in self._given().items()]
        others += self.extras
        others += [] if self.deterministic else ["nondeterministic"]
        others += [self.call] if self.call != "attention" else []
        return " ".join([sizes, *others]).replace(", ", ",")

    @property
    def options(self) -> dict[str, Any]:
        """Keywords for `attention` and the reference; their arrays are NumPy's."""
        given = {
            name: np.array(value) if isinstance(value, tuple) and name != "window" else value
            for name, value in self._given().items()
        }
        return {**given, **extras.options(self)}

    def arrays(self, seed: int = 0) -> Arrays:
        """Standard normal numbers."""
        rng = np.random.default_rng(seed)
        head_dim_v = self.head_dim_v or self.head_dim

        def tensor(seqlen: int, heads: int, size: int, lens: tuple[int, ...] | None) -> np.ndarray:
            values = rng.standard_normal((self.batch, seqlen, heads, size), np.float32)
            for row, length in enumerate(lens or ()):
                values[row, length:] = np.nan
            return values.astype(self.dtype)

        return Arrays(
            q=tensor(self.seqlen_q, self.heads_q, self.head_dim, self.q_lens),
            k=tensor(self.seqlen_k, self.heads_k, self.head_dim, self.kv_lens),
            v=tensor(self.seqlen_k, self.heads_k, head_dim_v, self.kv_lens),
            dout=tensor(self.seqlen_q, self.heads_q, head_dim_v, self.q_lens),
            dlse=rng.standard_normal((self.batch, self.heads_q, self.seqlen_q), np.float32),
        )

    def place(self, array: np.ndarray, xp: Any) -> Any:
        """A (B, S, H, D) array of xp, numpy or cupy, in the memory order of the layout."""
        if self.layout == "BHSD":
            return xp.asarray(np.ascontiguousarray(array.swapaxes(1, 2))).swapaxes(1, 2)
        if self.layout == "unaligned":
            wider = np.full((*array.shape[:3], array.shape[3] + 1), np.nan, array.dtype)
            wider[..., 1:] = array
            return xp.asarray(wider)[..., 1:]
        return xp.asarray(array)

    def _given(self) -> dict[str, Any]:
        names = ("causal", "offset", "window", "scale", "softcap", "q_lens", "kv_lens")
        values = {name: getattr(self, name) for name in names}
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False
        }


def spread() -> Iterator[Case]:
    """Every option and many sizes, each alone and some together."""
    yield from (*_sizes(), *_visibility(), *_masks(), *_terms(), *_the_rest(), *_calls())


def crowds() -> Iterator[Case]:
    """More tiles than a GPU has SMs: blocks that take several, and that wait for one another."""
    crowd = Case(batch=4, seqlen_q=400, seqlen_k=400, heads_q=32, heads_k=32)
    yield replace(crowd, causal=True)
    yield replace(crowd, head_dim=128, heads_k=8, seqlen_k=330, causal=True, dtype=FLOAT16)
    yield replace(crowd, head_dim=256, batch=3, seqlen_q=300, seqlen_k=600)
    yield replace(crowd, head_dim=128, extras=("documents",))
    yield replace(crowd, q_lens=(400, 0, 77, 300), kv_lens=(400, 20, 390, 129), call="packed")


def races() -> Iterator[Case]:
    """Twenty problems to be run again and again: what could race does so beside many blocks."""
    crowd = Case(seqlen_q=256, seqlen_k=520, heads_q=36, heads_k=36, causal=True)
    for dtype, head_dim in ((BFLOAT16, 64), (FLOAT16, 96), (BFLOAT16, 128), (FLOAT16, 256)):
        same = replace(crowd, dtype=dtype, head_dim=head_dim)
        yield same
        yield replace(same, causal=False, heads_k=6)
        yield replace(same, window=(100, 20))
    yield replace(crowd, head_dim=192, head_dim_v=128)
    yield replace(crowd, head_dim=128, layout="unaligned")  # the sm80 kernels
    yield replace(crowd, head_dim=128, softcap=5.0, heads_k=1)
    yield replace(crowd, head_dim=128, extras=("documents",), causal=False)
    yield replace(crowd, extras=("blocks",), causal=False)
    yield replace(crowd, extras=("alibi", "bias-of-heads", "sinks", "dropout"))
    packed = replace(crowd, q_lens=(256, 200), kv_lens=(520, 130), call="packed")
    yield packed
    yield replace(packed, head_dim=192, heads_k=12, causal=False)


def _sizes() -> Iterator[Case]:
    for index, head_dim in enumerate(HEAD_DIMS):
        dtypes = (BFLOAT16, FLOAT16) if index % 2 else (FLOAT16, BFLOAT16)
        yield Case(dtypes[0], head_dim=head_dim)
        yield Case(dtypes[1], head_dim=head_dim, causal=True)
    for head_dim, head_dim_v in HEAD_DIM_PAIRS:
        yield Case(head_dim=head_dim, head_dim_v=head_dim_v, causal=True)
    for seqlen_q, seqlen_k in LENGTHS:
        yield Case(FLOAT16, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=seqlen_q > 1)
    yield Case(batch=1, seqlen_q=2048, seqlen_k=2048, head_dim=128, causal=True)
    yield Case(FLOAT16, batch=1, seqlen_q=300, seqlen_k=1000, heads_k=1, head_dim=128)
    yield Case(batch=0)
    yield Case(seqlen_q=0)
    yield Case(seqlen_k=0)


def _visibility() -> Iterator[Case]:
    long = Case(seqlen_q=300, seqlen_k=517)
    for index, window in enumerate(WINDOWS):
        yield replace(long, window=window, head_dim=(64, 128)[index % 2])
        yield replace(long, window=window, offset=(0, -40, 3, 200, 9)[index], dtype=FLOAT16)
    yield replace(long, causal=True, offset=0)
    yield replace(long, causal=True, offset=(-100, 250))
    yield replace(long, causal=True, offset=-1000)
    yield replace(long, q_lens=(300, 77), kv_lens=(0, 129))
    yield replace(long, q_lens=(0, 1), kv_lens=(517, 516), causal=True)
    yield replace(long, kv_lens=(64, 65), window=(20, 3), dtype=FLOAT16)


def _masks() -> Iterator[Case]:
    long = Case(seqlen_q=300, seqlen_k=517, heads_q=4)
    for index, name in enumerate(extras.MASKS):
        dtype, head_dim = ((BFLOAT16, 64), (FLOAT16, 128))[index % 2]
        yield replace(long, dtype=dtype, head_dim=head_dim, extras=(name,))
    yield replace(long, extras=("documents",), causal=True, head_dim=192, head_dim_v=128)
    yield replace(long, extras=("documents", "prefix-lm"), kv_lens=(0, 400))
    yield replace(long, extras=("blocks", "window"), layout="BHSD", head_dim=256)
    yield replace(long, extras=("intervals", "dense"), heads_q=2, causal=True, softcap=5.0)
    yield replace(long, extras=("expression",), seqlen_q=1, kv_lens=(517, 20))
    yield replace(long, extras=("dense",), deterministic=False)


def _terms() -> Iterator[Case]:
    long = Case(seqlen_q=300, seqlen_k=517, heads_q=4)
    for index, name in enumerate(extras.TERMS):
        dtype, head_dim = ((FLOAT16, 64), (BFLOAT16, 128))[index % 2]
        yield replace(long, dtype=dtype, head_dim=head_dim, extras=(name,), causal=index % 3 > 0)
    yield replace(long, extras=("bias", "documents"), head_dim=96, head_dim_v=32)
    yield replace(long, extras=("bias-of-keys", "score_mod"), softcap=3.0)
    yield replace(long, extras=("sinks", "hidden-rows", "dropout"), q_lens=(300, 77))
    yield replace(long, extras=("alibi", "blocks", "dropout"), causal=True)
    yield replace(long, extras=("alibi", "bias", "sinks", "dropout", "score_mod"))


def _the_rest() -> Iterator[Case]:
    yield Case(softcap=5.0)
    yield Case(FLOAT16, softcap=15.0, causal=True, head_dim=128, scale=1.0)
    yield Case(scale=0.7)
    yield Case(scale=-0.2, causal=True)
    yield Case(scale=0.0)
    yield Case(heads_q=6, heads_k=2, causal=True, head_dim=128)
    yield Case(FLOAT16, heads_q=6, heads_k=1, seqlen_q=300)
    yield Case(heads_q=8, heads_k=1, seqlen_q=1, seqlen_k=700, kv_lens=(700, 333))
    yield Case(
        heads_q=4, heads_k=2, window=(50, 0), q_lens=(113, 60), kv_lens=(90, 203), softcap=9.0
    )
    for layout in ("BHSD", "unaligned"):
        yield Case(layout=layout)
        yield Case(FLOAT16, layout=layout, head_dim=40, causal=True, heads_q=4)
    yield Case(deterministic=False, causal=True)
    yield Case(FLOAT16, deterministic=False, head_dim=128, heads_q=4, seqlen_q=500)
    for head_dim in (160, 256):
        yield Case(seqlen_q=600, seqlen_k=700, head_dim=head_dim, causal=True)
    yield Case(FLOAT16, seqlen_q=600, seqlen_k=700, head_dim=192, head_dim_v=128)


def _calls() -> Iterator[Case]:
    """Other functions than `attention`."""
    packed = Case(
        batch=4,
        seqlen_q=300,
        seqlen_k=517,
        q_lens=(300, 0, 5, 200),
        kv_lens=(517, 30, 0, 260),
        call="packed",
    )
    yield packed
    yield replace(packed, dtype=FLOAT16, causal=True, heads_q=6, head_dim=128)
    yield replace(packed, head_dim=192, head_dim_v=128, window=(90, 40), offset=(0, 5, 9, -7))
    yield replace(packed, extras=("alibi", "sinks", "dropout"), causal=True, softcap=9.0)
    yield replace(packed, extras=("score_mod",), head_dim=40)
    compiled = Case(seqlen_q=300, seqlen_k=517, heads_q=4, call="compiled")
    yield replace(compiled, extras=("documents",), causal=True)
    yield replace(compiled, extras=("blocks", "prefix"), head_dim=128, dtype=FLOAT16)
    yield replace(compiled, extras=("dense", "bias"), head_dim=96)
