"""The emulator's arithmetic and conversions against Python integers and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator_programs import apply, integers, needs_compiler

pytestmark = needs_compiler


def wrap(value: int, dtype: np.dtype) -> int:
    bits = 8 * dtype.itemsize
    value %= 1 << bits
    return value - (1 << bits) if dtype.kind == "i" and value >> bits - 1 else value


# ---- Arithmetic.


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_OPERATIONS: dict[str, Callable[[int, int, int, int], int]] = {
    "add.{t} {d}, {a}, {b}": lambda a, b, c, w: a + b,
    "sub.{t} {d}, {a}, {b}": lambda a, b, c, w: a - b,
    "mul.lo.{t} {d}, {a}, {b}": lambda a, b, c, w: a * b,
    "mul.hi.{t} {d}, {a}, {b}": lambda a, b, c, w: a * b >> w,
    "mad.lo.{t} {d}, {a}, {b}, {c}": lambda a, b, c, w: a * b + c,
    "div.{t} {d}, {a}, {b}": lambda a, b, c, w: truncated_quotient(a, b),
    "rem.{t} {d}, {a}, {b}": lambda a, b, c, w: a - b * truncated_quotient(a, b),
    "min.{t} {d}, {a}, {b}": lambda a, b, c, w: min(a, b),
    "max.{t} {d}, {a}, {b}": lambda a, b, c, w: max(a, b),
}


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(name: str) -> None:
    dtype = np.dtype(
        name.replace("s", "i").replace("u", "u").replace("i", "int").replace("u", "uint")
    )
    a, b, c = integers(dtype), integers(dtype)[::-1].copy(), integers(dtype)
    b[b == 0] = 7
    width = 8 * dtype.itemsize
    found = apply(list(INTEGER_OPERATIONS), a, b, c, kind=name, out=dtype)
    for row, (instruction, function) in zip(found, INTEGER_OPERATIONS.items(), strict=True):
        expected = [
            wrap(function(int(x), int(y), int(z), width), dtype)
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert row.tolist() == expected, instruction


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits_and_shifts(bits: int) -> None:
    dtype, ones = np.dtype(f"uint{bits}"), (1 << bits) - 1
    a, b = integers(dtype), integers(dtype)[::-1].copy()
    shift = np.resize(np.array([0, 1, 5, bits - 1, bits, bits + 1, 200, 2**31], np.uint32), 64)
    logic = [
        "and.{t} {d}, {a}, {b}",
        "or.{t} {d}, {a}, {b}",
        "xor.{t} {d}, {a}, {b}",
        "not.{t} {d}, {a}",
    ]
    found = apply(logic, a, b, kind=f"b{bits}", out=dtype)
    for row, expected in zip(found, (a & b, a | b, a ^ b, ~a), strict=True):
        np.testing.assert_array_equal(row, expected)
    shifts = [
        f"shl.b{bits} {{d}}, {{a}}, {{b}}",
        f"shr.u{bits} {{d}}, {{a}}, {{b}}",
        f"shr.s{bits} {{d}}, {{a}}, {{b}}",
    ]
    left, right, signed = apply(shifts, a, shift, out=dtype)
    for i, (x, n) in enumerate(zip(a.tolist(), shift.tolist(), strict=True)):
        assert left[i] == x << min(n, bits) & ones
        assert right[i] == x >> min(n, bits)
        assert signed[i] == wrap(x, np.dtype(f"int{bits}")) >> min(n, bits) & ones


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    dtype = np.dtype(f"uint{bits}")
    a, b = integers(dtype), integers(dtype)[::-1].copy()
    ones = (1 << bits) - 1
    fields = [(0, 1), (3, 7), (bits - 4, 8), (bits + 2, 5), (0, bits), (5, 0)]
    code = []
    for position, length in fields:
        code.append(f"bfe.u{bits} {{d}}, {{a}}, {position}, {length}")
        code.append(f"bfe.s{bits} {{d}}, {{a}}, {position}, {length}")
        code.append(f"bfi.b{bits} {{d}}, {{a}}, {{b}}, {position}, {length}")
    found = apply(code, a, b, out=dtype).reshape(len(fields), 3, -1)
    for (position, length), (plain, signed, inserted) in zip(fields, found, strict=True):
        mask = (1 << length) - 1
        kept = max(min(length, bits - position), 0)
        for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            assert plain[i] == x >> position & mask
            sign = length and x >> min(position + length - 1, bits - 1) & 1
            field = x >> position & (1 << kept) - 1
            assert signed[i] == (field | (ones << kept if sign else 0)) & ones
            assert inserted[i] == (y & ~(mask << position) | (x & mask) << position) & ones


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    dtype = np.dtype(f"uint{bits}")
    a = integers(dtype)
    counts = apply(
        [f"popc.b{bits} {{d}}, {{a}}", f"clz.b{bits} {{d}}, {{a}}", f"bfind.u{bits} {{d}}, {{a}}"],
        a,
        out=np.uint32,
    )
    assert counts[0].tolist() == [x.bit_count() for x in a.tolist()]
    assert counts[1].tolist() == [bits - x.bit_length() for x in a.tolist()]
    assert counts[2].tolist() == [(x.bit_length() - 1) % 2**32 for x in a.tolist()]
    (reverse,) = apply([f"brev.b{bits} {{d}}, {{a}}"], a, out=dtype)
    assert reverse.tolist() == [int(f"{x:0{bits}b}"[::-1], 2) for x in a.tolist()]


def test_wide_products_and_permutations() -> None:
    a, b, c = (integers(np.uint32)[:: (-1) ** i].copy() for i in range(3))
    wide = apply(
        [
            "mul.wide.u32 {d}, {a}, {b}",
            "mul.wide.s32 {d}, {a}, {b}",
            "mad.wide.u32 {d}, {a}, {b}, 12345678901",
        ],
        a,
        b,
        out=np.uint64,
    )
    product = a.astype(np.uint64) * b
    np.testing.assert_array_equal(wide[0], product)
    np.testing.assert_array_equal(
        wide[1].view(np.int64), a.view(np.int32).astype(np.int64) * b.view(np.int32)
    )
    np.testing.assert_array_equal(wide[2], product + np.uint64(12345678901))
    narrow = apply(
        [
            "shf.l.wrap.b32 {d}, {a}, {b}, 13",
            "shf.r.clamp.b32 {d}, {a}, {b}, 40",
            "prmt.b32 {d}, {a}, {b}, 0x7a31",
            "lop3.b32 {d}, {a}, {b}, {c}, 0x96",
            "lop3.b32 {d}, {a}, {b}, {c}, 0xe8",
        ],
        a,
        b,
        c,
        out=np.uint32,
    )
    both = b.astype(np.uint64) << np.uint64(32) | a
    np.testing.assert_array_equal(
        narrow[0], (both << np.uint64(13) >> np.uint64(32)).astype(np.uint32)
    )
    np.testing.assert_array_equal(narrow[1], b)
    source = both.view(np.uint8).reshape(-1, 8)
    sign = np.where(source[:, 2] & 0x80, 0xFF, 0)  # selector 0xa replicates the sign of byte 2
    expected = (
        source[:, 1]
        | source[:, 3].astype(np.uint32) << 8
        | sign << 16
        | source[:, 7].astype(np.uint32) << 24
    )
    np.testing.assert_array_equal(narrow[2], expected)
    np.testing.assert_array_equal(narrow[3], a ^ b ^ c)
    np.testing.assert_array_equal(narrow[4], a & b | a & c | b & c)


def floats(dtype: Any, count: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count) * np.exp2(rng.integers(-8, 9, count))
    values[:6] = [0, -0.0, np.inf, -np.inf, np.nan, 1]
    return values.astype(dtype)


FLOAT_TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}


def assert_same(found: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Equal with NaN equal to NaN."""
    np.testing.assert_array_equal(found.astype(np.float64), expected.astype(np.float64), what)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero", "ignore:overflow")
