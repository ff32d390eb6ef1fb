"""python -m cuflash info, compile and bench; none of these tests needs a GPU."""

import json
import re
import types
from itertools import pairwise

import numpy as np
import pytest

import cuflash
from cuflash import _jit
from cuflash.__main__ import main
from cuflash._traits import Kernel
from cuflash.cli import (
    ahead,
    bench,
    check,
    compile,
    contenders,
    launches,
    reports,
    suites,
    tables,
    timing,
)
from cuflash.cli.cells import Cell
from cuflash.cli.inputs import cpu_inputs

SOURCE = 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = VALUE; }'


class StandInCupy:
    """CuPy as it is on a machine with these GPUs; with none, as without a driver."""

    __version__ = "14.0"

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, *capabilities: int):
        self.capabilities = capabilities
        self.CUDARuntimeError = StandInCupy.CUDARuntimeError
        self.nvrtc = types.SimpleNamespace(getVersion=lambda: (13, 0))
        self.cuda = types.SimpleNamespace(runtime=self, nvrtc=self.nvrtc)

    def getDeviceCount(self) -> int:
        if not self.capabilities:
            raise self.CUDARuntimeError("cudaErrorInsufficientDriver")
        return len(self.capabilities)

    def getDeviceProperties(self, index: int) -> dict:
        major, minor = divmod(self.capabilities[index], 10)
        return {
            "name": b"NVIDIA Pretend",
            "major": major,
            "minor": minor,
            "multiProcessorCount": 7,
            "totalGlobalMem": 3 * 2**30,
        }

    def driverGetVersion(self) -> int:
        return 13000 if self.capabilities else 0


@pytest.fixture
def gpus(monkeypatch):
    """Give the machine GPUs of these capabilities, as far as the commands can tell."""

    def have(*capabilities: int) -> None:
        monkeypatch.setattr(_jit, "import_cupy", lambda: StandInCupy(*capabilities))
        monkeypatch.setattr(_jit, "nvrtc_version", lambda: (13, 1, 80))

    return have


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(folder))
    return folder


@pytest.mark.parametrize(
    "command",
    [["check"], ["bench"], ["bench", "--suite", "masks", "--quick"], ["compile"]],
)
def test_without_a_gpu_a_command_says_what_it_needs(gpus, capsys, command):
    gpus()
    assert main(command) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "no usable NVIDIA driver (cudaErrorInsufficientDriver)" in printed.err
    need = (
        "--arch sm_80 sm_90" if command == ["compile"] else "needs an NVIDIA GPU of sm_80 or newer"
    )
    assert need in printed.err
    assert ("suites cpu, cpu-masks, cpu-packed need none" in printed.err) == (command[0] == "bench")


