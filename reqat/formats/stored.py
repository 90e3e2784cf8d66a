"""Reading a sidecar (:mod:`reqat.models.sidecar`): nothing of it is used before all of it was checked.

``reqat.json`` holds a digest of itself, one of ``reqat.safetensors``, and of a frozen model one of each dense weight
that its codes stand for: weights that were edited since would be replaced by the codes without a word. Folders of
earlier versions have no digests; everything else is checked of them too. (The digests tell damage and files that were
mixed up; they are no signature.)

:func:`read_stored` reads everything. A program that takes one layer after the other, and holds no second copy of a
large model's codes, takes :func:`read_about`, :func:`read_measured` and :func:`read_weight`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import explain, read_json
from reqat.formats import Format, PackedTensor, QuantizedTensor
from reqat.formats.checks import SMALLEST_GLOBAL_SCALE
from reqat.formats.digests import tensor_digest
from reqat.formats.precision import Precision

JSON = "reqat.json"
TENSORS = "reqat.safetensors"
SCHEMA = 1

_REMEDY = "copy or make the checkpoint again"
# Key of reqat.json -> the types it may have. Those that earlier versions did not write may be missing.
_KEYS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "precision": (dict,),
    "weights": (str,),
    "kv_shift": (bool,),
    "static_scales": (bool,),
    "quantized": (dict,),
}
_LATER_KEYS: dict[str, tuple[type, ...]] = {
    "skip": (list, type(None)),
    "tensors_sha256": (str, type(None)),
    "digest": (str,),
    "bases": (bool,),
    "clips": (bool,),
}
# What a tensor that is not of a quantized weight may be called, and which key of reqat.json tells of it.
_NAME = re.compile(r"(layers\.\d+|.+)\.(kv|keys|values|input|weight)_(shift|global_scale|left|right|clip)")
_OF_CACHE = re.compile(r"layers\.(\d+)")
_KINDS = {
    "kv_shift": ("kv_shift",),
    "static_scales": ("keys_global_scale", "values_global_scale", "input_global_scale"),
    "bases": ("keys_left", "keys_right", "input_left", "input_right"),
    "clips": ("keys_clip", "values_clip", "input_clip", "weight_clip"),
}
_CACHED = ("kv", "keys", "values")
#: What is stored of a quantized weight, and what a frozen layer's state dict has beyond an ordinary linear layer's.
CODES = ("weight_packed", "weight_scale", "weight_global_scale")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class Stored:
    """A sidecar's content, checked. `tensors` are those that are not of `weights`; `dense` are the digests of dense
    weights by layer, which :func:`check_dense` compares; `skip` are patterns of layers, None where it does not say."""

    precision: Precision
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Place:
    """What a tensor's name says: ``layers.0.keys_clip`` is of the ``role`` keys of layer 0, and its ``part`` is clip.

    ``layer`` is the index of a layer's cache, or None; ``linear`` the name of a linear layer, or None.
    """

    kind: str
    role: str
    part: str
    layer: int | None
    linear: str | None

    @property
    def prefix(self) -> str:
        """The name without its part: ``layers.0.keys``."""
        return f"{f'layers.{self.layer}' if self.linear is None else self.linear}.{self.role}"


def place_of(name: str) -> Place | None:
    """The place of a tensor of this name, or None if there is no such tensor."""
    match = _NAME.fullmatch(name)
    own = name.rpartition(".")[2]
    kind = next((kind for kind, known in _KINDS.items() if own in known), None)
    if match is None or kind is None:
        return None
    where, role, part = match.groups()
    layer = _OF_CACHE.fullmatch(where)
    if role in _CACHED:
        return Place(kind, role, part, int(layer[1]), None) if layer is not None else None
    return Place(kind, role, part, None, where)


def sealed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``about`` (what reqat.json is to say) with the digests of it, of ``reqat.safetensors`` in ``folder`` if there is
    one, and of the dense weights of the layers in ``about["quantized"]``."""
    tensors = folder / TENSORS
    dense = dense_digests(folder, about["quantized"])
    whole = {
        **about,
        "quantized": {
            name: {**info, "dense_sha256": dense[name]} if name in dense else dict(info)
            for name, info in about["quantized"].items()
        },
        "tensors_sha256": _file_digest(tensors) if tensors.is_file() else None,
    }
    return {**whole, "digest": digest(whole)}


