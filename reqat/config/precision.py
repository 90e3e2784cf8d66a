"""What the name of a precision means: the one place where names are read, written and given defaults.

``NVFP4-W4A4KV4`` reads: family NVFP4, four-bit weights (W), inputs of the linear layers (A) and key/value cache (KV);
16 means unquantized, ``BF16`` quantizes nothing. The number is that of the family's bits (``INT8-row-W8A8``). Families
can be mixed with ``+``: ``MXFP4-W4A4+NVFP4-KV4``, ``TERNARY-row-W2+INT8-tensor-A8``. Options
stand behind a colon: ``MXFP4-W4A4:rotation=32``, ``NVFP4-W4A4KV4:kv_element=E1M2,global_scale=static``; for one role
alone with its name in front, ``inputs.scale_rule=multiply``.

A name means what engines mean by it: nothing is rotated, keys and values take the family's own element (E2M1), and the
global scales of inputs, keys and values do not depend on other rows of a batch (``row``). What ReQAT does otherwise
(E1M2 keys and values of Q-FIT, MXFP4's rotation by blocks of 32, ``dynamic`` global scales in training) is an option,
given by recipe or user and shown wherever it is not the default.

Readable without torch: the command line checks arguments and the DAG is parsed in a second. :class:`reqat.Precision` is
the same choice as formats of tensors.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from reqat.config.base import Seed, Strict, distinct
from reqat.config.errors import ReqatError, unknown
from reqat.config.formats import FAMILIES, FORMATS, bits_of, has_global_scale, standard

Role = Literal["weights", "inputs", "keys", "values", "queries", "probabilities", "embeddings"]
ROLES: tuple[Role, ...] = ("weights", "inputs", "keys", "values", "queries", "probabilities", "embeddings")
LINEAR: tuple[Role, ...] = ("weights", "inputs")
CACHE: tuple[Role, ...] = ("keys", "values")
ATTENTION = ("queries", "keys", "values", "probabilities")
"""The operands of both products of attention."""
SCALED = ("inputs", "keys", "values", "queries", "probabilities", "embeddings")
"""Roles whose global scale is a choice. That of weights always follows from the whole weight."""

ACTS_ON: dict[str, tuple[tuple[str, ...], str]] = {
    "element": (LINEAR, "element"),
    "kv_element": (CACHE, "element"),
    "global_scale": (SCALED, "global_scale"),
    "scale": (ROLES, "scale"),
    "scale_rule": (ROLES, "scale_rule"),
    "rounding": (ROLES, "rounding"),
}
"""Option of a precision -> the roles that it acts on, and the field of their formats."""
ROTATIONS = ("rotation", "kv_rotation")
BASES = (*ROTATIONS, "kv_signs")
"""Options that say in which basis values are quantized; None stands for their own."""
CLAMP = "clamp"
"""Option: every number is held within plus and minus this before it is rounded, with no gradient outside."""
NUMBERS = (*BASES, CLAMP)
"""Options that are a number, or None."""
OPTIONS = (*ACTS_ON, *NUMBERS)
_FIELDS = ("element", "scale", "scale_rule", "rounding", "global_scale")
_ROLE_OPTIONS = tuple(f"{role}.{field}" for role in ROLES for field in _FIELDS)

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
_MAIN_FORMATS = ("NVFP4", "MXFP4", "AMXFP4", "INT4-g128", "INT4-row")
_CLOSEST = 3

GlobalScale = Literal["dynamic", "row", "static"]
DEFAULT_GLOBAL_SCALE: GlobalScale = "row"
LARGEST_ROTATION = 2**15

SKIP = "skip"
_BETWEEN_PATTERNS = "|"
_TOKENS = {
    "W": ("weights",), "A": ("inputs",), "KV": CACHE, "K": ("keys",), "V": ("values",), "Q": ("queries",),
    "P": ("probabilities",), "E": ("embeddings",),
}  # fmt: skip
_ROLE_BITS = r"(KV|W|A|K|V|Q|P|E)(2|3|4|8|16)"
_TERM = re.compile(rf"(?P<family>.+)-(?P<spec>(?:{_ROLE_BITS})+)", re.IGNORECASE)


@dataclass(frozen=True)
class Resolved:
    """A name and its options, understood: the family of each quantized role, what its format is told besides, and the
    sizes of the block Hadamard rotations."""

    families: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Role -> field of its format -> value. A field that is not there has the family's default."""
    rotation: int | None = None
    kv_rotation: int | None = None
    kv_signs: int | None = None
    """Seed of the signs that queries and keys are multiplied with before their rotation."""
    clamp: float | None = None

    @property
    def name(self) -> str:
        """The name in its usual spelling, without options."""
        return name_of(self.families)

    @property
    def family(self) -> str:
        """The family of the linear layers, or else of the cache; ``BF16`` where nothing is quantized."""
        return next((self.families[role] for role in ROLES if role in self.families), "BF16")


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Resolved:
    """What ``name`` means; case does not matter.

    Args:
        name: a name, possibly with options behind a colon.
        options: more of them by their names (:data:`OPTIONS`, or ``ROLE.FIELD``); None stands for the default. One that
            none of the name's roles takes is left out.

    Raises:
        ReqatError: an unreadable name (the closest known one is suggested); an unknown option or value; one that the
            family does not have; one in the name that acts on nothing, or that is given otherwise beside it.
    """
    if not isinstance(name, str):
        raise unknown_precision(name)
    families = _families(name, name.partition(":")[0])
    inline = inline_options(name)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for option in (*inline, *given):
        if option == SKIP:
            raise ReqatError(
                f"precision {name!r}: which layers are left alone is said of a model: prepare(model, precision, "
                "skip=[...]), or `skip` of a recipe's precision."
            )
        if option not in OPTIONS and option not in _ROLE_OPTIONS:
            raise unknown("option of a precision", option, OPTIONS)
    for option, value in inline.items():
        if option in given and str(given[option]) != value:
            raise ReqatError(f"precision {name!r} says {option}={value}, and {given[option]!r} is asked for beside it.")
        if not _acts(option, families):
            raise ReqatError(f"precision {name!r}: {option}={value} acts on nothing in {name_of(families)}.")
    chosen: dict[str, Any] = {**inline, **given}
    fields = {role: _fields(name, role, family, chosen) for role, family in families.items()}
    sizes = {option: _size(chosen.get(option), option) for option in ROTATIONS}
    cached = any(role in families for role in CACHE)
    return Resolved(
        families,
        fields,
        rotation=sizes["rotation"] if any(role in families for role in LINEAR) else None,
        kv_rotation=sizes["kv_rotation"] if cached else None,
        kv_signs=check_signs(_number(chosen.get("kv_signs")), sizes["kv_rotation"]) if cached else None,
        clamp=check_clamp(_number(chosen.get(CLAMP))) if families else None,
    )


