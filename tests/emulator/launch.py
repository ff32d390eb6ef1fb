"""Kernels that can be launched on NumPy arrays."""

from __future__ import annotations

import ctypes
import mmap
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arithmetic, build, instructions
from .errors import EmulatorError
from .parse import Variable, parse
from .translate import Translator

_MAX_THREADS = 512
_MAX_SHARED = 232448
_REGISTER_FILE = 65536
_MAP_32BIT = 0x40  # of Linux on x86
_SCHEDULES = ("eager", "lazy", "random")


class _Options(ctypes.Structure):
    """As Options in runtime/state.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_uint32),
        ("os_threads", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("registers", ctypes.c_uint32),
        ("races", ctypes.c_uint8),
        ("poison", ctypes.c_uint8),
        ("allow_same_value", ctypes.c_uint8),
        ("deterministic", ctypes.c_uint8),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_uint64),
        ("bytes_read", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    ]


_COUNTERS = ("switches", "mma", "wgmma", "tma_loads", "tma_stores", "cp_async", "bytes_loaded")
_COUNTERS += ("bank_wavefronts", "bank_ideal", "registers", "bytes_past_extents")


class _Counters(ctypes.Structure):
    """As Stats in runtime/state.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTERS]


@dataclass(frozen=True)
class Stats:
    """What a launch did."""

    seconds: float
    switches: int  # between threads
    mma: int
    wgmma: int
    tma_loads: int  # bulk copies, with or without a tensor map
    tma_stores: int
    cp_async: int
    bytes_loaded: int  # to shared memory, by cp.async and bulk copies
    bank_wavefronts: int  # of ldmatrix and stmatrix
    bank_ideal: int  # the same without conflicts: one per 8 rows of 16 bytes
    registers: int  # most registers that a block held at once
    bytes_past_extents: int  # written by TMA stores, which cut rows at multiples of 16 bytes
    bytes_read: tuple[int, ...]  # of each of `buffers`, by loads, cp.async and bulk copies


