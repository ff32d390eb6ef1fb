"""Any framework's arrays in, the same kind out; between the two stand NumPy and CuPy arrays.

A framework is known by the class of its arrays: none is imported that the caller has not imported.
Arrays are shared, not copied, and what runs on a GPU is in order with the caller's stream.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from cuflash import _capture, _dlpack, _remedies, _torch_memory
from cuflash._checks import BFLOAT16, Array, Check, is_array
from cuflash._torch_faults import fault_of, hides_something

Foreign = Any  # an array of the caller's kind
Checked = TypeVar("Checked")  # a problem: a dataclass that holds arrays by their arguments' names

OPTIONAL_ARRAYS = frozenset({"mask", "bias", "alibi_slopes", "sinks", "out", "dlse", "stats"})
# These may be on the host where q is on a GPU.
LENGTHS = frozenset({"offset", "q_lens", "kv_lens", "cu_seqlens_q", "cu_seqlens_k"})
STRUCTURES = frozenset({"mask", "score_mod"})  # whose arrays may be on the host likewise


@runtime_checkable
class Structure(Protocol):
    """An argument that holds arrays, as a mask and a score function do."""

    def arrays(self) -> dict[str, Foreign]:
        """Its arrays, by names for messages."""

    def with_arrays(self, arrays: Mapping[str, Foreign]) -> Structure:
        """The same with other arrays under these names."""


class Call(NamedTuple):
    """One call's arguments as NumPy or CuPy arrays, and the way back to the caller's kind."""

    function: str
    arguments: dict[str, Any]
    device: str  # "cpu" or "cuda"
    framework: Framework
    like: Foreign  # one of the caller's arrays
    host_lengths: list[str]  # the arguments that are lengths or offsets on the host
    is_captured: bool  # into a CUDA graph

    @property
    def xp(self) -> ModuleType:
        """The library of the arguments' arrays: numpy or cupy."""
        return np if self.device == "cpu" else _cupy()

    def upload(self, problem: Checked) -> Checked:
        """Bring lengths and offsets that the caller gave as host values to a GPU's problem."""
        if self.device == "cpu" or not self.host_lengths:
            return problem
        # CuPy stages small host arrays in pinned memory: the copy waits for nothing.
        host = {name: getattr(problem, name, None) for name in self.host_lengths}
        host = {name: x for name, x in host.items() if isinstance(x, np.ndarray)}
        if self.is_captured:
            nested = [name for name in self.host_lengths if name not in LENGTHS]
            _capture.check_nothing_on_host(self.function, [*host, *nested])
        changes = {name: _cupy().asarray(x) for name, x in host.items()}
        for name in STRUCTURES:
            structure = getattr(problem, name, None)
            if structure is not None:
                changes[name] = self.on_device(structure)
        return replace(problem, **changes)

    def on_device(self, structure: Structure) -> Structure:
        """The same structure with its arrays on the call's device."""
        if self.device == "cpu":
            return structure
        arrays = structure.arrays()
        for name, x in arrays.items():
            if isinstance(x, np.ndarray):  # CuPy would take foreign bytes as they are
                x = x.astype(x.dtype.newbyteorder("="), copy=False)
            arrays[name] = _cupy().asarray(x)
        return structure.with_arrays(arrays)

    def contiguous_integers(self, array: Array) -> Array:
        """The array itself, or a copy as contiguous int64."""
        if self.device == "cpu":
            return array.astype(np.int64, order="C", copy=False)
        from cuflash._convert import as_contiguous  # needs CuPy

        return as_contiguous(array, np.dtype(np.int64))

    def wait(self) -> None:
        """Until the device has done what the current stream was told: not while it is captured."""
        if self.device != "cpu":
            _cupy().cuda.get_current_stream().synchronize()

    def give(self, array: Array | None) -> Foreign:
        """A result as the caller's kind of array."""
        return None if array is None else self.framework.give(array, self.like)


@lru_cache(maxsize=256)
def _is_structure(argument_class: type) -> bool:
    return issubclass(argument_class, Structure)


@cache
def _array_names(required: tuple[str, ...]) -> frozenset[str]:
    return OPTIONAL_ARRAYS.union(required)


