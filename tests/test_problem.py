"""Every rule that arguments must keep, its exact message, and what a sound problem holds."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from unreal_gpu import DV, HK, HQ, LSE, OUT, SHAPES, SK, SQ, B, D, Maker, refused

from cuflash._checks import MAX_OFFSET
from cuflash._packed import PackedProblem
from cuflash._problem import Problem

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture(params=["cpu", "cuda"])
def make(request: pytest.FixtureRequest) -> Maker:
    if request.param == "cuda":
        pytest.importorskip("cupy")
    return Maker(request.param)


# What a sound problem holds


def test_the_sizes_have_the_names_of_the_letters(make: Maker) -> None:
    p = make.problem()
    sizes = (p.batch, p.seqlen_q, p.seqlen_k, p.heads_q, p.heads_k, p.head_dim, p.head_dim_v)
    assert sizes == (B, SQ, SK, HQ, HK, D, DV)
    assert (p.group, p.out_shape, p.lse_shape) == (HQ // HK, OUT, LSE)
    assert (p.dtype, p.lse_dtype, p.device) == (np.float16, np.float32, make.device)


def test_defaults(make: Maker) -> None:
    p = make.problem()
    assert p.scale == 1 / math.sqrt(D)
    assert (p.softcap, p.window, p.offset) == (0.0, (None, None), None)
    assert [p.q_lens, p.kv_lens, p.mask, p.bias, p.out] == [None] * 5


def test_arrays_are_not_copied(make: Maker) -> None:
    q, out = make(SHAPES["q"]), make(OUT)
    p = make.problem(q=q, out=out)
    assert p.q is q
    assert p.out is out


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (False, (3, 4), (3, 4)),
        (True, None, (None, 0)),
        (True, (3, 4), (3, 0)),
        (True, (3, None), (3, 0)),
        (False, (None, 4), (None, 4)),
        (False, [0, np.int32(2)], (0, 2)),
        (np.True_, (None, None), (None, 0)),
        (False, (10**30, None), (2 * MAX_OFFSET, None)),
    ],
)
def test_causal_is_a_window(make: Maker, causal: Any, window: Any, expected: Any) -> None:
    assert make.problem(causal=causal, window=window).window == expected


def test_numbers_become_python_numbers(make: Maker) -> None:
    p = make.problem(scale=np.float32(0.5), softcap=30, offset=np.int64(-3))
    assert (p.scale, p.softcap, p.offset) == (0.5, 30.0, -3)
    assert [type(x) for x in (p.scale, p.softcap, p.offset)] == [float, float, int]
    assert make.problem(softcap=0).softcap == 0.0
    assert make.problem(offset=np.array(4)).offset == 4


def test_host_lengths_become_int64(make: Maker) -> None:
    p = make.problem(q_lens=np.array([0, SQ], np.uint8), kv_lens=np.array([SK, 0], np.int32))
    assert (p.q_lens.dtype, p.kv_lens.dtype) == (np.int64, np.int64)
    assert p.q_lens.tolist() == [0, SQ]
    assert make.problem(offset=np.array([-9, 9], np.int16)).offset.tolist() == [-9, 9]


def test_lengths_on_the_device_stay_there() -> None:
    make = Maker("cuda")
    lengths = make((B,), np.int32)
    p = make.problem(q_lens=lengths, kv_lens=lengths, offset=lengths)
    assert p.q_lens is p.kv_lens is p.offset is lengths


@pytest.mark.parametrize("size", [1, 3, 256])
def test_any_head_sizes(make: Maker, size: int) -> None:
    p = make.problem(q=make((B, SQ, HQ, size)), k=make((B, SK, HK, size)), v=make((B, SK, HK, 1)))
    assert (p.head_dim, p.head_dim_v) == (size, 1)


def test_the_cpu_takes_head_sizes_over_256() -> None:
    make = Maker("cpu")
    p = make.problem(q=make((B, SQ, HQ, 300)), k=make((B, SK, HK, 300)))
    assert p.head_dim == 300


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [
        (np.float16, np.float32),
        (BFLOAT16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_dtypes_of_the_cpu(dtype: Any, lse_dtype: Any) -> None:
    make = Maker("cpu")
    p = make.problem(**{name: make(shape, dtype) for name, shape in SHAPES.items()})
    assert p.lse_dtype == lse_dtype


@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "heads"])
def test_empty_axes(make: Maker, empty: str) -> None:
    b, sq, sk, h = (0 if empty == axis else 3 for axis in ("batch", "queries", "keys", "heads"))
    q, k = make((b, sq, h, D)), make((b, sk, h, D))
    lengths = np.zeros(b, np.int64)
    p = make.problem(q=q, k=k, v=k, q_lens=lengths, kv_lens=lengths, out=make((b, sq, h, D)))
    assert p.out_shape == (b, sq, h, D)
    assert p.group == 1


def test_any_strides_with_a_contiguous_last_axis(make: Maker) -> None:
    heads_first = make((B, HQ, SQ, D)).swapaxes(1, 2)
    every_other = make((B, 2 * SK, HK, 2 * D))[:, ::2, :, D:]
    view = make((B, SK, HK, 2 * DV))[:, ::-1, :, :DV]
    out = make((B, HQ, SQ, DV)).swapaxes(1, 2)
    p = make.problem(q=heads_first, k=every_other, v=view, out=out)
    assert p.q is heads_first
    assert p.out is out


def test_broadcast_inputs(make: Maker) -> None:
    xp = np if make.device == "cpu" else pytest.importorskip("cupy")
    v = xp.broadcast_to(make((1, SK, 1, DV)), SHAPES["v"])
    assert make.problem(v=v).v is v


@pytest.mark.parametrize(
    "shape", [(), (SK,), (1, SK), (SQ, 1), (HQ, 1, SK), (B, 1, SQ, SK), (1,) * 4]
)
def test_masks_and_biases_broadcast(shape: tuple[int, ...]) -> None:
    p = Maker("cpu").problem(mask=np.ones(shape, bool), bias=np.zeros(shape, np.float32))
    assert p.mask.array.shape == p.bias.shape == shape


# q, k, v


SWAP = "; pass x.swapaxes(-3, -2) of arrays with the axes (heads, length, head size)"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "q",
            (SQ, HQ, D),
            "q has 3 axes, shape (5, 4, 8); expected 4 axes (batch, length, heads, head size); "
            "x[None] is a batch of one, and attention_varlen takes packed sequences",
        ),
        (
            "v",
            (1, 1, 1, 1, 1),
            "v has 5 axes, shape (1, 1, 1, 1, 1); "
            "expected 4 axes (batch, length, heads, head size)",
        ),
        ("k", (3, SK, HK, D), "k has batch 3, q has 2; expected the same"),
        (
            "v",
            (1, SK, HK, DV),
            "v has batch 1, q has 2; expected the same, as broadcast_to(v, (2, 7, 2, 6)) has, or "
            "v.expand(2, 7, 2, 6) in torch",
        ),
        (
            "q",
            (1, SQ, HQ, D),
            "k has batch 2, q has 1; expected the same, as broadcast_to(q, (2, 5, 4, 8)) has, or "
            "q.expand(2, 5, 4, 8) in torch",
        ),
        ("k", (B, SK, HK, 9), "k has head size 9, q has 8; expected the same"),
        (
            "k",
            (B, HK, D, SK),
            "k has head size 7, q has 8; expected the same along the last axis",
        ),
        ("v", (B, 6, HK, DV), "v has (length, heads) (6, 2), k has (7, 2); expected the same"),
        ("v", (B, SK, 4, DV), "v has (length, heads) (7, 4), k has (7, 2); expected the same"),
        (
            "v",
            (B, HK, SK, DV),
            f"v has (length, heads) (2, 7), k has (7, 2); expected the same{SWAP}",
        ),
        (
            "q",
            (B, SQ, 3, D),
            "q has 3 heads, k has 2; expected a number of q heads that is a multiple of k's",
        ),
        ("v", (B, SK, HK, 0), "v has head size 0; expected at least 1"),
    ],
)
def test_wrong_shape(make: Maker, name: str, shape: tuple[int, ...], message: str) -> None:
    with refused(ValueError, message):
        make.problem(**{name: make(shape)})


@pytest.mark.parametrize(
    ("shape_q", "shape_k"), [(SHAPES["q"], (B, HK, SK, D)), ((B, HQ, SQ, D), (B, HK, SK, D))]
)
def test_heads_before_lengths(make: Maker, shape_q: Any, shape_k: Any) -> None:
    message = "expected a number of q heads that is a multiple of k's"
    with refused(ValueError, f"q has {shape_q[2]} heads, k has {SK}; {message}{SWAP}"):
        make.problem(q=make(shape_q), k=make(shape_k), v=make(shape_k))


def test_head_size_zero(make: Maker) -> None:
    with refused(ValueError, "q has head size 0; expected at least 1"):
        make.problem(q=make((B, SQ, HQ, 0)), k=make((B, SK, HK, 0)))


def test_q_heads_without_k_heads(make: Maker) -> None:
    message = "q has 4 heads, k has 0; expected a number of q heads that is a multiple of k's"
    with refused(ValueError, message):
        make.problem(k=make((B, SK, 0, D)), v=make((B, SK, 0, DV)))


@pytest.mark.parametrize("name", ["q", "v"])
def test_head_size_over_256_on_a_gpu(name: str) -> None:
    make = Maker("cuda")
    changes = {"v": make((B, SK, HK, 257))}
    if name == "q":
        changes = {"q": make((B, SQ, HQ, 257)), "k": make((B, SK, HK, 257))}
    message = f"{name} has head size 257; expected at most 256 on a GPU (the cpu backend takes any)"
    with refused(NotImplementedError, message):
        make.problem(**changes)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool, ">f4", object])
def test_unsupported_dtype_on_the_cpu(dtype: Any) -> None:
    make = Maker("cpu")
    expected = "expected one of float16, bfloat16, float32, float64 on the CPU"
    with refused(TypeError, f"q is {np.dtype(dtype)}; {expected}"):
        make.problem(q=make(SHAPES["q"], dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
def test_unsupported_dtype_on_a_gpu(dtype: Any) -> None:
    make = Maker("cuda")
    expected = "expected one of float16, bfloat16 on a GPU"
    with refused(TypeError, f"k is {np.dtype(dtype)}; {expected}"):
        make.problem(k=make(SHAPES["k"], dtype))


@pytest.mark.parametrize("name", ["k", "v"])
def test_mixed_dtypes(make: Maker, name: str) -> None:
    with refused(TypeError, f"{name} is bfloat16, q is float16; expected one dtype"):
        make.problem(**{name: make(SHAPES[name], BFLOAT16)})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_axis_with_a_stride(make: Maker, name: str) -> None:
    *axes, size = SHAPES[name]
    message = "has a last axis with a stride of 4 bytes; expected a contiguous last axis (2 bytes)"
    remedy = f", as {name}.copy() has, or {name}.contiguous() in torch"
    with refused(ValueError, f"{name} {message}{remedy}"):
        make.problem(**{name: make((*axes, 2 * size))[..., ::2]})


def test_a_checked_layout_does_not_hide_a_bad_one(make: Maker) -> None:
    make.problem()
    with refused(ValueError, "k has batch 3, q has 2; expected the same"):
        make.problem(k=make((3, SK, HK, D)))
    make.problem()


# Options


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize(
    ("value", "error", "found"),
    [
        ("1", TypeError, "'1' (str); expected a real number"),
        (1j, TypeError, "1j (complex); expected a real number"),
        (True, TypeError, "True (bool); expected a real number"),
        ([1.0], TypeError, "[1.0] (list); expected a real number"),
        (np.ones(3), TypeError, "ndarray; expected a real number"),
        (math.nan, ValueError, "nan; expected a finite number"),
        (-math.inf, ValueError, "-inf; expected a finite number"),
        (10**400, ValueError, "inf; expected a finite number"),
        (np.float32("nan"), ValueError, "nan; expected a finite number"),
    ],
)
def test_bad_numbers(
    make: Maker, name: str, value: Any, error: type[Exception], found: str
) -> None:
    with refused(error, f"{name} is {found}"):
        make.problem(**{name: value})


@pytest.mark.parametrize(
    ("sq", "sk", "heads_q", "batch", "found"),
    [
        (2**29, 4, 4, 1, "Sq * (Hq // Hk) = 2147483648"),
        (2**30, 2**30, 1, 1, "Sq + Sk = 2147483648"),
        (2**30, 4, 1, 64, "B * Hk * (Sq * (Hq // Hk) or Sk) / 32 = 2147483712"),
    ],
)
def test_sizes_beyond_32_bits(sq: int, sk: int, heads_q: int, batch: int, found: str) -> None:
    def unreal(seqlen: int, heads: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((1, 1, 1, 8), np.float16), (batch, seqlen, heads, 8))

    q, k = unreal(sq, heads_q), unreal(sk, 1)
    with refused(
        NotImplementedError, f"q and k have {found}; expected at most 2147482624 on a GPU"
    ):
        Problem.create("attention", "cuda", q, k, k)
    Problem.create("attention", "cpu", q, k, k)


def test_packed_sequences_beyond_32_bits() -> None:
    """Each takes a block of every head at least, however few tokens they have."""
    q = np.broadcast_to(np.zeros((1, 1, 8), np.float16), (100, 2**15, 8))
    edges = np.broadcast_to(np.zeros(1, np.int64), 2**16 + 1)
    found = "Hq * (T / 32 + sequences) = 2147614720; expected at most 2147482624 on a GPU"
    with refused(
        NotImplementedError,
        f"cu_seqlens_q has 65536 sequences, which makes {found}: split the call",
    ):
        PackedProblem.create("attention", "cuda", q, q, q, edges, edges)
    PackedProblem.create("attention", "cpu", q, q, q, edges, edges)
    PackedProblem.create("attention", "cuda", q, q, q, edges[:100], edges[:100])


@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("value", [1e31, 1e-31, 1e300])
def test_factors_that_float32_cannot_hold(make: Maker, name: str, value: float) -> None:
    expected = "expected 0, or a size from 1e-30 to 1e+30 where sums are float32"
    with refused(ValueError, f"{name} is {value}; {expected}"):
        make.problem(**{name: value})
    assert make.problem(**{name: 1e-30}).dtype == make.problem().dtype


def test_negative_softcap(make: Maker) -> None:
    with refused(ValueError, "softcap is -1.0; expected a positive number, or 0 for none"):
        make.problem(softcap=-1)


@pytest.mark.parametrize("causal", [None, 1, "yes"])
def test_causal_is_no_flag(make: Maker, causal: Any) -> None:
    found = f"{causal!r} ({type(causal).__name__})"
    with refused(TypeError, f"causal is {found}; expected True or False"):
        make.problem(causal=causal)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (3, TypeError, "window is 3 (int); expected a pair (left, right)"),
        ("12", TypeError, "window is '12' (str); expected a pair (left, right)"),
        ((1, 2, 3), TypeError, "window is (1, 2, 3) (tuple); expected a pair (left, right)"),
        ((1.5, 0), TypeError, "window left is 1.5 (float); expected an integer"),
        ((0, True), TypeError, "window right is True (bool); expected an integer"),
        ((-1, 0), ValueError, "window left is -1; expected 0 or more, or None for unbounded"),
        ((0, -2), ValueError, "window right is -2; expected 0 or more, or None for unbounded"),
    ],
)
def test_bad_windows(make: Maker, window: Any, error: type[Exception], message: str) -> None:
    with refused(error, message):
        make.problem(window=window)


@pytest.mark.parametrize(
    ("offset", "error", "message"),
    [
        (1.0, TypeError, "offset is 1.0 (float); expected an integer"),
        (True, TypeError, "offset is True (bool); expected an integer"),
        ("1", TypeError, "offset is '1' (str); expected an integer"),
        (2**60 + 1, ValueError, f"offset is {2**60 + 1}; expected at most 2^60 in size"),
        (
            np.array([0.0, 1.0]),
            TypeError,
            "offset is float64; expected one integer per batch entry",
        ),
        (np.zeros(3, int), ValueError, "offset has shape (3,); expected (2,), one per batch entry"),
        (
            np.array([0, -(2**61)]),
            ValueError,
            f"offset holds {-(2**61)}; expected {-(2**60)} to {2**60}",
        ),
    ],
)
def test_bad_offsets(make: Maker, offset: Any, error: type[Exception], message: str) -> None:
    with refused(error, message):
        make.problem(offset=offset)


@pytest.mark.parametrize(("name", "longest"), [("q_lens", SQ), ("kv_lens", SK)])
@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (np.array([1.0, 2.0]), TypeError, "is float64; expected one integer per batch entry"),
        (np.array([True, False]), TypeError, "is bool; expected one integer per batch entry"),
        (3, TypeError, "is int; expected one integer per batch entry"),
        (np.array(3), ValueError, "has shape (); expected (2,), one per batch entry"),
        (np.zeros((2, 1), int), ValueError, "has shape (2, 1); expected (2,), one per batch entry"),
        (np.array([0, -1]), ValueError, "holds -1; expected 0 to {longest}"),
        (np.array([99, 0]), ValueError, "holds 99; expected 0 to {longest}"),
        (np.array([2**63, 0], np.uint64), ValueError, f"holds {2**63}; expected 0 to {{longest}}"),
    ],
)
def test_bad_lengths(
    make: Maker, name: str, longest: int, lengths: Any, error: type[Exception], message: str
) -> None:
    with refused(error, f"{name} {message.format(longest=longest)}"):
        make.problem(**{name: lengths})


def test_sums_of_lengths_for_lengths() -> None:
    expected = "expected (2,), one per batch entry (sums of lengths go to attention_varlen)"
    with refused(ValueError, f"kv_lens has shape (3,); {expected}"):
        Maker("cpu").problem(kv_lens=np.array([0, 3, 5]))


@pytest.mark.parametrize(("shape", "dtype"), [((3,), np.int32), ((), np.int32)])
def test_bad_lengths_on_the_device(shape: tuple[int, ...], dtype: Any) -> None:
    make = Maker("cuda")
    with refused(ValueError, f"kv_lens has shape {shape}; expected (2,), one per batch entry"):
        make.problem(kv_lens=make(shape, dtype))
    with refused(TypeError, "kv_lens is float32; expected one integer per batch entry"):
        make.problem(kv_lens=make((B,), np.float32))


def test_an_offset_on_the_device_is_not_waited_for() -> None:
    make = Maker("cuda")
    with refused(ValueError, "offset has shape (); expected (2,), one per batch entry"):
        make.problem(offset=make((), np.int32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(BFLOAT16)])
def test_a_mask_of_numbers(dtype: np.dtype) -> None:
    expected = "expected bool (True: attend); numbers to add to the scores go to bias="
    with refused(TypeError, f"mask is {dtype}; {expected}"):
        Maker("cpu").problem(mask=np.zeros((SQ, SK), dtype))


def test_a_mask_of_integers() -> None:
    with refused(TypeError, "mask is uint8; expected bool (True: attend), as mask != 0 is"):
        Maker("cpu").problem(mask=np.zeros((SQ, SK), np.uint8))


@pytest.mark.parametrize(
    ("dtype", "bias_dtype", "expected"),
    [
        (np.float16, np.float64, "float16 or float32"),
        (np.float32, np.float16, "float32"),
        (np.float32, np.float64, "float32"),
        (np.float64, np.float16, "float64 or float32"),
        (np.float32, np.bool_, "float32; True and False go to mask="),
    ],
)
def test_bias_dtype(dtype: Any, bias_dtype: Any, expected: str) -> None:
    make = Maker("cpu")
    tensors = {name: make(shape, dtype) for name, shape in SHAPES.items()}
    with refused(TypeError, f"bias is {np.dtype(bias_dtype)}; expected {expected}"):
        make.problem(**tensors, bias=np.zeros((SQ, SK), bias_dtype))


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((SQ, SK + 1), ""),
        ((1, 1, 1, SQ, SK), ""),
        ((B, SK), "[:, None, None, :]"),
        ((HQ, SK), "[:, None]"),
        ((B, SQ, SK), "[:, None]"),
        ((B, 1, SK), "[:, None]"),
        ((B, SQ, HQ, SK), ".swapaxes(1, 2)"),
        ((B, SQ, 1, SK), ".swapaxes(1, 2)"),
        ((SK, SQ), ".swapaxes(-2, -1)"),
        ((B, HQ, SK, SQ), ".swapaxes(-2, -1)"),
    ],
)
def test_not_broadcastable(name: str, shape: tuple[int, ...], remedy: str) -> None:
    dtype = bool if name == "mask" else np.float32
    message = (
        f"{name} has shape {shape}; "
        f"expected one that broadcasts to (batch, q heads, Sq, Sk) = {(B, HQ, SQ, SK)}"
    )
    message += f", as {name}{remedy} does" if remedy else ""
    array = np.zeros(shape, dtype)
    with refused(ValueError, message):
        Maker("cpu").problem(**{name: array})
    if remedy:
        Maker("cpu").problem(**{name: eval(f"array{remedy}", {"array": array})})


# out


def test_out_of_another_shape_or_dtype(make: Maker) -> None:
    with refused(ValueError, f"out has shape {SHAPES['q']}; expected {OUT}"):
        make.problem(out=make(SHAPES["q"]))
    with refused(TypeError, "out is bfloat16; expected float16"):
        make.problem(out=make(OUT, BFLOAT16))


def test_out_with_a_stride(make: Maker) -> None:
    message = (
        "out has a last axis with a stride of 4 bytes; expected a contiguous last axis (2 bytes)"
    )
    with refused(ValueError, message):
        make.problem(out=make((B, SQ, HQ, 2 * DV))[..., ::2])


def test_out_that_cannot_be_written() -> None:
    out = np.zeros(OUT, np.float16)
    out.flags.writeable = False
    with refused(ValueError, "out is read-only; expected an array that can be written"):
        Maker("cpu").problem(out=out)


def test_out_that_overlaps_itself(make: Maker) -> None:
    xp = np if make.device == "cpu" else pytest.importorskip("cupy")
    out = xp.lib.stride_tricks.as_strided(make(OUT), OUT, (0, 48, 12, 2))
    message = "out overlaps itself (strides (0, 48, 12, 2)); expected distinct elements"
    with refused(ValueError, message):
        make.problem(out=out)


def test_out_overlaps_an_input(make: Maker) -> None:
    packed = make((B, SQ, HQ, D))
    tensors = {"q": packed, "k": make(SHAPES["k"]), "v": make((B, SK, HK, D))}
    with refused(ValueError, "out overlaps q; expected memory of its own"):
        make.problem(**tensors, out=packed)
    v = make((B, SQ, HQ, D))
    with refused(ValueError, "out overlaps v; expected memory of its own"):
        make.problem(q=make(v.shape), k=make(v.shape), v=v[:, ::-1], out=v)


def test_out_overlaps_a_bias() -> None:
    memory = np.zeros(OUT, np.float16)
    with refused(ValueError, "out overlaps bias; expected memory of its own"):
        Maker("cpu").problem(out=memory, bias=memory.reshape(-1)[:SK])


@pytest.mark.parametrize("name", ["offset", "q_lens", "kv_lens"])
def test_out_overlaps_what_is_per_batch_entry(make: Maker, name: str) -> None:
    memory = make((B * SQ * HQ * DV,), np.float16)
    values = memory[-4 * B :].view(np.int64)
    with refused(ValueError, f"out overlaps {name}; expected memory of its own"):
        make.problem(out=memory.reshape(OUT), **{name: values})


def test_out_cannot_overlap_a_number_or_what_lies_on_the_host(make: Maker) -> None:
    p = make.problem(out=make(OUT), offset=3, q_lens=np.zeros(B, np.int64))
    assert p.offset == 3


def test_out_between_inputs_of_one_buffer(make: Maker) -> None:
    packed = make((B, SQ, 4, HQ, D))
    q, k, v, out = (packed[:, :, i] for i in range(4))
    assert make.problem(q=q, k=k, v=v, out=out).out is out
