"""Random calls of the native kernels' operators and wrappers: ``python -m tests.campaign.operators --calls 50000``.

Each call starts from arguments that fit together; most are then broken in one or two places (another length, type,
device or number of axes, a size that is negative, zero or huge, memory taken away, None). A call must either compute
what PyTorch computes from the same arguments, or raise ValueError or TypeError. Anything else is a failure: a crash of
the process, another exception, an answer to arguments that PyTorch refuses, other numbers.

Calls run in processes of their own, whose last words name the call that ended them; the next process goes on behind it.
``--sanitizer address`` builds the native library with the compiler's address sanitizer, which ends the process at the
first byte read or written outside of a tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat.formats import QuantizedTensor
from reqat_kernels.isas import CHOICES
from reqat_kernels.native import attention, dense, gemm, int8, table  # noqa: F401  (registers their operators)
from reqat_kernels.native import quantize as native
from tests.campaign import operator_arguments as arguments
from tests.campaign import operator_checks as checks

ROOT = Path(__file__).resolve().parents[2]


# --- operators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """How arguments that fit are made, the call, and what it is held against."""

    arguments: Callable[[random.Random], dict[str, Any]]
    call: Callable[..., Any]
    check: Callable[[dict[str, Any], Any], None]


def _ordered(operator: Any, *names: str) -> Callable[..., Any]:
    return lambda **a: operator(*(a[name] for name in names))


_LAYOUT = ("rows", "columns", "element", "scale", "g")


def _copied(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def _appended(cache: attention.PackedStates, states: Any, start: Any, shift: Any) -> bool:
    cache.append(states, start, shift=shift)
    return True


OPERATORS: dict[str, Operator] = {
    "linear": Operator(arguments.linear_arguments, gemm.linear, checks.check_linear),
    "fp4_linear": Operator(
        arguments.raw_arguments, _ordered(torch.ops.reqat.fp4_linear, "x", "weight", "bias", *_LAYOUT), checks.check_raw
    ),
    "fp4_linear_int": Operator(
        arguments.raw_int_arguments,
        _ordered(torch.ops.reqat.fp4_linear_int, "x", "start", "block_scale", "row_scale", "weight", "bias", *_LAYOUT),
        checks.check_raw_int,
    ),
    "pack_weight": Operator(lambda r: {"q": arguments.weight(r), "out": None}, gemm.pack_weight, checks.check_packed),
    "quantize_input": Operator(arguments.input_arguments, gemm.quantize_input, checks.check_input),
    "dense_bf16": Operator(arguments.dense_arguments, dense.dense_bf16, checks.check_dense),
    "dense_bf16 (raw)": Operator(
        arguments.dense_arguments, _ordered(torch.ops.reqat.dense_bf16, "x", "weight"), checks.check_dense
    ),
    "dense_f32": Operator(arguments.dense_f32_arguments, dense.dense_f32, checks.check_dense_f32),
    "dense_int8 (raw)": Operator(
        arguments.int8_arguments, _ordered(torch.ops.reqat.dense_int8, "x", "weight", "scale"), checks.check_int8
    ),
    "dense_int8_a8 (raw)": Operator(
        arguments.int8_a8_arguments,
        _ordered(torch.ops.reqat.dense_int8_a8, "x", "row_scale", "weight", "scale"),
        checks.check_int8,
    ),
    "piecewise_linear": Operator(arguments.table_arguments, table.piecewise_linear, checks.check_table),
    "piecewise_linear (raw)": Operator(
        arguments.table_arguments,
        _ordered(torch.ops.reqat.piecewise_linear, "x", "breakpoints", "slopes", "intercepts"),
        checks.check_table,
    ),
    "append": Operator(arguments.append_arguments, _appended, checks.check_append),
    "kv_append": Operator(
        arguments.raw_append_arguments,
        _ordered(
            torch.ops.reqat.kv_append,
            "states",
            "shift",
            "codes",
            "scales",
            "global_scale",
            "start",
            "is_value",
            "format",
        ),
        checks.check_append,
    ),  # fmt: skip
    "kv_attention": Operator(arguments.attention_arguments, attention.kv_attention, checks.check_attention),
    "kv_attention (raw)": Operator(
        arguments.raw_attention_arguments,
        _ordered(
            torch.ops.reqat.kv_attention, "query", *checks.SIDES, "length", "scaling", "mask", "start", "is_causal"
        ),
        checks.check_attention,
    ),
    "quantize": Operator(
        arguments.tensor_arguments, _ordered(native.quantize, "x", "format", "global_scale"), checks.check_quantized
    ),
    "quantize_packed": Operator(
        arguments.tensor_arguments,
        _ordered(native.quantize_packed, "x", "format", "global_scale"),
        checks.check_quantized,
    ),
    "quantize (raw)": Operator(
        arguments.raw_tensor_arguments,
        _ordered(torch.ops.reqat.quantize, "x", "format", "global_scale"),
        checks.check_quantized,
    ),
    "fake_quantize": Operator(
        arguments.tensor_arguments, _ordered(native.fake_quantize, "x", "format", "global_scale"), checks.check_fake
    ),
    "fake_quantize (raw)": Operator(
        arguments.raw_tensor_arguments,
        _ordered(torch.ops.reqat.fake_quantize, "x", "format", "global_scale"),
        checks.check_fake,
    ),
    "QuantizedTensor": Operator(arguments.parts_arguments, QuantizedTensor, checks.check_parts),
}


# --- a call -----------------------------------------------------------------------------------------------------------

#: Torch's own refusals: an argument of another type than the operator's schema says, which no operator sees, and a
#: result for which there is no memory (a weight of 2^31 rows without columns takes none, its product does).
_TORCHS = (
    "can't allocate memory",
    "There were no tensor arguments",
    "Expected a value of type",
    "is missing value for argument",
    "Unable to cast",
    "Overflow when unpacking",
)


def attempt(seed: int, index: int) -> tuple[str, str]:
    """One call; what came of it (``computed``, ``refused`` or ``failed``), and its description."""
    r = random.Random(f"{seed}/{index}")
    name = r.choice(list(OPERATORS))
    operator = OPERATORS[name]
    a = operator.arguments(r)
    changed = r.sample(list(a), min(len(a), r.choice((0, 1, 1, 1, 2))))
    try:
        for key in changed:
            a[key] = arguments.broken(r, a[key])
        if operator.check is checks.check_append:
            a["before"] = {name: _copied(part) for name, part in checks.cache_parts(a).items()}
        got = operator.call(**{key: value for key, value in a.items() if key != "before"})
        results = got if isinstance(got, tuple | list) else (got,)
        if any(isinstance(part, Tensor) and part.device.type == "meta" for part in results):
            if any(isinstance(v, Tensor) and v.device.type == "cpu" and v.numel() > 1 for v in a.values()):
                raise checks.Wrong("a result on the device meta from arguments on the CPU")
            return "computed", f"{name} {changed}"
        operator.check(a, got)
    except (ValueError, TypeError) as error:
        return "refused", f"{name} {changed}: {error}"
    except RuntimeError as error:
        known = any(words in str(error) for words in _TORCHS)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{name} {changed}: {error!r:.300} ({Path(where.filename).name}:{where.lineno})"
        return "refused" if known else "failed", text
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{name} {changed}: {error!r:.300} ({Path(where.filename).name}:{where.lineno})"
    return "computed", f"{name} {changed}"


# --- running ----------------------------------------------------------------------------------------------------------


def work(seed: int, first: int, count: int, log: Path) -> None:
    """Calls ``first`` to ``first + count``; ``log`` gets a line before each and what came of it after."""
    torch.set_num_threads(1)
    with log.open("w", buffering=1) as out:
        for index in range(first, first + count):
            out.write(f"{index} ")
            out.flush()
            outcome, text = attempt(seed, index)
            out.write(outcome + (" " + json.dumps(text) if outcome == "failed" else "") + "\n")


def run(
    calls: int, seed: int, *, sanitizer: str | None = None, isa: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """``calls`` calls; ``tried``, ``counts`` of refused, computed, failed and crashes, and ``failures`` in words."""
    counts: Counter[str] = Counter(dict.fromkeys(("refused", "computed", "failed", "crashes"), 0))
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if sanitizer:
            from tests.kernels.builds import checked_environment

            environment = checked_environment(Path(folder))
            # A result that is too large for memory is an error of torch's then, and not the end of the process.
            environment["ASAN_OPTIONS"] += ":allocator_may_return_null=1"
        environment |= {"OMP_NUM_THREADS": "1"} | ({"REQAT_ISA": isa} if isa else {})
        log, first = Path(folder) / "log", 0
        while first < calls:
            count = min(5000, calls - first)
            command = [sys.executable, "-m", "tests.campaign.operators", "--work", str(log), "--first", str(first)]
            command += ["--calls", str(count), "--seed", str(seed)]
            log.unlink(missing_ok=True)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines:
                index, _, rest = line.partition(" ")
                outcome, _, text = rest.partition(" ")
                counts[outcome or "crashes"] += 1
                if outcome == "failed":
                    failures.append(f"call {index}: {json.loads(text)}")
            if done.returncode:
                last = lines[-1].split(" ")[0] if lines else "none"
                words = [row for row in done.stderr.splitlines() if "ERROR" in row or "rror:" in row][:2]
                failures.append(f"call {last}: the process ended with {done.returncode}: {' '.join(words)[:300]}")
                if not lines:
                    counts["crashes"] += 1
                    break
            first += len(lines)
            say(f"{first} calls: {dict(counts)}")
            sys.stdout.flush()
    return {"tried": first, "counts": dict(counts), "failures": failures}


def main() -> int:
    """The command line; 1 if a call failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.operators", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitizer", choices=["address"], help="build the native library with it")
    parser.add_argument("--isa", choices=CHOICES, help="use this instruction set")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.seed, given.first, given.calls, given.work)
        return 0
    found = run(given.calls, given.seed, sanitizer=given.sanitizer, isa=given.isa)
    for failure in found["failures"][:40]:
        print(failure)
    counts = found["counts"]
    print(
        f"{found['tried']} calls: "
        + ", ".join(f"{counts[k]} {k}" for k in ("refused", "computed", "failed", "crashes"))
    )
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