@pytest.mark.parametrize("name", FLOAT_TYPES)
def test_float_arithmetic(name: str) -> None:
    dtype = FLOAT_TYPES[name]
    a, b, c = floats(dtype), floats(dtype, seed=1)[::-1].copy(), floats(dtype, seed=2)
    exact = np.float64 if name in ("f16", "bf16") else np.longdouble
    x, y, z = (v.astype(exact) for v in (a, b, c))
    operations = {
        "add.rn.{t} {d}, {a}, {b}": (x + y).astype(dtype),
        "sub.rn.{t} {d}, {a}, {b}": (x - y).astype(dtype),
        "mul.rn.{t} {d}, {a}, {b}": (x * y).astype(dtype),
        "fma.rn.{t} {d}, {a}, {b}, {c}": (x * y + z).astype(dtype),
        "neg.{t} {d}, {a}": -a,
        "abs.{t} {d}, {a}": np.abs(a),
        "min.{t} {d}, {a}, {b}": np.fmin(a, b),
        "max.{t} {d}, {a}, {b}": np.fmax(a, b),
    }
    if name != "f64":
        operations["max.NaN.{t} {d}, {a}, {b}"] = np.maximum(a, b)
    if name in ("f32", "f64"):
        operations["div.rn.{t} {d}, {a}, {b}"] = a / b
        operations["sqrt.rn.{t} {d}, {a}"] = np.sqrt(a)
    found = apply(
        list(operations), a, b, c, kind=name, out=np.dtype(f"u{np.dtype(dtype).itemsize}")
    )
    for row, (instruction, expected) in zip(found.view(dtype), operations.items(), strict=True):
        assert_same(row, expected, instruction)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_packed_arithmetic(name: str) -> None:
    dtype = FLOAT_TYPES[name]
    a, b, c = (floats(dtype, 128, seed)[:: (-1) ** seed].copy() for seed in range(3))
    packed = [v.view(np.uint32) for v in (a, b, c)]
    found = apply(
        [
            "add.rn.{t}x2 {d}, {a}, {b}",
            "fma.rn.{t}x2 {d}, {a}, {b}, {c}",
            "max.{t}x2 {d}, {a}, {b}",
        ],
        *packed,
        kind=name,
        out=np.uint32,
    )
    x, y, z = (v.astype(np.float64) for v in (a, b, c))
    with np.errstate(invalid="ignore", over="ignore"):
        assert_same(found[0].view(dtype), (x + y).astype(dtype))
        assert_same(found[1].view(dtype), (x * y + z).astype(dtype))
        assert_same(found[2].view(dtype), np.fmax(a, b))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero", "ignore:overflow")
