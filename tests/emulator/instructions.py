"""Instructions that touch memory, other threads or control flow, and the table of all handlers."""

from __future__ import annotations

import re

from .parse import TYPE_BYTES
from .translate import Instruction, Translator, bits_type, elements, value_type

_SCOPES = "relaxed acquire release acq_rel volatile weak cta cluster gpu sys"
_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


# ---- Loads, stores, atomics.


def _without_policy(i: Instruction) -> tuple[str, ...]:
    """Operands less the cache policy, which comes last."""
    return i.operands[:-1] if "L2::cache_hint" in i else i.operands


def _order(i: Instruction, unnamed: str) -> str:
    """The C++ Order of a strong access or a fence; `unnamed`: the scope if it names none."""
    scope = next((m for m in i.modifiers if m in ("cta", "cluster", "gpu", "sys", "gl")), unnamed)
    acquires = any(m in i for m in ("acquire", "acq_rel", "sc"))
    releases = any(m in i for m in ("release", "acq_rel", "sc"))
    cpp_scope = "cta" if scope in ("cta", "cluster") else "gpu"
    return f"Order{{Scope::{cpp_scope}, {int(acquires)}, {int(releases)}}}"


def load(t: Translator, i: Instruction) -> str:
    i.allow(f"{_SCOPES} v2 v4 v8 unified")
    target, source = _without_policy(i)
    targets, kind = elements(target), i.type if i.type[0] == "s" else bits_type(i.type)
    v = f"{value_type(kind)} v[{len(targets)}];"
    stores = " ".join(t.assign(x, f"v[{n}]", kind) for n, x in enumerate(targets) if x != "_")
    address = t.address(source, i.space)
    if i.space == "param":
        return f"{{ {v} std::memcpy(v, (const void*){address}, sizeof v); {stores} }}"
    if i.space == "local":
        where = f"local_at({address}, sizeof v, frame, sizeof frame)"
        return f"{{ {v} std::memcpy(v, {where}, sizeof v); {stores} }}"
    space = "global" if i.space == "const" else i.space
    if not any(m in i for m in ("acquire", "relaxed", "volatile")):
        return f"{{ {v} load_{space}(v, {address}); {stores} }}"
    generic = f"shared_to_generic({address})" if space == "shared" else address
    load = f"load_shared(v, {address})" if space == "shared" else None
    load = load or f"load_strong(v, {address}, {_order(i, 'sys')})"
    return f"{{ {v} {load}; polled({generic}, (u64)v[0]); {stores} }}"


def store(t: Translator, i: Instruction) -> str:
    i.allow(f"{_SCOPES} v2 v4 v8")
    target, source = _without_policy(i)
    kind = bits_type(i.type)
    if i.space == "param":  # an argument of a call
        return ""
    sources = elements(source)
    values = ", ".join(t.value(x, kind) for x in sources)
    v = f"const {value_type(kind)} v[{len(sources)}] = {{{values}}};"
    address = t.address(target, i.space)
    if i.space == "local":
        where = f"local_at({address}, sizeof v, frame, sizeof frame)"
        return f"{{ {v} std::memcpy({where}, v, sizeof v); }}"
    if i.space != "shared" and any(m in i for m in ("release", "relaxed", "volatile")):
        return f"{{ {v} store_strong(v, {address}, {_order(i, 'sys')}); }}"
    return f"{{ {v} store_{i.space}(v, {address}); }}"


