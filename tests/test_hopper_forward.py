"""The Hopper forward: long rings under every schedule, what it leaves to sm80, injected bugs."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backends
import numpy as np
import pytest
from backends import EmulatedBackend, EmulatedGpu, Launch, _arrays_of
from conftest import emulated
from injection import assert_noticed, changed, put_in
from test_kernels import check_hopper_kernel

from cuflash import _gpu, _jit, _launch, _launch_packed, _params, _plan, _plan_sm90, _traits
from cuflash._packed import PackedProblem
from cuflash._problem import Problem
from cuflash._reference_masks import visibility
from cuflash.cli import oracle
from cuflash.cli.cases import Arrays, Case

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

# Two rounds of work for each of the emulated GPU's blocks, and rings that turn four times and more.
LONG = Case(batch=1, heads_q=2, heads_k=1, seqlen_q=450, seqlen_k=1000, head_dim=64)
WIDE = replace(LONG, head_dim=128)
CASES = {
    "dense": LONG,
    "causal": replace(LONG, causal=True),
    "window": replace(LONG, window=(200, 30)),
    "lengths": replace(LONG, batch=2, q_lens=(450, 133), kv_lens=(999, 500), causal=True),
    "head-dim-128": replace(WIDE, causal=True),
    "head-dim-128-window": replace(WIDE, window=(40, 40)),
    "dense-tiles": WIDE,  # of 176 keys
}
# Each pair compiles another kernel.
SIZES = (64, 96, 128, 192, 256)
PAIRS = {f"{d}-{dv}": (d, dv) for d in SIZES for dv in SIZES}
# Two rounds of work, and at least eight tiles of keys for each block: both rings turn four times.
SHORT = replace(LONG, seqlen_q=260, seqlen_k=800, causal=True)
# The others of PAIRS need `full`; 64-64 and 128-128 run in CASES.
ORDINARY_PAIRS = ("96-96", "192-128", "192-192", "256-256")
STAGES = 2
SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0), ("random", 1)]

WRONG = "wrong result"
SOURCE = "flash_fwd_sm90.cu"
K_FULL = "mbarrier_wait(smem.k_full(ring), ring.parity);"
V_FULL = "mbarrier_wait(smem.v_full(behind), behind.parity);"
V_READ = "wgmma_wait<0>(o_acc, probabilities);\n      release_read(smem.v_empty(behind));"
OWN_BARRIER = "named_barrier_sync(own_barrier(index), kWarpgroupThreads);"

# name: (file, what stands there, what takes its place, what it has to end with, in which case)
BUGS = {
    "k-not-awaited": (
        SOURCE,
        f"    {K_FULL}\n    take_turn();\n    issue_scores();",
        "    take_turn();\n    issue_scores();",
        "race:",
        LONG,
    ),
    "v-not-awaited": (SOURCE, f"    {V_FULL}\n", "", "race:", LONG),
    "v-released-early": (
        SOURCE,
        "      issue_values(behind);\n      pass_turn();",
        "      issue_values(behind);\n      release(smem.v_empty(behind));\n      pass_turn();",
        "race:|arrivals",
        LONG,
    ),
    "q-released-early": (
        SOURCE,
        "    begin_with(mask, last);",
        "    release_q();\n      begin_with(mask, last);",
        "race:|arrivals",
        LONG,
    ),
    "v-never-released": (
        SOURCE,
        V_READ,
        "wgmma_wait<0>(o_acc, probabilities);",
        "deadlock:",
        LONG,
    ),
    "skipped-v-kept": (
        SOURCE,
        "    mbarrier_wait(smem.v_full(ring), ring.parity);\n    release(smem.v_empty(ring));\n",
        "",
        "deadlock:",
        CASES["causal"],
    ),
    "q-parity": (
        SOURCE,
        "mbarrier_wait(smem.q_full(index), list.round % 2);",
        "mbarrier_wait(smem.q_full(index), 1);",
        "race:|deadlock:",
        LONG,
    ),
    "k-empty-parity": (
        SOURCE,
        "mbarrier_wait(smem.k_empty(at), at.parity ^ 1);",
        "mbarrier_wait(smem.k_empty(at), at.parity);",
        "race:|deadlock:",
        LONG,
    ),
    "v-empty-not-awaited": (
        SOURCE,
        "      mbarrier_wait(smem.v_empty(at), at.parity ^ 1);\n",
        "",
        "race:|more",
        LONG,
    ),
    "too-few-bytes": (
        SOURCE,
        "smem.v_full(at), VTile::kBytes)",
        "smem.v_full(at), VTile::kBytes - 16)",
        "deadlock:|race:|bytes|more",
        LONG,
    ),
    "one-arrival": (
        SOURCE,
        "mbarrier_init(of_stage(3, stage), kConsumerWarps)",
        "mbarrier_init(of_stage(3, stage), 1)",
        "race:|deadlock:|arrivals",
        LONG,
    ),
    "barriers-not-shown": (SOURCE, "  __syncthreads();\n\n", "\n", "race:|mbarrier", LONG),
    "a-lane-left-behind": (
        "warpgroup.cuh",
        "  __syncwarp();\n  release_read(mbarrier);",
        "  release_read(mbarrier);",
        "deadlock:",
        CASES["lengths"],
    ),
    "scores-not-awaited": (
        SOURCE,
        "    wgmma_wait<1>(s_acc);",
        "    wgmma_wait<2>(s_acc);",
        "flight|accumulators|race:",
        LONG,
    ),
    "output-not-awaited": (
        SOURCE,
        V_READ,
        V_READ.replace("<0>", "<1>"),
        "flight|accumulators|race:",
        LONG,
    ),
    "products-not-fenced": ("ptx/wgmma.cuh", "wgmma.fence.sync.aligned;", "", "fence", LONG),
    "leading-offset": (
        "warpgroup.cuh",
        "Tile::kPanelBytes, Tile::kPanelBytes) {}",
        "Tile::kPanelBytes, 8 * Tile::kPitch) {}",
        WRONG,
        WIDE,
    ),
    "swizzle-dropped": (
        "panels.cuh",
        "row % 8 : row / 2 % 4",
        "0 : row / 2 % 4",
        WRONG,
        LONG,
    ),
    "fully-visible-for-a-tile-too-long": (
        SOURCE,
        "return tiles.current >= full.begin;",
        "return tiles.current >= full.begin - 1;",
        WRONG,
        CASES["window"],
    ),
    "not-rescaled": (SOURCE, "if (kRescaleLate) softmax.rescale(o_acc);", "", WRONG, LONG),
    "not-hidden": (
        SOURCE,
        "if (tile.partly) {\n      if constexpr",
        "if (false) {\n      if constexpr",
        WRONG,
        CASES["causal"],
    ),
    "store-not-fenced": (SOURCE, "    fence_proxy_async();\n", "", "proxy:", LONG),
    "store-before-all-wrote": (
        SOURCE,
        f"    fence_proxy_async();\n    {OWN_BARRIER}\n",
        "    fence_proxy_async();\n",
        "race:|proxy:",
        LONG,
    ),
    "stage-of-out-reused": (
        SOURCE,
        "    if (!kOutOverQ && warpgroup_thread() == 0) bulk_wait_read();\n",
        "",
        "race:",
        LONG,
    ),
    "exit-before-store": (
        SOURCE,
        "    if (warpgroup_thread() == 0) bulk_wait();\n",
        "",
        "exit|in flight|bulk",
        LONG,
    ),
    "out-over-q-too-early": (
        SOURCE,
        "        bulk_wait_read();\n        mbarrier_arrive(smem.q_empty(index));",
        "        mbarrier_arrive(smem.q_empty(index));",
        "race:",
        replace(LONG, head_dim=192),
    ),
    "turn-to-oneself": (
        SOURCE,
        "turn_barrier((index + 1) % kConsumers)",
        "turn_barrier(index)",
        "deadlock:|barrier",
        LONG,
    ),
    "too-many-registers": (
        SOURCE,
        "kConsumers == 2 ? 240 : 160",
        "kConsumers == 2 ? 240 : 168",
        "register|deadlock",
        LONG,
    ),
}
# One of each kind in every run; the others compile a kernel each as well.
QUICK = ("v-released-early", "store-not-fenced", "k-empty-parity")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_long_rings(case: Case, schedule: tuple[str, int]) -> None:
    assert ending(case, schedule) == "right result"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=name, marks=() if name in ORDINARY_PAIRS else pytest.mark.full)
        for name, pair in PAIRS.items()
    ],
)
def test_every_pair_of_head_sizes(pair: tuple[int, int], schedule: tuple[str, int]) -> None:
    head_dim, head_dim_v = pair
    case = replace(SHORT, head_dim=head_dim, head_dim_v=head_dim_v)
    on = emulated(capability=90, schedule=schedule[0], seed=schedule[1])
    assert ending(case, schedule, on) == "right result"
    (launch,) = on.launches
    tiles = shares(case, *tile_of(launch)) > 0
    assert tiles.sum() >= 4 * STAGES * launch.blocks


# ------------------------------------------------------------------------- the schedule


def shares(case: Case, rows: int, keys: int) -> np.ndarray:
    """(B, Hq, tiles of rows, of keys): how much is visible of a tile's queries, from 0 to 1."""
    arrays = case.arrays()
    problem = Problem.create("attention", "cuda", *arrays[:3], **case.options)
    band = (False, problem.offset, problem.window, problem.q_lens, problem.kv_lens, None)
    pairs = visibility(arrays.q, arrays.k, *band).astype(np.int64)
    for axis, size in ((2, rows), (3, keys)):
        pairs = np.add.reduceat(pairs, np.arange(0, pairs.shape[axis], size), axis=axis)
    queries = tile_lengths(queries_of(case), pairs.shape[2], rows)
    return pairs / np.maximum(1, queries * keys)[:, None, :, None]


