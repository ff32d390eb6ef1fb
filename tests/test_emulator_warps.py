"""Instructions that a warp executes together, and access to memory, against NumPy."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatorError, load
from emulator_programs import (
    apply,
    fragments_of,
    integers,
    launch,
    needs_compiler,
    per_thread,
    program,
    small_values,
)

pytestmark = needs_compiler


def shuffle_source(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Lane read and whether it is in range, as in the PTX manual."""
    clamp, segment = c & 31, c >> 8 & 31
    high, low = (lane & segment) | (clamp & ~segment), lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
    ok = j >= high if mode == "up" else j <= high
    return (j if ok else lane), ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    x = np.arange(100, 132, dtype=np.uint32)
    cases = [
        (b, (32 - width) << 8 | (0 if mode == "up" else 31))
        for b in (0, 1, 3, 18)
        for width in (32, 8)
    ]
    code = [
        f"shfl.sync.{mode}.b32 %r1|%p1, {{a}}, {b}, {c}, -1; selp.b32 %r2, 1000, 0, %p1; "
        "add.u32 {d}, %r1, %r2"
        for b, c in cases
    ]
    found = apply(code, x, out=np.uint32)
    for row, (b, c) in zip(found, cases, strict=True):
        sources = [shuffle_source(mode, lane, b, c) for lane in range(32)]
        assert row.tolist() == [100 + j + 1000 * ok for j, ok in sources], (b, c)


def test_votes_and_reductions() -> None:
    x = integers(np.uint32)[:32].copy()
    found = apply(
        [
            "setp.gt.u32 %p1, {a}, 1000; vote.sync.ballot.b32 {d}, %p1, -1",
            "setp.ge.u32 %p1, {a}, 0; vote.sync.all.pred %p2, %p1, -1; selp.u32 {d}, 1, 0, %p2",
            "setp.eq.u32 %p1, {a}, 0; vote.sync.any.pred %p2, %p1, -1; selp.u32 {d}, 1, 0, %p2",
            "redux.sync.add.u32 {d}, {a}, -1",
            "redux.sync.min.s32 {d}, {a}, -1",
            "redux.sync.max.u32 {d}, {a}, -1",
            "redux.sync.xor.b32 {d}, {a}, -1",
            "elect.sync _|%p1, -1; vote.sync.ballot.b32 {d}, %p1, -1",
        ],
        x,
        out=np.uint32,
    )
    ballot = sum(1 << i for i in range(32) if x[i] > 1000)
    signed_minimum = int(x.view(np.int32).min()) % 2**32
    expected = [
        ballot,
        1,
        int((x == 0).any()),
        int(x.sum(dtype=np.uint32)),
        signed_minimum,
        int(x.max()),
    ]
    expected.append(int(np.bitwise_xor.reduce(x)))
    for row, value in zip(found, expected, strict=False):
        assert (row == value).all()
    assert int(found[7, 0]).bit_count() == 1


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrix_loads_and_stores(count: int, trans: str) -> None:
    """Each thread stores its fragment of `matrices` by stmatrix and loads it back by ldmatrix."""
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    loads = "\n".join(f"ld.global.b32 %r{10 + i}, [%rd10+{128 * i}];" for i in range(count))
    stores = "\n".join(f"st.global.b32 [%rd11+{128 * i}], %r{10 + i};" for i in range(count))
    kernel = program(
        f"""
        {per_thread(2, 4, "%rd10")} {per_thread(0, 4, "%rd11")} {loads}
        mov.u32 %r1, smem; shl.b32 %r2, %r0, 4; add.u32 %r1, %r1, %r2;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1], {registers};
        bar.warp.sync -1;
        shl.b32 %r3, %r0, 2; mov.u32 %r4, smem; add.u32 %r4, %r4, %r3;
        mov.u32 %r5, 0;
        again:
        ld.shared.b32 %r6, [%r4];
        {per_thread(1, 4, "%rd12")} mul.wide.u32 %rd13, %r5, 128; add.u64 %rd12, %rd12, %rd13;
        st.global.b32 [%rd12], %r6;
        add.u32 %r4, %r4, 128; add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, {count}; @%p1 bra again;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r1];
        {stores}""",
        3,
    )
    rng = np.random.default_rng(0)
    fragments = rng.integers(0, 2**32, (count, 32), dtype=np.uint32)
    back, image = np.zeros_like(fragments), np.zeros_like(fragments)
    stats = launch(kernel, back, image, fragments)
    np.testing.assert_array_equal(back, fragments)
    matrices = image.view(np.uint16).reshape(count, 8, 8)
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    expected = fragments.view(np.uint16).reshape(count, 8, 4, 2)  # lane = 4 row + column / 2
    np.testing.assert_array_equal(matrices.reshape(count, 8, 4, 2), expected)
    assert stats.bank_wavefronts == stats.bank_ideal == 2 * count


