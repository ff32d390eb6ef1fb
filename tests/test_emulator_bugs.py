"""The emulator accepts sound attention kernels and notices every bug put into them.

`emulator/kernels/bugs.cuh` describes the bugs; each test compiles one in and runs it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import emulator_oracle as oracle
import numpy as np
import pytest
from emulator import EmulatorError, Kernel, Stats, guarded, load, tensor_map

nvrtc = pytest.importorskip("cupy", reason="NVRTC is reached through CuPy").cuda.nvrtc
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++")

SOURCES = Path(__file__).parent / "emulator" / "kernels"
LOG2_E = math.log2(math.e)
TILE = 64  # queries of a warpgroup, keys of a tile, in both kernels

Schedule = tuple[str, int]  # name, seed
SCHEDULES: list[Schedule] = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1)]
SEEDS = [("random", seed) for seed in range(8)]

RIGHT = "right result"
WRONG = "wrong result"

# What an attempt has to end with, as a pattern for the message or WRONG.
SM80_BUGS = {
    "CausalOffByOne": WRONG,
    "MissingBarrierAfterFirstWait": "race:",
    "MissingBarrierAtLoopEnd": "race:",
    "LaxWaitGroup": "race:",
    "DroppedSwizzle": WRONG,
    "WrongRow": "race:",
    "SwappedPack": WRONG,
    "SwappedLdmatrix": WRONG,
}
SM90_BUGS = {
    "MissingBarrierAfterInit": "race:",
    "MissingFullWait": "race:",
    "MissingEmptyWaitK": "race:|more arrivals than",
    "MissingEmptyWaitV": "race:|more arrivals than",
    "EarlyReleaseV": "race:",
    "ExpectTooFewBytes": "deadlock:",
    "ExpectTooManyBytes": "deadlock:",
    "WrongParity": "deadlock:|race:",
    "WrongArrivalCount": "deadlock:|race:",
    "DoubleArrival": "deadlock:|race:",
    "MissingScoresWait": "accumulators were",
    "ProbsOverwrittenInFlight": "A registers were",
    "OutputRescaledInFlight": "accumulators were",
    "MissingWgmmaFence": "no wgmma.fence",
    "WrongStrideOffset": WRONG,
    "SwappedOffsets": WRONG,
    "MisalignedStorage": "out of bounds of shared memory",
    "OutputOverKeys": "race:",
    "MissingProxyFence": "proxy:",
    "ProxyFenceInOneThread": "proxy:",
    "MissingBarrierBeforeStore": "proxy:|race:",
    "MissingStoreWait": "exits with a bulk store",
    "SwappedMbarrierInit": "misaligned shared memory address",
    "SwappedTmaCoordinates": WRONG,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation of an attention kernel."""

    arch: int
    head_dim: int = TILE
    causal: bool = True
    dtype: str = "bf16"
    bug: str = "None"

    @property
    def entry(self) -> str:
        return f"forward_sm{self.arch}"

    @property
    def block_q(self) -> int:
        return {80: TILE, 90: 2 * TILE}[self.arch]


SOUND = [
    Variant(arch, head_dim, causal, dtype)
    for arch in (80, 90)
    for head_dim, causal, dtype in [(64, True, "bf16"), (64, False, "fp16"), (128, True, "fp16")]
]
EVERY_SOUND = [
    Variant(arch, head_dim, causal, dtype)
    for arch in (80, 90)
    for head_dim in (64, 128)
    for causal in (False, True)
    for dtype in ("bf16", "fp16")
]
BUGGY = [Variant(80, bug=bug) for bug in SM80_BUGS] + [
    # Exchanged offsets are equal, and so harmless, at head size 64
    Variant(90, head_dim=128 if bug == "SwappedOffsets" else 64, bug=bug)
    for bug in SM90_BUGS
]
BENIGN = Variant(90, bug="EarlyReleaseK")
SHARED_BARRIER = Variant(90, bug="SharedNamedBarrier")


def variant_id(variant: Variant) -> str:
    shape = f"d{variant.head_dim}-{'causal' if variant.causal else 'full'}-{variant.dtype}"
    return f"sm{variant.arch}-{shape if variant.bug == 'None' else variant.bug}"


