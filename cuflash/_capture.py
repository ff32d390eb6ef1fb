"""CUDA graphs: what a call may not do while the stream that it runs on is being captured into one.

A replay reads and writes the addresses that the captured call had. So memory that the call lets go
must not go to others as long as the graph lives, and nothing that the host holds can be copied.
"""

from __future__ import annotations

from types import ModuleType

# The legacy stream, by either of its names: it can't be captured, nor queried while another is.
_LEGACY_STREAMS = (0, 1)


def is_captured(cupy: ModuleType) -> bool:
    """Whether CuPy's current stream is being captured."""
    stream = cupy.cuda.get_current_stream()
    return stream.ptr not in _LEGACY_STREAMS and stream.is_capturing()


def check_pool(function: str, cupy: ModuleType) -> None:
    """Fail where CuPy's memory would not stay the graph's. Torch has a pool for each graph.

    Whose memory a function of the caller's own gives can't be seen.
    """
    source = getattr(cupy.cuda.get_allocator(), "__self__", None)
    if source is cupy.get_default_memory_pool():
        shared = "CuPy's default pool, which hands it out again"
    elif isinstance(source, cupy.cuda.MemoryAsyncPool):
        shared = "a pool of CUDA's, cupy.cuda.MemoryAsyncPool, which takes it back"
    elif isinstance(source, ModuleType):  # CuPy's functions: _malloc, malloc_managed, malloc_async
        shared = "CUDA without a pool of CuPy's, which frees it"
    else:
        return
    raise RuntimeError(
        f"cuflash.{function}: a CUDA graph is being captured, and memory comes from {shared} "
        "while replays use it; expected a pool of the graph's own: pool = "
        "cupy.cuda.MemoryPool(), kept as long as the graph, and the capture within "
        "cupy.cuda.using_allocator(pool.malloc)"
    )


def refuse_to_wait(function: str, kind: str) -> None:
    """Fail: a call on these arrays waits for its stream at its end, which ends a capture."""
    raise NotImplementedError(
        f"cuflash.{function}: a CUDA graph is being captured, and a call on a {kind} waits for its "
        "results; expected cupy.ndarray or torch.Tensor"
    )


def check_nothing_on_host(function: str, names: list[str]) -> None:
    """Fail where arrays of these names would be copied from the host."""
    if names:
        raise ValueError(
            f"cuflash.{function}: {names[0]} is on the host while a CUDA graph is being captured, "
            "whose replays would copy from memory that is gone by then; expected an array on the "
            "GPU, made before the capture"
        )


def refuse_to_compile(function: str) -> None:
    """Fail: a mask's arrays are converted, and waited for."""
    raise RuntimeError(
        f"cuflash.{function}: a CUDA graph is being captured, and compile waits for the mask's "
        "arrays; expected a mask that is compiled before the capture"
    )
