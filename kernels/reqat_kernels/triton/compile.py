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
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from reqat_kernels.triton.compile_cases import CAPABILITIES, Case, cases
from reqat_kernels.triton.runtime import AVAILABLE, INTERPRETED, triton

#: Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
#: Columns of tensor memory, where there is one.
TENSOR_MEMORY_LIMIT = 512

_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
_CONVERT_FP4 = re.compile(r"\bcvt[\w.]*e2m1[\w.]*")
_FLUSH = re.compile(r"\b(?:mul|add|sub|fma|div)(?:\.rn)?\.ftz\.f32\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


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


def compile_case(case: Case, capability: int) -> Row:
    """Compile a case for ``capability`` (80, 90, ...) and read registers, memory and instructions off the result.

    Raises RuntimeError where nothing can be compiled: triton is missing or interprets.
    """
    if not AVAILABLE or INTERPRETED:
        reason = "unset TRITON_INTERPRET" if AVAILABLE else "pip install 'reqat[kernels]'"
        raise RuntimeError(f"this process cannot compile Triton kernels: {reason}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = case.at(capability)
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
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    for path in (options.out, options.markdown):
        if path is not None and path.exists() and not options.force:
            parser.error(f"{path} is there; --force replaces it")
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


if __name__ == "__main__":
    sys.exit(main())
