"""What is compiled ahead of time: each kernel in launches typical of a model of head_dim 128 and hidden size 4096.

Tiles, warps and stages are those of the table (launches.py), of each architecture its own. Each case has a budget of
registers and names the matrix instruction that each generation is to use; see :mod:`reqat_kernels.triton.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from reqat_kernels.triton import append, attention, gemm, gemv, quantize, sem_loss
from reqat_kernels.triton.launches import CAPABILITIES, launch
from reqat_kernels.triton.runtime import tl


@dataclass(frozen=True)
class Case:
    """One launch to compile.

    ``types``: triton's type of each argument (``*u8``, ``fp32``); integers need no mention. ``registers``: the budget,
    a thread's. ``matrix``: by capability, what the name of every matrix instruction must contain ("" : there is none).
    ``impossible``: by capability, why it does not compile. ``unused``: why the launcher takes another way there;
    no budget holds then. ``spilled``: bytes allowed, where it is not 0. ``subnormals``: whether small numbers must not
    be flushed. ``core``: capabilities in the test that always runs. ``kind``: whose tile and options the table has
    ("": the case has them itself); ``sides``: a tile's constants of the table's ``elements``.
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
    kind: str = ""
    sides: Callable[[int], dict[str, int]] | None = None

    def at(self, capability: int) -> Case:
        """The case as it is launched on a GPU of ``capability``."""
        return self.launched(launch(self.kind, capability)) if self.kind else self

    def launched(self, how: dict[str, int]) -> Case:
        """The case with constants and options of a ``kind`` of launch, in the form of the table."""
        constants, options = dict(self.constants), dict(self.options)
        for name, value in how.items():
            if name == "elements":
                assert self.sides is not None
                constants |= self.sides(value)
            elif name.isupper():
                constants[name] = value
            else:
                options[name] = value
        return replace(self, constants=constants, options=options, kind="")

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
        """Types by argument, and which arguments are multiples of 16, as triton's ASTSource takes them."""
        types, attributes = {}, {}
        for index, argument in enumerate(self.kernel.arg_names):
            kind = "constexpr" if argument in self.constants else self.types.get(argument, "i32")
            types[argument] = kind
            if kind.startswith("*") or (argument in self.multiples and kind != "constexpr"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        return types, attributes


def cases() -> list[Case]:
    """Every kernel of the package, in launches typical of a model of head_dim 128 and hidden size 4096."""
    return [*_quantize_cases(), *_gemm_cases(), *_attention_cases(), *_append_cases(), *_loss_cases()]


_UNPACKED = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"


def _by_capability(sm80: str, sm90: str, sm100: str, sm120: str) -> dict[int, str]:
    return dict(zip(CAPABILITIES, (sm80, sm90, sm100, sm120), strict=True))


def _quantize_cases() -> list[Case]:
    types = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scales_ptr": "*u8", "g_ptr": "*fp32", "amax_ptr": "*i32"}
    types |= {"flag_ptr": "*i32"}
    table: dict[str, Any] = {"kind": "quantize", "sides": _sides_of_quantize}
    options = {"enable_fp_fusion": False}
    nvfp4 = {"BLOCK": 16, "E1M2": False, "RULE": "divide", "NVFP4": True, "ROW": False, "DYNAMIC": False}
    mxfp4 = {"BLOCK": 32, "E1M2": False, "RULE": "rceil", "NVFP4": False, "ROW": False, "DYNAMIC": False}
    kernel = quantize.quantize_kernel

    def case(name: str, constants: dict[str, Any], core: tuple[int, ...] = (), fake: bool = False) -> Case:
        kinds = {**types, "packed_ptr": "*bf16"} if fake else types
        constants = {"FAKE": fake, "LIMIT": torch.finfo(torch.bfloat16).max if fake else 0.0, **constants}
        return Case(name, kernel, kinds, constants, options, 128, multiples=("M", "K"), core=core, **table)

    return [
        Case(
            "quantize: amax, rows, Hadamard 16",
            quantize.amax_kernel,
            types,
            {"ROW": True, "HADAMARD": 16},
            options,
            128,
            multiples=("M", "K"),
            **table,
        ),
        case("quantize: NVFP4, static", {**nvfp4, "HADAMARD": 0}, core=(80,)),
        case("quantize: NVFP4, row, Hadamard 16", {**nvfp4, "ROW": True, "DYNAMIC": True, "HADAMARD": 16}),
        case("quantize: MXFP4", {**mxfp4, "HADAMARD": 0}),
        case("quantize: MXFP4, Hadamard 32", {**mxfp4, "HADAMARD": 32}),
        case("fake quantize: NVFP4, dynamic", {**nvfp4, "DYNAMIC": True, "HADAMARD": 0}, (90,), True),
        case("fake quantize: MXFP4", {**mxfp4, "HADAMARD": 0}, fake=True),
    ]


def _sides_of_quantize(elements: int) -> dict[str, int]:
    block_m, block_k = quantize._tile(4096, 4096, 16, elements)
    return {"BLOCK_M": block_m, "BLOCK_K": block_k}


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
        kind: str,
        constants: dict[str, Any],
        matrix: dict[int, str],
        registers: int = 255,
        **others: Any,
    ) -> Case:
        constants = {**constants, "BLOCK_M": min(rows, 128)}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        options, kind = {"enable_fp_fusion": False}, f"{kind} {'few' if rows <= 32 else 'many'}"
        return Case(name, kernel, types, constants, options, registers, matrix, ("N", "K"), kind=kind, **others)

    bf16, fp16 = _UNPACKED.format("bf16"), _UNPACKED.format("f16")
    w4a16 = {"SHIFT": False, "COMPUTE": tl.bfloat16}
    scaled = {"SCALED": True, "COMPUTE": tl.float16}
    found = []
    for label, constants in (("NVFP4", nvfp4), ("MXFP4", mxfp4)):
        big = _by_capability(bf16, "wgmma", "tcgen05.mma", bf16)
        settings = {**constants, **w4a16}
        found.append(case(f"W4A16: {label}, 32 rows", gemm.w4a16_kernel, 32, "w4a16", settings, _all(bf16)))
        found.append(case(f"W4A16: {label}, 4096 rows", gemm.w4a16_kernel, 4096, "w4a16", settings, big))
    four, two = "kind::mxf4nvf4.block_scale.scale_vec::4X", "kind::mxf4nvf4.block_scale.scale_vec::2X"
    scale_nvfp4 = _by_capability("", "wgmma", "kind::mxf4nvf4.block_scale", four)
    scale_mxfp4 = _by_capability(bf16, "wgmma", "kind::mxf4.block_scale", two)
    # Below 64 rows sm_90 has no wgmma and sm_100 no tcgen05: triton unpacks to bfloat16 by itself.
    scale_few = {"NVFP4": _by_capability("", "", bf16, four), "MXFP4": _by_capability(bf16, bf16, bf16, two)}
    no_type = {80: "sm_80 has no E4M3 type (fp8e4nv); the unpacking branch is launched"}
    no_fp4 = {90: "sm_90 has no FP4 instruction; the unpacking branch is launched"}
    spills = {80: "spills; the unpacking branch is launched"}
    for rows in (32, 4096):
        few = rows == 32
        found.append(
            case(
                f"W4A4: NVFP4, scaled, {rows} rows",
                gemm.w4a4_kernel,
                rows,
                "w4a4 scaled",
                {**nvfp4, **scaled},
                scale_few["NVFP4"] if few else scale_nvfp4,
                impossible=no_type,
                unused=no_fp4,
                core=() if few else (100,),
            )
        )
        found.append(
            case(
                f"W4A4: MXFP4, scaled, {rows} rows",
                gemm.w4a4_kernel,
                rows,
                "w4a4 scaled",
                {**mxfp4, **scaled},
                scale_few["MXFP4"] if few else scale_mxfp4,
                unused=spills,
            )
        )
        for label, constants, type_, name in (("NVFP4", nvfp4, tl.float16, fp16), ("MXFP4", mxfp4, tl.bfloat16, bf16)):
            big = _by_capability(name, "wgmma", "tcgen05.mma", name)
            settings = {**constants, "SCALED": False, "COMPUTE": type_}
            matrix = _all(name) if few else big
            title = f"W4A4: {label}, unpacked, {rows} rows"
            found.append(case(title, gemm.w4a4_kernel, rows, "w4a4 unpacked", settings, matrix))
    for label, constants in (("NVFP4", nvfp4), ("MXFP4", mxfp4)):
        for rows in (1, 8):
            found.append(
                Case(
                    f"W4A4 small M: {label}, {rows} rows",
                    gemv.gemv_w4a4_kernel,
                    types,
                    {**constants, "ROWS": rows},
                    {"enable_fp_fusion": False},
                    255,
                    multiples=("N", "K"),
                    # ptxas gives up two registers to stay at 128, where four blocks fit on a multiprocessor.
                    spilled={120: 8} if rows == 8 else {},
                    core=(120,) if rows == 1 and label == "NVFP4" else (),
                    kind="gemv one" if rows == 1 else "gemv several",
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
        options = {"enable_fp_fusion": True}
        kind = "attention float32" if kinds["query"] == "*fp32" else "attention"
        kernel = attention.decode_attention_kernel
        # At 168 registers three blocks fit on a multiprocessor, and ptxas gives up two registers to stay there.
        spilled = dict.fromkeys(CAPABILITIES, 8) if constants["MASK"] != "none" or constants["CAUSAL"] else {}
        return Case(
            name, kernel, kinds, constants, options, registers, _all(instruction), multiples,
            spilled=spilled, core=core, kind=kind,
        )  # fmt: skip

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
        "flag": "*i32",
    }
    multiples = (*_CACHE_MULTIPLES, *(f"{x}_{axis}" for x in ("key", "value", "cos", "sin") for axis in "bgt"))

    def case(name: str, key: str, value: str, rotate: Any, row: bool, rows: int, core: tuple[int, ...] = ()) -> Case:
        rules = ("divide" if "NVFP4" in key else "rceil", "divide" if "NVFP4" in value else "rceil")
        constants = {
            **_sides(key, value, RULE=rules, ROW_SCALE=(row, row)),
            "HEAD_DIM": 128,
            "D": 128,
            "HAS_OFFSETS": True,
            "HAS_SHIFT": True,
            "ROTATE": rotate,
            "key_global_s": 1,
            "value_global_s": 1,
        }
        options = {"enable_fp_fusion": False}

        def sides(elements: int) -> dict[str, int]:
            return {"ROWS": min(rows, elements // 128)}

        return Case(
            name, append.append_kernel, types, constants, options, 96, {}, multiples,
            core=core, kind="append", sides=sides,
        )  # fmt: skip

    return [
        case("append: NVFP4 row, rotated and shifted", "NVFP4", "NVFP4", tl.bfloat16, True, 64, core=(80,)),
        case("append: NVFP4 static, E1M2 keys, one row", "NVFP4 E1M2", "NVFP4", None, False, 1),
        case("append: MXFP4, rotated and shifted", "MXFP4", "MXFP4", tl.bfloat16, False, 64),
    ]


def _loss_cases() -> list[Case]:
    types = {"logits": "*fp32", "lse": "*fp32", "entropy": "*fp32", "pull": "*fp32", "nll": "fp32"}
    options = {"enable_fp_fusion": False}
    return [
        Case(
            "SEM loss: statistics",
            sem_loss.statistics_kernel,
            types,
            {"ENTROPY": True},
            options,
            128,
            multiples=("size", "stride"),
            subnormals=False,
            kind="loss",
        ),
        Case(
            "SEM loss: gradient",
            sem_loss.gradient_kernel,
            types,
            {"PULL": True},
            options,
            128,
            multiples=("size", "stride"),
            subnormals=False,
            kind="loss",
        ),
    ]
