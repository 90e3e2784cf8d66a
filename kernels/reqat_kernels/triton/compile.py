"""Compile every Triton kernel for every GPU generation, without a GPU, and see what came out.

Triton's compiler needs no device: given types and constants it writes PTX, and the assembler in its package makes the
binary. Three questions can be answered from that, on any machine and in CI: does the kernel compile for sm_80, sm_90,
sm_100 and sm_120; do its registers and shared memory fit, with no spill; and which matrix instruction was found, since
a product that silently falls back to another instruction is a kernel of another speed. What cannot be answered is how
fast it runs.

    python -m reqat_kernels.triton.compile --out table.csv --markdown table.md

A :class:`Case` is one kernel with the types, constants and options of one typical launch, and a budget. Pointers and
the integers in ``multiples`` are declared as multiples of 16, as triton finds them at run time: without, loads are
narrow and the figures mean little. What a generation cannot do stays in the table, with the reason; a case that is
said to be impossible and compiles is a failure too, so that an upgrade which mends it is noticed.

Must not run in a process whose triton interprets (``TRITON_INTERPRET``): kernels are plain Python there.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from reqat_kernels.triton import append, attention, gemm, gemv, quantize, sem_loss
from reqat_kernels.triton.runtime import AVAILABLE, INTERPRETED, tl, triton

#: Ampere, Hopper, datacenter Blackwell, consumer Blackwell (and DGX Spark's close relative).
CAPABILITIES = (80, 90, 100, 120)
#: Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
#: Columns of tensor memory, where there is one.
TENSOR_MEMORY_LIMIT = 512

_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
_CONVERT_FP4 = re.compile(r"\bcvt[\w.]*e2m1[\w.]*")
_FLUSH = re.compile(r"\b(?:mul|add|sub|fma|div)(?:\.rn)?\.ftz\.f32\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Case:
    """One launch to compile.

    ``types``: triton's type of each argument (``*u8``, ``fp32``); integers need no mention. ``registers``: the budget,
    a thread's. ``matrix``: by capability, what the name of every matrix instruction must contain ("" : there is none).
    ``impossible``: by capability, why it does not compile. ``unused``: why the launcher takes another way there;
    no budget holds then. ``spilled``: bytes allowed, where it is not 0. ``subnormals``: whether small numbers must not
    be flushed. ``core``: capabilities in the test that always runs.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    registers: int
    matrix: dict[int, str] = field(default_factory=dict)
    multiples: tuple[str, ...] = ()
    impossible: dict[int, str] = field(default_factory=dict)
    unused: dict[int, str] = field(default_factory=dict)
    spilled: dict[int, int] = field(default_factory=dict)
    subnormals: bool = True
    core: tuple[int, ...] = ()

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
        """Types by argument, and which arguments are multiples of 16, as triton's ASTSource takes them."""
        types, attributes = {}, {}
        for index, argument in enumerate(self.kernel.arg_names):
            kind = "constexpr" if argument in self.constants else self.types.get(argument, "i32")
            types[argument] = kind
            if kind.startswith("*") or (argument in self.multiples and kind != "constexpr"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        return types, attributes


@dataclass(frozen=True)
class Row:
    """What came out of one case on one capability. ``status``: compiled, unused, impossible (see ``note``) or failed.

    ``spilled``: bytes of stack and local memory a thread; ``shared``: bytes a block; ``tensor_memory``: columns;
    ``matrix``, ``fp4_conversions``: instructions found; ``flushes``: float32 instructions that would flush subnormals.
    """

    case: str
    kernel: str
    capability: int
    status: str
    warps: int = 0
    registers: int = 0
    register_budget: int = 0
    spilled: int = 0
    shared: int = 0
    shared_limit: int = 0
    tensor_memory: int = 0
    matrix: str = ""
    fp4_conversions: str = ""
    flushes: int = 0
    triton: str = ""
    note: str = ""


def cases() -> list[Case]:
    """Every kernel of the package, in launches typical of a model of head_dim 128 and hidden size 4096."""
    return [*_quantize_cases(), *_gemm_cases(), *_attention_cases(), *_append_cases(), *_loss_cases()]


def compile_case(case: Case, capability: int) -> Row:
    """Compile a case for ``capability`` (80, 90, ...) and read registers, memory and instructions off the result.

    Raises RuntimeError where nothing can be compiled: triton is missing or interprets.
    """
    if not AVAILABLE or INTERPRETED:
        reason = "unset TRITON_INTERPRET" if AVAILABLE else "pip install 'reqat[kernels]'"
        raise RuntimeError(f"this process cannot compile Triton kernels: {reason}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, attributes = case.signature()
    constants = {name: value for name, value in case.constants.items() if name in types}
    label = {
        "case": case.name,
        "kernel": case.kernel.__name__,
        "capability": capability,
        "warps": case.options.get("num_warps", 4),
        "register_budget": case.registers,
        "shared_limit": SHARED_LIMIT[capability],
        "triton": triton.__version__,
    }
    try:
        source = ASTSource(case.kernel, types, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    except Exception as error:  # the compiler raises many kinds
        known = case.impossible.get(capability)
        note = known or f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
        return Row(status="impossible" if known else "failed", note=note, **label)
    ptx = made.asm["ptx"]
    registers, stack, local = _resources(made.asm["cubin"])
    return Row(
        status="unused" if capability in case.unused else "compiled",
        note=case.unused.get(capability, ""),
        registers=registers,
        spilled=stack + local,
        shared=made.metadata.shared,
        tensor_memory=getattr(made.metadata, "tmem_size", None) or 0,
        matrix=" ".join(sorted(set(_MATRIX.findall(ptx)))),
        fp4_conversions=" ".join(sorted(set(_CONVERT_FP4.findall(ptx)))),
        flushes=len(_FLUSH.findall(ptx)),
        **label,
    )


def compile_table(pairs: Iterable[tuple[Case, int]] | None = None, *, jobs: int = 1) -> list[Row]:
    """A row for each case and capability (all of them by default), in ``jobs`` processes."""
    chosen = list(pairs if pairs is not None else ((case, sm) for case in cases() for sm in CAPABILITIES))
    if jobs <= 1:
        return [compile_case(case, capability) for case, capability in chosen]
    # Kernels do not travel between processes; names do.
    names = [(case.name, capability) for case, capability in chosen]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_named, names))


def core_pairs() -> list[tuple[Case, int]]:
    """A few cases that between them meet every capability and every kind of kernel."""
    return [(case, capability) for case in cases() for capability in case.core]


def violations(rows: Iterable[Row], chosen: Iterable[Case] | None = None) -> list[str]:
    """What is wrong with the rows, one line each: failures, budgets exceeded, another matrix instruction than told."""
    known = {case.name: case for case in chosen or cases()}
    found = []
    for row in rows:
        case, where = known[row.case], f"{row.case}, sm_{row.capability}: "
        if row.status == "failed":
            found.append(f"{where}does not compile ({row.note})")
        if row.status != "compiled":
            continue
        if row.capability in case.impossible:
            found.append(f"{where}compiles, though said to be impossible: {case.impossible[row.capability]}")
        if row.registers > row.register_budget:
            found.append(f"{where}{row.registers} registers, budget {row.register_budget}")
        if row.spilled > case.spilled.get(row.capability, 0):
            found.append(f"{where}{row.spilled} bytes spilled")
        if row.shared > row.shared_limit:
            found.append(f"{where}{row.shared} bytes of shared memory, limit {row.shared_limit}")
        if row.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"{where}{row.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_LIMIT}")
        if row.flushes and case.subnormals:
            found.append(f"{where}{row.flushes} instructions flush subnormals, which carry numbers here")
        wanted = case.matrix.get(row.capability, "")
        instructions = row.matrix.split()
        if bool(instructions) != bool(wanted) or any(wanted not in instruction for instruction in instructions):
            found.append(f"{where}matrix instruction {row.matrix or 'none'}, wanted {wanted or 'none'}")
    return found


