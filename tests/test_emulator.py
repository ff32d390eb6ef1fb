"""What the emulator has to report: bad memory accesses, races, deadlocks, unknown instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatorError, UnsupportedPtx, guarded, load
from emulator_programs import launch, needs_compiler, per_thread, program

pytestmark = needs_compiler


def test_unsupported_instruction_is_named() -> None:
    with pytest.raises(UnsupportedPtx, match=r"test, PTX line \d+.*frobnicate\.b32 %r1, %r0"):
        program("frobnicate.b32 %r1, %r0;")
    with pytest.raises(UnsupportedPtx, match="modifier .sideways"):
        program("add.sideways.u32 %r1, %r0, %r0;")
    after_debug_lines = "\n\t// comment\n\t.loc 1 2 3\n\n\t.loc 1 2 3\nfrobnicate;"
    with pytest.raises(UnsupportedPtx, match="test, PTX line 6.*frobnicate"):
        load(f".version 8.0 .target sm_80 .entry test() {{{after_debug_lines} }}")
    with pytest.raises(ValueError, match="entry='missing'.*the PTX has test"):
        load(".version 8.0 .target sm_80 .entry test() { ret; }", "missing")


def test_global_memory_out_of_bounds() -> None:
    kernel = program(
        f"{per_thread(0, 4, '%rd10')} ld.global.u32 %r1, [%rd10]; st.global.u32 [%rd10], %r1;"
    )
    assert launch(kernel, np.zeros(32, np.uint32)).bytes_read == (128,)
    with pytest.raises(
        EmulatorError, match=r"thread 31 .*`.*ld.global.*out of bounds.*byte 124 of its 124"
    ):
        launch(kernel, np.zeros(31, np.uint32), schedule="eager")
    short = guarded(28, np.uint32)
    with pytest.raises(EmulatorError, match="memory fault"):
        kernel.launch((1,), (32,), 0, [short])
    constant = np.zeros(32, np.uint32)
    constant.flags.writeable = False
    with pytest.raises(EmulatorError, match="read-only"):
        launch(kernel, constant)
    with pytest.raises(EmulatorError, match="misaligned"):
        launch(program("ld.global.u32 %r1, [%rd0+2];"), np.zeros(32, np.uint32))


# Each thread writes its word and reads one that a thread of the other warp wrote.
EXCHANGE = """
    mov.u32 %r1, smem; shl.b32 %r2, %r0, 2; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], %r0;
    {}
    xor.b32 %r3, %r2, 128; mov.u32 %r4, smem; add.u32 %r4, %r4, %r3; ld.shared.u32 %r5, [%r4];
