"""Bulk copies, TMA, wgmma and setmaxnreg: results against NumPy, and what has to be an error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from emulator import EmulatorError, Kernel, load, tensor_map
from emulator_programs import (
    FORMATS,
    fragments_of,
    launch,
    needs_compiler,
    per_thread,
    program,
    small_values,
)

pytestmark = needs_compiler

BARRIER = """
    mov.u32 %r1, smem; add.u32 %r2, %r1, 1024; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    bar.sync 0;
"""
WAIT = """
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra wait;
"""


def bulk_load(pointer: int, size: int) -> str:
    return f"""
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {size};
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r2], [%rd{pointer}], {size}, [%r1];
    """


def bulk_store(pointer: int, size: int) -> str:
    return f"""
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd{pointer}], [%r2], {size};
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;
    """


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_bulk_copies(schedule: str) -> None:
    source = np.arange(512, dtype=np.float32)
    out, total = np.zeros_like(source), np.ones_like(source)
    reduce = "@%p1 cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd2], [%r2], 2048;"
    kernel = program(BARRIER + bulk_load(1, 2048) + WAIT + reduce + bulk_store(0, 2048), 3)
    stats = launch(kernel, out, source, total, schedule=schedule)
    np.testing.assert_array_equal(out, source)
    np.testing.assert_array_equal(total, source + 1)
    assert (stats.tma_loads, stats.tma_stores, stats.bytes_loaded) == (1, 2, 2048)
    assert stats.bytes_read == (0, 2048, 0)
    with pytest.raises(EmulatorError, match="race: ld.shared.* the write by a bulk load"):
        launch(
            program(BARRIER + bulk_load(1, 2048) + "ld.shared.u32 %r4, [%r2];" + WAIT, 3),
            out,
            source,
            total,
            schedule=schedule,
        )


def test_missing_wait_shows_as_poison_without_the_race_detector() -> None:
    source, out = np.arange(512, dtype=np.uint32), np.zeros(1, np.uint32)
    kernel = program(
        BARRIER
        + bulk_load(1, 2048)
        + "ld.shared.u32 %r4, [%r2]; st.global.u32 [%rd0], %r4;"
        + WAIT,
        2,
    )
    launch(kernel, out, source, schedule="lazy", races=False)
    assert out[0] == 0xFFFFFFFF


def test_proxy_fence_between_store_and_bulk_store() -> None:
    write = (
        "shl.b32 %r5, %r0, 2; add.u32 %r6, %r2, %r5; st.shared.u32 [%r6], %r0; {} bar.sync 0; {}"
    )
    out = np.zeros(32, np.uint32)
    fence = "fence.proxy.async.shared::cta;"
    for by_writers, by_issuer in ((fence, ""), ("", fence)):
        launch(program(BARRIER + write.format(by_writers, by_issuer) + bulk_store(0, 128)), out)
        assert out.tolist() == list(range(32))
    with pytest.raises(EmulatorError, match="proxy: bulk store reads"):
        launch(program(BARRIER + write.format("", "") + bulk_store(0, 128)), out)
    with pytest.raises(EmulatorError, match="race"):
        launch(
            program(
                BARRIER + write.replace("bar.sync 0;", "").format(fence, "") + bulk_store(0, 256)
            ),
            np.zeros(64, np.uint32),
            block=64,
        )
    with pytest.raises(EmulatorError, match="exits with a bulk store"):
        unwaited = bulk_store(0, 128).replace("wait_group 0", "wait_group 1")
        launch(program(BARRIER + write.format(fence, "") + unwaited), out)


def swizzled_image(data: np.ndarray, span: int) -> np.ndarray:
    """The bytes of `data` where the swizzle puts them: address bits 4-6 ^= bits 7-9."""
    flat = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    address = np.arange(flat.size)
    if span:
        address ^= (address >> 7 & (span // 16 - 1)) << 4
    image = np.empty_like(flat)
    image[address] = flat
    return image


# Shape, box, where the box starts (in the order of the axes), swizzle.
BOXES = [
    ((40,), (16,), (32,), 0),
    ((9, 64), (8, 16), (4, 56), 64),
    ((9, 64), (8, 32), (-3, 48), 128),
    ((3, 5, 32), (2, 4, 8), (2, -1, -4), 32),
    ((2, 3, 5, 32), (1, 2, 8, 32), (1, 2, 0, 0), 128),
    ((2, 2, 3, 5, 16), (2, 1, 2, 4, 16), (1, 1, 0, 3, 8), 64),
]


def visible(
    shape: Sequence[int], box: Sequence[int], at: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """For each element of the box: is it inside, and its flat index in the tensor."""
    index = np.indices(box) + np.array(at).reshape(-1, *[1] * len(box))
    extent = np.array(shape).reshape(-1, *[1] * len(box))
    inside = ((index >= 0) & (index < extent)).all(0)
    return inside, np.ravel_multi_index(np.where(inside, index, 0), shape)


@pytest.mark.parametrize("shape,box,at,swizzle", BOXES)
def test_tensor_copies(
    shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], swizzle: int
) -> None:
    rank, size = len(shape), math.prod(box) * 4
    coordinates = ", ".join(str(c) for c in at[::-1])
    tensor = f"[map, {{{coordinates}}}]"
    map_address = "mov.b64 %rd10, map; cvta.param.u64 %rd11, %rd10;"

    def build_kernel(body: str) -> Kernel:
        text = f""".version 8.8 .target sm_90a .address_size 64
            .extern .shared .align 1024 .b8 smem[];
            .entry test(.param .align 64 .b8 map[128], .param .u64 p1) {{
            .reg .pred %p<8>; .reg .b32 %r<8>; .reg .b64 %rd<16>;
            {map_address} ld.param.u64 %rd1, [p1]; mov.u32 %r0, %tid.x; {BARRIER} {body} ret; }}"""
        return load(text.replace("[map,", "[%rd11,"))

    rng = np.random.default_rng(rank)
    array = rng.integers(1, 100, shape).astype(np.float32)
    inside, index = visible(shape, box, at)
    load_opcode = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile"
    load_opcode += ".mbarrier::complete_tx::bytes.L2::cache_hint"
    load_box = build_kernel(
        f"""@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {size};
        @%p1 {load_opcode} [%r2], {tensor}, [%r1], 0x1000000000000000;
        {WAIT} {bulk_store(1, size)}"""
    )
    image = np.zeros(size, np.uint8)
    stats = launch(load_box, tensor_map(array, box, swizzle=swizzle), image, buffers=[array, image])
    assert stats.bytes_read == (4 * np.count_nonzero(inside), 0)
    expected = np.where(inside, array.reshape(-1)[index], 0).astype(np.float32)
    np.testing.assert_array_equal(image, swizzled_image(expected, swizzle))

    values = rng.integers(1, 100, box).astype(np.float32)
    source = swizzled_image(values, swizzle)
    commit = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"
    for operation, combine in (("cp.async.bulk", 0), ("cp.reduce.async.bulk", 1)):
        add = ".add" if combine else ""
        kernel = build_kernel(
            f"""{bulk_load(1, size)} {WAIT}
            @%p1 {operation}.tensor.{rank}d.global.shared::cta{add}.tile.bulk_group {tensor}, [%r2];
            {commit}"""
        )
        target = np.ones(shape, np.float32)
        launch(kernel, tensor_map(target, box, swizzle=swizzle), source, buffers=[target, source])
        result = np.ones(math.prod(shape), np.float32)
        result[index[inside]] = values[inside] + combine
        np.testing.assert_array_equal(target.reshape(-1), result)


@pytest.mark.parametrize("schedule", ["eager", "lazy"])
def test_a_load_looks_at_the_own_address_of_its_map(schedule: str) -> None:
    array = np.arange(128, dtype=np.float32).reshape(16, 8)
    below = tensor_map(array, (8, 8), swizzle=0)  # whose rows 8 and on are the only buffer
    load_box = """@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256;
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
            [%r2], [%rd11, {0, 8}], [%r1];"""
    store_box = """@%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group
            [%rd11, {0, 8}], [%r2];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"""

    def run(body: str, other: np.ndarray, *buffers: np.ndarray) -> None:
        text = f""".version 8.8 .target sm_90a .address_size 64
            .extern .shared .align 1024 .b8 smem[];
            .entry test(.param .align 64 .b8 map[128], .param .u64 p1) {{
            .reg .pred %p<8>; .reg .b32 %r<8>; .reg .b64 %rd<16>;
            mov.b64 %rd10, map; cvta.param.u64 %rd11, %rd10; ld.param.u64 %rd1, [p1];
            mov.u32 %r0, %tid.x; {BARRIER} {body} ret; }}"""
        launch(load(text), below, other, buffers=[other, *buffers], schedule=schedule)

    out = np.zeros(64, np.float32)
    run(load_box + WAIT + bulk_store(1, 256), out, array)
    np.testing.assert_array_equal(out, array[8:].reshape(-1))
    with pytest.raises(EmulatorError, match="TMA load: the tensor map's own address.*byte -256"):
        run(load_box + WAIT + bulk_store(1, 256), out, array[8:])
    run(bulk_load(1, 256) + WAIT + store_box, -out, array[8:])
    np.testing.assert_array_equal(array[8:].reshape(-1), -out)


@pytest.mark.parametrize("columns", [16, 20, 24])
def test_stores_cut_rows_at_multiples_of_16_bytes(columns: int) -> None:
    """In 16 bits a row of 20 columns ends inside a chunk: columns 20 to 23 are written too."""
    caller = np.ones((8, 32), np.float16)
    tile = np.arange(8 * 32, dtype=np.float16).reshape(8, 32)
    text = f""".version 8.8 .target sm_90a .address_size 64
        .extern .shared .align 1024 .b8 smem[];
        .entry test(.param .align 64 .b8 map[128], .param .u64 p1) {{
        .reg .pred %p<8>; .reg .b32 %r<8>; .reg .b64 %rd<16>;
        mov.b64 %rd10, map; cvta.param.u64 %rd11, %rd10; ld.param.u64 %rd1, [p1];
        mov.u32 %r0, %tid.x; {BARRIER} {bulk_load(1, tile.nbytes)} {WAIT}
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd11, {{0, 0}}], [%r2];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0; ret; }}"""
    rows = tensor_map(caller[:, :columns], (8, 32), swizzle=0)
    stats = launch(load(text), rows, tile, buffers=[caller, tile])
    written = -(-columns // 8) * 8
    np.testing.assert_array_equal(caller[:, :written], tile[:, :written])
    np.testing.assert_array_equal(caller[:, written:], 1)
    assert stats.bytes_past_extents == 8 * 2 * (written - columns)
    if columns == 20:  # the last row's end is the end of the array
        with pytest.raises(EmulatorError, match="bulk store of 16 bytes .* is out of bounds"):
            launch(load(text), rows, tile, buffers=[caller[:, :columns], tile])


def test_tensor_maps_that_the_driver_would_refuse() -> None:
    x = np.zeros((8, 64), np.float32)
    with pytest.raises(ValueError, match="256 bytes wide"):
        tensor_map(x, (8, 64))
    with pytest.raises(ValueError, match="last axis"):
        tensor_map(x.T, (8, 8))
    with pytest.raises(ValueError, match="multiples of 16"):
        tensor_map(x.reshape(-1)[: 8 * 63].reshape(8, 63), (8, 8))
    with pytest.raises(ValueError, match="each entry must be 1 to 256"):
        tensor_map(np.zeros((300, 32), np.float32), (257, 32))


def operand(matrix: np.ndarray, mn_major: bool, span: int) -> tuple[np.ndarray, int]:
    """Bytes of a (rows, depth) operand in the manual's layout, and its descriptor at address 0."""
    size = matrix.itemsize
    rows, depth = np.indices(matrix.shape)
    width = span or 16
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    if not mn_major:
        leading, stride = 8 * width, (8 if span else 16) * width
        byte = depth * size
        address = (
            rows // 8 * stride
            + rows % 8 * width
            + (byte if span else byte // 16 * leading + byte % 16)
        )
    else:
        byte = rows * size
        leading, stride = (16 * width, 8 * width) if span else (8 * width, 16 * width)
        group, panel = (stride, leading) if span else (leading, stride)
        address = byte // width * panel + byte % width + depth % 8 * width + depth // 8 * group
    if span:
        address = address ^ (address >> 7 & (span // 16 - 1)) << 4
    image = np.zeros(-(-int(address.max() + size) // 1024) * 1024, np.uint8)
    for part in range(size):
        image[address + part] = (
            np.ascontiguousarray(matrix).view(np.uint8).reshape(*matrix.shape, size)[..., part]
        )
    return image, leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def wgmma_program(
    name: str,
    n: int,
    a_bytes: int,
    b_bytes: int,
    fields: tuple[int, int],
    transposed: str,
    rs: bool,
) -> Kernel:
    """D += A B on one warpgroup, D in and out by %rd0, the images of A and B by %rd1."""
    depth = 32 // np.dtype(FORMATS[name]).itemsize
    count = n // 2
    d = [f"%r{100 + i}" for i in range(count)]
    loads = "".join(f"ld.global.b32 {r}, [%rd10+{4 * i}];" for i, r in enumerate(d))
    stores = "".join(f"st.global.b32 [%rd10+{4 * i}], {r};" for i, r in enumerate(d))
    a, fragment = "%rd20", ""
    if rs:
        a = "{%r20, %r21, %r22, %r23}"
        fragment = (
            per_thread(2, 16, "%rd12") + "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd12];"
        )
    return program(
        f"""{BARRIER} {bulk_load(1, a_bytes + b_bytes)} {WAIT}
        {per_thread(0, 4 * count, "%rd10")} {loads} {fragment}
        cvt.u64.u32 %rd20, %r2; shr.u64 %rd20, %rd20, 4; add.u64 %rd21, %rd20, {a_bytes >> 4};
        or.b64 %rd20, %rd20, {fields[0]:#x}; or.b64 %rd21, %rd21, {fields[1]:#x};
        setp.eq.u32 %p3, 0, 0;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{name}.{name}
            {{{", ".join(d)}}}, {a}, %rd21, %p3, 1, 1{transposed};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {stores}""",
        3,
    )


@pytest.mark.parametrize(
    "name,n,a_major,b_major,span",
    [
        ("bf16", 8, "k", "k", 128),
        ("bf16", 64, "k", "k", 64),
        ("f16", 256, "k", "k", 128),
        ("bf16", 128, "k", "mn", 128),
        ("f16", 64, "mn", "mn", 64),
        ("bf16", 32, "mn", "k", 32),
        ("bf16", 64, "registers", "mn", 128),
        ("f16", 40, "registers", "k", 32),
        ("f16", 16, "k", "k", 0),
        ("bf16", 16, "mn", "mn", 0),
        ("e4m3", 64, "k", "k", 128),
        ("e5m2", 24, "registers", "k", 64),
        ("tf32", 32, "k", "k", 128),
    ],
)
def test_wgmma(name: str, n: int, a_major: str, b_major: str, span: int) -> None:
    depth = 32 // np.dtype(FORMATS[name]).itemsize
    a, b = small_values((64, depth), name, 0), small_values((n, depth), name, 1)
    c = np.random.default_rng(2).integers(-4, 5, (64, n)).astype(np.float32)
    a_image, a_fields = operand(a, a_major == "mn", span)
    b_image, b_fields = operand(b, b_major == "mn", span)
    rs = a_major == "registers"
    flags = [f", {int(major == 'mn')}" for major in ([] if rs else [a_major]) + [b_major]]
    transposed = "".join(flags) if name in ("bf16", "f16") else ""
    kernel = wgmma_program(
        name, n, a_image.size, b_image.size, (a_fields, b_fields), transposed, rs
    )
    fragments = np.concatenate([fragments_of(a[16 * w : 16 * w + 16], 16) for w in range(4)])
    thread, i = np.indices((128, n // 2))
    place = (
        thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8,
        i // 4 * 8 + thread % 4 * 2 + i % 2,
    )
    for schedule in ("eager", "lazy", "random"):
        d = c[place]
        stats = launch(
            kernel,
            d,
            np.concatenate([a_image, b_image]),
            fragments,
            block=128,
            smem=1024 + a_image.size + b_image.size,
            schedule=schedule,
        )
        np.testing.assert_array_equal(d, (a.astype(np.float64) @ b.astype(np.float64).T + c)[place])
        assert stats.wgmma == 1


WGMMA_N8 = """
    cvt.u64.u32 %rd20, %r2; shr.u64 %rd20, %rd20, 4;
    or.b64 %rd20, %rd20, 0x4000004000010000; setp.eq.u32 %p3, 0, 0;
    {}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r10, %r11, %r12, %r13}}, {{%r20, %r21, %r22, %r23}}, %rd20, %p3, 1, 1, 0;
    wgmma.commit_group.sync.aligned; {} wgmma.wait_group.sync.aligned 0;
"""
FENCE = "wgmma.fence.sync.aligned;"


@pytest.mark.parametrize(
    "fence,meanwhile,message",
    [
        ("", "", "no wgmma.fence"),
        (FENCE, "mov.u32 %r21, 5;", "A registers were modified"),
        (FENCE, "mul.f32 %r12, %r12, 0f40000000;", "accumulators were modified"),
        (FENCE, "exit;", "exits with wgmma in flight"),
        (FENCE, "@%p1 st.shared.u32 [%r2], 1;", "race: st.shared|proxy: wgmma reads"),
    ],
)
def test_wgmma_errors(fence: str, meanwhile: str, message: str) -> None:
    image, d = np.zeros(1024, np.uint8), np.zeros(4, np.uint32)
    registers = "".join(f"mov.u32 %r{i}, 0;" for i in (*range(10, 14), *range(20, 24)))
    kernel = program(
        BARRIER + bulk_load(1, 1024) + WAIT + registers + WGMMA_N8.format(fence, meanwhile), 2
    )
    with pytest.raises(EmulatorError, match=message):
        launch(kernel, d, image, block=128)


def test_registers_of_a_are_free_after_the_wait_for_their_group() -> None:
    second = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%r10, %r11, %r12, %r13}}, {{%r24, %r25, %r26, %r27}}, %rd20, %p3, 1, 1, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; mov.u32 {}, 5;"""
    image, d = np.zeros(1024, np.uint8), np.zeros(4, np.uint32)
    registers = "".join(f"mov.u32 %r{i}, 0;" for i in (*range(10, 14), *range(20, 28)))
    before = BARRIER + bulk_load(1, 1024) + WAIT + registers
    first_group, second_group = (
        program(before + WGMMA_N8.format(FENCE, second.format(register)), 2)
        for register in ("%r21", "%r25")
    )
    for schedule in ("eager", "lazy", "random"):
        assert launch(first_group, d, image, block=128, schedule=schedule).wgmma == 2
        with pytest.raises(EmulatorError, match="A registers were modified"):
            launch(second_group, d, image, block=128, schedule=schedule)


def test_register_budget() -> None:
    body = """setp.lt.u32 %p1, %r0, 128; @%p1 bra producer;
        setmaxnreg.inc.sync.aligned.u32 {consumer}; bar.sync 1, 256; ret;
        producer: setmaxnreg.dec.sync.aligned.u32 24;"""
    out = np.zeros(1, np.uint32)
    for schedule in ("eager", "lazy", "random"):
        stats = launch(program(body.format(consumer=240)), out, block=384, schedule=schedule)
        assert stats.registers == 128 * (24 + 2 * 240)
    with pytest.raises(
        EmulatorError, match=r"(?s)deadlock.*setmaxnreg.inc 248: waits for registers, \d+ are free"
    ):
        launch(program(body.format(consumer=248)), out, block=384)
    with pytest.raises(EmulatorError, match="multiples of 8"):
        launch(program("setmaxnreg.dec.sync.aligned.u32 20;"), out, block=128)
    with pytest.raises(EmulatorError, match="setmaxnreg.inc 64: the warp has 168"):
        launch(program("setmaxnreg.inc.sync.aligned.u32 64;"), out, block=384)


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_cp_async_completes_on_an_mbarrier(schedule: str) -> None:
    body = BARRIER.replace("], 1;", "], 32;") + per_thread(1, 4, "%rd10") + "shl.b32 %r5, %r0, 2;"
    body += """add.u32 %r6, %r2, %r5; cp.async.ca.shared.global [%r6], [%rd10], 4;
        cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1]; {}
        xor.b32 %r7, %r5, 4; add.u32 %r7, %r7, %r2; ld.shared.u32 %r8, [%r7];"""
    body += per_thread(0, 4, "%rd11") + "st.global.u32 [%rd11], %r8;"
    source, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(program(body.format(WAIT), 2), out, source, schedule=schedule)
    np.testing.assert_array_equal(out, source ^ 1)
    with pytest.raises(EmulatorError, match="race: ld.shared.* the write by cp.async"):
        launch(program(body.format("") + WAIT, 2), out, source, schedule=schedule)


def test_bulk_copies_stay_in_their_buffers() -> None:
    source, out = np.zeros(512, np.float32), np.zeros(508, np.float32)
    kernel = program(BARRIER + bulk_load(1, 2048) + WAIT + bulk_store(0, 2048), 2)
    with pytest.raises(EmulatorError, match="thread 0 .*bulk store of 16 bytes.*out of bounds"):
        launch(kernel, out, source)
    with pytest.raises(EmulatorError, match="thread 0 .*bulk load of 16 bytes.*out of bounds"):
        launch(kernel, source, out)