@pytest.fixture(scope="module", autouse=True)
def compile_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the variants of the selected tests on all cores while the first tests run."""
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    variants = [call.params["variant"] for call in selected if call and "variant" in call.params]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for variant in dict.fromkeys(variants):
            _KERNELS.setdefault(variant, pool.submit(build, variant))
        yield
        pool.shutdown(cancel_futures=True)


_KERNELS: dict[Variant, concurrent.futures.Future[Kernel]] = {}


@pytest.mark.parametrize("variant", SOUND, ids=variant_id)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_sound_kernels_match_float64(variant: Variant, schedule: Schedule) -> None:
    for seqlen in (77, 200):
        stats = attend(variant, schedule, batch=2, heads=2, seqlen=seqlen)
        if variant.arch == 80:
            assert stats.mma > 0
            assert stats.bank_wavefronts == stats.bank_ideal
        else:
            assert stats.wgmma > 0
            assert stats.tma_loads > 0


@pytest.mark.full
@pytest.mark.parametrize("variant", EVERY_SOUND, ids=variant_id)
def test_sound_kernels_match_float64_under_many_seeds(variant: Variant) -> None:
    for schedule in SCHEDULES[:2] + SEEDS:
        for seqlen in (1, 64, 129, 320):
            attend(variant, schedule, heads=2, seqlen=seqlen)


@pytest.mark.parametrize("variant", BUGGY, ids=variant_id)
def test_bug_is_noticed(variant: Variant) -> None:
    check_noticed(variant, SCHEDULES)


@pytest.mark.full
@pytest.mark.parametrize("variant", BUGGY, ids=variant_id)
def test_bug_is_noticed_under_many_seeds(variant: Variant) -> None:
    check_noticed(variant, SEEDS)


@pytest.mark.parametrize("variant", [BENIGN], ids=variant_id)
def test_early_release_of_k_is_benign(variant: Variant) -> None:
    # The producer may refill K only after the same tile's V is released, which is late enough
    for schedule in SCHEDULES:
        assert outcome(variant, schedule) == RIGHT


@pytest.mark.parametrize("variant", [SHARED_BARRIER], ids=variant_id)
def test_shared_named_barrier_is_noticed(variant: Variant) -> None:
    # Warps of one warpgroup that happen to arrive together hide it, as the lazy schedule makes them
    assert re.search("race:|proxy:", outcome(variant, ("eager", 0)))
    noticed = [outcome(variant, schedule) != RIGHT for schedule in SEEDS]
    assert any(noticed)


PROGRAM_BUGS = {
    "block_sum": ("SharedMemoryRace", "race:"),
    "half_warp_sum": ("DivergentShuffle", "deadlock:"),
    "copy_after_barrier": ("BarrierCountMismatch", "barrier 1: this thread expects|deadlock:"),
    "copy": ("GlobalOutOfBounds", "is out of bounds; the nearest buffer"),
    "local_sum": ("LocalOutOfBounds", "local memory out of bounds"),
}


@pytest.mark.parametrize("entry", PROGRAM_BUGS)
@pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=str)
def test_small_programs(entry: str, schedule: Schedule) -> None:
    bug, expected = PROGRAM_BUGS[entry]
    assert run_program(entry, "None", schedule) == RIGHT
    assert re.search(expected, run_program(entry, bug, schedule))


def test_overrun_of_a_guarded_array_is_an_error() -> None:
    # Without a list of buffers the page after the array catches it
    found = run_program("copy", "GlobalOutOfBounds", ("eager", 0), check_buffers=False)
    assert re.search("thread 127 .*memory fault", found)


# Helpers


def check_noticed(variant: Variant, schedules: list[Schedule]) -> None:
    expected = (SM80_BUGS | SM90_BUGS)[variant.bug]
    for schedule in schedules:
        found = outcome(variant, schedule)
        assert re.search(expected, found), f"{schedule}: {found}"


def outcome(variant: Variant, schedule: Schedule) -> str:
    """RIGHT, WRONG or the emulator's message; five key tiles turn the ring more than twice."""
    try:
        attend(variant, schedule, seqlen=5 * TILE)
    except EmulatorError as error:
        return str(error)
    except AssertionError:
        return WRONG
    return RIGHT


