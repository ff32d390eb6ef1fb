"""From a kernel's source to a loaded function: digest, cache on disk, compile errors, loading."""

import contextlib
import json
import logging
import multiprocessing
import os
import stat
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cuflash import _jit
from cuflash._traits import Kernel

pytest.importorskip("cupy", reason="compiling needs CuPy")

SOURCE = """
#include "scale.cuh"
#ifndef kFactor
#define kFactor 1
#endif
extern "C" __global__ void __launch_bounds__(64) scale(float* x) {
  __shared__ float reversed[64];
  reversed[63 - threadIdx.x] = scaled(x[threadIdx.x], kFactor);
  __syncthreads();
  x[threadIdx.x] = reversed[threadIdx.x];
}
"""
HEADER = "__device__ inline float scaled(float x, int factor) { return x * factor; }\n"
KERNEL = Kernel(
    source="scale.cu",
    entry="scale",
    arch="sm_80",
    constants=(("kFactor", 3),),
    threads=64,
    smem_bytes=0,
)


def with_constants(**constants: int) -> Kernel:
    return Kernel("scale.cu", "scale", "sm_80", tuple(constants.items()), 64, 0)


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of kernels of our own."""
    folder = write_sources(tmp_path / "kernels_cu")
    monkeypatch.setattr(_jit, "kernel_dir", lambda: folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(folder))
    monkeypatch.delenv("CUFLASH_LINEINFO", raising=False)
    monkeypatch.delenv("CUPY_CUDA_COMPILE_WITH_DEBUG", raising=False)
    return folder


def write_sources(folder: Path) -> Path:
    folder.mkdir()
    (folder / "scale.cu").write_text(SOURCE)
    (folder / "scale.cuh").write_text(HEADER)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_cubin_is_a_whole_elf_with_its_resources(sources):
    cubin = _jit.compile_cubin(KERNEL)
    assert cubin.image[:4] == b"\x7fELF"
    assert len(cubin.image) % 8 == 0  # CuPy alone cuts the last byte
    resources = cubin.resources
    assert 4 <= resources.registers <= 64
    assert resources.static_smem_bytes == 64 * 4
    assert resources.stack_bytes == resources.spill_bytes == 0


def test_resources_add_up_spills_and_take_the_largest_stack():
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_80'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem\n"
        "    32 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
    )
    assert _jit.Cubin(b"", log).resources == _jit.Resources(255, 32, 24, 1024)


def test_the_second_call_reads_the_file_of_the_first(sources, cache):
    first = _jit.cached_cubin(KERNEL)
    second = _jit.cached_cubin(KERNEL)
    assert first.seconds > 0 and second.seconds == 0
    assert second.image == first.image == first.path.read_bytes()
    assert second.path == first.path and second.log == first.log
    assert names(cache) == {first.path.name, first.path.with_suffix(".json").name}


def test_entries_obey_the_umask_so_that_another_user_can_read_them(sources, cache):
    previous = os.umask(0o022)
    try:
        path = _jit.cached_cubin(KERNEL).path
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_whatever_decides_the_result_decides_the_name(sources, cache, monkeypatch):
    paths = [_jit.cached_cubin(KERNEL).path]
    paths.append(_jit.cached_cubin(with_constants(kFactor=4)).path)
    paths.append(_jit.cached_cubin(Kernel("scale.cu", "scale", "sm_90", (), 64, 0)).path)
    monkeypatch.setenv("CUFLASH_LINEINFO", "1")
    paths.append(_jit.cached_cubin(KERNEL).path)
    monkeypatch.delenv("CUFLASH_LINEINFO")
    (sources / "scale.cuh").write_text(HEADER + "// edited\n")
    paths.append(_jit.cached_cubin(KERNEL).path)
    (sources / "scale.cu").write_text(SOURCE + "// edited\n")
    paths.append(_jit.cached_cubin(KERNEL).path)
    for version in ((13, 99, 1), (13, 99, 2)):
        monkeypatch.setattr(_jit, "nvrtc_version", lambda version=version: version)
        paths.append(_jit.cached_cubin(KERNEL).path)
    assert len(set(paths)) == len(paths)


def test_a_constant_reaches_the_code(sources):
    assert "0f40E00000" in _jit.compile_ptx(with_constants(kFactor=7))  # 7.0f


@pytest.mark.parametrize("damage", [b"", b"garbage", None, "truncated", "flipped"])
def test_a_damaged_cubin_is_recompiled(sources, cache, damage):
    entry = _jit.cached_cubin(KERNEL)
    if damage is None:
        entry.path.unlink()
    elif damage == "truncated":
        entry.path.write_bytes(entry.image[: len(entry.image) // 2])
    elif damage == "flipped":
        entry.path.write_bytes(entry.image[:-9] + b"\xff" + entry.image[-8:])
    else:
        entry.path.write_bytes(damage)
    again = _jit.cached_cubin(KERNEL)
    assert again.seconds > 0
    assert again.image == entry.image == entry.path.read_bytes()


@pytest.mark.parametrize(
    "record", [None, "", "{", "[]", "{}", '{"sha256": "0", "log": ""}', "\xff"]
)
def test_a_damaged_record_is_recompiled(sources, cache, record):
    path = _jit.cached_cubin(KERNEL).path
    beside = path.with_suffix(".json")
    if record is None:
        beside.unlink()
    else:
        beside.write_bytes(record.encode("latin-1"))
    assert _jit.cached_cubin(KERNEL).seconds > 0
    assert json.loads(beside.read_text())["log"]
    assert _jit.cached_cubin(KERNEL).seconds == 0


def test_many_processes_meet_at_one_sound_entry(tmp_path, cache):
    folder = write_sources(tmp_path / "kernels_cu")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(6, mp_context=spawn) as pool:
        images = list(pool.map(_cached_image, [folder] * 6, [str(cache)] * 6))
    assert len(set(images)) == 1
    (cubin,) = cache.glob("*.cubin")
    assert cubin.read_bytes() == images[0]
    assert names(cache) == {cubin.name, cubin.with_suffix(".json").name}


def _cached_image(folder: Path, cache: str) -> bytes:
    os.environ["CUFLASH_CACHE_DIR"] = cache
    _jit.kernel_dir = lambda: folder
    return _jit.cached_cubin(KERNEL).image


def test_an_unwritable_folder_works_and_warns_once(sources, tmp_path, monkeypatch):
    blocker = tmp_path / "a file"
    blocker.write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(blocker / "cache"))
    with pytest.warns(RuntimeWarning, match="CUFLASH_CACHE_DIR"):
        cubin = _jit.cached_cubin(KERNEL)
    assert cubin.path is None and cubin.image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _jit.cached_cubin(with_constants(kFactor=5)).image


def test_a_process_that_compiles_with_debug_fills_no_cache(sources, cache, monkeypatch):
    monkeypatch.setenv("CUPY_CUDA_COMPILE_WITH_DEBUG", "1")
    assert _jit.cached_cubin(KERNEL).path is None
    assert not cache.exists()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "mine"))
    assert _jit.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("CUFLASH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _jit.cache_dir() == tmp_path / "cuflash"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _jit.cache_dir() == tmp_path / "home/.cache/cuflash"


@pytest.mark.parametrize(("limit", "lines"), [(0.0, 1), (1e9, 0)])
def test_a_slow_compile_logs_one_line(sources, cache, monkeypatch, caplog, limit, lines):
    monkeypatch.setattr(_jit, "SLOW_COMPILE_SECONDS", limit)
    with caplog.at_level(logging.INFO, logger="cuflash"):
        _jit.cached_cubin(KERNEL)
    assert len(caplog.messages) == lines
    assert all("scale.cu for sm_80 (kFactor=3)" in line for line in caplog.messages)


def test_ptx_is_compiled_for_the_virtual_architecture_and_cached(sources, cache):
    ptx = _jit.cached_ptx(KERNEL)
    assert ".target sm_80" in ptx and ".entry scale" in ptx
    assert _jit.cached_ptx(KERNEL) == ptx == _jit.compile_ptx(KERNEL, "compute_80")
    assert ".target sm_90a" in _jit.cached_ptx(KERNEL, "compute_90a")
    assert len(list(cache.glob("*.ptx"))) == 2


def test_a_missing_header_names_itself_and_who_includes_it(sources):
    (sources / "scale.cuh").unlink()
    with pytest.raises(FileNotFoundError, match=r"scale\.cuh, which scale\.cu includes"):
        _jit.compile_cubin(KERNEL)


def test_the_closure_follows_headers_of_headers_once(sources):
    (sources / "ptx").mkdir()
    (sources / "ptx/move.cuh").write_text('#include "scale.cuh"\n')
    (sources / "scale.cuh").write_text('  #  include "ptx/move.cuh"\n' + HEADER)
    assert set(_jit.source_closure("scale.cu")) == {"scale.cu", "scale.cuh", "ptx/move.cuh"}


def test_a_compile_error_shows_the_log(sources, cache):
    (sources / "scale.cuh").write_text("int scaled(float x, int factor) { return undeclared; }\n")
    with pytest.raises(_jit.CompileError, match=r'scale\.cu for sm_80[\s\S]*"undeclared"'):
        _jit.cached_cubin(KERNEL)
    assert not cache.exists()


def test_an_architecture_that_nvrtc_does_not_know_is_named(sources):
    with pytest.raises(NotImplementedError, match="does not know sm_999; it compiles for .*80"):
        _jit.compile_cubin(Kernel("scale.cu", "scale", "sm_999", (), 64, 0))


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ImportError, match=r"cuflash\[cuda13\]"):
        _jit.import_cupy()


def test_without_nvrtc_the_error_names_the_extra(monkeypatch):
    def absent() -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")

    nvrtc = types.SimpleNamespace(getVersion=absent)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setattr(_jit, "import_cupy", lambda: cupy)
    with pytest.raises(ImportError, match=r"no NVRTC.*cuflash\[cuda13\]"):
        _jit._nvrtc.__wrapped__()


class StandInDriver:
    """The part of CuPy that loads modules, as it behaves with a GPU."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self, driver_version: int = 13000, error: str = ""):
        self.loaded: list[str | bytes] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.error = error
        self.cuda = types.SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(types.SimpleNamespace(use=lambda: None)),
            driver=self,
            runtime=types.SimpleNamespace(driverGetVersion=lambda: driver_version),
            function=types.SimpleNamespace(Module=lambda: self),
        )

    def RawModule(self, *, path: str) -> "StandInDriver":
        self.load(path)
        return self

    def load(self, image: str | bytes) -> None:
        if self.error:
            raise self.CUDADriverError(self.error)
        self.loaded.append(image)

    def get_function(self, entry: str) -> types.SimpleNamespace:
        function = types.SimpleNamespace(ptr=0x5EED)
        function.kernel = function
        return function

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.attributes.append((function, attribute, value))