def atomic(t: Translator, i: Instruction) -> str:
    """atom and red, of one element or of a vector, element by element."""
    operation = next((m for m in i.modifiers if m in _ATOMICS), None)
    i.allow(f"{_SCOPES} {operation} noftz v2 v4 v8")
    returns = i.base == "atom"
    operands = list(_without_policy(i))
    target = operands.pop(0) if returns else None
    address = t.address(operands[0], i.space)
    operator = operation + "_" if operation in ("and", "or", "xor") else operation
    cpp = {"f16x2": "F16x2", "bf16x2": "BF16x2"}.get(i.type) or value_type(i.type)
    values = elements(operands[1])
    size = TYPE_BYTES[i.type]
    width = size * len(values)
    order = _order(i, "gpu")
    kind = "float_sum" if operation == "add" and "f" in i.type else "atomic"
    if i.space == "shared":
        before = f"u8* p = (u8*)shared_atomic({address}, {width});"
        code = []
    else:
        before = f"u8* p = (u8*)strong_at({address}, {width}, Strong::{kind}, {order});"
        code = [f"const StrongAtomic together(p, {order}, {int(returns)});"]
    for n, x in enumerate(values):
        others = "".join(f", as<{cpp}>({t.raw(o, i.type)})" for o in operands[2:])
        code.append(
            f"const {cpp} old{n} = atomic<Atomic::{operator}, {cpp}>"
            f"(p + {n * size}, as<{cpp}>({t.raw(x, i.type)}){others});"
        )
    after = ""
    if target is not None:
        bits = bits_type(i.type)
        code += [
            t.assign(x, f"bits(old{n})", bits) for n, x in enumerate(elements(target)) if x != "_"
        ]
        before += " u64 old;"
        code.append("old = (u64)bits(old0);")
        after = "polled((u64)p, old);"
    return f"{{ {before} {{ {' '.join(code)} }} {after} }}"


def convert_address(t: Translator, i: Instruction) -> str:
    """cvta: only shared addresses differ from generic ones."""
    i.allow("to")
    source = t.value(i.operands[1], "u64")
    if i.space == "shared":
        to = "to" in i
        source = f"generic_to_shared({source})" if to else f"shared_to_generic((u32){source})"
    return t.assign(i.operands[0], source, "u64")


def is_space(t: Translator, i: Instruction) -> str:
    i.allow("")
    inside = f"is_shared({t.value(i.operands[1], 'u64')})"
    if i.space not in ("shared", "global"):
        raise i.unsupported("state space")
    return t.assign(i.operands[0], inside if i.space == "shared" else f"!{inside}", "pred")


# ---- Control flow.


def branch(t: Translator, i: Instruction) -> str:
    return t.branch(i.operands[0])


def branch_indexed(t: Translator, i: Instruction) -> str:
    cases = enumerate(t.branch_targets(i.operands[1]))
    code = " ".join(f"case {n}: {t.branch(label)}" for n, label in cases)
    return f"switch ({t.value(i.operands[0], 'u32')}) {{ {code} }}"


def leave(t: Translator, i: Instruction) -> str:
    return "return;"


def trap(t: Translator, i: Instruction) -> str:
    return 'trap("trap");'


def call(t: Translator, i: Instruction) -> str:
    if "__assertfail" not in i.text:
        raise i.unsupported("call of a function")
    return 'trap("assertion of the kernel failed");'


def nothing(t: Translator, i: Instruction) -> str:
    return ""


def yields(t: Translator, i: Instruction) -> str:
    return "yield_point();"


def memory_fence(t: Translator, i: Instruction) -> str:
    """fence and membar; blocks notice those of the GPU's scope or a wider one."""
    if not any(m in i for m in ("gpu", "sys", "gl")):
        return "__atomic_thread_fence(__ATOMIC_SEQ_CST);"
    both = i.base == "membar" or not any(m in i for m in ("acquire", "release"))
    return f"fence({int(both or 'acquire' in i)}, {int(both or 'release' in i)});"


def fence_proxy(t: Translator, i: Instruction) -> str:
    return "fence_proxy_async();"


def create_policy(t: Translator, i: Instruction) -> str:
    return t.assign(i.operands[0], "0", "b64")


# ---- Warps and barriers.


def shuffle(t: Translator, i: Instruction) -> str:
    i.allow("sync up down bfly idx")
    target, _, in_range = i.operands[0].partition("|")
    arguments = ", ".join(t.value(o, "u32") for o in i.operands[1:])
    code = (
        f"bool in_range; const u32 v = shuffle(Shuffle::{i.modifiers[1]}, {arguments}, in_range); "
    )
    code += t.assign(target, "v", "b32")
    if in_range:
        code += t.assign(in_range, "in_range", "pred")
    return f"{{ {code} }}"


def vote(t: Translator, i: Instruction) -> str:
    i.allow("sync ballot all any uni")
    mask = t.value(i.operands[2], "u32")
    ballot = f"ballot({t.value(i.operands[1], 'pred')}, mask)"
    results = {"ballot": "votes", "all": "votes == mask", "any": "votes != 0"}
    result = results.get(i.modifiers[1], "votes == mask || votes == 0")
    target = t.assign(i.operands[0], result, "b32" if "ballot" in i else "pred")
    return f"{{ const u32 mask = {mask}, votes = {ballot}; {target} }}"