def inline_options(name: str) -> dict[str, str]:
    """The options that stand in a name, behind its colon. Raises `ReqatError` for what is none."""
    _, colon, text = name.partition(":")
    return _inline(name, text) if colon else {}


def without_skip(name: str) -> tuple[str, tuple[str, ...] | None]:
    """A name without its ``skip=PATTERN|PATTERN``, and these patterns (None where it has none): which layers a
    precision leaves alone is said of a model, and everything else of tensors."""
    bare, colon, text = name.partition(":") if isinstance(name, str) else ("", "", "")
    options = _inline(name, text) if colon and SKIP in text else {}
    if SKIP not in options:
        return name, None
    patterns = tuple(options.pop(SKIP).split(_BETWEEN_PATTERNS))
    return written(bare, options), patterns


def family(name: str) -> str:
    """The format of a precision's name: `NVFP4` of `NVFP4-W4A4KV4`, `BF16` of `BF16`. Raises `ReqatError` on anything
    else."""
    return resolve(name).family


def name_of(families: Mapping[str, str]) -> str:
    """The name of a precision whose roles have these families, in its usual spelling."""
    parts: list[tuple[str, str]] = []  # (family, tokens), neighbours of one family merged
    keys, values = families.get("keys"), families.get("values")
    entries = [("W", families.get("weights")), ("E", families.get("embeddings")), ("A", families.get("inputs"))]
    entries += [("Q", families.get("queries"))]
    entries += [("KV", keys)] if keys == values else [("K", keys), ("V", values)]
    entries += [("P", families.get("probabilities"))]
    linear = {families[role] for role in LINEAR if role in families}
    for token, name in entries:
        if name is not None:
            bits, of = str(bits_of(name)), name
        elif token in ("W", "A") and len(linear) == 1:
            bits, of = "16", next(iter(linear))  # "W4A16", not "W4"
        else:
            continue
        if parts and parts[-1][0] == of:
            parts[-1] = (of, parts[-1][1] + token + bits)
        else:
            parts.append((of, token + bits))
    return "+".join(f"{of}-{spec}" for of, spec in parts) or "BF16"