class Kernel:
    """A kernel translated from PTX; `load` makes one.

    Options of a launch:
        schedule: "eager" (round robin, asynchronous work at once), "lazy" (as late as possible, the
            highest warp first) or "random" by `seed`.
        threads: OS threads; each takes the next block: in linear order if eager, from the last if
            lazy, in an order by `seed` if random. With one, blocks run one at a time, and one that
            waits for another that has not started is a deadlock.
        order: the linear numbers of the blocks, in the order in which they are to start.
        buffers: if given, every global access has to lie in the memory of one of these arrays, and
            every write in one that is writeable. What lies in several counts as the first's.
        races: detect races in shared and global memory, missing proxy fences in shared memory.
        deterministic: that floats are added to one address in no order is a race as well.
        poison: fill shared memory and what is in flight with NaN.
        allow_same_value: unordered writes of the value that is there already are no race; in global
            memory no two writes of one block are.
    """

    def __init__(self, ptx: str, entry: str | None) -> None:
        self._lines = ptx.splitlines()
        self._entry = parse(ptx, entry)
        translator = Translator(self._entry)
        self._layout = translator.layout
        self.name = self._entry.name
        self._library = build.kernel_library(
            ptx, self.name, lambda: translator.run(arithmetic.HANDLERS, instructions.HANDLERS)
        )
        self.static_smem = self._layout.static_shared

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        smem_bytes: int,
        args: Sequence[Any],
        *,
        schedule: str = "lazy",
        seed: int = 0,
        threads: int = 2,
        buffers: Sequence[np.ndarray] | None = None,
        races: bool = True,
        poison: bool = True,
        allow_same_value: bool = False,
        deterministic: bool = False,
        order: Sequence[int] | None = None,
    ) -> Stats:
        """Runs the whole grid; the class describes the options.

        Args:
            grid, block: one to three extents.
            smem_bytes: dynamic shared memory.
            args: one per PTX parameter. Of an array the address is passed, unless it is 0-d or has
                one element of a structured type: such ones, bytes and scalars are passed by value.

        Raises:
            EmulatorError: the kernel did something wrong.
        """
        extents = _extents("grid", grid), _extents("block", block)
        count = self._check_sizes(extents[1], smem_bytes)
        if schedule not in _SCHEDULES:
            raise ValueError(f"launch: schedule is {schedule!r}, must be one of {_SCHEDULES}")
        parameters = self._pack(args)
        ranges = self._ranges(() if buffers is None else buffers)
        bytes_read = np.zeros(len(ranges), np.uint64)
        if order is not None and sorted(order) != list(range(np.prod(extents[0]))):
            raise ValueError(f"launch: order is {order}, must have each block of {grid} once")
        starts = None if order is None else np.array(order, np.uint32)
        options = _Options(
            *extents,
            schedule=_SCHEDULES.index(schedule),
            os_threads=max(1, min(threads, int(np.prod(extents[0])))),
            seed=seed,
            static_shared=self.static_smem,
            dynamic_shared=smem_bytes,
            registers=self._registers(count),
            races=races,
            poison=poison,
            allow_same_value=allow_same_value,
            deterministic=deterministic,
            parameters=parameters.ctypes.data,
            parameter_bytes=parameters.nbytes,
            buffers=None if buffers is None else ranges.ctypes.data,
            buffer_count=0 if buffers is None else len(ranges),
            bytes_read=bytes_read.ctypes.data,
            order=None if starts is None else starts.ctypes.data,
        )
        counters = self._run(options)
        return Stats(*counters, tuple(bytes_read[:-1].tolist()))  # all but the module's own

    def _run(self, options: _Options) -> list[float]:
        """Seconds, then the counters."""
        counters, error = _Counters(), ctypes.create_string_buffer(16384)
        start = time.perf_counter()
        failed = np.prod(options.grid) and build.runtime().emulator_launch(
            self._library.kernel_entry,
            ctypes.byref(options),
            ctypes.byref(counters),
            error,
            ctypes.c_uint64(len(error)),
        )
        if failed:
            raise EmulatorError(f"{self.name}: {self._with_statements(error.value.decode())}")
        seconds = time.perf_counter() - start
        return [seconds, *(getattr(counters, name) for name in _COUNTERS)]

    def _check_sizes(self, block: tuple[int, ...], smem_bytes: int) -> int:
        count = int(np.prod(block))
        directives = self._entry.directives
        if count % 32 or not 32 <= count <= _MAX_THREADS:
            raise ValueError(
                f"launch: block has {count} threads, must be a multiple of 32 up to {_MAX_THREADS}"
            )
        built_for = directives.get("reqntid") or directives.get("maxntid")
        if built_for and count > np.prod(built_for):
            raise ValueError(f"launch: block has {count} threads, {self.name} is for {built_for}")
        limit = _MAX_SHARED - self.static_smem
        if not 0 <= smem_bytes <= limit:
            raise ValueError(f"launch: smem_bytes is {smem_bytes}, must be 0 to {limit}")
        return count

    def _registers(self, threads: int) -> int:
        """Per thread, at entry: as many as the block can have, as __launch_bounds__(threads, 1)."""
        if limit := self._entry.directives.get("maxnreg"):
            return limit[0]
        return min(_REGISTER_FILE // threads // 8 * 8, 256)

    def _pack(self, args: Sequence[Any]) -> np.ndarray:
        """The parameter block. PTX may hold a parameter's address in 32 bits."""
        params, size = self._entry.params, self._layout.param_bytes
        if len(args) != len(params):
            raise ValueError(f"launch: {len(args)} args, {self.name} has {len(params)} parameters")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
        memory = np.frombuffer(mmap.mmap(-1, max(size, 1), flags=flags), np.uint8)
        for i, (param, arg) in enumerate(zip(params, args, strict=True)):
            raw = _argument_bytes(arg, param)
            if len(raw) != param.size:
                raise ValueError(
                    f"launch: args[{i}] has {len(raw)} bytes, "
                    f"parameter {param.name} of {self.name} has {param.size}"
                )
            offset = self._layout.param_offsets[param.name]
            memory[offset : offset + param.size] = np.frombuffer(raw, np.uint8)
        return memory

    def _ranges(self, buffers: Sequence[np.ndarray]) -> np.ndarray:
        """Begin, end and writability of each buffer, then of the module's own variables."""
        rows = [(*_byte_bounds(b), int(b.flags.writeable)) for b in buffers]
        size = len(self._layout.constants)
        module = (ctypes.c_uint8 * (size + 1)).in_dll(self._library, "module_memory")
        begin = ctypes.addressof(module)
        return np.array([*rows, (begin, begin + size, 1)], np.uint64)

    def _with_statements(self, message: str) -> str:
        """Adds the text of the PTX lines that a message names."""

        def quote(match: re.Match[str]) -> str:
            number = int(match.group(1))
            text = self._lines[number - 1] if 0 < number <= len(self._lines) else ""
            return f"{match.group()} `{' '.join(text.split())}`"

        return re.sub(r"PTX line (\d+)", quote, message)


def load(ptx: str, entry: str | None = None) -> Kernel:
    """Translates and compiles a kernel; compiled ones are kept in a cache folder.

    Args:
        ptx: the text that NVRTC or another compiler gives.
        entry: name of the entry point; may be left out if there is only one.

    Raises:
        UnsupportedPtx: it has an instruction that the emulator does not know; quotes it.
    """
    return Kernel(ptx, entry)


def _extents(name: str, value: Sequence[int]) -> tuple[int, ...]:
    extents = tuple(int(x) for x in value)
    if not 1 <= len(extents) <= 3 or min(extents) < 0:
        raise ValueError(f"launch: {name} is {value}, must be one to three sizes")
    return extents + (1,) * (3 - len(extents))


def _argument_bytes(arg: Any, param: Variable) -> bytes:
    if isinstance(arg, np.ndarray):
        # Small floats of ml_dtypes are of kind V too, but arrays of them are buffers.
        if arg.ndim == 0 or (arg.size == 1 and arg.dtype.type is np.void):
            return arg.tobytes()
        arg = arg.ctypes.data
    if isinstance(arg, int):
        return (arg % (1 << 8 * param.size)).to_bytes(param.size, "little")
    if isinstance(arg, float) and not isinstance(arg, np.generic):
        return np.array(arg, np.float64 if param.size == 8 else np.float32).tobytes()
    if isinstance(arg, np.generic):
        return arg.tobytes()
    if isinstance(arg, bytes | bytearray | memoryview | ctypes.Structure):
        return bytes(arg)
    raise TypeError(f"launch: an argument is {type(arg).__name__}; pass arrays, scalars or bytes")


def _byte_bounds(array: np.ndarray) -> tuple[int, int]:
    begin = array.ctypes.data
    if array.size == 0:
        return begin, begin
    extents = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low, high = (sum(e for e in extents if e * sign > 0) for sign in (-1, 1))
    return begin + low, begin + high + array.itemsize
