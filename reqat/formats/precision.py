"""A precision says which tensors of a model are quantized, and to which format.

Training, post-training quantization, packing and analysis all read this one value. What a name such as
``NVFP4-W4A4KV4`` and its options mean is decided in :mod:`reqat.config.precision`; here the choice becomes formats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.precision import (
    CLAMP,
    NUMBERS,
    ROLES,
    check_clamp,
    check_rotation,
    check_signs,
    name_of,
    options_of,
    resolve,
    written,
)
from reqat.formats import Format, get_format

_LATER = ("queries", "probabilities", "embeddings", CLAMP)


@dataclass(frozen=True)
class Precision:
    """Formats of weights, linear inputs, keys and values (None: unquantized), and Hadamard block sizes.

    ``queries`` and ``probabilities`` are the other operands of attention's two products (AMXFP4, INT8 of ternary BERT),
    ``embeddings`` the rows of the token embedding. ``clamp`` holds every number that is rounded within plus and minus
    it. These four exist in fake quantization alone: packed models and exports refuse them.

    ``rotation`` rotates the inputs and weights of every quantized linear layer; ``kv_rotation`` rotates queries and
    keys along head_dim after RoPE (the paper's alternative to Q-FIT, Table 17), with ``kv_signs`` after multiplying
    them with the random signs of that seed (:func:`reqat.quant.signs`).
    """

    weights: Format | None = None
    inputs: Format | None = None
    keys: Format | None = None
    values: Format | None = None
    rotation: int | None = None
    kv_rotation: int | None = None
    kv_signs: int | None = None
    queries: Format | None = None
    probabilities: Format | None = None
    embeddings: Format | None = None
    clamp: float | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises `ReqatError` for what is no Format, or a rotation that is no power of two."""
        for role in ROLES:
            if not isinstance(getattr(self, role), Format | None):
                raise ReqatError(f"{role}={getattr(self, role)!r}: give a reqat.Format (reqat.get_format), or None.")
        check_rotation(self.rotation, "rotation")
        check_rotation(self.kv_rotation, "kv_rotation")
        check_signs(self.kv_signs, self.kv_rotation)
        check_clamp(self.clamp)
        for role in ("queries", "probabilities", "embeddings"):
            fmt = getattr(self, role)
            if fmt is not None and fmt.global_scale == "static":
                raise ReqatError(f"{role} take no calibrated global scale: say {role}.global_scale=row.")
        if (fmt := self.embeddings) is not None and (fmt.per_tensor or fmt.global_scale == "dynamic"):
            raise ReqatError(f"embeddings are quantized row by row, and {fmt.name} has a scale for the whole table.")

    @classmethod
    def parse(cls, name: str | Precision, **options: Any) -> Precision:
        """Read a name such as ``NVFP4-W4A4KV4`` or ``MXFP4-W4A4:rotation=32``; case does not matter.

        Args:
            name: the name; a Precision is returned as it is.
            options: what may also stand behind the colon; None stands for the default.

                - ``element``: element of weights and inputs, ``kv_element``: of keys and values; E2M1, or E1M2 where
                  the family has it.
                - ``global_scale``: of inputs, keys and values, in the families that have one (NVFP4): ``row`` (one a
                  token and KV head, the default), ``static`` (calibrated) or ``dynamic`` (amax of the tensor at hand,
                  as in the paper's training). Weights take the amax of the whole weight.
                - ``scale``, ``scale_rule``, ``rounding``: of the formats of every role.
                - ``rotation``: block Hadamard size of inputs and weights, ``kv_rotation``: of queries and keys;
                  ``kv_signs``: seed of random signs before the latter.
                - ``clamp``: bound of every number before it is rounded.
                - ``ROLE.FIELD`` (``keys.element``, ``inputs.rounding``): of one role alone.

        Raises:
            ReqatError: unknown family, unreadable name (the closest known name is suggested), an unknown option, or one
                that the family does not have.
        """
        if isinstance(name, Precision):
            if any(value is not None for value in options.values()):
                raise ReqatError(f"options beside the Precision {name} would be ignored; put them into it (replace).")
            return name
        found = resolve(name, options)
        formats: dict[str, Any] = {
            role: get_format(family, **found.fields[role]) for role, family in found.families.items()
        }
        return cls(**formats, **{option: getattr(found, option) for option in NUMBERS})

    @property
    def name(self) -> str:
        """The name without options: ``NVFP4-W4A4KV4``."""
        return name_of(self._families())

    @property
    def options(self) -> dict[str, Any]:
        """Every option that is not the name's default: ``parse(name, **options)`` is this precision."""
        chosen = {role: vars(getattr(self, role)) for role in self._families()}
        sizes = {option: size for option in NUMBERS if (size := getattr(self, option)) is not None}
        return {**options_of(self._families(), chosen), **sizes}

    def __str__(self) -> str:
        """The name with each option that is not the default; ``parse`` reads it back."""
        return written(self.name, self.options)

    def _families(self) -> dict[str, str]:
        return {role: fmt.name for role in ROLES if (fmt := getattr(self, role)) is not None}

    @property
    def quantizes_linear(self) -> bool:
        """Whether weights or inputs of linear layers are quantized."""
        return self.weights is not None or self.inputs is not None

    @property
    def quantizes_attention(self) -> bool:
        """Whether an operand of attention is quantized that no cache keeps."""
        return self.queries is not None or self.probabilities is not None

    def check_packable(self, who: str) -> None:
        """Raise ReqatError if it has what fake quantization alone computes, naming it, ``who`` does not, and what to
        take instead."""
        fake = [name for name in _LATER if getattr(self, name) is not None]
        if fake:
            rest = self.replace(**dict.fromkeys(fake))
            raise ReqatError(
                f"{self}: {', '.join(fake)} exist in fake quantization alone, and {who} does not compute them: take "
                f"{rest}, or stay with the prepared model"
            )

    @property
    def quantizes_cache(self) -> bool:
        """Whether keys or values are quantized."""
        return self.keys is not None or self.values is not None

    def replace(self, **changes: Any) -> Precision:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values; :meth:`from_dict` reads it back exactly."""
        values = {"name": self.name, **dataclasses.asdict(self)}
        for later in ("kv_signs", *_LATER):  # what has none of them reads as before
            if values[later] is None:
                del values[later]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Precision:
        """The inverse of :meth:`to_dict`."""
        of = {role: values.get(role) if role in _LATER else values[role] for role in ROLES}
        formats = {role: Format(**fields) if fields is not None else None for role, fields in of.items()}
        return cls(
            **formats,
            rotation=values["rotation"],
            kv_rotation=values["kv_rotation"],
            kv_signs=values.get("kv_signs"),
            clamp=values.get(CLAMP),
        )