@pytest.mark.parametrize(
    "name,k,accumulate",
    [
        ("bf16", 16, "f32"),
        ("bf16", 8, "f32"),
        ("f16", 16, "f32"),
        ("f16", 16, "f16"),
        ("e4m3", 32, "f32"),
        ("e5m2", 32, "f32"),
        ("tf32", 8, "f32"),
        ("tf32", 4, "f32"),
    ],
)
def test_mma(name: str, k: int, accumulate: str) -> None:
    a, b = small_values((16, k), name, 0), small_values((8, k), name, 1)
    c = (
        np.random.default_rng(2)
        .integers(-4, 5, (16, 8))
        .astype(np.float32 if accumulate == "f32" else np.float16)
    )
    lanes = np.arange(32)
    rows, columns = lanes // 4, lanes % 4 * 2
    places = [(rows + 8 * (i // 2), columns + i % 2) for i in range(4)]
    c_fragment = np.stack([c[p] for p in places], axis=1).view(np.uint32)
    inputs = [fragments_of(a, 16), fragments_of(b, 8), c_fragment]
    names, code, first = [], "", 10
    for index, fragment in enumerate(inputs):
        registers = [f"%r{first + i}" for i in range(fragment.shape[1])]
        names.append("{" + ", ".join(registers) + "}")
        code += per_thread(index + 1, 4 * len(registers), "%rd10")
        code += "".join(f"ld.global.b32 {r}, [%rd10+{4 * i}];" for i, r in enumerate(registers))
        first += len(registers)
    code += f"mma.sync.aligned.m16n8k{k}.row.col.{accumulate}.{name}.{name}.{accumulate} "
    code += f"{names[2]}, {names[0]}, {names[1]}, {names[2]};"
    width = c_fragment.shape[1]
    code += per_thread(0, 4 * width, "%rd10")
    code += "".join(f"st.global.b32 [%rd10+{4 * i}], %r{first - width + i};" for i in range(width))
    found = np.zeros_like(c_fragment)
    stats = launch(program(code, 4), found, *inputs)
    expected = a.astype(np.float64) @ b.astype(np.float64).T + c
    result = found.view(c.dtype)
    for i, place in enumerate(places):
        np.testing.assert_array_equal(result[:, i], expected[place])
    assert stats.mma == 1


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size: int) -> None:
    kernel = program(
        f"""
        {per_thread(1, size, "%rd10")} {per_thread(0, size, "%rd11")}
        mad.lo.u32 %r1, %r0, {size}, smem; and.b32 %r2, %r0, {size - 1};
        cp.async.ca.shared.global.L2::128B [%r1], [%rd10], {size}, %r2;
        cp.async.commit_group; cp.async.wait_group 0;
        mov.u32 %r3, 0;
        again: add.u32 %r4, %r1, %r3; cvt.u64.u32 %rd12, %r3; add.u64 %rd12, %rd12, %rd11;
        ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd12], %r5;
        add.u32 %r3, %r3, 4; setp.lt.u32 %p1, %r3, {size}; @%p1 bra again;""",
        2,
    )
    source = np.random.default_rng(0).integers(1, 256, (32, size), dtype=np.uint8)
    for schedule in ("eager", "lazy", "random"):
        found = np.zeros_like(source)
        stats = launch(kernel, found, source, schedule=schedule)
        kept = np.arange(size) < (np.arange(32) & (size - 1))[:, None]
        np.testing.assert_array_equal(found, np.where(kept, source, 0))
        assert stats.cp_async == 32
        assert stats.bytes_read == (0, np.count_nonzero(kept))


def test_vector_loads_and_reductions_to_global_memory() -> None:
    kernel = program(
        f"""
        mul.wide.u32 %rd10, %r0, 16; add.u64 %rd11, %rd1, %rd10;
        ld.global.nc.L1::no_allocate.v4.f32 {{%r1, %r2, %r3, %r4}}, [%rd11];
        red.global.add.v4.f32 [%rd0], {{%r1, %r2, %r3, %r4}};
        red.relaxed.gpu.global.add.v2.f32 [%rd0+16], {{%r3, %r4}};
        red.global.add.f32 [%rd0+24], %r1;
        mov.b32 %r5, 0x3f803f80; red.global.add.noftz.bf16x2 [%rd0+28], %r5;
        {per_thread(2, 4, "%rd12")}
        atom.global.add.u32 %r6, [%rd0+32], 1;
        atom.global.cas.b32 %r7, [%rd0+36], 0, %r6;
        atom.global.max.s32 %r8, [%rd0+40], %r0;
        red.global.or.b32 [%rd0+44], 4;
        atom.global.inc.u32 %r9, [%rd0+48], 9;
        st.global.u32 [%rd12], %r6;""".replace(
            "red.global.add.noftz", "mov.b32 %r5, 0x3f803f80; red.global.add.noftz"
        ),
        3,
    )
    x = np.random.default_rng(0).integers(-8, 9, (128, 4)).astype(np.float32)
    out, tickets = np.zeros(16, np.uint32), np.zeros(128, np.uint32)
    launch(kernel, out, x, tickets, block=128)
    np.testing.assert_array_equal(out[:4].view(np.float32), x.sum(0))
    np.testing.assert_array_equal(out[4:6].view(np.float32), x.sum(0)[2:])
    assert out[6:7].view(np.float32)[0] == x[:, 0].sum()
    assert out[7:8].view(ml_dtypes.bfloat16).tolist() == [128, 128]
    assert sorted(tickets) == list(range(128))
    assert out[8] == 128 and out[10] == 127 and out[11] == 4 and out[12] == 128 % 10


def test_shared_atomics_are_no_race() -> None:
    kernel = program(
        """
        mov.u32 %r1, smem; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r1], 5;
        bar.sync 0; atom.shared.add.u32 %r2, [%r1], %r0; bar.sync 0;
        ld.shared.u32 %r3, [%r1]; @%p1 st.global.u32 [%rd0], %r3;"""
    )
    out = np.zeros(1, np.uint32)
    launch(kernel, out, block=128)
    assert out[0] == 5 + 127 * 64


def test_local_memory_constants_and_generic_addresses() -> None:
    kernel = program(
        """
        .local .align 16 .b8 depot[16];
        .reg .b64 %SP; mov.u64 %SP, depot; cvta.local.u64 %rd20, %SP;
        st.local.u32 [%SP+4], %r0; ld.u32 %r1, [%rd20+4];
        mov.u64 %rd10, table; cvta.global.u64 %rd11, %rd10;
        and.b32 %r2, %r0, 3; mul.wide.u32 %rd12, %r2, 4;
        add.u64 %rd11, %rd11, %rd12; ld.u32 %r3, [%rd11];
        mov.u32 %r4, smem; cvt.u64.u32 %rd13, %r4; cvta.shared.u64 %rd13, %rd13;
        mul.wide.u32 %rd14, %r0, 4; add.u64 %rd13, %rd13, %rd14; st.u32 [%rd13], %r3;
        isspacep.shared %p1, %rd13; selp.u32 %r5, 1000, 0, %p1;
        cvta.to.shared.u64 %rd15, %rd13; cvt.u32.u64 %r6, %rd15; ld.shared.u32 %r7, [%r6];
        targets: .branchtargets $L0, $L1, $L0, $L1;
        brx.idx %r2, targets;
        $L1: add.u32 %r7, %r7, 10000;
        $L0: add.u32 %r8, %r1, %r7; add.u32 %r8, %r8, %r5;
        add.u64 %rd16, %rd0, %rd14; st.global.u32 [%rd16], %r8;""",
        module=".global .align 4 .u32 table[4] = {100, 200, 300, 400};",
    )
    out = np.zeros(32, np.uint32)
    launch(kernel, out)
    lanes = np.arange(32)
    np.testing.assert_array_equal(out, lanes + 100 * (lanes % 4 + 1) + 1000 + 10000 * (lanes % 2))
    beyond = ".local .align 4 .b8 depot[16]; .reg .b64 %SP; mov.u64 %SP, depot; "
    beyond += "ld.local.u32 %r1, [%SP+16];"
    with pytest.raises(EmulatorError, match="local memory out of bounds"):
        launch(program(beyond), out)


def test_parameters_are_passed_by_value() -> None:
    kernel = load(
        """.version 8.0 .target sm_80 .address_size 64
        .entry test(.param .align 8 .b8 s[16], .param .u64 .ptr .global .align 1 out,
                    .param .f32 x, .param .u16 y) {
        .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .b16 %h<2>;
        ld.param.u64 %rd1, [s]; ld.param.u32 %r1, [s+8]; ld.param.u64 %rd2, [out];
        ld.param.f32 %r2, [x]; ld.param.u16 %h1, [y];
        st.global.u64 [%rd2], %rd1; st.global.v2.b32 [%rd2+8], {%r1, %r2};
        st.global.u16 [%rd2+16], %h1; ret; }"""
    )
    out = np.zeros(3, np.uint64)
    record = np.array([(2**40, 7, 0)], [("a", np.uint64), ("b", np.uint32), ("pad", np.uint32)])
    kernel.launch((1,), (32,), 0, [record, out, 1.5, np.uint16(9)], buffers=[out])
    assert out.tolist() == [2**40, struct.unpack("<Q", struct.pack("<If", 7, 1.5))[0], 9]
    with pytest.raises(ValueError, match="args\\[0\\] has 8 bytes, parameter s of test has 16"):
        kernel.launch((1,), (32,), 0, [bytes(8), out, 1.5, 9])
    with pytest.raises(ValueError, match="3 args, test has 4 parameters"):
        kernel.launch((1,), (32,), 0, [record, out, 1.5])