def reduce_lanes(t: Translator, i: Instruction) -> str:
    operation = next((m for m in i.modifiers if m in _ATOMICS), "")
    i.allow(f"sync {operation}")
    if i.type not in ("s32", "u32", "b32"):
        raise i.unsupported("type")
    signed = i.type == "s32"
    value = f"(u64){'(i64)' if signed else ''}{t.value(i.operands[1], i.type)}"
    operator = operation + "_" if operation in ("and", "or", "xor") else operation
    arguments = f"{value}, {t.value(i.operands[2], 'u32')}, {int(signed)}"
    return t.assign(i.operands[0], f"reduce_lanes(Atomic::{operator}, {arguments})", "b32")


def elect(t: Translator, i: Instruction) -> str:
    target, _, chosen = i.operands[0].partition("|")
    code = f"const u32 lane = elect({t.value(i.operands[1], 'u32')}); "
    if target != "_":
        code += t.assign(target, "lane", "b32")
    return f"{{ {code}{t.assign(chosen, 'me.linear % 32 == lane', 'pred')} }}"


def warp_barrier(t: Translator, i: Instruction) -> str:
    return f"sync_warp({t.value(i.operands[0], 'u32')});"


def barrier(t: Translator, i: Instruction) -> str:
    """bar.sync, bar.arrive, bar.red and the same as barrier."""
    i.allow("cta sync arrive aligned red popc and or")
    operands = list(i.operands)
    target = operands.pop(0) if "red" in i else None
    vote = t.value(operands.pop(), "pred") if "red" in i else None
    name = t.value(operands[0], "u32")
    count = t.value(operands[1], "u32") if len(operands) > 1 else "-1"
    if target is None:
        return f"barrier({name}, {count}, {int('arrive' in i)});"
    votes = f"const i64 count = {count}; const u32 votes = barrier_vote({name}, count, {vote}); "
    votes += "const u32 all = count < 0 ? me.ntid.x * me.ntid.y * me.ntid.z : count; "
    result = "votes" if "popc" in i else "votes == all" if "and" in i else "votes != 0"
    return f"{{ {votes}(void)all; {t.assign(target, result, 'u32' if 'popc' in i else 'pred')} }}"


def max_registers(t: Translator, i: Instruction) -> str:
    i.allow("inc dec sync aligned")
    return f"set_max_registers({i.operands[0]}, {int('inc' in i)});"


def load_matrix(t: Translator, i: Instruction) -> str:
    i.allow("sync aligned m8n8 x1 x2 x4 trans")
    targets = elements(i.operands[0])
    arguments = f"{len(targets)}, {t.address(i.operands[1], 'shared')}, {int('trans' in i)}"
    stores = " ".join(t.assign(x, f"v[{n}]", "b32") for n, x in enumerate(targets))
    return f"{{ u32 v[4]; ldmatrix(v, {arguments}); {stores} }}"


def store_matrix(t: Translator, i: Instruction) -> str:
    i.allow("sync aligned m8n8 x1 x2 x4 trans")
    sources = elements(i.operands[1])
    values = ", ".join(t.value(x, "b32") for x in sources)
    arguments = f"{len(sources)}, {t.address(i.operands[0], 'shared')}, {int('trans' in i)}"
    return f"{{ const u32 v[4] = {{{values}}}; stmatrix(v, {arguments}); }}"


def mma(t: Translator, i: Instruction) -> str:
    match = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(f32|f16)\.(\w+)\.(\w+)\.\2",
        i.text.partition(" ")[0],
    )
    depths = {"bf16": (8, 16), "f16": (8, 16), "tf32": (4, 8), "e4m3": (32,), "e5m2": (32,)}
    if match is None or int(match.group(1)) not in depths.get(match.group(3), ()):
        raise i.unsupported("shape or types")
    k, accumulator, a_format, b_format = match.groups()
    d, a, b, c = (elements(o) for o in i.operands)
    a_values, b_values, c_values = (", ".join(t.value(x, "b32") for x in xs) for xs in (a, b, c))
    stores = " ".join(t.assign(x, f"d[{n}]", "b32") for n, x in enumerate(d))
    formats = f"Format::{a_format}, Format::{b_format}, {k}, {int(accumulator == 'f16')}"
    return (
        f"{{ u32 d[4] = {{{c_values}}}; const u32 a[4] = {{{a_values}}}, b[2] = {{{b_values}}}; "
        f"mma({formats}, d, a, b); {stores} }}"
    )


