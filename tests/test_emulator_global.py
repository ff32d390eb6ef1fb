"""Global memory between blocks on the emulator: what orders accesses, and races that it reports."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
import pytest
from emulator import EmulatorError, Kernel
from emulator_programs import launch, needs_compiler, program

pytestmark = needs_compiler

RACE = "race in global memory"
SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0)]

# %rd0: flags, %rd1: data. One lane of each block runs, but where that is said.
ONE_LANE = "setp.ne.u32 %p0, %r0, 0; @%p0 exit;"
ACQUIRE = "ld.acquire.gpu.global.u32 %r2, [%rd0];"
RELAXED_LOAD = "ld.relaxed.gpu.global.u32 %r2, [%rd0];"
VOLATILE_LOAD = "ld.volatile.global.u32 %r2, [%rd0];"
RELEASE = "red.release.gpu.global.add.u32 [%rd0], 1;"
RELAXED = "red.relaxed.gpu.global.add.u32 [%rd0], 1;"
FENCE = "fence.acq_rel.gpu;"
WRITE = "mov.u32 %r9, 7; st.global.u32 [%rd1], %r9;"
READ = "ld.global.u32 %r8, [%rd1];"


COUNT = "red.relaxed.gpu.global.add.u32 [%rd1], 1;"
SUM = "red.relaxed.gpu.global.add.f32 [%rd1], 0f3F800000;"
FOUR = "mov.b32 %r9, 0x3F800000; red.relaxed.gpu.global.add.v4.f32 [%rd1], {%r9, %r9, %r9, %r9};"


def until(load: str, count: int | str = 1) -> str:
    """Polls the flag until it holds `count`."""
    return f"WAIT: {load} setp.ne.u32 %p1, %r2, {count}; @%p1 bra WAIT;"


BULK_STORE = """mov.u32 %r5, smem; st.shared.u32 [%r5], %r5; fence.proxy.async.shared::cta;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r5], 16; cp.async.bulk.commit_group;"""
CP_ASYNC = "mov.u32 %r5, smem; cp.async.ca.shared.global [%r5], [%rd1], 16; cp.async.commit_group;"
CP_WAIT = "cp.async.wait_group 0;"
BULK_LOAD = """mov.u32 %r5, smem; mbarrier.init.shared.b64 [%r5+64], 1;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r5+64], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r5], [%rd1], 16, [%r5+64];"""
BULK_WAIT = "LANDS: mbarrier.try_wait.parity.shared.b64 %p5, [%r5+64], 0; @!%p5 bra LANDS;"

# What a block does after its write, and another before its read.
ORDERED = {
    "release-acquire": (RELEASE, until(ACQUIRE)),
    "stored-flag": ("st.release.gpu.global.u32 [%rd0], 1;", until(ACQUIRE)),
    "generic": (RELEASE.replace(".global", ""), until(ACQUIRE.replace(".global", ""))),
    "whole-system": (RELEASE.replace("gpu", "sys"), until(ACQUIRE)),
    "atomic-acquire": (RELEASE, until("atom.acquire.gpu.global.add.u32 %r2, [%rd0], 0;")),
    "exchange": ("atom.acq_rel.gpu.global.exch.b32 %r3, [%rd0], 1;", until(ACQUIRE)),
    "relaxed-poll-then-acquire": (RELEASE, until(RELAXED_LOAD) + ACQUIRE),
    "relaxed-poll-then-fence": (RELEASE, until(RELAXED_LOAD) + FENCE),
    "fences": (FENCE + RELAXED, until(RELAXED_LOAD) + FENCE),
    "one-way-fences": (
        "fence.release.gpu;" + RELAXED,
        until(RELAXED_LOAD) + "fence.acquire.gpu;",
    ),
    "membar": ("membar.gl; st.volatile.global.u32 [%rd0], 1;", until(VOLATILE_LOAD) + "membar.gl;"),
    "fence-long-before": (FENCE + "st.global.u32 [%rd1+64], %r9;" + RELAXED, until(ACQUIRE)),
}
UNORDERED = {
    "relaxed-flag": (RELAXED, until(ACQUIRE)),
    "flag-not-acquired": (RELEASE, until(RELAXED_LOAD)),
    "release-in-the-block": (RELEASE.replace("gpu", "cta"), until(ACQUIRE)),
    "acquire-in-the-block": (RELEASE, until(ACQUIRE.replace("gpu", "cta"))),
    "fence-in-the-block": ("fence.acq_rel.cta;" + RELAXED, until(ACQUIRE)),
    "fence-behind": (RELAXED + FENCE, until(ACQUIRE)),
    "fence-before-the-poll": (RELEASE, FENCE + until(RELAXED_LOAD)),
    "weak-flag": (FENCE + "st.global.u32 [%rd0], 1;", until(ACQUIRE)),
    "weak-poll": (RELEASE, until("ld.global.u32 %r2, [%rd0];")),
    "another-flag": (RELEASE.replace("%rd0", "%rd0+4") + RELAXED, until(ACQUIRE)),
    "written-behind": (RELEASE + WRITE, until(ACQUIRE)),
    "none": ("", ""),
}
OTHER_FLAG = RELAXED_LOAD.replace("%rd0", "%rd0+4")

# What each block does: first those that have to be sound, then races.
SOUND = {
    **{name: (WRITE + release, acquire + READ) for name, (release, acquire) in ORDERED.items()},
    "relaxed-sum-between": (
        WRITE + RELEASE,
        until(RELAXED_LOAD) + RELAXED,
        until(ACQUIRE, 2) + READ,
    ),
    "block-between": (WRITE + RELEASE, until(ACQUIRE) + RELEASE, until(ACQUIRE, 2) + READ),
    "read-then-written": (READ + RELEASE, until(ACQUIRE) + WRITE),
    "all-read": (READ, READ, READ),
    "neighbours": tuple(f"st.global.u8 [%rd1+{i}], %r9;" for i in range(3)),
    "counted": (COUNT, COUNT),
    "added-in-turn": (SUM + RELEASE, until(ACQUIRE) + SUM),
    "four-added-in-turn": (FOUR + RELEASE, until(ACQUIRE) + FOUR),
    "stored-and-awaited": (
        BULK_STORE + "cp.async.bulk.wait_group 0;" + RELEASE,
        until(ACQUIRE) + READ,
    ),
    "cp-then-written": (CP_ASYNC + CP_WAIT + RELEASE, until(ACQUIRE) + WRITE),
    "bulk-then-written": (BULK_LOAD + BULK_WAIT + RELEASE, until(ACQUIRE) + WRITE),
    "written-then-cp": (WRITE + RELEASE, until(ACQUIRE) + CP_ASYNC + CP_WAIT),
    "written-then-bulk": (WRITE + RELEASE, until(ACQUIRE) + BULK_LOAD + BULK_WAIT),
}
RACES = {
    **{name: (WRITE + release, acquire + READ) for name, (release, acquire) in UNORDERED.items()},
    "cut-by-a-store": (
        WRITE + RELEASE,
        until(RELAXED_LOAD) + "st.relaxed.gpu.global.u32 [%rd0], 2;",
        until(ACQUIRE, 2) + READ,
    ),
    "block-between-acquires-nothing": (
        WRITE + RELEASE.replace("%rd0", "%rd0+4"),
        until(OTHER_FLAG) + RELEASE,
        until(ACQUIRE) + READ,
    ),
    "read-and-written": (READ, WRITE),
    "read-then-written-unordered": (READ + RELAXED, until(ACQUIRE) + WRITE),
    "both-write": (WRITE, WRITE),
    "weak-before-strong": ("st.global.u32 [%rd1], %r9;" + COUNT, COUNT),
    "overlap": ("st.global.u16 [%rd1], %r9;", "st.global.u8 [%rd1+1], %r9;"),
    "some-added-then-read": (SUM + RELAXED, SUM + RELEASE, until(ACQUIRE, 2) + READ),
    "stored-and-half-awaited": (
        BULK_STORE + "cp.async.bulk.wait_group.read 0;" + RELEASE,
        until(ACQUIRE) + READ,
    ),
    "cp-not-awaited": (CP_ASYNC + RELEASE + CP_WAIT, until(ACQUIRE) + WRITE),
    "bulk-not-awaited": (BULK_LOAD + RELEASE + BULK_WAIT, until(ACQUIRE) + WRITE),
    "written-unordered-then-cp": (WRITE + RELAXED, until(ACQUIRE) + CP_ASYNC + CP_WAIT),
    "written-unordered-then-bulk": (WRITE + RELAXED, until(ACQUIRE) + BULK_LOAD + BULK_WAIT),
}
# Races only of a launch that is declared deterministic.
SUMS = {
    "one": (SUM, SUM),
    "four": (FOUR, FOUR),
    "read-when-all-are-added": (SUM + RELEASE, SUM + RELEASE, until(ACQUIRE, 2) + READ),
}
TICKET = "atom.relaxed.gpu.global.add.u32 %r6, [%rd0+4], 1;"
IN_TURN = until(ACQUIRE, "%r6") + SUM + RELEASE
TURNS = {
    "turns-by-ticket": (TICKET + IN_TURN,) * 3,
    "turns-by-number": ("mov.u32 %r6, %ctaid.x;" + IN_TURN,) * 3,
}
PROGRAMS = SOUND | RACES | SUMS | TURNS


@cache
def programs() -> Kernel:
    """All in one, which is quicker to compile: the flag at byte 32 says which block is first."""
    body = f"{ONE_LANE} ld.global.u32 %r1, [%rd0+32]; mov.u32 %r3, %ctaid.x; mov.u32 %r9, 7;"
    body += "add.u32 %r1, %r1, %r3;"
    for i, code in enumerate(code for blocks in PROGRAMS.values() for code in blocks):
        body += f"\n{{ setp.ne.u32 %p2, %r1, {i}; @%p2 bra NEXT; {code} exit; NEXT: }}"
    return program(body, 2)


def ending(name: str, schedule: tuple[str, int] = ("eager", 0), **options: object) -> str:
    """The emulator's message, or an empty one."""
    names = list(PROGRAMS)
    first = sum(len(PROGRAMS[other]) for other in names[: names.index(name)])
    flags, data = np.zeros(16, np.uint32), np.zeros(64, np.uint32)
    flags[8] = first
    options |= {"grid": len(PROGRAMS[name]), "schedule": schedule[0], "seed": schedule[1]}
    return message(programs(), flags, data, **options)