def test_special_functions_and_rounding() -> None:
    a = floats(np.float32)
    a[6:10] = [1e-40, -1e-40, 3e-39, 0.5]
    x = a.astype(np.float64)
    found = apply(
        [
            "ex2.approx.ftz.f32 {d}, {a}",
            "lg2.approx.f32 {d}, {a}",
            "rcp.approx.f32 {d}, {a}",
            "rsqrt.approx.f32 {d}, {a}",
            "tanh.approx.f32 {d}, {a}",
            "mul.ftz.f32 {d}, {a}, 0f3F800000",
            "add.sat.f32 {d}, {a}, 0f00000000",
            "add.rm.f32 {d}, {a}, 0f4B400001",
            "add.rp.f32 {d}, {a}, 0f4B400001",
        ],
        a,
        out=np.uint32,
    ).view(np.float32)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        exp2 = np.where(np.exp2(x) < 2.0**-126, 0, np.exp2(x))
        for row, expected in zip(
            found, (exp2, np.log2(x), 1 / x, 1 / np.sqrt(x), np.tanh(x)), strict=False
        ):
            np.testing.assert_allclose(row, expected.astype(np.float32), rtol=1e-5)
    np.testing.assert_array_equal(found[5], np.where(np.abs(a) < 2.0**-126, 0, a))
    np.testing.assert_array_equal(found[6], np.where(np.isnan(a), 0, np.clip(a, 0, 1)))
    finite = np.isfinite(a) & (np.abs(a) > 1e-9)
    step = 12582913.0 + x[finite]  # floats there are 1 apart
    np.testing.assert_array_equal(found[7][finite], np.floor(step))
    np.testing.assert_array_equal(found[8][finite], np.ceil(step))


def test_comparisons() -> None:
    a, b = floats(np.float32), floats(np.float32, seed=3)
    b[::4] = a[::4]
    nan = np.isnan(a) | np.isnan(b)
    operators = {
        "eq": a == b,
        "ne": (a != b) & ~nan,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }
    operators |= {f"{name}u": held | nan for name, held in operators.items()}
    operators |= {"num": ~nan, "nan": nan}
    code = [f"setp.{o}.f32 %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1" for o in operators]
    found = apply(code, a.view(np.uint32), b.view(np.uint32), out=np.uint32)
    for row, (operator, expected) in zip(found, operators.items(), strict=True):
        assert row.astype(bool).tolist() == expected.tolist(), operator
    both = "setp.lt.s32 %p1, {a}, {b}; setp.gt.and.u32 %p2|%p3, {a}, 7, %p1; "
    u, v = integers(np.uint32), integers(np.uint32)[::-1].copy()
    found = apply(
        [
            both + "selp.b32 {d}, 1, 0, %p2",
            both + "selp.b32 {d}, 1, 0, %p3",
            "set.lo.u32.u32 {d}, {a}, {b}",
        ],
        u,
        v,
        out=np.uint32,
    )
    less = u.view(np.int32) < v.view(np.int32)
    np.testing.assert_array_equal(found[0].astype(bool), (u > 7) & less)
    np.testing.assert_array_equal(found[1].astype(bool), (u <= 7) & less)
    np.testing.assert_array_equal(found[2], np.where(u < v, 2**32 - 1, 0))


