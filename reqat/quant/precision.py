"""A precision says which tensors of a decoder are quantized, and to which format.

``NVFP4-W4A4KV4`` reads: family NVFP4, four-bit weights (W), inputs of the linear layers (A) and key/value cache (KV);
16 means unquantized. Training, post-training quantization, packing and analysis all read this one value. Families can
be mixed with ``+``: ``MXFP4-W4A4+NVFP4-KV4``, ``NVFP4-W4A4+INT4-row-V4``. ``BF16`` quantizes nothing.

Defaults that a name implies (ReQAT section 1): keys and values of NVFP4 use E1M2 elements; MXFP4 rotates inputs and
weights by Hadamard blocks of 32 and takes the ``ceil`` scale rule; global scales are ``dynamic``.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import check_rotation, unknown_precision
from reqat.formats import FORMAT_NAMES, Format, get_format

_ROLES = ("weights", "inputs", "keys", "values")
_TOKENS = {"W": ("weights",), "A": ("inputs",), "KV": ("keys", "values"), "K": ("keys",), "V": ("values",)}
OPTIONS = ("element", "kv_element", "global_scale", "scale", "scale_rule", "rounding", "rotation", "kv_rotation")
_TERM = re.compile(r"(?P<family>.+)-(?P<spec>(?:(?:W|A|KV|K|V)(?:4|16))+)", re.IGNORECASE)


@dataclass(frozen=True)
class Precision:
    """Formats of weights, linear inputs, keys and values (None: unquantized), and Hadamard block sizes.

    ``rotation`` rotates the inputs and weights of every quantized linear layer; ``kv_rotation`` rotates queries and
    keys along head_dim after RoPE (the paper's alternative to Q-FIT, Table 17).
    """

    weights: Format | None = None
    inputs: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    rotation: int | None = None
    kv_rotation: int | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises `ReqatError` for what is no Format, or a rotation that is no power of two."""
        for role in _ROLES:
            if not isinstance(getattr(self, role), Format | None):
                raise ReqatError(f"{role}={getattr(self, role)!r}: give a reqat.Format (reqat.get_format), or None.")
        check_rotation(self.rotation, "rotation")
        check_rotation(self.kv_rotation, "kv_rotation")

    @classmethod
    def parse(
        cls,
        name: str | Precision,
        *,
        element: str | None = None,
        kv_element: str | None = None,
        global_scale: Literal["dynamic", "row", "static"] | None = None,
        scale: str | None = None,
        scale_rule: str | None = None,
        rounding: str | None = None,
        rotation: int | Literal["default"] | None = "default",
        kv_rotation: int | None = None,
        **others: Any,
    ) -> Precision:
        """Read a name such as ``NVFP4-W4A4KV4``; case does not matter.

        Args:
            name: the name; a Precision is returned as it is.
            element: element of weights and inputs, where the family leaves a choice.
            kv_element: element of keys and values; NVFP4 takes ``E1M2`` unless told ``E2M1``.
            global_scale: of inputs, keys and values, in the families that have one (NVFP4): ``dynamic`` (amax of the
                tensor at hand, as in the paper), ``row`` (one a token and KV head) or ``static`` (calibrated). Weights
                always take the amax of the whole weight.
            scale, scale_rule, rounding: passed on to the format of every role.
            rotation: Hadamard block of inputs and weights; "default" is 32 for MXFP4 and None otherwise.
            kv_rotation: Hadamard block of queries and keys; default None.
            others: none; an unknown option is refused with the closest one there is.

        Raises:
            ReqatError: unknown family, unreadable name (the closest known name is suggested), an unknown option, or one
                that the family does not have.
        """
        if others:
            raise unknown("option of a precision", next(iter(others)), OPTIONS)
        if isinstance(name, Precision):
            if any(
                (element, kv_element, global_scale, scale, scale_rule, rounding, kv_rotation, rotation != "default")
            ):
                raise ReqatError(f"options beside the Precision {name} would be ignored; put them into it (replace).")
            return name
        if not isinstance(name, str):
            raise unknown_precision(name)
        if name.strip().upper() == "BF16":
            return cls()
        roles: dict[str, str] = {}
        for term in name.strip().split("+"):
            match = _TERM.fullmatch(term)
            if match is None:
                raise unknown_precision(name)
            family = match["family"]
            for token, bits in re.findall(r"(KV|W|A|K|V)(4|16)", match["spec"].upper()):
                for role in _TOKENS[token]:
                    if role in roles:
                        raise ReqatError(f"precision {name!r} sets {role} twice")
                    roles[role] = family if bits == "4" else ""
        common = {"scale": scale, "rounding": rounding}
        formats: dict[str, Format | None] = {}
        for role, family in roles.items():
            options: dict[str, Any] = dict(common)
            on_cache = role in ("keys", "values")
            upper = family.upper()
            options["scale_rule"] = scale_rule or ("ceil" if upper == "MXFP4" else None)
            options["element"] = (kv_element or ("E1M2" if upper == "NVFP4" else None)) if on_cache else element
            if upper.startswith("NVFP4") and role != "weights":
                options["global_scale"] = global_scale
            options = {key: value for key, value in options.items() if value is not None}
            formats[role] = _format(name, family, options) if family else None
        linear = [fmt for role in ("weights", "inputs") if (fmt := formats.get(role)) is not None]
        if rotation == "default":
            rotation = 32 if linear and all(fmt.name == "MXFP4" for fmt in linear) else None
        return cls(**formats, rotation=rotation, kv_rotation=kv_rotation)

    def __str__(self) -> str:
        """The name: ``parse`` reads it back. What formats choose otherwise than by default, an element such as E2M1 for
        the cache among it, is not part of a name; see :meth:`to_dict`."""
        parts: list[tuple[str, str]] = []  # (family, tokens), neighbours of one family merged
        keys, values = self.keys, self.values
        entries = [("W", self.weights), ("A", self.inputs)]
        entries += [("KV", keys)] if _family(keys) == _family(values) else [("K", keys), ("V", values)]
        linear = {_family(self.weights), _family(self.inputs)} - {""}
        for token, fmt in entries:
            if fmt is not None:
                bits, family = "4", fmt.name
            elif token in ("W", "A") and len(linear) == 1:
                bits, family = "16", next(iter(linear))  # "W4A16", not "W4"
            else:
                continue
            if parts and parts[-1][0] == family:
                parts[-1] = (family, parts[-1][1] + token + bits)
            else:
                parts.append((family, token + bits))
        return "+".join(f"{family}-{spec}" for family, spec in parts) or "BF16"

    @property
    def quantizes_linear(self) -> bool:
        """Whether weights or inputs of linear layers are quantized."""
        return self.weights is not None or self.inputs is not None

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys or values are quantized."""
        return self.keys is not None or self.values is not None

    def replace(self, **changes: Any) -> Precision:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values; :meth:`from_dict` reads it back exactly."""
        return {"name": str(self), **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Precision:
        """The inverse of :meth:`to_dict`."""
        formats = {role: Format(**values[role]) if values[role] is not None else None for role in _ROLES}
        return cls(**formats, rotation=values["rotation"], kv_rotation=values["kv_rotation"])


def _family(fmt: Format | None) -> str:
    return fmt.name if fmt is not None else ""


def _format(name: str, family: str, options: dict[str, Any]) -> Format:
    try:
        return get_format(family, **options)
    except (ValueError, TypeError) as error:
        if family.upper() in (known.upper() for known in FORMAT_NAMES):  # then it is an option that does not fit
            raise ReqatError(f"precision {name!r}: {error}") from error
        raise unknown_precision(name) from error