def message(kernel: Kernel, *arrays: np.ndarray, **options: object) -> str:
    try:
        launch(kernel, *arrays, **options)
    except EmulatorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", SOUND)
def test_what_is_in_order(name: str) -> None:
    for schedule in SCHEDULES:
        assert ending(name, schedule, threads=3, deterministic=True) == ""


@pytest.mark.parametrize("name", RACES)
def test_what_is_not(name: str) -> None:
    """Though the blocks run one after the other, and the numbers are right."""
    assert RACE in ending(name, threads=1)


def test_the_message_names_both_places() -> None:
    found = ending("relaxed-flag", threads=1)
    assert "block (1,0,0) thread 0" in found
    assert "byte 0 of buffer number 1" in found
    assert "after the write by warp 0 of block (0,0,0) at PTX line" in found
    assert "after the read by" in ending("read-and-written", threads=1)


@pytest.mark.parametrize("name", SUMS)
def test_floats_are_added_in_an_order_where_that_is_declared(name: str) -> None:
    for schedule in SCHEDULES:
        assert ending(name, schedule, threads=3) == ""
        assert "sums of floats in no order" in ending(name, schedule, deterministic=True)


def test_one_block_at_a_time_in_any_order() -> None:
    for order in permutations(range(3)):
        options = {"threads": 1, "order": order, "deterministic": True}
        assert ending("turns-by-ticket", **options) == ""
        found = ending("turns-by-number", **options)
        if order == (0, 1, 2):
            assert found == ""
        else:
            assert "deadlock" in found and "blocks have not started" in found