def attend(
    variant: Variant, schedule: Schedule, *, batch: int = 1, heads: int = 1, seqlen: int
) -> Stats:
    """Run the kernel on random inputs and assert that it is right."""
    shape = (batch, seqlen, heads, variant.head_dim)
    q, k, v, expected = problem(shape, variant.causal, variant.dtype)
    out = guarded(shape, q.dtype, fill=np.nan)
    lse = guarded((batch, heads, seqlen), np.float32, fill=np.nan)
    pack = {80: pack_sm80, 90: pack_sm90}[variant.arch]
    params, smem_bytes, threads = pack(q, k, v, out, lse)
    grid = (-(-seqlen // variant.block_q), heads, batch)
    name, seed = schedule
    stats = kernel(variant).launch(
        grid,
        (threads, 1, 1),
        smem_bytes,
        [params],
        schedule=name,
        seed=seed,
        buffers=[q, k, v, out, lse],
    )
    oracle.assert_within(out, expected.out, expected.out_tolerance)
    oracle.assert_within(lse, expected.lse, expected.lse_tolerance)
    return stats


@functools.lru_cache(maxsize=32)
def problem(
    shape: tuple[int, ...], causal: bool, dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, oracle.Forward]:
    rng = np.random.default_rng(0)
    q, k, v = (oracle.random_tensor(shape, dtype, rng) for _ in range(3))
    return q, k, v, oracle.forward(q, k, v, causal, dtype)


def pack_sm80(*arrays: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Params of forward_sm80.cu for (q, k, v, out, lse), shared-memory bytes, threads."""
    _, seqlen, heads, head_dim = arrays[0].shape
    layout = [(name, np.uint64) for name in ("q", "k", "v", "out", "lse")]
    layout += [("seqlen", np.int32), ("heads", np.int32), ("scale_log2", np.float32)]
    params = np.zeros((), np.dtype([*layout, ("padding", np.int32)]))
    pointers = [array.ctypes.data for array in arrays]
    params[()] = (*pointers, seqlen, heads, LOG2_E / math.sqrt(head_dim), 0)
    tiles = 1 + 2 * 2  # Q, and two stages of K and V
    return params, tiles * TILE * head_dim * arrays[0].itemsize, 128


def pack_sm90(*arrays: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Params of forward_sm90.cu for (q, k, v, out, lse), shared-memory bytes, threads."""
    *tensors, lse = arrays
    _, seqlen, heads, head_dim = tensors[0].shape
    layout = [(name, np.uint64, 16) for name in ("q", "k", "v", "out")] + [("lse", np.uint64)]
    layout += [("seqlen", np.int32), ("heads", np.int32), ("scale_log2", np.float32)]
    params = np.zeros((), np.dtype([*layout, ("padding", np.uint8, 44)]))
    for name, tensor in zip(("q", "k", "v", "out"), tensors, strict=True):
        descriptor = tensor_map(tensor.swapaxes(1, 2), (1, 1, TILE, 64), swizzle=128)
        params[name] = descriptor.view(np.uint64)
    params["lse"] = lse.ctypes.data
    params["seqlen"] = seqlen
    params["heads"] = heads
    params["scale_log2"] = LOG2_E / math.sqrt(head_dim)
    tiles, barriers = 2 + 2 * 2, 1 + 4 * 2  # Q of two consumers, two stages of K and V
    return params, tiles * TILE * head_dim * tensors[0].itemsize + barriers * 8, 384


def run_program(entry: str, bug: str, schedule: Schedule, *, check_buffers: bool = True) -> str:
    """RIGHT, WRONG or the emulator's message for one entry of programs.cu."""
    values = guarded((128,), np.float32)
    values[...] = np.arange(128)
    out = guarded((128,), np.float32, fill=np.nan)
    expected = {
        "block_sum": np.full(128, values.sum()),
        "half_warp_sum": values + np.where(np.arange(128) % 32 < 16, values[np.arange(128) ^ 1], 0),
        "local_sum": 7 * values + 1,
    }.get(entry, values)
    params = np.array([values.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    name, seed = schedule
    try:
        program(entry, bug).launch(
            (1, 1, 1),
            (128, 1, 1),
            0,
            [params],
            schedule=name,
            seed=seed,
            buffers=[values, out] if check_buffers else None,
        )
    except EmulatorError as error:
        return str(error)
    return RIGHT if np.array_equal(out, expected) else WRONG


def kernel(variant: Variant) -> Kernel:
    """The variant's kernel, built once."""
    if variant not in _KERNELS:
        built: concurrent.futures.Future[Kernel] = concurrent.futures.Future()
        built.set_result(build(variant))
        _KERNELS[variant] = built
    return _KERNELS[variant].result()


def build(variant: Variant) -> Kernel:
    defines = {
        "HEAD_DIM": variant.head_dim,
        "CAUSAL": int(variant.causal),
        "FP16": int(variant.dtype == "fp16"),
        "BUG": variant.bug,
    }
    target = {80: "compute_80", 90: "compute_90a"}[variant.arch]
    return load(compile_ptx(f"{variant.entry}.cu", target, defines), variant.entry)


@functools.cache
def program(entry: str, bug: str) -> Kernel:
    return load(compile_ptx("programs.cu", "compute_80", {"BUG": bug}), entry)


def compile_ptx(source: str, target: str, defines: dict[str, int | str]) -> str:
    """PTX of one file of emulator/kernels, without GPU or driver."""
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    handle = nvrtc.createProgram(
        (SOURCES / source).read_text(),
        source,
        list(headers.values()),
        [name.encode() for name in headers],
    )
    options = [f"-arch={target}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    try:
        nvrtc.compileProgram(handle, options)
        ptx = nvrtc.getPTX(handle)
    except nvrtc.NVRTCError as error:
        raise AssertionError(nvrtc.getProgramLog(handle)) from error
    finally:
        nvrtc.destroyProgram(handle)
    return ptx.decode() if isinstance(ptx, bytes) else ptx