# ---- Asynchronous copies.


def cp_async(t: Translator, i: Instruction) -> str:
    i.allow("async")
    target, source, size, *rest = _without_policy(i)
    count = size
    if rest:
        register = t.register(rest[0])
        ignores = register is not None and register[1] == "pred"
        count = f"{t.value(rest[0], 'pred')} ? 0 : {size}" if ignores else t.value(rest[0], "u32")
    return (
        f"cp_async({t.address(target, 'shared')}, {t.address(source, 'global')}, {size}, {count});"
    )


def cp_async_wait_all(t: Translator, i: Instruction) -> str:
    return "cp_async_commit(); cp_async_wait(0);"


def cp_async_arrive(t: Translator, i: Instruction) -> str:
    return f"cp_async_mbarrier_arrive({t.address(i.operands[0], 'shared')}, {int('noinc' in i)});"


def _call(function: str):
    """A handler for an instruction without operands, or with one immediate."""
    return lambda t, i: f"{function}({', '.join(t.value(o, 'u64') for o in i.operands)});"


def bulk_tensor(t: Translator, i: Instruction) -> str:
    """cp.async.bulk.tensor and cp.reduce.async.bulk.tensor."""
    i.allow(
        "async reduce bulk tensor 1d 2d 3d 4d 5d tile mbarrier::complete_tx::bytes bulk_group add"
    )
    operands = list(_without_policy(i))
    load = "bulk_group" not in i
    shared, tensor = operands[:2] if load else operands[1::-1]
    tensor_map, coordinates = tensor.strip("[] ").split(",", 1)
    at = elements(coordinates.strip())
    values = ", ".join(t.value(x, "s32") for x in at)
    op = "load" if load else "reduce" if i.modifiers[0] == "reduce" else "store"
    barrier_address = t.address(operands[2], "shared") if load else "0"
    return (
        f"{{ const i32 c[] = {{{values}}}; tma(Bulk::{op}, {t.address(shared, 'shared')}, "
        f"{t.value(tensor_map.strip(), 'u64')}, {barrier_address}, {len(at)}, c); }}"
    )


def bulk(t: Translator, i: Instruction) -> str:
    """cp.async.bulk and cp.reduce.async.bulk of contiguous memory."""
    i.allow("async reduce bulk mbarrier::complete_tx::bytes bulk_group add noftz")
    operands = list(_without_policy(i))
    load, reduces = "bulk_group" not in i, i.modifiers[0] == "reduce"
    shared, other = operands[:2] if load else operands[1::-1]
    if "global" not in i:
        raise i.unsupported("direction")
    kinds = {"f32": "f32", "f16": "f16", "bf16": "bf16", "u32": "u32", "s32": "u32"}
    if reduces and i.type not in kinds:
        raise i.unsupported("type")
    op = "load" if load else "reduce" if reduces else "store"
    barrier_address = t.address(operands[3], "shared") if load else "0"
    element = f"Element::{kinds[i.type] if reduces else 'bytes'}"
    size = t.value(operands[2], "u32")
    where = f"{t.address(shared, 'shared')}, {t.address(other, 'global')}"
    return f"bulk_copy(Bulk::{op}, {element}, {where}, {size}, {barrier_address});"


def bulk_wait(t: Translator, i: Instruction) -> str:
    """With .read only until shared memory has been read."""
    i.allow("async bulk wait_group read")
    return f"bulk_wait({t.value(i.operands[0], 'u64')}, {int('read' in i)});"


