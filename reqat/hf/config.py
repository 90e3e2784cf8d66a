"""The ``quantization_config`` of transformers for reqat: a precision, and the layers that are left alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from reqat.config.errors import ReqatError
from reqat.formats.described import METHOD, described, read_described
from reqat.quant import Precision


@register_quantization_config(METHOD)
class ReqatConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` is to prepare a model for.

    What is not said is what :meth:`reqat.Precision.parse` takes: a global scale for each row of inputs, keys and
    values, so that what is computed of a row depends neither on its batch nor on later tokens.
    """

    def __init__(
        self,
        precision: str | Precision | None = None,
        *,
        skip: Iterable[str] | None = None,
        override: bool = False,
        **options: Any,
    ) -> None:
        """
        Args:
            precision: a name such as ``NVFP4-W4A4KV4``, or a Precision; None for the one that the folder was saved
                with (by ``reqat quantize``, say).
            skip: patterns (``model.layers.0.*``) of linear layers to leave alone; None for the folder's.
            override: compute as asked, whatever options the folder was saved with.
            options: of :meth:`reqat.Precision.parse`: ``global_scale``, ``kv_element``, ``rotation``, ...

        Raises ReqatError for an unknown precision (naming the known ones) or option.
        """
        if options.pop("quant_method", METHOD) != METHOD:
            raise ReqatError(f"ReqatConfig is the configuration of quant_method {METHOD!r} alone")
        if isinstance(skip, str):
            raise ReqatError(f"skip={skip!r}: give a list of patterns of layers' names, such as ['model.layers.0.*']")
        if precision is None and options:
            raise ReqatError(
                f"ReqatConfig({', '.join(f'{k}={v!r}' for k, v in options.items())}) names no precision that these are "
                "options of: ReqatConfig('NVFP4-W4A4KV4', ...)"
            )
        if precision is not None:
            Precision.parse(precision, **options)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration has its own methods alone
        self.precision = precision
        self.skip = None if skip is None else list(skip)
        self.override = override
        self.options = options

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Of what ``config.json`` says, or of the arguments of this class as a dictionary (of a file, say).

        Raises ReqatError for what a newer version wrote, and for damaged values.
        """
        if "schema" in config_dict:
            precision, skip = read_described(config_dict)
            config = cls(precision, skip=skip)
        else:
            config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary: transformers reads it so where a loaded model's configuration is given again."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_dict` reads it back. Of a loaded model's this is what ``config.json`` gets."""
        if isinstance(self.precision, Precision) and not self.override:
            return described(self.precision, self.skip or ())
        given = {"precision": self.precision, "skip": self.skip, "override": self.override, **self.options}
        if isinstance(self.precision, Precision):
            given["precision"] = str(self.precision)
        return {"quant_method": METHOD, **given}