def write_csv(rows: Iterable[Row], path: str | Path) -> None:
    """One line a row, columns as the fields of :class:`Row`."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def to_markdown(rows: Iterable[Row]) -> str:
    """A table for people."""
    lines = [
        "| case | sm | registers (budget) | spilled | shared | matrix instruction | FP4 conversion |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.status in ("compiled", "unused"):
            what = (
                f"{row.registers} ({row.register_budget}) | {row.spilled} | {row.shared} | "
                f"{row.matrix.replace(' ', '<br>') or 'none'} | {row.fp4_conversions.replace(' ', '<br>') or 'none'}"
            )
        else:
            what = f"{row.status}: {row.note.replace('|', '/')} | | | | "
        unused = f" (unused: {row.note})" if row.status == "unused" else ""
        lines.append(f"| {row.case}{unused} | {row.capability} | {what} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, write the table, print what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m reqat_kernels.triton.compile", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    parser.add_argument("--case", action="append", help="only cases whose name contains this; repeatable")
    parser.add_argument("--core", action="store_true", help="only the core cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES, help="only this; repeatable")
    options = parser.parse_args(arguments)
    # Every case says for itself; this is for whatever else triton may compile.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
    if not AVAILABLE or INTERPRETED:
        print("nothing compiled: triton is missing, or TRITON_INTERPRET is set", file=sys.stderr)
        return 2
    pairs = core_pairs() if options.core else [(case, sm) for case in cases() for sm in CAPABILITIES]
    if options.case:
        pairs = [(case, sm) for case, sm in pairs if any(part in case.name for part in options.case)]
    if options.capability:
        pairs = [(case, sm) for case, sm in pairs if sm in options.capability]
    rows = compile_table(pairs, jobs=options.jobs)
    if options.out:
        write_csv(rows, options.out)
    if options.markdown:
        options.markdown.write_text(to_markdown(rows))
    if not options.out and not options.markdown:
        print(to_markdown(rows), end="")
    wrong = violations(rows)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _compile_named(pair: tuple[str, int]) -> Row:
    name, capability = pair
    return compile_case(next(case for case in cases() if case.name == name), capability)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack bytes and local bytes a thread, as cuobjdump reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = _RESOURCES.search(text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:500]!r}")
    return int(match[1]), int(match[2]), int(match[3])


# --- the cases --------------------------------------------------------------------------------------------------------

_UNPACKED = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"


def _by_capability(sm80: str, sm90: str, sm100: str, sm120: str) -> dict[int, str]:
    return dict(zip(CAPABILITIES, (sm80, sm90, sm100, sm120), strict=True))


def _quantize_cases() -> list[Case]:
    block_m, block_k = quantize._tile(4096, 4096, 16)
    types = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scales_ptr": "*u8", "g_ptr": "*fp32", "amax_ptr": "*i32"}
    tile = {"BLOCK_M": block_m, "BLOCK_K": block_k}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    nvfp4 = {"BLOCK": 16, "E1M2": False, "RULE": "divide", "NVFP4": True, "ROW": False, "DYNAMIC": False}
    mxfp4 = {"BLOCK": 32, "E1M2": False, "RULE": "ceil", "NVFP4": False, "ROW": False, "DYNAMIC": False}
    kernel = quantize.quantize_kernel

    def case(name: str, constants: dict[str, Any], core: tuple[int, ...] = (), fake: bool = False) -> Case:
        kinds = {**types, "packed_ptr": "*bf16"} if fake else types
        constants = {"FAKE": fake, "LIMIT": torch.finfo(torch.bfloat16).max if fake else 0.0, **constants, **tile}
        return Case(name, kernel, kinds, constants, options, 128, multiples=("M", "K"), core=core)

    return [
        Case(
            "quantize: amax, rows, Hadamard 16",
            quantize.amax_kernel,
            types,
            {"ROW": True, "HADAMARD": 16, **tile},
            options,
            128,
            multiples=("M", "K"),
        ),
        case("quantize: NVFP4, static", {**nvfp4, "TRACK": False, "HADAMARD": 0}, core=(80,)),
        case(
            "quantize: NVFP4, row, Hadamard 16", {**nvfp4, "ROW": True, "DYNAMIC": True, "TRACK": False, "HADAMARD": 16}
        ),
        case("quantize: MXFP4, checked", {**mxfp4, "TRACK": True, "HADAMARD": 0}),
        case("quantize: MXFP4, Hadamard 32", {**mxfp4, "TRACK": False, "HADAMARD": 32}),
        case("fake quantize: NVFP4, dynamic", {**nvfp4, "DYNAMIC": True, "TRACK": False, "HADAMARD": 0}, (90,), True),
        case("fake quantize: MXFP4, checked", {**mxfp4, "TRACK": True, "HADAMARD": 0}, fake=True),
    ]


def _gemm_cases() -> list[Case]:
    types = dict.fromkeys(("a_ptr", "as_ptr", "w_ptr", "ws_ptr"), "*u8")
    types |= {"ga_ptr": "*fp32", "gw_ptr": "*fp32", "x_ptr": "*bf16", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    types |= {"top_ptr": "*i32"}
    nvfp4 = {"BLOCK": 16, "NVFP4": True, "E1M2": False, "G_A": 2, "G_W": 1, "HAS_BIAS": False}
    mxfp4 = {"BLOCK": 32, "NVFP4": False, "E1M2": False, "G_A": 0, "G_W": 0, "HAS_BIAS": False}

    def case(
        name: str,
        kernel: Any,
        rows: int,
        depth: int,
        constants: dict[str, Any],
        matrix: dict[int, str],
        registers: int = 255,
        **others: Any,
    ) -> Case:
        block_m, block_n, block_k, options = gemm._tile(rows, 4096, depth)
        constants = {**constants, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        return Case(name, kernel, types, constants, options, registers, matrix, ("N", "K"), **others)

    bf16, fp16 = _UNPACKED.format("bf16"), _UNPACKED.format("f16")
    w4a16 = {"SHIFT": False, "COMPUTE": tl.bfloat16}
    scaled, unpacked = {"SCALED": True, "COMPUTE": tl.float16}, {"SCALED": False, "COMPUTE": tl.float16}
    found = []
    for label, constants in (("NVFP4", nvfp4), ("MXFP4", mxfp4)):
        big = _by_capability(bf16, "wgmma", "tcgen05.mma", bf16)
        found.append(case(f"W4A16: {label}, 16 rows", gemm.w4a16_kernel, 16, 64, {**constants, **w4a16}, _all(bf16)))
        found.append(case(f"W4A16: {label}, 4096 rows", gemm.w4a16_kernel, 4096, 64, {**constants, **w4a16}, big))
    found.append(
        case(
            "W4A4: NVFP4, scaled, 4096 rows",
            gemm.w4a4_kernel,
            4096,
            128,
            {**nvfp4, **scaled},
            _by_capability("", "wgmma", "kind::mxf4nvf4.block_scale", "kind::mxf4nvf4.block_scale.scale_vec::4X"),
            impossible={80: "sm_80 has no E4M3 type (fp8e4nv); the unpacking branch is launched"},
            unused={90: "sm_90 has no FP4 instruction; the unpacking branch is launched"},
            core=(100,),
        )
    )
    found.append(
        case(
            "W4A4: MXFP4, scaled, 4096 rows",
            gemm.w4a4_kernel,
            4096,
            128,
            {**mxfp4, **scaled},
            _by_capability(bf16, "wgmma", "kind::mxf4.block_scale", "kind::mxf4nvf4.block_scale.scale_vec::2X"),
            unused={80: "spills; the unpacking branch is launched"},
        )
    )
    big = _by_capability(fp16, "wgmma", "tcgen05.mma", fp16)
    found.append(case("W4A4: NVFP4, unpacked, 4096 rows", gemm.w4a4_kernel, 4096, 64, {**nvfp4, **unpacked}, big))
    big = _by_capability(bf16, "wgmma", "tcgen05.mma", bf16)
    unpacked = {"SCALED": False, "COMPUTE": tl.bfloat16}
    found.append(case("W4A4: MXFP4, unpacked, 4096 rows", gemm.w4a4_kernel, 4096, 64, {**mxfp4, **unpacked}, big))
    for label, constants in (("NVFP4", nvfp4), ("MXFP4", mxfp4)):
        for rows in (1, 8):
            found.append(
                Case(
                    f"W4A4 small M: {label}, {rows} rows",
                    gemv.gemv_w4a4_kernel,
                    types,
                    {**constants, "ROWS": rows, "BLOCK_N": 8, "BLOCK_K": 512},
                    {"num_warps": 4, "enable_fp_fusion": False},
                    255,
                    multiples=("N", "K"),
                    # ptxas gives up two registers to stay at 128, where four blocks fit on a multiprocessor.
                    spilled={120: 8} if rows == 8 else {},
                    core=(120,) if rows == 1 and label == "NVFP4" else (),
                )
            )
    return found


def _all(instruction: str) -> dict[int, str]:
    return dict.fromkeys(CAPABILITIES, instruction)


_CACHE_TYPES = {
    f"{side}_{part}": kind
    for side in ("key", "value")
    for part, kind in (("codes", "*u8"), ("scales", "*u8"), ("global", "*fp32"))
}
# Strides of [B, G, S, D/2] codes and of what is larger; those of scales along S are D/16 = 8.
_CACHE_MULTIPLES = tuple(
    f"{side}_{part}_{axis}"
    for side in ("key", "value")
    for part, axes in (("codes", "bgs"), ("scales", "bg"), ("global", "bg"))
    for axis in axes
)


def _sides(key: str, value: str, **more: tuple[Any, Any]) -> dict[str, Any]:
    """The constants of keys and values in formats like ``NVFP4`` or ``MXFP4 E1M2``."""
    constants: dict[str, Any] = {}
    for index, (side, fmt) in enumerate((("KEY", key), ("VALUE", value))):
        constants[f"{side}_E1M2"] = "E1M2" in fmt
        constants[f"{side}_SCALE"] = "E4M3" if "NVFP4" in fmt else "E8M0"
        constants[f"{side}_BLOCK"] = 16 if "NVFP4" in fmt else 32
        constants |= {f"{side}_{name}": pair[index] for name, pair in more.items()}
    return constants


def _attention_cases() -> list[Case]:
    types = {
        **_CACHE_TYPES,
        "query": "*bf16",
        "out": "*bf16",
        "partial": "*fp32",
        "partial_stats": "*fp32",
        "mask": "*u8",
        "lengths": "*i64",
        "scale_log2": "fp32",
    }
    common = {
        "GROUP": 4,
        "HALF_DIM": 64,
        "C": 64,
        "MASK": "none",
        "HAS_LENGTHS": True,
        "CAUSAL": False,
        "DIRECT": False,
        "BLOCK_M": 16,
        "BLOCK_S": attention.BLOCK_S,
        "COMPUTE": tl.bfloat16,
        "PRECISION": "ieee",
        "key_global_s": 1,
        "value_global_s": 1,
    }
    multiples = (*_CACHE_MULTIPLES, "query_b", "query_h", "query_t", "mask_b", "mask_h", "mask_t")

    def case(
        name: str, key: str, value: str, registers: int, instruction: str, core: tuple[int, ...] = (), **changes: Any
    ) -> Case:
        kinds = {**types, **changes.pop("types", {})}
        constants = {**common, **_sides(key, value), **changes}
        options = attention.OPTIONS
        kernel = attention.decode_attention_kernel
        # At 168 registers three blocks fit on a multiprocessor, and ptxas gives up two registers to stay there.
        spilled = dict.fromkeys(CAPABILITIES, 8) if constants["MASK"] != "none" or constants["CAUSAL"] else {}
        matrix = _all(instruction)
        return Case(name, kernel, kinds, constants, options, registers, matrix, multiples, spilled=spilled, core=core)

    bf16 = _UNPACKED.format("bf16")
    fp32: dict[str, str] = {"query": "*fp32", "out": "*fp32"}
    narrow: dict[str, Any] = {"HALF_DIM": 32, "C": 32, "DIRECT": True}
    tf32: dict[str, Any] = {"PRECISION": "tf32", "COMPUTE": tl.float32}
    return [
        case("decode attention: NVFP4", "NVFP4", "NVFP4", 192, bf16, core=(90,)),
        case("decode attention: NVFP4 E1M2", "NVFP4 E1M2", "NVFP4 E1M2", 192, bf16),
        case("decode attention: MXFP4", "MXFP4", "MXFP4", 160, bf16),
        case("decode attention: NVFP4, boolean mask", "NVFP4", "NVFP4", 200, bf16, MASK="bool"),
        case("decode attention: NVFP4, head_dim 64, one split", "NVFP4", "NVFP4", 128, bf16, **narrow),
        case(
            "decode attention: NVFP4, 32 rows, causal",
            "NVFP4",
            "NVFP4",
            255,
            bf16,
            BLOCK_M=attention.MAX_BLOCK_M,
            CAUSAL=True,
        ),
        case(
            "decode attention: NVFP4, float16 queries",
            "NVFP4",
            "NVFP4",
            255,
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
            types={"query": "*fp16", "out": "*fp16"},
            **tf32,
        ),
        case(
            "decode attention: NVFP4, float32 queries",
            "NVFP4",
            "NVFP4",
            255,
            "",
            types=fp32,
            COMPUTE=tl.float32,
            BLOCK_S=attention.BLOCK_S_FLOAT32,
        ),
        Case(
            "decode attention: merging 16 splits",
            attention.merge_splits_kernel,
            types,
            {"HEAD_DIM": 128, "D": 128, "SPLITS": 16, "CHUNK": 16},
            {"num_warps": 4, "enable_fp_fusion": True},
            64,
        ),
    ]


def _append_cases() -> list[Case]:
    types = {
        **_CACHE_TYPES,
        **dict.fromkeys(("key", "value", "cos", "sin"), "*bf16"),
        "shift": "*fp32",
        "offsets": "*i64",
    }
    multiples = (*_CACHE_MULTIPLES, *(f"{x}_{axis}" for x in ("key", "value", "cos", "sin") for axis in "bgt"))

    def case(name: str, key: str, value: str, rotate: Any, row: bool, rows: int, core: tuple[int, ...] = ()) -> Case:
        rules = ("divide" if "NVFP4" in key else "ceil", "divide" if "NVFP4" in value else "ceil")
        constants = {
            **_sides(key, value, RULE=rules, ROW_SCALE=(row, row)),
            "HEAD_DIM": 128,
            "D": 128,
            "ROWS": rows,
            "HAS_OFFSETS": True,
            "HAS_SHIFT": True,
            "ROTATE": rotate,
            "key_global_s": 1,
            "value_global_s": 1,
        }
        return Case(name, append.append_kernel, types, constants, append.OPTIONS, 96, {}, multiples, core=core)

    return [
        case("append: NVFP4 row, rotated and shifted", "NVFP4", "NVFP4", tl.bfloat16, True, 16, core=(80,)),
        case("append: NVFP4 static, E1M2 keys, one row", "NVFP4 E1M2", "NVFP4", None, False, 1),
        case("append: MXFP4, rotated and shifted", "MXFP4", "MXFP4", tl.bfloat16, False, 16),
    ]


def _loss_cases() -> list[Case]:
    types = {"logits": "*fp32", "lse": "*fp32", "entropy": "*fp32", "pull": "*fp32", "nll": "fp32"}
    options = {"num_warps": sem_loss._WARPS, "enable_fp_fusion": False}
    block = sem_loss._block(49152)
    return [
        Case(
            "SEM loss: statistics",
            sem_loss.statistics_kernel,
            types,
            {"ENTROPY": True, "BLOCK": block},
            options,
            128,
            multiples=("size", "stride"),
            subnormals=False,
        ),
        Case(
            "SEM loss: gradient",
            sem_loss.gradient_kernel,
            types,
            {"PULL": True, "BLOCK": block},
            options,
            128,
            multiples=("size", "stride"),
            subnormals=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
