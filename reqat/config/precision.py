"""The name of a precision and its options, as configuration sees them: checked here by shape, given meaning by
`reqat.quant.Precision`.

Configuration must be readable without torch (the DAG is parsed in a second), so this floor knows only which names
exist and normalizes the options that a name does not use. Otherwise `rotation: 32` on a model without rotation, or a
KV element where no KV cache is quantized, would give the same work two identities.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator, model_validator

from reqat.config.base import Strict
from reqat.config.errors import ReqatError

FORMATS = ("MXFP4", "NVFP4", "NVFP4-4/6", "AMXFP4", "INT4-g128", "INT4-row")
_NAME = re.compile(r"(?P<format>.+?)-(?P<bits>(W4A4|W4A16)(KV4)?|KV4)")
BITS = ("W4A16", "W4A4", "W4A16KV4", "W4A4KV4", "KV4")
KNOWN = (
    "BF16",
    "MXFP4-W4A16",
    "MXFP4-W4A4",
    "NVFP4-W4A16",
    "NVFP4-W4A4",
    "NVFP4-W4A4KV4",
    "NVFP4-KV4",
    "NVFP4-4/6-W4A16",
    "NVFP4-4/6-W4A4",
    "AMXFP4-W4A4",
    "AMXFP4-W4A4KV4",
    "INT4-g128-W4A16",
    "INT4-row-W4A4KV4",
)
"""The settings of the paper, and those that the artifact adds; used to suggest what a misspelt name may have meant."""

GlobalScale = Literal["dynamic", "row", "static"]


def family(name: str) -> str:
    """The format of a precision's name: `NVFP4` of `NVFP4-W4A4KV4`, `BF16` of `BF16`. Raises `ReqatError` on anything
    else."""
    if name == "BF16":
        return name
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if not match or match["format"] not in FORMATS:
        raise unknown_precision(name)
    return match["format"]


def unknown_precision(name: object) -> ReqatError:
    """The error for a name that is no precision: the closest one that is, and how names are made."""
    text = str(name)
    close = difflib.get_close_matches(text.upper(), [known.upper() for known in KNOWN], n=1, cutoff=0.4)
    meant = next((known for known in KNOWN if close and known.upper() == close[0]), None)
    hint = f" did you mean {meant!r}?" if meant and meant != text else ""
    return ReqatError(
        f"unknown precision {name!r}:{hint} Write BF16 or FORMAT-BITS, with FORMAT one of {', '.join(FORMATS)} and "
        f"BITS one of {', '.join(BITS)}; for example {', '.join(KNOWN[:6])}."
    )


def check_rotation(size: Any, name: str = "rotation") -> Any:
    """`size` itself, if a Hadamard matrix has it (or None). Raises `ReqatError` unless it is a power of two."""
    if size is None:
        return None
    if type(size) is not int or not 1 <= size <= LARGEST_ROTATION or size & (size - 1):
        raise ReqatError(f"{name} {size!r}: a block Hadamard size is a power of two (16, 32, 64, ...), or none at all.")
    return size


LARGEST_ROTATION = 2**15
Rotation = Annotated[int, AfterValidator(check_rotation)]
"""Size of a block Hadamard rotation: a power of two."""


class PrecisionSpec(Strict):
    """A precision by name with its options. `options()` is what `Precision.parse(name, **options)` takes."""

    name: str = "BF16"
    kv_element: Literal["E1M2", "E2M1"] | None = None
    """Element of the KV cache's codes; null: the format's own (NVFP4: E1M2), or no quantized KV cache."""
    rotation: Rotation | None = None
    """Size of the block Hadamard rotation of the linear layers' inputs and weights; null for none."""
    kv_rotation: Rotation | None = None
    """Size of the block Hadamard rotation of queries and keys; null for none."""
    global_scale: GlobalScale | None = None
    """Where the global scale of inputs, keys and values comes from; NVFP4 formats only, `row` unless told otherwise."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        family(name)
        return name

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, dict):
            return data
        name = data.get("name", "BF16")
        kind = family(name)
        nvfp4 = kind in ("NVFP4", "NVFP4-4/6")
        kv = "KV4" in name
        scaled = nvfp4 and ("A4" in name or "KV4" in name)
        has_linear = "-W4" in name
        return data | {
            "kv_element": (data.get("kv_element") or ("E1M2" if kind == "NVFP4" else None)) if kv else None,
            "kv_rotation": data.get("kv_rotation") if kv else None,
            "global_scale": (data.get("global_scale") or "row") if scaled else None,
            "rotation": data.get("rotation") if has_linear else None,
        }

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `reqat.quant.Precision.parse`, those that this name uses. `rotation` is always given,
        None included."""
        named = {"kv_element": self.kv_element, "global_scale": self.global_scale, "kv_rotation": self.kv_rotation}
        return {key: value for key, value in named.items() if value is not None} | {"rotation": self.rotation}

    @property
    def family(self) -> str:
        """`NVFP4` of `NVFP4-W4A4KV4`; `BF16` of `BF16`."""
        return family(self.name)