def test_bench_help_has_a_line_on_every_suite(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    printed = capsys.readouterr().out
    (names,) = re.search(r"--suite \{(.*?)\}", printed).groups()
    assert re.findall(r"^  ([a-z][a-z-]+) +\w", printed, re.MULTILINE) == names.split(",")


def test_without_cupy_the_need_is_cupy(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert main(["check"]) == 2
    assert 'pip install "cuflash[cuda13]"' in capsys.readouterr().err
    assert main(["info"]) == 0
    assert "CuPy           not installed" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_info_without_a_gpu(gpus, cache, capsys):
    gpus()
    assert main(["info"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {line[:14].strip(): line[14:].strip() for line in printed}
    assert lines["cuflash"].startswith(cuflash.__version__)
    assert lines["numpy"] == np.__version__
    assert lines["NVRTC"] == "13.1.80" and lines["driver"] == "none"
    assert lines["GPU arrays"].startswith("no backend: no usable NVIDIA driver")
    assert lines["NumPy arrays"].startswith("backend cpu")
    assert lines["cache"] == f"{cache}: 0 kernels, 0.0 MiB"


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ((13, 0, 88), 'pip install "nvidia-cuda-nvrtc>=13.1"'),
        ((13, 1, 79), 'pip install "nvidia-cuda-nvrtc>=13.1"'),
        ((12, 9, 86), 'a driver of CUDA 13 and pip install "cuflash[cuda13]"'),
    ],
)
def test_a_compiler_that_is_wrong_on_hopper_is_warned_of(
    gpus, cache, capsys, monkeypatch, version, remedy
):
    gpus(80, 90)
    monkeypatch.setattr(check, "_every", lambda quick: [])
    monkeypatch.setattr(check, "compile_ahead", lambda calls: None)
    dotted = ".".join(map(str, version))
    warning = (
        f"warning: NVRTC {dotted} may make wrong code for Hopper GPUs (sm_90a); "
        f"expected 13.1.80 or newer: {remedy}\n"
    )

    def printed(command: str) -> str:
        assert main([command]) == 0
        return "".join(capsys.readouterr())

    assert "warning" not in printed("info") + printed("check")
    monkeypatch.setattr(_jit, "nvrtc_version", lambda: version)
    assert f"{dotted}; {warning}" in printed("info")
    assert warning in printed("check")
    gpus(80)
    monkeypatch.setattr(_jit, "nvrtc_version", lambda: version)
    assert "warning" not in printed("check")


def test_info_says_which_backend_serves_which_gpu_and_why(gpus, cache, capsys):
    gpus(90, 75, 80)
    cache.mkdir()
    (cache / "a.cubin").write_bytes(bytes(2**20))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "GPU 0            NVIDIA Pretend, sm_90, 7 SMs, 3.0 GiB" in out
    assert "arrays on GPU 0  backend sm90, by its architecture sm_90" in out
    assert "arrays on GPU 2  backend sm80, by its architecture sm_80" in out
    assert "arrays on GPU 1  no backend: the GPU has compute capability 7.5" in out
    assert "1 kernels, 1.0 MiB" in out


KIND = launches.CallKind("bfloat16", 32, 32, backward=False)


@pytest.fixture
def tiny_kernel(tmp_path, monkeypatch, cache):
    """The planner asks for one kernel per head size, and each compiles in no time."""
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    sources = tmp_path / "kernels_cu"
    sources.mkdir()
    (sources / "fill.cu").write_text(SOURCE)

    def kernels_of(kind, arch):
        return [Kernel("fill.cu", "fill", arch, (("VALUE", kind.head_dim),), 32, 0)]

    monkeypatch.setattr(_jit, "kernel_dir", lambda: sources)
    monkeypatch.setattr(launches, "kernels_of", kernels_of)
    return sources / "fill.cu"


def test_compile_fills_the_cache_once(tiny_kernel, cache, capsys):
    command = ["compile", "--arch", "sm_80", "sm_90", "--head-dim", "64", "96", "--jobs", "1"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "sm_90 fill.cu VALUE=96: " in out and " 0 bytes spilled" in out
    assert "4 kernels for sm_80, sm_90: 4 compiled, 0 were there, 0 failed" in out
    assert len(list(cache.glob("*.cubin"))) == 4
    assert main(command) == 0
    assert "0 compiled, 4 were there, 0 failed" in capsys.readouterr().out


def test_compile_takes_the_architectures_of_the_gpus_here(tiny_kernel, gpus, monkeypatch, capsys):
    gpus(86, 90, 90)
    seen = []
    monkeypatch.setattr(
        compile, "_compile", lambda kernel: seen.append(kernel.arch) or compile.Outcome(kernel)
    )
    main(["compile", "--head-dim", "64", "--jobs", "1"])
    assert seen == ["sm_86", "sm_90"]


def test_compile_goes_on_after_a_failure_and_shows_the_log(tiny_kernel, capsys):
    tiny_kernel.write_text("#if VALUE == 96\n#error this size\n#endif\n" + SOURCE)
    assert main(["compile", "--arch", "sm_80", "--head-dim", "96", "64", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    assert "VALUE=96: FAILED" in out and "this size" in out
    assert "2 kernels for sm_80: 1 compiled, 0 were there, 1 failed" in out


@pytest.mark.filterwarnings("ignore:cuflash. cannot write")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_compile_stops_where_the_cache_cannot_be_written(tmp_path, monkeypatch, capsys, jobs):
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "a file/cache"))
    command = ["compile", "--arch", "sm_80", "--head-dim", "32", "--forward-only", "--jobs", jobs]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert "a file/cache cannot be written" in printed.err


def test_compile_hands_on_masks_and_terms(tiny_kernel, monkeypatch, cache):
    kinds = []
    monkeypatch.setattr(launches, "kernels_of", lambda kind, arch: kinds.append(kind) or [])
    sizes = ["--arch", "sm_80", "--head-dim", "64", "--dtype", "float16", "--jobs", "1"]
    terms = ["--mask", "causal & ~dense", "--bias-bits", "32", "--alibi", "--sinks", "--dropout"]
    assert main(["compile", *sizes, *terms]) == 0
    assert main(["compile", *sizes, "--packed", "--group", "2", "--nondeterministic"]) == 0
    given = {"mask": "causal & ~dense", "bias_bits": 32}
    given |= dict.fromkeys(("alibi", "sinks", "dropout"), True)
    packed = {"group": 2, "packed": True, "deterministic": False}
    assert kinds == [launches.CallKind("float16", 64, 64, **x) for x in (given, packed)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--packed", "--mask", "causal"], "--packed goes with neither --mask nor --bias-bits"),
        (["--packed", "--bias-bits", "16"], "--packed goes with neither --mask nor --bias-bits"),
        (
            ["--mask", " & ".join(["causal"] * 33)],
            "compile: mask and score_mod have 33 rules and named ",
        ),
    ],
)
def test_compile_refuses_what_no_call_has(arguments, message, cache, capsys):
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    assert main(["compile", "--arch", "sm_80", "--jobs", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_compile_refuses_what_is_no_mask(cache, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compile", "--arch", "sm_80", "--mask", "causal & sliding"])
    assert "'sliding' is no rule; expected causal, window, " in capsys.readouterr().err


def test_compile_counts_an_architecture_once(tiny_kernel, cache, capsys):
    assert main(["compile", "--arch", "sm_80", "sm_80", "--head-dim", "64", "--jobs", "1"]) == 0
    assert "1 kernels for sm_80: 1 compiled" in capsys.readouterr().out


def test_compile_refuses_an_architecture_below_the_kernels(cache, capsys):
    assert main(["compile", "--arch", "sm_75", "--jobs", "1"]) == 2
    assert "compute capability 7.5" in capsys.readouterr().err


def test_compile_runs_the_planners_kernels_in_processes(cache, capsys):
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    command = ["compile", "--arch", "sm_80", "--head-dim", "32", "--dtype", "bfloat16"]
    assert main([*command, "--forward-only", "--jobs", "2"]) == 0
    assert " 0 failed" in capsys.readouterr().out
    kernels = launches.kernels_of(KIND, "sm_80")
    assert len(list(cache.glob("*.cubin"))) == len(set(kernels))


def test_what_calls_will_launch_is_compiled_ahead(cache, monkeypatch):
    pytest.importorskip("cupy", reason="compiling needs CuPy")
    from cuflash._gpu import Gpu, noted

    (kernel,) = set(launches.kernels_of(KIND, "sm_80")[:1])
    gpu = Gpu.__new__(Gpu)  # of no device: a launch in earnest would fail
    calls = []

    def call():
        calls.append(gpu.run(kernel, 1, b""))

    def fail():
        raise ValueError("reported where it is made in earnest")

    ahead.compile_ahead([call, fail, call])
    assert calls == [None, None] and noted.get() is None
    assert len(list(cache.glob("*.cubin"))) == 1
    monkeypatch.setattr(_jit, "_compile", None)  # what is cached is not compiled again
    ahead.compile_ahead([call])
    with pytest.raises(AttributeError):
        call()


def test_contenders_take_turns():
    turns = []

    class Script:
        def __init__(self, *milliseconds: float):
            self.left = [1.0] * timing.WARM_UP_CALLS + list(milliseconds)

        def time(self, call):
            call()
            value = self.left.pop(0)
            return lambda: value

    a = timing.Contender(lambda: turns.append("a"), Script(9, 3, 4, 5, 6, 1, 2))
    b = timing.Contender(lambda: turns.append("b"), Script(*[2.0] * 7))
    timings = timing.measure({"a": a, "b": b}, seconds=0)
    assert timings["a"] == timing.Timing(median_ms=4, min_ms=1, repeats=7)
    assert timings["b"].median_ms == 2
    assert turns[2 * timing.WARM_UP_CALLS :] == ["a", "b"] * 7


def test_the_host_clock_divides_by_what_it_queues():
    calls = []
    waited = []
    clock = timing.HostClock(queued=4, wait=waited.append)
    milliseconds = clock.time(lambda: calls.append(0) or len(calls))()
    assert len(calls) == 4 and waited == [4]
    assert milliseconds >= 0


def test_the_stream_clock_empties_the_cache_and_reads_its_events_last():
    log = []

    class Event:
        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

    scratch = types.SimpleNamespace(fill=lambda value: log.append("flush"))
    cuda = types.SimpleNamespace(
        Event=Event,
        Device=lambda: types.SimpleNamespace(id=3),
        get_elapsed_time=lambda start, end: 0.25,
        runtime=types.SimpleNamespace(getDeviceProperties=lambda index: {"l2CacheSize": 100}),
    )

    def empty(size, dtype):
        log.append(size)
        return scratch

    clock = timing.StreamClock(types.SimpleNamespace(cuda=cuda, empty=empty, uint8=np.uint8))
    read = clock.time(lambda: log.append("call"))
    assert log == [200, "flush", "record", "call", "record"]
    assert read() == 0.25 and log[-1] == "synchronize"


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_torch_computes_what_we_compute(direction):
    pytest.importorskip("torch", reason="the comparison needs torch")
    cell = Cell(direction, "float32", 2, 19, 3, 8, causal=True)
    inputs = cpu_inputs(cell)
    factories = contenders.cpu_contenders()
    ours, theirs = (factories[name](cell, inputs).call() for name in ("cuflash", "torch"))
    if direction == "forward":
        ours, theirs = [ours], [theirs]
    for mine, peer in zip(ours[: len(theirs)], theirs, strict=True):
        assert np.allclose(mine, peer.detach().transpose(1, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_flops_count_the_visible_pairs(causal):
    cell = Cell("forward", "bfloat16", 2, 7, 3, 16, causal)
    pairs = sum(j <= i or not causal for i in range(7) for j in range(7))
    assert cell.flops == 2 * 2 * 16 * pairs * 2 * 3
    backward = Cell("backward", "bfloat16", 2, 7, 3, 16, causal)
    assert backward.flops / cell.flops == 2.5


def test_the_grid_holds_tokens_and_width():
    cells = list(suites.cells("forward", quick=False))
    assert len(cells) == 30
    assert {cell.batch * cell.seqlen for cell in cells} == {16384}
    assert {cell.heads * cell.head_dim for cell in cells} == {2048}
    assert {(c.head_dim, c.causal) for c in cells} == {
        (d, causal) for d in (64, 128, 256) for causal in (False, True)
    }


def test_bench_on_the_cpu_leaves_a_table_and_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "CPU_SHAPES", ((1, 32, 2, 8, True),))
    monkeypatch.setattr(contenders, "gemm_tflops_cpu", lambda: (0.5, "numpy float32"))
    output = tmp_path / "cpu.json"
    command = ["bench", "--suite", "cpu", "--seconds", "0.01", "--output", str(output)]
    assert main([*command, "--commit", "abc"]) == 0
    report = json.loads(output.read_text())
    assert report["commit"] == "abc" and report["gemm"] == {"tflops": 0.5, "by": "numpy float32"}
    assert report["versions"]["numpy"] == np.__version__ and report["command"] and report["date"]
    forward, both = report["cells"]
    assert (forward["direction"], both["direction"]) == ("forward", "forward+backward")
    assert forward["results"]["cuflash"]["median_ms"] > 0
    table = capsys.readouterr().out
    assert "| forward | 8 | 32 | yes | " in table and str(output) in table


def test_bench_of_the_host_queues_calls_and_prints_microseconds(tmp_path, monkeypatch, capsys):
    waits, calls = [], []
    runtime = types.SimpleNamespace(deviceSynchronize=lambda: waits.append(len(calls)))
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(contenders, "HOST_QUEUE", 5)
    gpu = bench.Bench(
        factories=contenders.gpu_host_contenders(cupy),
        machine={"device": "GPU"},
        gemm=lambda: (0.5, "nobody"),
        inputs=lambda cells: cpu_inputs,
        tiles=lambda cell, inputs: {},
    )
    attention = cuflash.attention
    monkeypatch.setattr(cuflash, "attention", lambda *x, **o: calls.append(1) or attention(*x, **o))
    monkeypatch.setattr(bench, "_on_gpu", lambda suite: gpu)
    monkeypatch.setattr(bench, "compile_ahead", lambda calls: None)
    output = tmp_path / "host.json"
    command = ["bench", "--suite", "host", "--quick", "--seconds", "0.001", "--peers"]
    assert main([*command, "--output", str(output), "--commit", "abc"]) == 0
    cells = json.loads(output.read_text())["cells"]
    assert [cell["head_dim"] for cell in cells] == [64, 128]
    assert [(stop - start) for start, stop in pairwise(waits)][::2] == [5] * (len(waits) // 2)
    microseconds = 1e3 * cells[0]["results"]["cuflash"]["median_ms"]
    table = capsys.readouterr().out
    assert f"| forward | 64 | {microseconds:.4g} | – |" in table and "microseconds" in table


def test_a_report_never_replaces_another(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        path = reports.default_output("cpu", "Some CPU, 2 cores")
        path.touch()
        names.append(path.name.partition("some-cpu-2-cores-")[2])
    assert names == ["cpu.json", "cpu-2.json", "cpu-3.json"]


def test_bench_records_why_a_peer_is_absent(tmp_path, monkeypatch, capsys):
    def absent(cell, inputs):
        raise ImportError("No module named 'torch'\nmore")

    factories = {**contenders.cpu_contenders(), "torch": absent}
    monkeypatch.setattr(contenders, "cpu_contenders", lambda: factories)
    monkeypatch.setattr(contenders, "gemm_tflops_cpu", lambda: (0.5, "numpy float32"))
    monkeypatch.setattr(suites, "CPU_SHAPES", ((1, 32, 2, 8, False),))
    output = tmp_path / "cpu.json"
    assert main(["bench", "--suite", "cpu", "--seconds", "0.01", "--output", str(output)]) == 0
    results = json.loads(output.read_text())["cells"][0]["results"]
    assert results["torch"] == {"error": "ImportError: No module named 'torch'"}
    assert "torch: ImportError: No module named 'torch'" in capsys.readouterr().out


@pytest.fixture
def unmeasured(monkeypatch):
    """`bench --suite cpu` must be over before it measures anything."""

    def measured(*_):
        raise AssertionError("this was to be refused first")

    monkeypatch.setattr(contenders, "gemm_tflops_cpu", measured)
    monkeypatch.setattr(bench, "_run_cell", measured)


def test_bench_refuses_peers_that_it_does_not_know(unmeasured, tmp_path, capsys):
    command = ["bench", "--suite", "cpu", "--output", str(tmp_path / "cpu.json")]
    assert main([*command, "--peers", "torch", "tensorflow"]) == 2
    assert "--peers has 'tensorflow'; expected some of 'torch'\n" in capsys.readouterr().err


def test_bench_takes_the_peers_that_were_named():
    factories = {"cuflash": 0, "torch cudnn": 1, "jax cudnn": 2}
    assert bench._chosen(factories, None) == factories
    assert bench._chosen(factories, ["jax cudnn"]) == {"cuflash": 0, "jax cudnn": 2}
    assert bench._chosen(factories, ["cuflash"]) == bench._chosen(factories, []) == {"cuflash": 0}


@pytest.mark.parametrize("output", ["", "missing/cpu.json", "a file/cpu.json"])
def test_bench_refuses_an_output_that_cannot_be_written(unmeasured, tmp_path, capsys, output):
    (tmp_path / "a file").write_text("")
    path = tmp_path / output
    assert main(["bench", "--suite", "cpu", "--output", str(path)]) == 2
    assert f"the result cannot be written to {path}: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]


def test_bench_leaves_no_file_where_it_does_not_measure(tmp_path):
    reports.require_writable("bench", tmp_path / "cpu.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "cpu.json").write_text("{}")
    reports.require_writable("bench", tmp_path / "cpu.json")
    assert (tmp_path / "cpu.json").read_text() == "{}"


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "1e999", "soon"])
def test_bench_refuses_what_is_no_duration(unmeasured, capsys, seconds):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--suite", "cpu", f"--seconds={seconds}"])
    assert f"{seconds!r} is no duration; expected seconds" in capsys.readouterr().err


def test_the_table_compares_with_the_best_peer():
    cell = {"direction": "forward", "head_dim": 128, "seqlen": 1024, "causal": False}
    results = {
        "cuflash": {"tflops": 450.0},
        "torch cudnn": {"tflops": 500.0},
        "torch flash": {"tflops": 300.0},
        "jax cudnn": {"error": "ImportError: no jax"},
    }
    report = {
        "device": "GPU",
        "suite": "forward",
        "date": "2026-01-01",
        "gemm": {"tflops": 600.0, "by": "torch bfloat16"},
        "cells": [{**cell, "results": results}],
    }
    table = tables.table(report)
    assert "| forward | 128 | 1024 | no | 450 | 75 % | 500 | 300 | – | 0.90 |" in table
    assert table.endswith("jax cudnn: ImportError: no jax")