def tile_lengths(lengths: np.ndarray, tiles: int, size: int) -> np.ndarray:
    """(B, tiles): queries or keys of each tile."""
    return np.clip(lengths[:, None] - size * np.arange(tiles), 0, size)


def queries_of(case: Case) -> np.ndarray:
    return np.broadcast_to(case.q_lens or case.seqlen_q, case.batch)


def keys_of(case: Case) -> np.ndarray:
    return np.broadcast_to(case.kv_lens or case.seqlen_k, case.batch)


def tile_of(launch: Launch) -> tuple[int, int]:
    constants = dict(launch.kernel.constants)
    return 64 * constants["CONSUMERS"], constants["BLOCK_KV"]


def run_forward(case: Case) -> tuple[Launch, Any, np.ndarray]:
    """The launch, the arrays and lse."""
    arrays = case.arrays()
    on = emulated(capability=90)
    _, lse = on.forward(arrays.q, arrays.k, arrays.v, **case.options)
    (launch,) = on.launches
    return launch, arrays, lse


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen_k", [1, 175, 176, 177, 352, 353])
def test_dense_tiles_at_their_edges(
    seqlen_k: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of numbers of keys that other tiles serve in fewer instructions."""
    monkeypatch.setattr(_plan_sm90, "dense_tiles_pay", lambda problem: True)
    case = replace(WIDE, seqlen_q=140, seqlen_k=seqlen_k, dtype=np.dtype(dtype))
    on = emulated(capability=90)
    assert ending(case, ("lazy", 0), on) == "right result"
    (launch,) = on.launches
    assert tile_of(launch) == (128, 176)


def test_an_infinite_value_in_the_last_dense_tile_stays_in_its_column() -> None:
    q, k, v = replace(WIDE, seqlen_q=140).arrays()[:3]
    on = emulated(capability=90)
    expected, _ = on.forward(q, k, v)
    v[0, 999, 0, 5] = np.inf
    out, _ = on.forward(q, k, v)
    assert [tile_of(launch) for launch in on.launches] == [(128, 176)] * 2
    assert np.isposinf(out[..., 5].astype(np.float32)).all()
    others = [np.delete(x.astype(np.float32), 5, axis=3) for x in (out, expected)]
    np.testing.assert_allclose(*others, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "name", ["dense", "causal", "window", "lengths", "head-dim-128-window", "dense-tiles"]
)
def test_what_is_seen_is_loaded_and_multiplied_and_no_more(name: str) -> None:
    case = CASES[name]
    launch, arrays, _ = run_forward(case)
    block_q, block_kv = tile_of(launch)
    assert launch.bytes_read(arrays.q) == queries_of(case).sum() * arrays.q[0, 0].nbytes

    seen = shares(case, block_q, block_kv) > 0
    keys = tile_lengths(keys_of(case), seen.shape[3], block_kv)
    loaded = (seen * keys[:, None, None]).sum()
    assert launch.bytes_read(arrays.k) == loaded * arrays.k[0, 0, 0].nbytes
    assert launch.bytes_read(arrays.v) == loaded * arrays.v[0, 0, 0].nbytes

    # A warpgroup's rows, of a block's: each instruction takes 16 of the summed axis.
    seen = shares(case, 64, block_kv) > 0
    assert launch.stats.wgmma == seen.sum() * (case.head_dim + block_kv) // 16


@pytest.mark.parametrize("sms", [1, 3, 7, 8, 9, 132])
def test_no_more_blocks_than_multiprocessors(sms: int) -> None:
    case = replace(LONG, heads_q=4, heads_k=2, seqlen_q=300)
    arrays = case.arrays()

    def blocks(**options: Any) -> int:
        problem = Problem.create("attention", "cuda", *arrays[:3], **options)
        gpu = EmulatedGpu(90, "lazy", 0, _arrays_of(problem))
        gpu.device = replace(gpu.device, sms=sms)
        _launch.forward(problem, gpu)
        kernel, blocks, _ = gpu._stream[-1]
        assert kernel.source == SOURCE
        return blocks

    assert blocks() == blocks(causal=True) == min(8, sms)
    # Tiles of 128 rows that take any time: the hardware spreads them.
    assert blocks(mask=np.ones((300, 1000), bool)) == 12


# What a kernel does unseen, made visible: the order of its work in lse, a mask's price in what is
# read of it, and the next q, which has to come before the last product ends. No turn is taken then
# where all tiles are visible; elsewhere the other warpgroups may wait for this one's.
WATCHED = (
    ("  // Of the present work item.\n", "  int round;\n  bool has_next;\n"),
    (
        "      mbarrier_wait(smem.q_full(index), list.round % 2);\n",
        "      WorkList next(p);\n      next.round = round = list.round + 1;\n"
        "      has_next = next.valid() && p.call.problem.window_right > p.call.problem.seqlen_k;\n"
        "      mbarrier_wait(smem.q_full(index), list.round % 2);\n",
    ),
    (
        "    issue_values(behind);\n    wgmma_wait<0>(o_acc, probabilities);\n",
        "    issue_values(behind);\n"
        "    if (has_next) mbarrier_wait(smem.q_full(index), round % 2);\n"
        "    wgmma_wait<0>(o_acc, probabilities);\n",
    ),
    (
        "        hide(s_acc, places);\n",
        "        hide(s_acc, places);\n"
        "      if (warpgroup_thread() == 0) (void)*(const volatile float*)p.call.lse;\n",
    ),
    (
        "      store(work, mask);\n",
        "      store(work, mask);\n      if (index == 0 && warpgroup_thread() == 0)\n"
        "        p.call.lse[mask.stats(head) + first_row] = 1000 * blockIdx.x + list.round;\n",
    ),
)


@pytest.fixture(scope="module")
def watched_kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of LONG's traits."""
    emulated()  # or skip
    import emulator

    arrays = LONG.arrays()
    problem = Problem.create("attention", "cuda", *arrays[:3])
    kernel = _plan.forward_plan(_launch.forward_traits(problem, arrays.q), 90).kernel
    folder = tmp_path_factory.mktemp("watched") / "kernels_cu"
    shutil.copytree(_jit.kernel_dir(), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_jit, "kernel_dir", lambda: folder)
        patch.setenv("CUFLASH_CACHE_DIR", str(folder.parent / "cache"))
        for old, new in WATCHED:
            (folder / SOURCE).write_text(changed(SOURCE, old, new))
        return emulator.load(_jit.cached_ptx(kernel), kernel.entry)


@pytest.fixture
def watched(watched_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs launch the kernel that shows what it does."""
    # What is put in reads lse while other blocks write it.
    raced = SimpleNamespace(launch=partial(watched_kernel.launch, races=False))
    monkeypatch.setattr(backends, "_emulated_kernel", lambda kernel: raced)


def test_the_next_q_comes_before_the_last_product_ends(watched: None) -> None:
    """Else this one waits for it forever."""
    launch, _, lse = run_forward(LONG)
    rounds = lse[:, :, :: tile_of(launch)[0]] % 1000
    assert rounds.max() == 1  # after it another item of work


@pytest.mark.parametrize("name", ["causal", "window", "lengths"])
def test_fully_visible_tiles_pay_for_no_mask(name: str, watched: None) -> None:
    launch, _, lse = run_forward(CASES[name])
    share = shares(CASES[name], 64, tile_of(launch)[1])
    partly = ((share > 0) & (share < 1)).sum()
    assert launch.bytes_read(lse) == partly * lse.itemsize


def test_the_longest_run_first(watched: None) -> None:
    """Within a section of heads, and in rounds of alternate direction."""
    case = replace(LONG, batch=2, heads_q=4, heads_k=2, causal=True, offset=0)
    launch, arrays, lse = run_forward(case)
    block_q, block_kv = tile_of(launch)
    assert launch.blocks == 3
    found = {}
    for place, mark in np.ndenumerate(lse[:, :, ::block_q]):
        block, round_ = divmod(int(mark), 1000)
        found[round_, launch.blocks - 1 - block if round_ % 2 else block] = place
    assert len(found) == 2 * 4 * 3

    # Half of the L2 cache of 1 MiB holds the keys and values of two key heads.
    assert 2 < (1 << 19) / (arrays.k[0, :, 0].nbytes + arrays.v[0, :, 0].nbytes) < 3
    lengths = (shares(case, block_q, block_kv) > 0).sum(axis=3)

    def first_come(place: tuple[int, int, int]) -> tuple[int, int, int]:
        batch, head, _ = place
        return batch, -lengths[place], head

    assert [found[key] for key in sorted(found)] == sorted(found.values(), key=first_come)


# ------------------------------------------------------------------------- what is compiled

FLAGS = {
    "bfloat16": {},
    "float16": {"dtype": "float16"},
    "scale-first": {"scale_first": True, "dtype": "float16"},
    "softcap": {"softcap": True},
}
COMPILED = [("64-128", "scale-first")]


@pytest.mark.parametrize(
    ("pair", "flags"),
    [
        pytest.param(x, flags, marks=() if (x, flags) in COMPILED else pytest.mark.full)
        for x in PAIRS
        for flags in FLAGS
    ],
)
def test_wgmma_alone_multiplies_and_nothing_spills(pair: str, flags: str) -> None:
    traits = _traits.Traits("bfloat16", *PAIRS[pair], 16, False, False, False, False, tma=True)
    plan = _plan.forward_plan(replace(traits, **FLAGS[flags]), 90)
    check_hopper_kernel(plan.kernel, _params.mapped_bytes(4, _params.FORWARD_BYTES))


# ------------------------------------------------------------------------- injected bugs


def test_every_bug_has_its_place() -> None:
    for source, old, new, *_ in BUGS.values():
        assert changed(source, old, new)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in BUGS],
)
def test_bug_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new, wanted, case = BUGS[name]
    put_in(source, old, new, tmp_path, monkeypatch)
    assert_noticed(name, wanted, (ending(case, schedule) for schedule in SCHEDULES))


def ending(case: Case, schedule: tuple[str, int], on: EmulatedBackend | None = None) -> str:
    """The emulator's message, or how the result is."""
    from emulator import EmulatorError

    arrays = case.arrays()
    name, seed = schedule
    on = on or emulated(capability=90, schedule=name, seed=seed)
    try:
        out, lse = on.forward(arrays.q, arrays.k, arrays.v, **case.options)
    except EmulatorError as error:
        return str(error)
    bounds = oracle.expect(arrays._replace(dlse=None), case.options)
    for key, found in (("out", out), ("lse", lse)):
        if not bounds[key].error(found) <= bounds[key].allowed:
            return WRONG
    return "right result"


def explained(case: Case, capability: int = 90, **placed: np.ndarray) -> tuple[str, str]:
    """(backend, reason)"""
    arrays = case.arrays()._asdict() | placed
    problem = Problem.create("attention", "cuda", *(arrays[name] for name in "qkv"), **case.options)
    plan, reason, _ = _launch.explain(
        problem, EmulatedGpu(capability, "lazy", 0, _arrays_of(problem))
    )
    return plan.backend, reason


def test_hopper_takes_what_tma_can_move() -> None:
    assert explained(LONG) == ("sm90", "a Hopper GPU, and TMA can move q, k, v and out")
    heads_first = {n: heads_first_copy(getattr(LONG.arrays(), n)) for n in "qkv"}
    assert explained(LONG, **heads_first)[0] == "sm90"


def test_what_hopper_leaves_to_sm80() -> None:
    odd = replace(LONG, head_dim=20)
    assert explained(LONG, 80) == ("sm80", "the GPU is sm_80, not Hopper (sm_90)")
    assert explained(LONG, 100) == ("sm80", "the GPU is sm_100, not Hopper (sm_90)")
    reasons = {
        "q has stride 40 bytes in axis 2, no multiple of 16 above 0": odd,
        "64 queries do not fill a tile of its kernels": replace(LONG, seqlen_q=64),
    }
    for reason, case in reasons.items():
        assert explained(case) == ("sm80", f"a Hopper GPU, but {reason}")
    arrays = LONG.arrays()
    for k, reason in (
        (shifted(arrays.k), "k starts at an address that is no multiple of 16 bytes"),
        (arrays.k[:, ::-1], "k has stride -128 bytes in axis 1, no multiple of 16 above 0"),
        (np.broadcast_to(arrays.k[:, :1], arrays.k.shape), "k has stride 0 bytes in axis 1"),
    ):
        backend, why = explained(LONG, k=k)
        assert backend == "sm80" and reason in why


def columns(x: np.ndarray, count: int) -> np.ndarray:
    """The first columns of wider rows, which hold NaN behind them."""
    wider = np.full((*x.shape[:-1], 64), np.nan, x.dtype)
    wider[..., :count] = x[..., :count]
    return wider[..., :count]


def test_what_tma_stores_has_rows_of_whole_chunks() -> None:
    arrays = LONG.arrays()
    wide = {name: columns(getattr(arrays, name), 20) for name in "qkv"}
    reason = "out has rows of 40 bytes, which TMA stores in multiples of 16"
    out = columns(np.zeros_like(arrays.q), 20)

    def backend(**changes: np.ndarray) -> tuple[str, str]:
        of = Problem.create("attention", "cuda", **(wide | {"out": out} | changes))
        plan, why, _ = _launch.explain(of, EmulatedGpu(90, "lazy", 0, _arrays_of(of)))
        return plan.backend, why

    assert backend() == ("sm80", f"a Hopper GPU, but {reason}")
    v, out_of_24 = columns(arrays.v, 24), columns(np.zeros_like(arrays.q), 24)
    assert backend(v=v, out=out_of_24)[0] == "sm90"
    whole = (arrays.q, arrays.k, arrays.v)
    assert _params.tma_obstacle({}, dict(zip("qkv", whole, strict=True))) == ""
    assert _params.tma_obstacle({}, {"dk": wide["k"]}) == reason.replace("out", "dk")


@pytest.mark.parametrize("size_v", [20, 24])
def test_rows_that_end_within_a_chunk(size_v: int) -> None:
    """Loads read zeros past them, and what lies behind out stays as it was, whoever serves."""
    arrays = replace(LONG, seqlen_q=130, seqlen_k=200).arrays()
    q, k, v = columns(arrays.q, 20), columns(arrays.k, 20), columns(arrays.v, size_v)
    out = columns(np.zeros_like(arrays.q), size_v)
    on = emulated(capability=90)
    found, lse = on.forward(q, k, v, out=out)
    assert ("sm90" in on.launches[0].kernel.source) == (size_v == 24)
    assert np.isnan(out.base[..., size_v:]).all()
    dout = columns(arrays.dout, size_v)
    plain = Arrays(*map(np.ascontiguousarray, (q, k, v, dout)), dlse=None)
    bounds = oracle.expect(plain, {})
    assert bounds["out"].error(found) <= bounds["out"].allowed
    assert bounds["lse"].error(lse) <= bounds["lse"].allowed


def test_a_store_past_the_end_of_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plan that lets TMA store any rows: that of the last row goes past out."""
    from emulator import EmulatorError

    monkeypatch.setattr(_params, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(_launch, "_forward_choices", {})
    arrays = replace(LONG, seqlen_q=130, seqlen_k=200).arrays()
    q, k, v, out = (columns(x, 20) for x in (*arrays[:3], arrays.q))
    with pytest.raises(EmulatorError, match="bulk store of 16 bytes .* is out of bounds"):
        emulated(capability=90).forward(q, k, v, out=out)


def test_stores_of_parts_of_chunks_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were such rows stored by TMA, it would write behind them, and behind the last one."""
    from emulator import EmulatorError

    monkeypatch.setattr(_params, "_CHUNK_BYTES", 2)
    monkeypatch.setattr(_launch, "_forward_choices", {})
    arrays = replace(LONG, seqlen_q=130, seqlen_k=200).arrays()
    q, k, v = (columns(getattr(arrays, name), 20) for name in "qkv")
    out = columns(np.zeros_like(arrays.q), 20)
    with pytest.raises(EmulatorError, match="bulk store of 16 bytes at .* is out of bounds"):
        emulated(capability=90).forward(q, k, v, out=out)


def test_hopper_takes_packed_sequences() -> None:
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in LONG.arrays()[:3])
    edges = np.array([0, 3, len(q)]), np.array([0, 5, len(k)])
    problem = PackedProblem.create("explain", "cuda", q, k, v, *edges)
    for capability, backend in ((80, "sm80"), (90, "sm90")):
        plan, *_ = _launch_packed.explain(problem, EmulatedGpu(capability, "lazy", 0, [q, k, v]))
        assert plan.backend == backend and plan.kernel.source == f"flash_fwd_{backend}.cu"
        assert dict(plan.kernel.constants)["PACKED"]


def test_empty_keys_are_an_obstacle() -> None:
    keys = LONG.arrays().k[:, :0]
    assert _params.tma_obstacle({"k": keys}, {}) == "k is empty"


def test_no_keys() -> None:
    arrays = LONG.arrays()
    for heads in (1, 2):  # with one head nothing but the length says that k is empty
        q, k, v = arrays.q[:, :, :heads], arrays.k[:, :0, :1], arrays.v[:, :0, :1]
        out, lse = emulated(capability=90).forward(q, k, v)
        assert not out.any() and (lse == -np.inf).all()


def test_tensor_maps_reach_the_driver_as_it_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Driver:
        def cuTensorMapEncodeTiled(self, encoded: Any, *arguments: Any) -> int:  # noqa: N802
            plain = [getattr(x, "value", x) for x in arguments]
            seen.append([encoded.value % 128, *(x if isinstance(x, int) else [*x] for x in plain)])
            ctypes.memset(encoded, 7, _params.TENSOR_MAP_BYTES)
            return self.status

        status = 0

    driver = Driver()
    monkeypatch.setattr(_gpu, "_driver", lambda: driver)
    x = LONG.arrays().k
    row_map, store_map = _params.row_map(x, 112, 64), _params.store_map(x, 64, 32)
    load_map = _params.load_map(Problem.create("test", "cuda", x, x, x), x, 112, 64)
    for tensor_map in (row_map, store_map, load_map):
        assert _gpu._encode.__wrapped__(tensor_map) == bytes([7]) * 128
    address, row = x.ctypes.data, x.strides[1]
    head, batch = 1 * 128, 1 * 128  # axes of one element
    rows, strides = [64, 1 << 30, 0x7FFF0000, 1, (1 << 30) + 1], [row, 16, head, (1 << 34) - row]
    others = [row, head, batch]
    plain = [row, batch, head, 16]
    assert seen == [
        [0, 1, 5, address, rows, strides, [64, 112, 1, 1, 1], [1] * 5, 0, 3, 2, 0],
        [0, 1, 4, address, [64, 1000, 1, 1], others, [32, 64, 1, 1], [1] * 4, 0, 2, 2, 0],
        [0, 1, 5, address, [64, 1000, 1, 1, 1], plain, [64, 112, 1, 1, 1], [1] * 5, 0, 3, 2, 0],
    ]
    driver.status = 1
    with pytest.raises(RuntimeError, match="the driver refuses .*: CUDA error 1"):
        _gpu._encode.__wrapped__(row_map)


def test_only_calls_with_lengths_load_by_maps_that_end_with_them() -> None:
    q, k, v = LONG.arrays()[:3]
    lengths = np.full(1, 9)
    for options in ({}, {"causal": True}, {"q_lens": lengths}, {"kv_lens": lengths}):
        problem = Problem.create("test", "cuda", q, k, v, **options)
        found = _params.load_map(problem, k, 64, 64)
        ends = _params.row_map(k, 64, 64)
        assert (found == ends) == bool({"q_lens", "kv_lens"} & options.keys())
        assert found == ends or found.extents == (64, 1000, 1, 1, 1)
        assert found.address == k.ctypes.data


def test_a_row_map_ends_with_the_length() -> None:
    x = np.zeros((2, 10, 3, 16), np.float16)
    found = _params.row_map(x, rows=64, panel=64)
    row = 3 * 16 * 2
    wrap = 1 << 30
    # Hardware looks at a map's own address when it loads: memory has to be mapped there.
    assert found.address == x.ctypes.data
    assert found.extents == (16, wrap, 0x7FFF0000, 3, wrap + 1)
    assert found.strides == (row, 16, 32, (1 << 34) - row)
    # Row 4 of length 7 of batch entry 1, head 2; row 7 is the first out of bounds.
    at = (4 + wrap - 7, (1 * 10 * row + 7 * row) // 16, 2, wrap)
    offset = sum(index * stride for index, stride in zip(at, found.strides, strict=True))
    assert (found.address + offset) % (1 << 64) == x[1, 4, 2].ctypes.data
    assert found.extents[1] == 7 + wrap - 7


def heads_first_copy(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def shifted(x: np.ndarray) -> np.ndarray:
    """The same values and strides, two bytes off."""
    memory = np.empty(x.size + 8, x.dtype)
    start = 1 + (-memory.ctypes.data % 16) // 2
    view: Any = memory[start : start + x.size].reshape(x.shape)
    view[...] = x
    return view