def dense_digests(folder: Path, layers: Iterable[str]) -> dict[str, str]:
    """Layer -> digest of its ``weight`` in the folder's own safetensors files. Layers without one are left out."""
    wanted = {f"{name}.weight": name for name in layers}
    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")) if wanted else ():
        if file.name == TENSORS:
            continue
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (a file handle, not a dictionary)
                if key in wanted:
                    found[wanted[key]] = tensor_digest(tensors.get_tensor(key))
    return found


def read_stored(folder: Path) -> Stored | None:
    """The sidecar of a model folder, or None where there is none. Raises ReqatError, naming file and remedy, for one
    that is damaged or of another version."""
    about = read_about(folder)
    if about is None:
        return None
    stored = about.stored()
    tensors = _tensors(folder, about.values)
    for name in about.layers:
        stored.weights[name] = _quantized(folder / TENSORS, name, tensors, about)
    _check_rest(folder / TENSORS, about.values, tensors)
    stored.tensors |= tensors
    return stored


@dataclass(frozen=True)
class About:
    """What ``reqat.json`` says, checked: its ``values``, the precision of the weights in ``folder`` and the patterns of
    layers that were skipped (None where it does not say)."""

    folder: Path
    values: Mapping[str, Any]
    precision: Precision
    skip: tuple[str, ...] | None

    @property
    def layers(self) -> Mapping[str, Any]:
        """Name -> shape, dtype and digest of each layer that has codes."""
        layers: Mapping[str, Any] = self.values["quantized"]
        return layers

    @property
    def dense(self) -> dict[str, str]:
        """Name -> digest of the dense weight that a layer's codes stand for, where it is stated."""
        return {name: info["dense_sha256"] for name, info in self.layers.items() if "dense_sha256" in info}

    def stored(self) -> Stored:
        """The content as far as this file has it."""
        return Stored(self.precision, dense=self.dense, skip=self.skip)


def read_about(folder: Path) -> About | None:
    """What ``reqat.json`` in ``folder`` says, or None where there is none. Raises ReqatError as :func:`read_stored`."""
    file = folder / JSON
    if not file.is_file():
        if (folder / TENSORS).is_file():
            raise ReqatError(
                f"{folder / TENSORS} stands there without {JSON}, so its codes and scales would be ignored; copy the "
                f"checkpoint again, or delete {TENSORS} to take the dense weights as they are."
            )
        return None
    values = read_json(file, "sidecar", _REMEDY)
    _check_about(file, values)
    skip = values.get("skip")
    return About(folder, values, stored_precision(file, values["precision"]), None if skip is None else tuple(skip))


def check_files(about: About) -> None:
    """Raise ReqatError unless ``reqat.safetensors`` and the dense weights are those that ``about`` was written for.
    Reads both from end to end."""
    path = _tensors_file(about.folder, about.values)
    if path is not None:
        _check_digest(path, about.values)
    check_dense(about.folder, about.dense)


def read_measured(about: About) -> dict[str, Tensor]:
    """The tensors that are not of quantized weights: shifts, static scales, bases, clips. Raises ReqatError as
    :func:`read_stored`, but for digests."""
    path = _tensors_file(about.folder, about.values)
    if path is None:
        return {}
    of_weights = {f"{name}.{part}" for name in about.layers for part in CODES}
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key not in of_weights}  # noqa: SIM118
    _check_rest(path, about.values, tensors)
    return tensors


def read_weight(about: About, name: str) -> QuantizedTensor:
    """Codes and scales of the layer ``name`` of ``about.layers``. Raises ReqatError as :func:`read_stored`, but for
    digests."""
    path = about.folder / TENSORS
    wanted = {f"{name}.{part}" for part in CODES}
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in wanted & set(file.keys())}
    return _quantized(path, name, tensors, about)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ReqatError(f"the sidecar {path} is damaged ({error}); {_REMEDY}.") from error
    except OSError as error:
        raise explain(error, path) from error


def stored_precision(where: Path | str, values: Any) -> Precision:
    """The precision that ``Precision.to_dict`` wrote. Raises ReqatError, naming ``where`` it stands, if it is none."""
    try:
        precision = Precision.from_dict(values)
        if precision.name != values.get("name", precision.name):
            raise ValueError(f"its formats are those of {precision.name}, its name is {values['name']}")
        for block in (precision.rotation, precision.kv_rotation):
            if block is not None and (type(block) is not int or block < 1 or block & (block - 1)):
                raise ValueError(f"rotation block {block!r}, where a power of two is needed")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReqatError(f"{where}: its precision is damaged ({error}); {_REMEDY}.") from error
    return precision