# ---- Conversions.


def test_conversions_of_floats() -> None:
    a, b = floats(np.float32), floats(np.float32, seed=4)
    a[8:12] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 65519.9, 1e-7]  # ties, overflow, subnormals
    halves = apply(
        ["cvt.rn.f16.f32 {d}, {a}", "cvt.rn.bf16.f32 {d}, {a}", "cvt.rz.bf16.f32 {d}, {a}"],
        a,
        out=np.uint16,
    )
    with np.errstate(over="ignore"):
        assert_same(halves[0].view(np.float16), a.astype(np.float16))
    assert_same(halves[1].view(ml_dtypes.bfloat16), a.astype(ml_dtypes.bfloat16))
    finite = np.isfinite(a)
    np.testing.assert_array_equal(halves[2][finite], a.view(np.uint32)[finite] >> 16)
    packed = apply(
        [
            "cvt.rn.f16x2.f32 {d}, {a}, {b}",
            "cvt.rn.bf16x2.f32 {d}, {a}, {b}",
            "cvt.rna.tf32.f32 {d}, {a}",
        ],
        a,
        b,
        out=np.uint32,
    )
    for row, dtype in zip(packed, (np.float16, ml_dtypes.bfloat16), strict=False):
        low, high = row.view(dtype).reshape(-1, 2).T  # the first source is the upper half
        with np.errstate(over="ignore"):
            assert_same(high, a.astype(dtype))
            assert_same(low, b.astype(dtype))
    tf32 = packed[2].view(np.float32)
    assert (np.abs(tf32[finite] - a[finite]) <= np.abs(a[finite]) * 2.0**-11).all()
    assert (packed[2][finite] & 0x1FFF == 0).all()


@pytest.mark.parametrize(
    "name,dtype", [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_conversions_of_8_bit_floats(name: str, dtype: Any) -> None:
    a = floats(np.float32)
    a[8:14] = [447, 449, 1e6, 2.0**-9, 2.0**-10, 1e-9]
    (found,) = apply([f"cvt.rn.satfinite.{name}x2.f32 {{d}}, {{a}}, 0f3F800000"], a, out=np.uint16)
    largest = float(ml_dtypes.finfo(dtype).max)
    assert_same(
        (found >> 8).astype(np.uint8).view(dtype), np.clip(a, -largest, largest).astype(dtype)
    )
    assert_same((found & 0xFF).astype(np.uint8).view(dtype), np.ones(64, dtype))
    every = np.arange(256, dtype=np.uint16) | np.uint16(0x3C00)
    (halves,) = apply([f"cvt.rn.f16x2.{name}x2 {{d}}, {{a}}"], every[:128], out=np.uint32)
    low = (every[:128] & 0xFF).astype(np.uint8).view(dtype)
    assert_same((halves & 0xFFFF).astype(np.uint16).view(np.float16), low.astype(np.float16))


def test_conversions_to_integers() -> None:
    a = floats(np.float32)
    a[8:14] = [0.5, 1.5, -2.5, 3e9, -3e9, 254.5]
    clean = np.nan_to_num(a.astype(np.float64), nan=0, posinf=1e30, neginf=-1e30)
    roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for kind, info in (("s32", np.iinfo(np.int32)), ("u32", np.iinfo(np.uint32))):
        found = apply([f"cvt.{r}.{kind}.f32 {{d}}, {{a}}" for r in roundings], a, out=np.uint32)
        for row, function in zip(found.view(info.dtype), roundings.values(), strict=True):
            np.testing.assert_array_equal(
                row, np.clip(function(clean), info.min, info.max).astype(info.dtype)
            )
    x = integers(np.uint32)
    found = apply(
        [
            "cvt.s32.s8 {d}, {a}",
            "cvt.u32.u16 {d}, {a}",
            "cvt.sat.u32.s32 {d}, {a}",
            "cvt.rn.f32.s32 {d}, {a}",
        ],
        x,
        out=np.uint32,
    )
    np.testing.assert_array_equal(found[0].view(np.int32), x.astype(np.int8))
    np.testing.assert_array_equal(found[1], x & 0xFFFF)
    np.testing.assert_array_equal(found[2], np.maximum(x.view(np.int32), 0))
    np.testing.assert_array_equal(found[3].view(np.float32), x.view(np.int32).astype(np.float32))
    (wide,) = apply(["cvt.s64.s32 {d}, {a}"], x, out=np.uint64)
    np.testing.assert_array_equal(wide.view(np.int64), x.view(np.int32))
