"""Kernel → loaded function: source closure, digest, NVRTC, the cache on disk, the module.

Compiling needs CuPy and NVRTC, but neither a driver nor a GPU: an image can be warmed anywhere.
A cache entry is two files named by the digest of all that decides the result: what NVRTC made
(.cubin or .ptx), and a .json with its checksum and log. Both appear by an atomic rename.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuflash._traits import Kernel

SLOW_COMPILE_SECONDS = 1.0
# Of sm_90a code, ptxas 12.8.93 and 13.0.88 made some that is wrong (flash-linear-attention's pull
# request 1262), 13.1.80 did not.
SOUND_ON_HOPPER = (13, 1, 80)

GENERATED_HEADER = "generated.cuh"
# The files that a user's expressions claim to be lines of (_program.py).
_USER_CODE = r"masks\.expression|ScoreMod\.forward|ScoreMod\.backward"
_USER_LINES = rf'#line 1 "({_USER_CODE})"\n((?:.|\n)*?)\n  \);\n#line'

logger = logging.getLogger("cuflash")

# NVRTC compiles one program at a time; the lock lets a second thread find the result of the first.
_compiling = threading.Lock()


class CompileError(RuntimeError):
    """NVRTC rejected a kernel; the message holds its log."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas reports of a kernel and of the functions it calls."""

    registers: int
    stack_bytes: int
    spill_bytes: int  # stores plus loads
    static_smem_bytes: int
    # ptxas: wgmma serialised, or setmaxnreg ignored; C7517 and C7519 only tell of inserted waits.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cubin:
    """One compiled kernel for one architecture."""

    image: bytes
    log: str
    path: Path | None = None  # where it lies in the cache; None: nowhere
    seconds: float = 0.0  # that compiling took; 0: it came from the cache

    @property
    def resources(self) -> Resources:
        """The numbers of the log."""

        def numbers(pattern: str) -> list[int]:
            return [int(n) for n in re.findall(pattern, self.log)]

        return Resources(
            registers=max(numbers(r"Used (\d+) registers"), default=0),
            stack_bytes=max(numbers(r"(\d+) bytes stack frame"), default=0),
            spill_bytes=sum(numbers(r"(\d+) bytes spill (?:stores|loads)")),
            static_smem_bytes=max(numbers(r"(\d+) bytes smem"), default=0),
            notes=tuple(dict.fromkeys(re.findall(r"C75(?:08|1[0-6]|18|20)", self.log))),
        )


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel on one device."""

    kernel: Kernel
    function_pointer: int  # CUfunction
    owner: Any  # CuPy's object, which keeps the code on the device


@functools.cache
def load(kernel: Kernel, device_id: int) -> Function:
    """Compile `kernel` unless it is cached, and load it on a device.

    Raises
    ------
    NotImplementedError
        Where the driver is too old for what this NVRTC makes.
    """
    cupy = import_cupy()
    if kernel.arch == "sm_90a":
        _warn_of_compiler(hopper_fault())
    cubin = cached_cubin(kernel)
    with cupy.cuda.Device(device_id) as device:
        device.use()  # binds its context to this thread, which `with` alone may leave without one
        try:
            function = _load_function(cupy, cubin, kernel.entry)
        except cupy.cuda.driver.CUDADriverError as error:
            if not _is_driver_too_old(error):
                raise
            raise NotImplementedError(_driver_too_old(cupy, kernel.arch)) from error
        cupy.cuda.driver.funcSetAttribute(
            function.ptr,
            cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            kernel.smem_bytes,
        )
    return Function(kernel, function.ptr, function)


def cached_cubin(kernel: Kernel) -> Cubin:
    """The cubin from the cache on disk, compiled and put there if need be."""
    return _cached(kernel, kernel.arch, ".cubin")


def cached_ptx(kernel: Kernel, arch: str | None = None) -> str:
    """The PTX from the cache on disk, compiled if need be; `arch` as in compile_ptx."""
    return _cached(kernel, arch or virtual_arch(kernel), ".ptx").image.decode()


def compile_cubin(kernel: Kernel) -> Cubin:
    """Compile, past the cache."""
    return _compile(kernel, kernel.arch)


def compile_ptx(kernel: Kernel, arch: str | None = None) -> str:
    """Compile to PTX, past the cache; `arch` is as compute_80, by default the kernel's own."""
    return _compile(kernel, arch or virtual_arch(kernel)).image.decode()


def virtual_arch(kernel: Kernel) -> str:
    """The PTX architecture of a kernel: compute_80 for sm_80."""
    return kernel.arch.replace("sm_", "compute_")


def import_cupy() -> Any:
    """CuPy, or an error that says how to install it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "cuflash: the CUDA kernels need CuPy; "
            'pip install "cuflash[cuda13]", or "cuflash[cuda12]" for a driver of CUDA 12'
        ) from error
    return cupy


@functools.cache
def nvrtc_version() -> tuple[int, int, int]:
    """(major, minor, build) of the NVRTC that compiles, as it writes into what it makes."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram("", "version.cu", [], [])
    try:
        nvrtc.compileProgram(program, ())
        major, minor, build = re.search(rb"V(\d+)\.(\d+)\.(\d+)", nvrtc.getPTX(program)).groups()
    finally:
        nvrtc.destroyProgram(program)
    return int(major), int(minor), int(build)