def check_dense(folder: Path, stated: Mapping[str, str]) -> None:
    """Raise ReqatError if a dense weight in ``folder`` is not the one that a layer's codes stand for (``stated``:
    layer -> its digest)."""
    dense = dense_digests(folder, stated)
    changed = [name for name, sha256 in stated.items() if dense.get(name) != sha256]
    if changed:
        raise ReqatError(
            f"{folder}: {changed[0]}.weight was changed after the model was frozen ({len(changed)} of {len(stated)} "
            f"weights differ), so the codes in {TENSORS} stand for other weights. To take the dense weights as they "
            f"are, delete {JSON} and {TENSORS}; to have the frozen model back, {_REMEDY}."
        )


def _check_about(file: Path, about: dict[str, Any]) -> None:
    if about.get("schema") != SCHEMA or type(about.get("schema")) is not int:
        raise ReqatError(
            f"{file} has schema {about.get('schema')!r}, this version of reqat reads {SCHEMA}: update reqat, or make "
            "the checkpoint again."
        )
    missing = [key for key in _KEYS if key not in about]
    unknown = [key for key in about if key not in _KEYS and key not in _LATER_KEYS]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {unknown[0]!r}: update reqat, or"
        raise ReqatError(f"{file} {what}{';' if missing else ''} {_REMEDY}.")
    for key, types in (_KEYS | _LATER_KEYS).items():
        if key in about and type(about[key]) not in types:
            raise ReqatError(f"{file}: {key} is {about[key]!r}, where {_words(types)} is needed; {_REMEDY}.")
    if "digest" in about and about["digest"] != digest({k: v for k, v in about.items() if k != "digest"}):
        raise ReqatError(f"{file} was changed after it was written: its digest is another's; {_REMEDY}.")
    if about["weights"] not in ("dense", "quantized") or (about["weights"] == "quantized") != bool(about["quantized"]):
        raise ReqatError(
            f"{file} says weights: {about['weights']!r} and lists {len(about['quantized'])} quantized layers; "
            f"{_REMEDY}."
        )
    if not all(isinstance(pattern, str) for pattern in about.get("skip") or ()):
        raise ReqatError(f"{file}: skip is {about['skip']!r}, where a list of patterns is needed; {_REMEDY}.")
    for name, info in about["quantized"].items():
        if not isinstance(info, dict):
            raise ReqatError(f"{file}: {name} is {info!r}, where an object is needed; {_REMEDY}.")


def _words(types: tuple[type, ...]) -> str:
    names = {int: "a number", dict: "an object", str: "a text", bool: "a truth value", list: "a list"}
    return " or ".join(names.get(kind, "nothing") for kind in types)


def _tensors_file(folder: Path, about: Mapping[str, Any]) -> Path | None:
    """The file of tensors beside ``about``, or None where it says that there is none."""
    path = folder / TENSORS
    needed = about["weights"] == "quantized" or any(about.get(kind, False) for kind in _KINDS)
    if not path.is_file():
        if needed or about.get("tensors_sha256") is not None:
            raise ReqatError(f"{folder / JSON} needs {TENSORS} beside it, which is missing; copy the checkpoint again.")
        return None
    if not needed:
        raise ReqatError(
            f"{folder / JSON} knows nothing of {TENSORS} beside it, so the two are of different models; {_REMEDY}."
        )
    return path


def _check_digest(path: Path, about: Mapping[str, Any]) -> None:
    stated = about.get("tensors_sha256")
    try:
        if stated is not None and stated != _file_digest(path):
            raise ReqatError(
                f"the sidecar {path} is damaged: it is not the file that {JSON} was written for (changed or "
                f"truncated); {_REMEDY}."
            )
    except OSError as error:
        raise explain(error, path) from error