def test_an_order_has_each_block_once() -> None:
    with pytest.raises(ValueError, match="order is"):
        ending("all-read", order=(0, 1, 1))


def test_launches_are_ordered() -> None:
    flags, data = np.zeros(16, np.uint32), np.zeros(64, np.uint32)
    for body in (WRITE, READ, WRITE):
        assert message(program(ONE_LANE + body, 2), flags, data) == ""


# ---- Warps of one block: %p3 is false in warp 1, %p4 in block 0.

WARPS = "shr.u32 %r4, %r0, 5; setp.ne.u32 %p3, %r4, 1;"
WARPS += "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p4, %r1, 0;"


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""], ids=["barrier", "none"])
def test_a_release_is_of_what_its_thread_has_seen(barrier: str) -> None:
    """Warp 1 writes, warp 0 releases; in the other block warp 0 acquires, warp 1 reads."""
    kernel = program(
        f"""{WARPS} @%p4 bra READER;
        {{ @%p3 bra RELEASES; {WRITE} RELEASES: }} {barrier}
        {ONE_LANE} {RELEASE} exit;
        READER: setp.ne.u32 %p0, %r0, 0; @%p0 bra ACQUIRED; {until(ACQUIRE)}
        ACQUIRED: {barrier} @%p3 exit; {READ}""",
        2,
    )
    for schedule in ("eager", "lazy"):
        arrays = np.zeros(4, np.uint32), np.zeros(64, np.uint32)
        found = message(kernel, *arrays, grid=2, block=64, schedule=schedule)
        assert found == "" if barrier else RACE in found


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""], ids=["barrier", "none"])
def test_warps_of_a_block(barrier: str) -> None:
    body = f"{WARPS} {{ @%p3 bra READS; {WRITE} READS: }} {barrier} @!%p3 exit; {READ}"
    arrays = np.zeros(4, np.uint32), np.zeros(64, np.uint32)
    found = message(program(body, 2), *arrays, block=64)
    assert found == "" if barrier else RACE in found