@contextmanager
def receive(function: str, required: tuple[str, ...], arguments: dict[str, Any]) -> Iterator[Call]:
    """Within the block CuPy's current device and stream are the caller's.

    The `required` arguments must be arrays, all of one kind and on one device, and the optional
    arrays like them. Lengths and offsets may also be host values; all else passes through.
    """
    like = arguments[required[0]]
    home = framework, place = _locate(function, required[0], like)
    received = dict(arguments)
    sources: dict[str, Framework] = {}
    host_lengths = []
    structures = {
        name: x
        for name in STRUCTURES
        if (x := arguments.get(name)) is not None and _is_structure(type(x))
    }
    nested: dict[str, Foreign] = {}
    for structure in structures.values():
        nested |= structure.arrays()
    received |= nested
    arrays = _array_names(required)
    for name, x in [
        pair for pair in received.items() if pair[1] is not None or pair[0] in required
    ]:
        if name in structures:
            continue
        if name in arrays:
            if x is not like:
                _check_home(function, required[0], home, name, _locate(function, name, x))
            sources[name] = framework
        elif name in LENGTHS or name in nested:
            if isinstance(x, (list, tuple, range)):
                x = received[name] = Check(function, "").sequence(name, x)
            if name in nested or is_array(x):
                found = _locate(function, name, x)
                if found[1] == "cpu":
                    host_lengths.append(name)
                elif name not in nested or found[1] != place:  # compiled masks hold CuPy arrays
                    _check_home(function, required[0], home, name, found)
                sources[name] = found[0]
    if "out" in sources and "out" not in required and not framework.writable:
        raise TypeError(
            f"cuflash.{function}: out is a {framework.kind}, which cannot be written; "
            "expected no out"
        )
    if place != "cpu":
        _check_driver(function, required[0], framework, place)
    with framework.context(place):
        captured = place != "cpu" and _capture.is_captured(_cupy())
        if captured:
            framework.check_capture(function)
        for name, source in sources.items():
            if source is not _CUPY:  # whose arrays are what is wanted
                to_write = name == "out" and name not in required
                received[name] = _share(function, name, source, received[name], to_write)
        for name, structure in structures.items():
            received[name] = structure.with_arrays(received)
        for name in nested:
            del received[name]
        device = "cpu" if place == "cpu" else "cuda"
        yield Call(function, received, device, framework, like, host_lengths, captured)


def warn_of_lost_gradients(function: str, arguments: Mapping[str, Any], stacklevel: int) -> None:
    """Warn where torch records for a gradient: the result carries none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    found = [pair for pair in arguments.items() if pair[1] is not None]
    for name in STRUCTURES:
        if (x := arguments.get(name)) is not None and _is_structure(type(x)):
            found += x.arrays().items()
    for name, x in found:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            warnings.warn(
                f"cuflash.{function}: {name} requires grad, which the result does not carry on; "
                "expected a call under torch.no_grad(), or in a torch.autograd.Function, "
                "as the README wraps attention",
                UserWarning,
                stacklevel=stacklevel,
            )
            return


class Framework(Protocol):
    """What one framework's arrays need."""

    kind: str  # as error messages call them
    writable: bool

    def place(self, x: Foreign) -> str:
        """Where x lies: "cpu", "cuda:N", or the name of a device that cuflash does not know."""

    def receive(self, x: Foreign, to_write: bool) -> Array:
        """The same memory as a NumPy or CuPy array; a copy will do unless it is to be written."""

    def give(self, array: Array, like: Foreign) -> Foreign:
        """The same memory as the framework's array, on the device of `like`."""

    def context(self, place: str) -> AbstractContextManager[Any]:
        """Makes the device, the caller's stream and its source of memory CuPy's current ones."""

    def check_capture(self, function: str) -> None:
        """Fail where a call cannot be captured into a CUDA graph."""