def hopper_fault() -> str:
    """Why this NVRTC is not to be trusted with Hopper's kernels, and the remedy; empty if it is."""
    version = nvrtc_version()
    if version >= SOUND_ON_HOPPER:
        return ""
    remedy = 'pip install "nvidia-cuda-nvrtc>=13.1"'
    if version[0] < SOUND_ON_HOPPER[0]:
        remedy = 'a driver of CUDA 13 and pip install "cuflash[cuda13]"'
    return (
        f"NVRTC {dotted(version)} may make wrong code for Hopper GPUs (sm_90a); expected "
        f"{dotted(SOUND_ON_HOPPER)} or newer: {remedy}"
    )


def cache_dir() -> Path:
    """The folder of the cache on disk, whether or not it exists."""
    chosen = os.environ.get("CUFLASH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cuflash")


def kernel_dir() -> Path:
    """Where the CUDA sources are: within an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels_cu", package.parent / "kernels_cu"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"cuflash: no kernels_cu in {package} or {package.parent}; the installation is incomplete"
    )


def source_closure(source: str, generated: str = "") -> dict[str, str]:
    """The text of a file and of every header it includes, by path relative to kernel_dir().

    `generated`: stands for the header of that name, unless it is empty.
    """
    folder = kernel_dir()
    texts = {GENERATED_HEADER: generated} if generated else {}
    visited: set[str] = set()
    missing = [(source, "")]
    while missing:
        name, includer = missing.pop()
        if name in visited:
            continue
        visited.add(name)
        try:
            if name not in texts:
                texts[name] = (folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            blame = f", which {includer} includes," if includer else ""
            raise FileNotFoundError(f"cuflash: {name}{blame} is not in {folder}") from None
        includes = re.findall(r'^\s*#\s*include\s*"([^"]+)"', texts[name], re.MULTILINE)
        missing += [(header, name) for header in includes]
    return texts


def _compile(kernel: Kernel, arch: str) -> Cubin:
    """NVRTC's result for `arch`: a cubin for sm_80, PTX for compute_80."""
    nvrtc = _nvrtc()
    _check_arch(nvrtc, arch)
    headers = source_closure(kernel.source, kernel.generated)
    source = headers.pop(kernel.source)
    program = nvrtc.createProgram(
        source,
        kernel.source,
        [text.encode() for text in headers.values()],
        list(map(str.encode, headers)),
    )
    start = time.perf_counter()
    try:
        nvrtc.compileProgram(program, _options(kernel, arch))
        # CuPy takes both for strings and cuts the last byte: right for PTX, an ELF needs it back.
        image = nvrtc.getCUBIN(program) + b"\0" if _is_real(arch) else nvrtc.getPTX(program)
        log = nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(_complaint(kernel, arch, nvrtc.getProgramLog(program))) from error
    finally:
        nvrtc.destroyProgram(program)
    seconds = time.perf_counter() - start
    if seconds > SLOW_COMPILE_SECONDS:
        logger.info("compiled %s in %.1f s", _describe(kernel, arch), seconds)
    return Cubin(image, log.rstrip("\0"), seconds=seconds)


def _complaint(kernel: Kernel, arch: str, log: str) -> str:
    """What NVRTC says; where it concerns a user's expression, of its lines alone."""
    log = log.rstrip("\0")
    # What an expression is of the wrong type for stands around it, in the generated header.
    files = rf"{_USER_CODE}|{re.escape(GENERATED_HEADER)}"
    own = re.findall(rf"^(?:{files}).*: error: .*(?:\n(?!\S).*)*", log, re.MULTILINE)
    written = re.findall(_USER_LINES, kernel.generated)
    if own and written:
        named = [(name, code) for name, code in written if any(name in x for x in own)]
        blamed = [f"  {name}: {code}" for name, code in named or written]
        return "\n".join(["cuflash: the expression does not compile", *blamed, *own])
    return (
        f"cuflash: NVRTC {dotted(nvrtc_version())} cannot compile {_describe(kernel, arch)}\n{log}"
    )


def _options(kernel: Kernel, arch: str) -> tuple[str, ...]:
    # No fast math, no -ftz: the wrappers in ptx/ name the approximation they want (ex2.approx.ftz),
    # and all other float arithmetic keeps IEEE rounding and subnormals, which tiny gradients are.
    options = ["-std=c++17", f"-arch={arch}"]
    options += [f"-D{name}={value}" for name, value in kernel.constants]
    if _is_real(arch):
        options.append("--ptxas-options=-v")  # registers and spills, for Cubin.resources
    if nvrtc_version() >= (12, 9):
        options.append("--no-cache")  # NVRTC's own cache returns no log
    if os.environ.get("CUFLASH_LINEINFO", "0") not in ("", "0"):
        options.append("-lineinfo")
    return tuple(options)