def options_of(families: Mapping[str, str], fields: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The options that formats of these families and fields deviate from their defaults with, as few as say it."""
    found: dict[str, str] = {}
    for option, (roles, part) in ACTS_ON.items():
        there = [role for role in roles if role in families]
        if option == "global_scale":
            there = [role for role in there if has_global_scale(families[role])]
        values = {role: fields[role].get(part, _default(role, families[role], part)) for role in there}
        deviating = {role: v for role, v in values.items() if v != _default(role, families[role], part)}
        if deviating and len(deviating) == len(there) and len(set(deviating.values())) == 1:
            found[option] = next(iter(deviating.values()))
        else:
            found |= {f"{role}.{part}": value for role, value in deviating.items()}
    if "weights" in families:
        own = fields["weights"].get("global_scale", "")
        if own and own != _default("weights", families["weights"], "global_scale"):
            found["weights.global_scale"] = own
    return found


def written(name: str, options: Mapping[str, Any]) -> str:
    """``NAME:option=value,...``, which :func:`resolve` reads back."""
    return name + (":" + ",".join(f"{option}={value}" for option, value in options.items()) if options else "")


def unknown_precision(name: object) -> ReqatError:
    """The error for a name that is no precision: the closest ones that are, how names are made, and where all are."""
    remedy = (
        f"Write BF16, or FORMAT-BITS with FORMAT such as {', '.join(_MAIN_FORMATS)} and BITS such as W4A16, W4A4, "
        "W4A4KV4 or KV4; `reqat formats` lists all."
    )
    return unknown("precision", name, [*KNOWN, *_respelt(str(name))], remedy=remedy, closest=_CLOSEST)


def _respelt(name: str) -> list[str]:
    """Precisions with the bits of ``name`` and formats whose names are close to its own, where they have these bits."""
    match = _TERM.fullmatch(name.partition(":")[0])
    if match is None:
        return []
    by_upper = {of.upper(): of for of in FORMATS}
    close = difflib.get_close_matches(match["family"].upper(), by_upper, n=_CLOSEST, cutoff=0.5)
    widths = {int(width) for _, width in re.findall(_ROLE_BITS, match["spec"].upper())}
    return [f"{by_upper[of]}-{match['spec'].upper()}" for of in close if widths <= {bits_of(by_upper[of]), 16}]


def check_rotation(size: Any, name: str = "rotation") -> Any:
    """`size` itself, if a Hadamard matrix has it (or None). Raises `ReqatError` unless it is a power of two."""
    if size is None:
        return None
    if type(size) is not int or not 1 <= size <= LARGEST_ROTATION or size & (size - 1):
        raise ReqatError(f"{name} {size!r}: a block Hadamard size is a power of two (16, 32, 64, ...), or none at all.")
    return size


def check_signs(seed: Any, rotation: int | None) -> Any:
    """`seed` itself, if it is a seed and there is a rotation for its signs (or None). Raises `ReqatError` otherwise."""
    if seed is None:
        return None
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ReqatError(f"kv_signs {seed!r}: the seed of random signs is a whole number from 0, or none at all.")
    if rotation is None:
        raise ReqatError(f"kv_signs {seed}: signs without a rotation change nothing; give kv_rotation, too.")
    return seed


def check_clamp(bound: Any) -> Any:
    """`bound` itself, if numbers can be held within it (or None). Raises `ReqatError` unless it is positive."""
    if bound is None:
        return None
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise ReqatError(f"clamp {bound!r}: the bound of numbers before they are rounded is positive, or none at all.")
    return float(bound)


def _families(name: str, bare: str) -> dict[str, str]:
    """Role -> family, from the name without options."""
    if bare.upper() == "BF16":
        return {}
    known = {family.upper(): family for family in FORMATS}
    bits: dict[str, str] = {}
    for term in bare.split("+"):
        match = _TERM.fullmatch(term)
        if match is None or match["family"].upper() not in known:
            raise unknown_precision(name)
        of = known[match["family"].upper()]
        for token, width in re.findall(_ROLE_BITS, match["spec"].upper()):
            if int(width) not in (bits_of(of), 16):
                remedy = f"{of} has {bits_of(of)} bits: write {token}{bits_of(of)}, or {token}16 for not quantized."
                raise unknown("precision", name, KNOWN, remedy=remedy)
            for role in _TOKENS[token]:
                if role in bits:
                    raise ReqatError(f"precision {name!r} sets {role} twice")
                bits[role] = of if int(width) != 16 else ""
    return {role: bits[role] for role in ROLES if bits.get(role)}


def _inline(name: str, text: str) -> dict[str, str]:
    """The options behind the colon."""
    found: dict[str, str] = {}
    for part in text.split(","):
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not (option and equals and value):
            raise ReqatError(
                f"precision {name!r}: {part.strip()!r} is no option; write option=value, as in "
                "NVFP4-W4A4KV4:kv_element=E1M2,rotation=32."
            )
        if option in found:
            raise ReqatError(f"precision {name!r} gives {option} twice")
        found[option] = value
    return found


def _acts(option: str, families: Mapping[str, str]) -> bool:
    if option == "rotation":
        return any(role in families for role in LINEAR)
    if option in ("kv_rotation", "kv_signs"):
        return any(role in families for role in CACHE)
    if option == CLAMP:
        return bool(families)
    if option == "global_scale":
        return any(role in families and has_global_scale(families[role]) for role in SCALED)
    if option in ACTS_ON:
        return any(role in families for role in ACTS_ON[option][0])
    return option.partition(".")[0] in families


def _default(role: str, family: str, part: str) -> str:
    """What a field of the format of a role is where nothing is said."""
    if part == "global_scale" and role in SCALED and has_global_scale(family):
        return DEFAULT_GLOBAL_SCALE
    return str(FAMILIES[family][part][0])


def _fields(name: str, role: str, family: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What the format of one role is told, checked against its family."""
    fields: dict[str, str] = {}
    for option, (roles, part) in ACTS_ON.items():
        # A global scale is meant for the families that have one.
        if option in options and role in roles and (part != "global_scale" or has_global_scale(family)):
            fields[part] = options[option]
    for part in _FIELDS:
        if f"{role}.{part}" in options:
            fields[part] = options[f"{role}.{part}"]
    fields = {part: standard(part, value) for part, value in fields.items()}
    for part, value in fields.items():
        allowed = FAMILIES[family][part]
        if not isinstance(value, str) or value not in allowed:
            raise unknown(f"{part} of {family}", value, allowed, where=f"precision {name!r}")
    if role in SCALED and has_global_scale(family):
        fields.setdefault("global_scale", DEFAULT_GLOBAL_SCALE)
    return fields


def _size(value: Any, option: str) -> int | None:
    return check_rotation(_number(value), option)  # type: ignore[no-any-return]


def _number(value: Any) -> Any:
    """A number that stands behind a colon, where everything is text."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        return value


Rotation = Annotated[int, AfterValidator(check_rotation)]
"""Size of a block Hadamard rotation: a power of two."""


def _patterns(skip: tuple[str, ...]) -> tuple[str, ...]:
    """`skip`, unchanged. Raises `ReqatError` for an empty pattern, one that stands twice, and one that a precision's
    name could not hold."""
    if not all(pattern.strip() for pattern in skip):
        raise ReqatError(f"skip: {list(skip)}: give patterns of layers' names, such as '*.down_proj'.")
    for pattern in skip:
        if pattern != pattern.strip() or any(sign in pattern for sign in (",", _BETWEEN_PATTERNS)):
            raise ReqatError(
                f"skip: {pattern!r}: a pattern has no comma, no {_BETWEEN_PATTERNS!r} and no spaces around it; give "
                "several patterns instead."
            )
    distinct(skip)
    return skip


Skip = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_patterns)]
"""Patterns of the names of linear layers that a precision leaves alone."""


class PrecisionSpec(Strict):
    """A precision by name with its options, as configuration holds it: what a name does not use is None, so that the
    same work has one identity. `options()` is what `Precision.parse(name, **options)` takes."""

    name: str = "BF16"
    kv_element: Literal["E1M2", "E2M1"] | None = None
    """Element of the KV cache's codes, where NVFP4 leaves a choice; null: E2M1."""
    rotation: Rotation | None = None
    """Size of the block Hadamard rotation of the linear layers' inputs and weights; null for none."""
    kv_rotation: Rotation | None = None
    """Size of the block Hadamard rotation of queries and keys; null for none."""
    kv_signs: Seed | None = None
    """Seed of random signs of queries and keys before that rotation; null for none."""
    global_scale: GlobalScale | None = None
    """Where the global scale of inputs, keys and values comes from; NVFP4 formats only, `row` unless told otherwise."""
    clamp: float | None = Field(default=None, gt=0)
    """Bound of numbers before they are rounded; null for none."""
    skip: Skip | None = None
    """Patterns (`*.down_proj`) of linear layers that stay as they are; null for none."""

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
        text, skip = without_skip(data.get("name", "BF16"))
        beside = data.get(SKIP)
        if skip is not None and beside is None:
            data = data | {SKIP: skip}
        elif skip is not None and isinstance(beside, list | tuple) and tuple(beside) != skip:
            raise ReqatError(f"precision {data['name']!r} says skip, and {list(beside)} beside it.")
        asked = {option: data.get(option) for option in ("kv_element", "global_scale", *NUMBERS)}
        found = resolve(text)
        inline = inline_options(text)
        for option, value in inline.items():  # they become fields
            if option not in asked:
                raise unknown("option of a precision in configuration", option, asked, where=text)
            number = _number(value) if option in NUMBERS else value
            if asked[option] not in (None, value, number):
                raise ReqatError(f"precision {text!r} says {option}={value}, and {asked[option]!r} beside it.")
            asked[option] = number
        kind, cache = found.family, next((found.families[r] for r in CACHE if r in found.families), None)
        element = asked["kv_element"] if cache else None
        if cache is not None and element in (None, _default("keys", cache, "element")):
            element = "E2M1" if cache == "NVFP4" else None  # that NVFP4's stands there is part of the digests in use
        scaled = any(has_global_scale(found.families[role]) for role in SCALED if role in found.families)
        return data | {
            "name": found.name if kind != "BF16" else "BF16",
            "kv_element": element,
            "kv_rotation": asked["kv_rotation"] if cache else None,
            "kv_signs": check_signs(asked["kv_signs"], asked["kv_rotation"]) if cache else None,
            "global_scale": (asked["global_scale"] or DEFAULT_GLOBAL_SCALE) if scaled else None,
            "rotation": asked["rotation"] if any(role in found.families for role in LINEAR) else None,
            "clamp": check_clamp(asked[CLAMP]) if found.families else None,
            "skip": data.get("skip") if any(role in found.families for role in LINEAR) else None,
        }

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `reqat.Precision.parse`, those that this name uses. `rotation` is always given, None
        included."""
        options = ("kv_element", "global_scale", "kv_rotation", "kv_signs", CLAMP)
        named = {option: getattr(self, option) for option in options}
        return {key: value for key, value in named.items() if value is not None} | {"rotation": self.rotation}

    def for_prepare(self) -> dict[str, Any]:
        """Keyword arguments for `reqat.models.prepare` besides the name: `options()`, and the layers to leave alone."""
        return self.options() | ({"skip": list(self.skip)} if self.skip else {})

    @property
    def family(self) -> str:
        """`NVFP4` of `NVFP4-W4A4KV4`; `BF16` of `BF16`."""
        return family(self.name)

    def __str__(self) -> str:
        """The name with each option that is not the default, and what is skipped; `PrecisionSpec` reads it back.
        (`resolve` does where nothing is skipped.)"""
        found = resolve(self.name, self.options())
        sizes = {option: size for option in NUMBERS if (size := getattr(found, option)) is not None}
        skip = {SKIP: _BETWEEN_PATTERNS.join(self.skip)} if self.skip else {}
        return written(found.name, {**options_of(found.families, found.fields), **sizes, **skip})