@pytest.fixture
def stand_in(sources, cache, monkeypatch):
    """Replace CuPy's driver, not its NVRTC."""
    _jit._nvrtc()

    def use(**options) -> StandInDriver:
        driver = StandInDriver(**options)
        monkeypatch.setattr(_jit, "import_cupy", lambda: driver)
        _jit.load.cache_clear()
        return driver

    yield use
    _jit.load.cache_clear()


def test_load_reads_the_cached_file_and_raises_the_limit_of_shared_memory_once(stand_in, cache):
    driver = stand_in()
    kernel = Kernel("scale.cu", "scale", "sm_80", (), 64, smem_bytes=100_000)
    function = _jit.load(kernel, 0)
    assert _jit.load(kernel, 0) is function
    assert function.function_pointer == 0x5EED
    assert driver.loaded == [str(next(cache.glob("*.cubin")))]
    assert driver.attributes == [(0x5EED, 8, 100_000)]
    _jit.load(kernel, 1)
    assert len(driver.attributes) == 2  # once per device


@pytest.mark.filterwarnings("ignore:cuflash. cannot write")
def test_load_takes_the_image_from_memory_without_a_cache(stand_in, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "a file/cache"))
    driver = stand_in()
    _jit.load(KERNEL, 0)
    assert driver.loaded[0][:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("driver_version", "remedy"),
    [(12040, r'"cuflash\[cuda12\]" in place of cuda13'), (13000, r"nvidia-cuda-nvrtc==13\.0\.\*")],
)
def test_a_driver_too_old_for_the_cubin(stand_in, driver_version, remedy):
    stand_in(driver_version=driver_version, error="CUDA_ERROR_UNSUPPORTED_PTX_VERSION: unsupported")
    major, minor, build = _jit.nvrtc_version()
    if major != 13:
        pytest.skip("the remedies expected are those of CUDA 13")
    found = rf"NVRTC 13\.{minor}\.{build}.*sm_80"
    with pytest.raises(NotImplementedError, match=rf"{found}.*update the driver, or .*{remedy}"):
        _jit.load(KERNEL, 0)