def mbarrier(t: Translator, i: Instruction) -> str:
    """mbarrier.init, inval, expect_tx, arrive, arrive_drop, try_wait and test_wait."""
    i.allow(
        f"init inval expect_tx arrive arrive_drop try_wait test_wait parity noComplete {_SCOPES}"
    )
    kind, operands = i.modifiers[0], list(i.operands)
    target = None if operands[0].startswith("[") else operands.pop(0)
    address = t.address(operands.pop(0), "shared")
    if kind == "init":
        return f"mbarrier_init({address}, {t.value(operands[0], 'u32')});"
    if kind == "inval":
        return f"mbarrier_invalidate({address});"
    if kind == "expect_tx":
        return f"mbarrier_expect({address}, {t.value(operands[0], 'u32')});"
    if kind in ("arrive", "arrive_drop"):
        given = t.value(operands[0], "u32") if operands else "1"
        count, expected = ("1", given) if "expect_tx" in i else (given, "0")
        code = f"mbarrier_arrive({address}, {count}, {expected}, {int(kind == 'arrive_drop')})"
        return t.assign(target, code, "b64") if target else f"{code};"
    parity = "parity" in i
    state = t.value(operands[0], "u32" if parity else "u64")
    flags = f"{int(parity)}, {int(kind == 'try_wait')}"
    return t.assign(target, f"mbarrier_wait({address}, {state}, {flags})", "pred")


# ---- wgmma.


def wgmma(t: Translator, i: Instruction) -> str:
    match = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.f32\.(\w+)\.(\w+)",
        i.text.partition(" ")[0],
    )
    if match is None or match.group(2) not in ("bf16", "f16", "e4m3", "e5m2", "tf32"):
        raise i.unsupported("shape or types")
    n, a_format, b_format = int(match.group(1)), match.group(2), match.group(3)
    d, a, b_descriptor, accumulate, *flags = i.operands
    registers = elements(d)
    if len(registers) != n // 2:
        raise i.unsupported(f"{len(registers)} accumulators for n = {n}")
    in_registers = a.startswith("{")
    negate = [str(int(f == "-1")) for f in flags[:2]] or ["0", "0"]
    transpose = flags[2:] or ["0", "0"]
    transpose_a, transpose_b = ("0", transpose[-1]) if in_registers else transpose
    formats = f"Format::{a_format}, Format::{b_format}"
    shape = f"{formats}, {n}, {transpose_a}, {transpose_b}, {', '.join(negate)}"
    a_tuple = t.register_tuple(elements(a)) if in_registers else "nullptr"
    a_descriptor = "0" if in_registers else t.value(a, "u64")
    tuples = f"{t.register_tuple(registers)}, {a_tuple}"
    descriptors = f"{a_descriptor}, {t.value(b_descriptor, 'u64')}"
    scale = t.value(accumulate, "pred")
    return f"wgmma({{{shape}}}, wgmma_registers, {tuples}, {descriptors}, {scale});"


# Opcodes, or prefixes of them up to a dot; the longest counts.
HANDLERS = {
    "ld": load,
    "ldu": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "cvta": convert_address,
    "isspacep": is_space,
    "bra": branch,
    "brx.idx": branch_indexed,
    "ret": leave,
    "exit": leave,
    "trap": trap,
    "call": call,
    "nanosleep": yields,
    "membar": memory_fence,
    "fence": memory_fence,
    "fence.proxy.async": fence_proxy,
    "fence.proxy.tensormap::generic": nothing,
    "fence.mbarrier_init": nothing,
    "griddepcontrol": nothing,
    "prefetch": nothing,
    "prefetchu": nothing,
    "createpolicy": create_policy,
    "shfl.sync": shuffle,
    "vote.sync": vote,
    "redux.sync": reduce_lanes,
    "elect.sync": elect,
    "bar.warp.sync": warp_barrier,
    "bar": barrier,
    "barrier": barrier,
    "setmaxnreg": max_registers,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "mma": mma,
    "cp.async": cp_async,
    "cp.async.commit_group": _call("cp_async_commit"),
    "cp.async.wait_group": _call("cp_async_wait"),
    "cp.async.wait_all": cp_async_wait_all,
    "cp.async.mbarrier.arrive": cp_async_arrive,
    "cp.async.bulk": bulk,
    "cp.reduce.async.bulk": bulk,
    "cp.async.bulk.tensor": bulk_tensor,
    "cp.reduce.async.bulk.tensor": bulk_tensor,
    "cp.async.bulk.prefetch": nothing,
    "cp.async.bulk.commit_group": _call("bulk_commit"),
    "cp.async.bulk.wait_group": bulk_wait,
    "mbarrier": mbarrier,
    "wgmma.mma_async": wgmma,
    "wgmma.fence": _call("wgmma_fence"),
    "wgmma.commit_group": _call("wgmma_commit"),
    "wgmma.wait_group": _call("wgmma_wait"),
}