class _NumPy:
    kind = "numpy.ndarray"
    writable = True

    def place(self, x: np.ndarray) -> str:
        return "cpu"

    def receive(self, x: np.ndarray, to_write: bool) -> np.ndarray:
        return np.asarray(x)  # subclasses become plain arrays

    def give(self, array: np.ndarray, like: np.ndarray) -> np.ndarray:
        return array

    def context(self, place: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def check_capture(self, function: str) -> None:
        """Nothing of NumPy's is captured."""


class _CuPy:
    kind = "cupy.ndarray"
    writable = True

    def place(self, x: Array) -> str:
        return f"cuda:{x.data.device_id}"

    def receive(self, x: Array, to_write: bool) -> Array:
        return x

    def give(self, array: Array, like: Array) -> Array:
        return array

    def context(self, place: str) -> AbstractContextManager[Any]:
        return _cuda_device(place)

    def check_capture(self, function: str) -> None:
        _capture.check_pool(function, _cupy())


class _Torch:
    kind = "torch.Tensor"
    writable = True

    def place(self, x: Foreign) -> str:
        return str(x.device)

    def receive(self, x: Foreign, to_write: bool) -> Array:
        torch = sys.modules["torch"]
        if hides_something(x):
            raise TypeError("its memory is not all that it is")
        if to_write:  # so that autograd knows where it needs what was there before
            torch.autograd.graph.increment_version(x)
        if x.requires_grad:  # within torch.func even a plain tensor is wrapped by detach
            x = x.detach()  # who differentiates does it by attention_vjp
        if x.device.type == "cuda":
            return _cupy().from_dlpack(x)
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(BFLOAT16)
        return x.numpy()

    def give(self, array: Array, like: Foreign) -> Foreign:
        torch = sys.modules["torch"]
        if not isinstance(array, np.ndarray):
            return _torch_memory.as_tensor(torch, array)
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    @contextmanager
    def context(self, place: str) -> Iterator[None]:
        if place == "cpu":
            yield
            return
        torch, cupy, ordinal = sys.modules["torch"], _cupy(), _ordinal(place)
        stream = _Stream(torch.cuda.current_stream(ordinal).cuda_stream)
        memory = cupy.cuda.using_allocator(_torch_memory.allocator(torch, cupy, ordinal))
        with _cuda_device(place), cupy.cuda.Stream.from_external(stream), memory:
            yield

    def check_capture(self, function: str) -> None:
        """Torch gives each graph a pool."""


class _Stream:
    """A stream's address in the CUDA stream protocol, which torch itself speaks only lately."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.address)  # version of the protocol, cudaStream_t


class _Jax:
    kind = "jax.Array"
    writable = False

    def place(self, x: Foreign) -> str:
        devices = x.devices()
        if len(devices) > 1:
            return f"{len(devices)} devices"
        (device,) = devices
        if device.platform == "cpu":
            return "cpu"
        if device.platform in ("gpu", "cuda"):
            return f"cuda:{x.__dlpack_device__()[1]}"
        return str(device)

    def receive(self, x: Foreign, to_write: bool) -> Array:
        return np.asarray(x) if self.place(x) == "cpu" else _cupy().from_dlpack(x)

    def give(self, array: Array, like: Foreign) -> Foreign:
        jax = sys.modules["jax"]
        if isinstance(array, np.ndarray):
            with _x64(jax) if array.dtype == np.float64 else nullcontext():
                return jax.device_put(array, *like.devices())
        return jax.dlpack.from_dlpack(array)

    def context(self, place: str) -> AbstractContextManager[Any]:
        return nullcontext() if place == "cpu" else _finished_on(place)

    def check_capture(self, function: str) -> None:
        _capture.refuse_to_wait(function, self.kind)


def _x64(jax: ModuleType) -> AbstractContextManager[Any]:
    """Where JAX makes 64-bit arrays: elsewhere it makes 32-bit ones of them, silently."""
    if hasattr(jax, "enable_x64"):  # from 0.8 on
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


class _DLPack:
    """Arrays of a class that has __dlpack__ and __dlpack_device__ and is known for nothing else."""

    writable = True

    def __init__(self, array_class: type) -> None:
        self.kind = _class_name(array_class)

    def place(self, x: Foreign) -> str:
        device_type, ordinal = x.__dlpack_device__()
        if device_type == _dlpack.CPU:
            return "cpu"
        if device_type in _dlpack.CUDA:
            return f"cuda:{ordinal}"
        return f"a device of DLPack's type {int(device_type)}"

    def receive(self, x: Foreign, to_write: bool) -> Array:
        if self.place(x) != "cpu":
            return _cupy().from_dlpack(x)
        return _dlpack.to_numpy(x, to_write)

    def give(self, array: Array, like: Foreign) -> Foreign:
        """By the from_dlpack of the class's own library; where it has none, the array itself."""
        from_dlpack = getattr(_library(like), "from_dlpack", None)
        if from_dlpack is None:
            return array
        return from_dlpack(_dlpack.exporter(array) if isinstance(array, np.ndarray) else array)

    def context(self, place: str) -> AbstractContextManager[Any]:
        return nullcontext() if place == "cpu" else _finished_on(place)

    def check_capture(self, function: str) -> None:
        _capture.refuse_to_wait(function, self.kind)


_CUPY = _CuPy()
_FRAMEWORKS: dict[tuple[str, str], Framework] = {  # by package and name of the arrays' class
    ("numpy", "ndarray"): _NumPy(),
    ("cupy", "ndarray"): _CUPY,
    ("torch", "Tensor"): _Torch(),
    ("jax", "ArrayImpl"): _Jax(),
    ("jaxlib", "ArrayImpl"): _Jax(),
}
_REFUSED = {
    ("numpy", "MaskedArray"): "expected a plain array; mask= and kv_lens= say what is not seen",
    ("jax", "Tracer"): (
        "expected a concrete array; jax.custom_vjp lets JAX differentiate the call, and "
        "jax.pure_callback brings arrays out of a jit, as the README has it, options among them"
    ),
}


@lru_cache(maxsize=256)
def _framework(array_class: type) -> Framework | str:
    """The framework of a class, or what to say where there is none."""
    for base in array_class.__mro__:
        key = (base.__module__.partition(".")[0], base.__name__)
        if key in _REFUSED:
            return _REFUSED[key]
        if key in _FRAMEWORKS:
            return _FRAMEWORKS[key]
    if hasattr(array_class, "__dlpack__") and hasattr(array_class, "__dlpack_device__"):
        return _DLPack(array_class)
    return "expected an array of NumPy, CuPy, torch, JAX, or anything with __dlpack__"


def _locate(function: str, name: str, x: Foreign) -> tuple[Framework, str]:
    """The framework of an array and the device that it lies on."""
    framework = _framework(type(x))
    if isinstance(framework, str):
        if name == "mask":
            framework = "expected a boolean array, or a mask such as cuflash.masks.causal()"
        elif name in ("out", "lse") and isinstance(x, (list, tuple)):
            framework += _remedies.ORDER.get(function, "")
        found = "None" if x is None else f"a {_class_name(type(x))}"
        raise TypeError(f"cuflash.{function}: {name} is {found}; {framework}")
    try:
        place = framework.place(x)
    except Exception as error:  # a foreign object may raise anything
        raise TypeError(
            f"cuflash.{function}: {name} is a {framework.kind} that does not say where it lies: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not place.startswith(("cpu", "cuda:")):
        raise ValueError(
            f"cuflash.{function}: {name} is a {framework.kind} on {place}; expected cpu or cuda"
        )
    return framework, place


def _check_home(
    function: str, first: str, home: tuple[Framework, str], name: str, found: tuple[Framework, str]
) -> None:
    """Fail unless `name` was found where `first` is."""
    if found == home:
        return
    error = ValueError if home[0] is found[0] else TypeError
    raise error(
        f"cuflash.{function}: {first} is a {home[0].kind} on {home[1]}, "
        f"{name} is a {found[0].kind} on {found[1]}; expected one kind on one device"
    )


def _check_driver(function: str, name: str, framework: Framework, place: str) -> None:
    """Fail with a message of our own where CuPy cannot use the GPU that an array is on."""
    fault = _driver_fault(place)
    if fault:
        raise RuntimeError(
            f"cuflash.{function}: {name} is a {framework.kind} on {place}, "
            f"which CuPy {_cupy().__version__} cannot use: {fault}"
        )


@cache
def _driver_fault(place: str) -> str:
    """Why CuPy cannot use this GPU, and what it needs; empty where it can."""
    runtime = _cupy().cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        major = runtime.runtimeGetVersion() // 1000
        return f"{error}; expected an NVIDIA driver of CUDA {major} or newer"
    least = _ordinal(place) + 1
    return "" if least <= count else f"it sees {count} GPUs; expected at least {least}"


def _share(function: str, name: str, framework: Framework, x: Foreign, to_write: bool) -> Array:
    try:
        return framework.receive(x, to_write)
    except Exception as error:  # a foreign object may raise anything
        fault = fault_of(x) or f"{type(error).__name__}: {error}"
        raise TypeError(
            f"cuflash.{function}: {name} is a {framework.kind} that cannot be shared: {fault}"
        ) from error


def _class_name(array_class: type) -> str:
    package = array_class.__module__.partition(".")[0]
    name = array_class.__qualname__
    return name if package == "builtins" else f"{package}.{name}"


def _library(x: Foreign) -> Any:
    """Where an array's from_dlpack is looked for: its array namespace, or its class's package."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules.get(type(x).__module__.partition(".")[0])


@cache
def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "cuflash needs CuPy for arrays on a GPU: pip install cupy-cuda13x, "
            "or cupy-cuda12x for a driver of CUDA 12"
        ) from error
    return cupy


def _ordinal(place: str) -> int:
    return int(place.removeprefix("cuda:"))


@contextmanager
def _cuda_device(place: str) -> Iterator[None]:
    """The device, with its context bound to this thread: a launch by the driver needs that.

    CuPy binds it where it changes the device, and a new thread's is 0 without a context.
    """
    with _cupy().cuda.Device(_ordinal(place)) as device:
        device.use()
        yield


@contextmanager
def _finished_on(place: str) -> Iterator[None]:
    """A device, and a wait at the end: the inputs' owner may reuse their memory on any stream."""
    with _cuda_device(place):
        yield
        _cupy().cuda.get_current_stream().synchronize()