"""


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_race_between_warps(schedule: str) -> None:
    out = np.zeros(1, np.uint32)
    with pytest.raises(EmulatorError, match="race: (ld|st).shared by warp . (reads|writes) smem"):
        launch(program(EXCHANGE.format("")), out, block=64, schedule=schedule)
    launch(program(EXCHANGE.format("bar.sync 0;")), out, block=64, schedule=schedule)
    launch(program(EXCHANGE.format("")), out, block=64, schedule=schedule, races=False)


def test_writes_of_the_same_value() -> None:
    kernel = program("mov.u32 %r1, smem; st.shared.u32 [%r1], 7;")
    out = np.zeros(1, np.uint32)
    with pytest.raises(EmulatorError, match="race"):
        launch(kernel, out, block=64)
    launch(kernel, out, block=64, allow_same_value=True)


def test_shared_memory_bounds_and_poison() -> None:
    out = np.zeros(32, np.uint32)
    kernel = program("mov.u32 %r1, smem; ld.shared.u32 %r2, [%r1+64]; st.global.u32 [%rd0], %r2;")
    launch(kernel, out, smem=68)
    assert out[0] == 0xFFFFFFFF
    with pytest.raises(EmulatorError, match=r"out of bounds of shared memory: smem\+0x40"):
        launch(kernel, out, smem=64)


FIRST_WARP = "setp.lt.u32 %p1, %r0, 32; @%p1 "
SEVEN_LANES = "setp.lt.u32 %p1, %r0, 7; @%p1 bar.warp.sync -1; "
MBARRIER = "mov.u32 %r1, smem; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; "
ARRIVE = "mbarrier.arrive.shared.b64 %rd3, [%r1]"
SYNCHRONISATION_ERRORS = {
    FIRST_WARP + "bar.sync 0, 64;": r"(?s)deadlock.*threads 0\.\.31: barrier 0 \(64 threads\)"
    r".*threads 32\.\.63: exited",
    FIRST_WARP + "bar.sync 1, 64; @!%p1 bar.sync 1, 32;": "barrier 1: this thread expects",
    "bar.sync 0, 40;": "must be a multiple of 32",
    SEVEN_LANES + "@!%p1 shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;": "divergent warp",
    SEVEN_LANES: "deadlock",
    "shfl.sync.idx.b32 %r1, %r0, 9, 31, 0xff;": "lane [0-9]+ (is not in its own|reads lane 9)",
    "trap;": "trap",
    "again: bra again;": "deadlock.*\n.*in a loop without end",
    "mov.u32 %r1, smem; " + ARRIVE + ";": "not an initialised mbarrier",
    "mov.u32 %r1, smem; ld.shared.u32 %r2, [%r1+2];": "misaligned shared memory address smem.0x2",
    MBARRIER + ARRIVE + ";": "race: mbarrier.arrive|not an initialised mbarrier",
    MBARRIER + "bar.sync 0; @%p1 " + ARRIVE + ", 2;": "more arrivals than its count 1",
}


@pytest.mark.parametrize("code", SYNCHRONISATION_ERRORS)
def test_synchronisation_errors(code: str) -> None:
    with pytest.raises(EmulatorError, match=SYNCHRONISATION_ERRORS[code]):
        launch(program(code), np.zeros(1, np.uint32), block=64)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_may_wait_for_blocks_that_asked_earlier(threads: int) -> None:
    """In linear order, which eager schedules have, that is for blocks of a lower number."""
    kernel = program(
        """
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0; @%p1 bra done;
        wait: ld.acquire.gpu.global.u32 %r2, [%rd0]; setp.ne.u32 %p2, %r2, %r1; @%p2 bra wait;
        ld.global.u32 %r3, [%rd0+4]; mad.lo.u32 %r3, %r3, 3, %r1; st.global.u32 [%rd0+4], %r3;
        fence.acq_rel.gpu; red.release.gpu.global.add.u32 [%rd0], 1;
        done: bar.sync 0;"""
    )
    out = np.zeros(2, np.uint32)
    launch(kernel, out, grid=20, threads=threads, schedule="eager")
    expected = 0
    for block in range(20):
        expected = (3 * expected + block) % 2**32
    assert out.tolist() == [20, expected]
    for schedule in ("lazy", "random"):
        with pytest.raises(EmulatorError, match="deadlock"):
            launch(kernel, np.zeros(2, np.uint32), grid=20, threads=threads, schedule=schedule)
    backwards = program(
        "wait: ld.volatile.global.u32 %r2, [%rd0]; setp.ne.u32 %p2, %r2, 7; @%p2 bra wait;"
    )
    with pytest.raises(EmulatorError, match="deadlock.*\n.*spinning on address"):
        launch(backwards, out, grid=3, threads=threads)


def test_launch_checks_sizes() -> None:
    kernel = program("", directives=".maxntid 64, 1, 1")
    out = np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match="block has 96 threads, test is for"):
        launch(kernel, out, block=96)
    with pytest.raises(ValueError, match="multiple of 32"):
        launch(kernel, out, block=33)
    with pytest.raises(ValueError, match="smem_bytes is 232449"):
        launch(kernel, out, smem=232449)
    with pytest.raises(ValueError, match="schedule is 'slow'"):
        launch(kernel, out, schedule="slow")
    launch(kernel, out, grid=0)


def test_all_of_shared_memory_and_512_threads() -> None:
    kernel = program(
        "mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2+230400], %r0;"
    )
    launch(kernel, np.zeros(1, np.uint32), block=512, smem=232448)


@pytest.mark.full
def test_processes_share_an_empty_cache(tmp_path: Path) -> None:
    code = "from test_emulator import program; program('mov.u32 %r1, 1;')"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    folder = Path(__file__).parent
    workers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment)
        for _ in range(3)
    ]
    assert [worker.wait(300) for worker in workers] == [0, 0, 0]
    files = sorted(p.name.split("-")[0] for p in (tmp_path / "cuflash" / "emulator").iterdir())
    assert files == ["kernel", "runtime"]