def _check_arch(nvrtc: Any, arch: str) -> None:
    known = nvrtc.getSupportedArchs()
    if int(re.sub(r"\D", "", arch)) not in known:
        raise NotImplementedError(
            f"cuflash: NVRTC {dotted(nvrtc_version())} does not know {arch}; it compiles for "
            f"{', '.join(map(str, known))}; a newer GPU needs a newer nvidia-cuda-nvrtc"
        )


def _is_real(arch: str) -> bool:
    return arch.startswith("sm_")


def _describe(kernel: Kernel, arch: str) -> str:
    constants = ", ".join(f"{name}={value}" for name, value in kernel.constants)
    return f"{kernel.source} for {arch} ({constants})"


def _cached(kernel: Kernel, arch: str, suffix: str) -> Cubin:
    path = cache_dir() / f"{_digest(kernel, arch)}{suffix}"
    with _compiling:
        cubin = _read_entry(path)
        if cubin is not None:
            return cubin
        cubin = _compile(kernel, arch)
        if _compiled_with_debug() or not _write_entry(path, cubin):
            return cubin
        return Cubin(cubin.image, cubin.log, path, cubin.seconds)


def _digest(kernel: Kernel, arch: str) -> str:
    """sha256 of everything that decides what NVRTC makes."""
    recipe = {
        "source": kernel.source,
        "closure": source_closure(kernel.source, kernel.generated),
        "options": _options(kernel, arch),  # hold the architecture and the constants
        "nvrtc": nvrtc_version(),
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _compiled_with_debug() -> bool:
    # One -G compile, which CuPy's switch asks for, makes every later compile of the process worse.
    return os.environ.get("CUPY_CUDA_COMPILE_WITH_DEBUG", "0") not in ("", "0")


def _read_entry(path: Path) -> Cubin | None:
    """A cache entry; None when there is none or it is damaged."""
    try:
        image = path.read_bytes()
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if record["sha256"] == hashlib.sha256(image).hexdigest():
            return Cubin(image, str(record["log"]), path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _write_entry(path: Path, cubin: Cubin) -> bool:
    """Put an entry into the cache; False, with one warning per folder, when that is impossible."""
    record = {"sha256": hashlib.sha256(cubin.image).hexdigest(), "log": cubin.log}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, cubin.image)
        _replace(path.with_suffix(".json"), json.dumps(record).encode())
    except OSError as error:
        _warn_unwritable(path.parent, error.strerror or type(error).__name__)
        return False
    return True


def _replace(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, whoever else writes it at the same time."""
    scratch = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@functools.cache
def _warn_unwritable(folder: Path, reason: str) -> None:
    warnings.warn(
        f"cuflash: cannot write to the cache folder {folder} ({reason}); kernels will be compiled "
        "anew by every process; set CUFLASH_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _load_function(cupy: Any, cubin: Cubin, entry: str) -> Any:
    """CuPy's function object on the current device."""
    if cubin.path is not None:
        return cupy.RawModule(path=str(cubin.path)).get_function(entry).kernel
    module = cupy.cuda.function.Module()
    module.load(cubin.image)
    return module.get_function(entry)


def _is_driver_too_old(error: Exception) -> bool:
    names = ("UNSUPPORTED_PTX_VERSION", "INVALID_IMAGE", "NO_BINARY_FOR_GPU")
    return any(f"CUDA_ERROR_{name}" in str(error) for name in names)


@functools.cache
def _warn_of_compiler(fault: str) -> None:
    if fault:
        warnings.warn(f"cuflash: {fault}", RuntimeWarning, stacklevel=2)


def _driver_too_old(cupy: Any, arch: str) -> str:
    driver = cupy.cuda.runtime.driverGetVersion()
    driver_version = (driver // 1000, driver % 1000 // 10)
    compiler = nvrtc_version()
    if driver_version[0] < compiler[0]:
        remedy = (
            f', or pip install "cuflash[cuda{driver_version[0]}]" in place of cuda{compiler[0]}'
        )
    elif arch == "sm_90a" and driver_version < SOUND_ON_HOPPER[:2]:
        remedy = ""  # an older compiler is not to be trusted with it
    else:
        package = "nvidia-cuda-nvrtc" + ("-cu12" if compiler[0] == 12 else "")
        remedy = f', or pip install "{package}=={dotted(driver_version)}.*"'
    return (
        f"cuflash: the driver (CUDA {dotted(driver_version)}) does not load what NVRTC "
        f"{dotted(compiler)} compiled for {arch}; update the driver{remedy}"
    )


def dotted(version: tuple[int, ...]) -> str:
    """As versions are written."""
    return ".".join(map(str, version))


@functools.cache
def _nvrtc() -> Any:
    """CuPy's binding of NVRTC, once it is known to load."""
    nvrtc = import_cupy().cuda.nvrtc
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        raise ImportError(
            f'cuflash: CuPy finds no NVRTC ({error}); pip install "cuflash[cuda13]", '
            'or "cuflash[cuda12]" for a driver of CUDA 12, brings one'
        ) from error
    return nvrtc