def test_a_driver_too_old_for_hopper_is_given_no_older_compiler(stand_in):
    stand_in(driver_version=13000, error="CUDA_ERROR_UNSUPPORTED_PTX_VERSION: unsupported")
    kernel = Kernel("scale.cu", "scale", "sm_90a", (), 64, 0)
    with pytest.raises(NotImplementedError, match="for sm_90a; update the driver$"):
        _jit.load(kernel, 0)


def test_the_compilers_version_is_that_of_its_package():
    from importlib import metadata

    version = _jit.nvrtc_version()
    assert version[:2] == _jit._nvrtc().getVersion()
    with contextlib.suppress(metadata.PackageNotFoundError):
        assert _jit.dotted(version) == metadata.version("nvidia-cuda-nvrtc")


def test_loading_hoppers_kernels_warns_once_of_a_compiler_that_is_wrong(stand_in, monkeypatch):
    stand_in()
    kernel = Kernel("scale.cu", "scale", "sm_90a", (), 64, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(_jit, "nvrtc_version", lambda: (13, 1, 80))
        _jit.load(kernel, 0)
        monkeypatch.setattr(_jit, "nvrtc_version", lambda: (13, 0, 87))
        _jit.load(KERNEL, 0)
        with pytest.raises(RuntimeWarning, match=r"^cuflash: NVRTC 13\.0\.87 may make wrong code"):
            _jit.load(kernel, 1)
    with pytest.warns(RuntimeWarning, match="13.0.87"):
        _jit.load(kernel, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _jit.load(kernel, 2)


def test_another_error_of_the_driver_is_left_alone(stand_in):
    driver = stand_in(error="CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    with pytest.raises(driver.CUDADriverError, match="OUT_OF_MEMORY"):
        _jit.load(KERNEL, 0)


@pytest.mark.gpu
def test_a_loaded_kernel_runs(sources, cache):
    import cupy
    import numpy as np

    arch = f"sm_{cupy.cuda.Device().compute_capability}"
    kernel = Kernel("scale.cu", "scale", arch, (("kFactor", 3),), 64, 0)
    function = _jit.load(kernel, cupy.cuda.Device().id)
    x = cupy.arange(64, dtype=cupy.float32)
    argument = np.array([x.data.ptr], np.uint64)
    arguments = np.array([argument.ctypes.data], np.uint64)
    cupy.cuda.driver.launchKernel(
        function.function_pointer, 1, 1, 1, 64, 1, 1, 0, 0, arguments.ctypes.data, 0
    )
    assert (x.get() == 3 * np.arange(64)[::-1]).all()
