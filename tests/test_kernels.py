"""What the compiler makes of the kernels: registers, spills, instructions, the parameter block."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import register_limits
from injection import put_in

from cuflash import _jit, _params, _plan, _traits

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = range(32, 257, 32)
FLAGS = {  # vec_bytes, pack_group, softcap, scale_first, few_rows, dtype
    "plain": (16, False, False, False, False, "bfloat16"),
    "gqa": (16, True, False, False, False, "float16"),
    "softcap": (16, False, True, False, False, "float16"),
    "gqa-softcap": (16, True, True, False, False, "bfloat16"),
    "scale-first": (16, True, False, True, False, "bfloat16"),
    "vec-4": (4, True, False, False, False, "bfloat16"),
    "vec-2": (2, False, True, False, False, "float16"),
    "few-rows": (16, True, False, False, True, "bfloat16"),
}


def traits(head_dim: int, head_dim_v: int, flags: str) -> _traits.Traits:
    vec, pack_group, softcap, scale_first, few_rows, dtype = FLAGS[flags]
    return _traits.Traits(
        dtype, head_dim, head_dim_v, vec, pack_group, softcap, scale_first, few_rows
    )


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_one_configuration_per_architecture(capability: int) -> None:
    check_all(traits(128, 128, "plain"), capability)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "flags"),
    [(64, 64, "gqa-softcap"), (192, 128, "plain"), (256, 256, "gqa")],
)
def test_more_configurations(head_dim: int, head_dim_v: int, flags: str) -> None:
    check_all(traits(head_dim, head_dim_v, flags), 80)


@pytest.mark.full
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_option_at_every_head_size(capability: int, flags: str, head_dim: int) -> None:
    check_all(traits(head_dim, head_dim, flags), capability)


@pytest.mark.full
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("head_dim_v", HEAD_DIMS)
def test_every_pair_of_head_sizes(capability: int, head_dim: int, head_dim_v: int) -> None:
    check_all(traits(head_dim, head_dim_v, "plain"), capability)


def check_all(chosen: _traits.Traits, capability: int) -> None:
    """Forward and the three kernels of backward."""
    forward = _plan.forward_plan(chosen, capability).kernel
    backward = _plan.backward_plan(chosen, capability, deterministic=True)
    check(forward, _params.FORWARD_BYTES)
    if chosen.few_rows:  # of the forward kernel alone
        return
    for kernel in (backward.prep, backward.main, backward.post):
        check(kernel, _params.BACKWARD_BYTES)
    check(_plan.backward_plan(chosen, capability, deterministic=False).main, _params.BACKWARD_BYTES)


def check(kernel: _traits.Kernel, params_bytes: int) -> None:
    cubin = _jit.cached_cubin(kernel)
    resources = cubin.resources
    assert resources.stack_bytes <= invariant_bytes(kernel), (kernel, resources)
    assert resources.static_smem_bytes == 0, (kernel, resources)
    assert resources.registers * kernel.threads <= 65536, (kernel, resources)
    assert "warning" not in cubin.log.replace("warning #177-D", ""), cubin.log
    assert kernel_params_bytes(cubin.image) == params_bytes


def invariant_bytes(kernel: _traits.Kernel) -> int:
    """Local memory that a kernel may have for loop invariants, never enough for accumulators.

    Beside 160 accumulators or more a thread has few registers left, and some versions of ptxas keep
    a few addresses in local memory, read once per tile. All other kernels have none.
    """
    constants = dict(kernel.constants)
    if kernel.entry not in ("flash_fwd", "flash_bwd"):
        return 0
    scores = constants["BLOCK_Q"] * constants["BLOCK_KV"]
    if kernel.entry == "flash_fwd":
        accumulators = scores + constants["BLOCK_Q"] * constants["HEAD_DIM_V"]
    else:
        head_dims = constants["HEAD_DIM"] + constants["HEAD_DIM_V"]
        accumulators = 2 * scores + constants["BLOCK_KV"] * head_dims
    return 64 if accumulators >= 160 * kernel.threads else 0


HOPPER_HEAD_DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
HOPPER_HEAD_DIMS += [(64, 256), (256, 64), (128, 64), (64, 128)]
HOPPER_FLAGS = ("plain", "softcap", "scale-first")


@pytest.mark.parametrize("head_dims", HOPPER_HEAD_DIMS[:2] + HOPPER_HEAD_DIMS[-2:], ids=str)
def test_hopper(head_dims: tuple[int, int]) -> None:
    check_hopper(head_dims, "plain")


def test_hopper_options() -> None:
    for flags in HOPPER_FLAGS:
        check_hopper((128, 128), flags)


@pytest.mark.parametrize("flags", ["plain", "gqa"])
def test_hoppers_dense_tiles(flags: str) -> None:
    chosen = replace(traits(128, 128, flags), tma=True, dense_tiles=True)
    kernel = _plan.forward_plan(chosen, 90).kernel
    check_hopper_kernel(kernel, _params.mapped_bytes(4, _params.FORWARD_BYTES))


@pytest.mark.full
@pytest.mark.parametrize("flags", HOPPER_FLAGS)
@pytest.mark.parametrize("head_dims", HOPPER_HEAD_DIMS, ids=str)
def test_hopper_at_every_head_size(head_dims: tuple[int, int], flags: str) -> None:
    check_hopper(head_dims, flags)


def check_hopper(head_dims: tuple[int, int], flags: str) -> None:
    """Nothing in local memory, nothing that serialises wgmma, and wgmma alone multiplies."""
    plan = _plan.forward_plan(replace(traits(*head_dims, flags), tma=True), 90)
    assert plan.backend == "sm90"
    check_hopper_kernel(plan.kernel, _params.mapped_bytes(4, _params.FORWARD_BYTES))


def check_hopper_kernel(kernel: _traits.Kernel, params_bytes: int) -> None:
    cubin = _jit.cached_cubin(kernel)
    assert not cubin.resources.notes, (kernel, cubin.log)
    assert cubin.resources.stack_bytes == cubin.resources.spill_bytes == 0, (kernel, cubin.log)
    assert cubin.resources.registers * kernel.threads <= 65536, (kernel, cubin.log)
    assert kernel.smem_bytes <= _traits.smem_limit(90)
    assert kernel_params_bytes(cubin.image) == params_bytes
    assert params_place(cubin.image) % _params.TENSOR_MAP_BYTES == 0  # they begin with the maps
    check_register_limits(kernel)
    counts = instructions(cubin.image)
    for wanted in ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"):
        assert counts.get(wanted, 0) > 0, f"{kernel.source} has no {wanted}"
    for unwanted in ("HMMA", "LDL", "STL"):
        assert counts.get(unwanted, 0) == 0, f"{kernel.source} has {unwanted}"


def check_register_limits(kernel: _traits.Kernel) -> None:
    """The loading warps give registers up, the computing ones get them, and both keep to theirs."""
    image = _jit.cached_cubin(kernel).image
    roles = register_limits.roles(run_tool("nvdisasm", image, "-c", "-plr"))
    assert len({role.limit for role in roles}) == len(roles) == 2, (kernel, roles)
    for role in roles:
        assert role.used <= role.limit, (kernel, role)


# What stands in a kernel and what takes its place: setmaxnreg is dropped, wholly or in one role.
LIMIT_BUGS = {
    "consumers-give-up": ("setmaxnreg_inc<kConsumerRegisters>();", "setmaxnreg_dec<24>();"),
    "consumers-get-none": ("setmaxnreg_inc<kConsumerRegisters>();", ""),
    "producers-keep-theirs": ("setmaxnreg_dec<kProducerRegisters>();", ""),
}


@pytest.mark.parametrize("name", LIMIT_BUGS)
def test_a_role_without_its_registers_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in("flash_fwd_sm90.cu", *LIMIT_BUGS[name], tmp_path, monkeypatch)
    kernel = _plan.forward_plan(replace(traits(64, 64, "plain"), tma=True), 90).kernel
    with pytest.raises(AssertionError):
        check_register_limits(kernel)


def test_a_register_over_the_limit_is_noticed() -> None:
    """The machine code as it is, but for the number in setmaxnreg."""
    kernel = _plan.forward_plan(replace(traits(64, 64, "plain"), tma=True), 90).kernel
    text = run_tool("nvdisasm", _jit.cached_cubin(kernel).image, "-c", "-plr")
    as_it_is = register_limits.roles(text)
    assert len(as_it_is) == 2
    for role in as_it_is:
        smaller = text.replace(f"{role.limit:#x} ;", f"{role.used - 1:#x} ;")
        assert any(x.used > x.limit for x in register_limits.roles(smaller))


def test_notes_of_ptxas_are_read_from_its_log() -> None:
    log = "ptxas info : (C7517) waits inserted\nptxas info : (C7510) Potential Performance Loss\n"
    assert _jit.Cubin(b"", 2 * log).resources.notes == ("C7510",)
    assert _jit.Cubin(b"", "ptxas info : (C7519) waits inserted").resources.notes == ()


def test_instructions_of_the_main_kernels() -> None:
    chosen = traits(64, 64, "plain")
    for kernel in (
        _plan.forward_plan(chosen, 80).kernel,
        _plan.backward_plan(chosen, 80, True).main,
    ):
        counts = instructions(_jit.cached_cubin(kernel).image)
        for wanted in ("HMMA", "LDSM", "LDGSTS", "MUFU"):
            assert counts.get(wanted, 0) > 0, f"{kernel.entry} has no {wanted}"
        for unwanted in ("LDL", "STL"):
            assert counts.get(unwanted, 0) == 0, f"{kernel.entry} uses local memory"


def calls(flags: str) -> int:
    """In the forward kernel: each division of numbers that may be of any size is one."""
    kernel = _plan.forward_plan(traits(32, 32, flags), 80).kernel
    return instructions(_jit.cached_cubin(kernel).image).get("CALL", 0)


def test_a_softcap_divides_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = calls("plain")
    assert calls("softcap") == plain
    put_in("scores.cuh", "square, 62.f / 2835", "square * 62.f / 2835, 1.f", tmp_path, monkeypatch)
    assert calls("softcap") > plain + 9


def test_each_source_compiles_with_its_own_defaults() -> None:
    for source in sorted(_jit.kernel_dir().glob("*.cu")):
        entry = re.sub(r"(_wide)?_sm\d+$", "", source.stem)
        arch = "sm_90a" if source.stem.endswith("_sm90") else "sm_80"
        kernel = _traits.Kernel(source.name, entry, arch, (), 256, 0)
        assert _jit.compile_cubin(kernel).image[:4] == b"\x7fELF"


def test_static_asserts_tie_the_plan_to_the_source() -> None:
    kernel = _plan.forward_plan(traits(64, 64, "plain"), 80).kernel
    for name in ("SMEM_BYTES", "PARAMS_BYTES"):
        constants = {**dict(kernel.constants), name: 4096}
        wrong = _traits.Kernel(
            kernel.source, kernel.entry, kernel.arch, tuple(constants.items()), 128, 4096
        )
        with pytest.raises(_jit.CompileError, match="differs from the"):
            _jit.compile_cubin(wrong)


def kernel_params_bytes(image: bytes) -> int:
    """The size of the parameter block, as the cubin's .nv.info says of its one parameter."""
    text = run_tool("cuobjdump", image, "-elf")
    return int(re.search(r"Ordinal : 0x0\s+Offset\s*: \w+\s+Size\s*: (0x\w+)", text)[1], 16)


def params_place(image: bytes) -> int:
    """Where the parameter starts in the bank of constants."""
    text = run_tool("cuobjdump", image, "-elf")
    bank = int(re.search(r"EIATTR_PARAM_CBANK\s.*\s+Value:\s*0x\w+ (0x\w+)", text)[1], 16)
    offset = int(re.search(r"Ordinal : 0x0\s+Offset\s*: (0x\w+)", text)[1], 16)
    return bank % (1 << 16) + offset


def instructions(image: bytes) -> dict[str, int]:
    """How often each opcode stands in the machine code."""
    counts: dict[str, int] = {}
    for opcode in re.findall(
        r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", run_tool("nvdisasm", image, "-c")
    ):
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def run_tool(name: str, image: bytes, *options: str) -> str:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(tool_path(name)), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def tool_path(name: str) -> Path:
    packages = Path(sysconfig.get_paths()["purelib"])
    found = next(packages.glob(f"nvidia/*/bin/{name}"), None) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return Path(found)