def _tensors(folder: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file beside ``about``; none where it says that there is none."""
    path = _tensors_file(folder, about)
    if path is None:
        return {}
    _check_digest(path, about)
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quantized(path: Path, name: str, stored: dict[str, Tensor], about: About) -> QuantizedTensor:
    """Take a layer's codes and scales out of ``stored``, checked."""
    precision, info = about.precision, about.layers[name]
    if precision.weights is None:
        raise ReqatError(f"{path}: codes of {name}, where {JSON} says that weights are not quantized; {_REMEDY}.")
    shape, dtype = _shape(path, name, info)
    wanted = CODES if precision.weights.has_global_scale else CODES[:2]
    if missing := [key for key in wanted if f"{name}.{key}" not in stored]:
        raise ReqatError(f"{path}: no {name}.{missing[0]}; {_REMEDY}.")
    parts = [stored.pop(f"{name}.{key}") for key in wanted]
    g = _global(path, name, parts[2], precision.weights, shape) if len(parts) == 3 else None
    try:
        packed = PackedTensor(parts[0], parts[1], g, precision.weights, len(shape) - 1, shape, dtype)
        quantized = packed.unpack()
        quantized.check(f"{name}.weight")
    except (ValueError, TypeError) as error:
        raise ReqatError(f"{path}: the quantized weight of {name} is damaged ({error}); {_REMEDY}.") from error
    return quantized


def _shape(path: Path, name: str, info: Any) -> tuple[torch.Size, torch.dtype]:
    valid = isinstance(info, dict) and {"shape", "dtype"} <= set(info) <= {"shape", "dtype", "dense_sha256"}
    valid = valid and isinstance(info.get("dense_sha256", ""), str)
    shape = info["shape"] if valid else None
    if not (isinstance(shape, list) and shape and all(type(size) is int and size > 0 for size in shape)):
        raise ReqatError(f"{path.parent / JSON}: no valid shape of {name} (given: {info!r}); {_REMEDY}.")
    if not isinstance(info["dtype"], str) or info["dtype"] not in _DTYPES:
        raise ReqatError(f"{path.parent / JSON}: dtype {info['dtype']!r} of {name} is none of {', '.join(_DTYPES)}; "
                         f"{_REMEDY}.")  # fmt: skip
    return torch.Size(shape), _DTYPES[info["dtype"]]


def _global(path: Path, name: str, stored: Tensor, fmt: Format, shape: torch.Size) -> Tensor:
    """A weight's global scale: a scalar, or of format ``row`` [N, 1]. It is stored flat."""
    if stored.numel() == 1 and stored.ndim <= 1:
        return stored.reshape(())
    if fmt.global_scale == "row" and stored.numel() == shape[:-1].numel():
        return stored.reshape(*shape[:-1], 1)
    raise ReqatError(f"{path}: {name}.weight_global_scale has shape {tuple(stored.shape)}, where (1,) is needed; "
                     f"{_REMEDY}.")  # fmt: skip


def _check_rest(path: Path, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Shifts, static scales, bases, clips: whether each is one, and whether ``about`` says that there are some."""
    kinds = check_tensors(tensors, str(path))
    for kind in _KINDS:
        if about.get(kind, False) != (kind in kinds):
            raise ReqatError(
                f"{path}: {JSON} says {kind}: {about.get(kind, False)}, the tensors say otherwise; {_REMEDY}."
            )


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> set[str]:
    """The kinds of ``tensors`` that are not of quantized weights. Raises ReqatError, naming the tensor after ``where``,
    for an unknown name, another dtype than float32, a form that no model has, or numbers that cannot be."""
    kinds: set[str] = set()
    for name, tensor in tensors.items():
        place = place_of(name)
        if place is None:
            raise ReqatError(f"{where}: {name} belongs to nothing that {JSON} lists; {_REMEDY}.")
        kind = place.kind
        kinds.add(kind)
        scale, clip = kind == "static_scales", kind == "clips"
        form = tuple(tensor.shape) == (1,) if scale else tensor.ndim == 2 and tensor.numel() > 0
        if clip:
            form = tensor.shape[-1:] == (2,) and tensor.ndim == (2 if place.role == "weight" else 1)
        if tensor.dtype != torch.float32 or not form:
            raise ReqatError(
                f"{where}: {name} is {tensor.dtype} {tuple(tensor.shape)}, where torch.float32 "
                f"{_FORMS[kind]} is needed; {_REMEDY}."
            )
        outside = clip and not bool(((tensor > 0) & (tensor <= 1)).all())
        if not bool(torch.isfinite(tensor).all()) or outside or (scale and not float(tensor) > SMALLEST_GLOBAL_SCALE):
            raise ReqatError(
                f"{where}: {name} holds {tensor.flatten()[:4].tolist()}, where "
                f"{_NUMBERS.get(kind, 'finite numbers')} must be; {_REMEDY}."
            )
    return kinds


_FORMS = {
    "static_scales": "(1,)",
    "kv_shift": "[heads, head_dim]",
    "bases": "a square matrix",
    "clips": "(2,), or [outputs, 2] of a weight,",
}
_NUMBERS = {"static_scales": "one positive finite number", "clips": "numbers above 0 and up to 1"}
