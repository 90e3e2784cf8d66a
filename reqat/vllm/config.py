"""What vLLM asks a quantization method: which layers are quantized, and how.

The folder says it: precision and skipped layers in ``reqat.json``, and in ``quantization_config`` of ``config.json``
where transformers quantized the model. vLLM pickles the configuration into its processes; tensors are read there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.formats.described import METHOD, check_agrees, is_ours
from reqat.formats.precision import Precision
from reqat.formats.stored import CODES, JSON, About, check_files, read_about, read_measured
from reqat.vllm.attention import ReqatKVMethod
from reqat.vllm.linear import ReqatLinearMethod

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# Names of the sidecar's tensors, which lie in a safetensors file that vLLM reads as weights.
_OURS = re.compile(rf"\.({'|'.join(CODES)}|(kv|keys|values|input|weight)_(shift|global_scale|left|right|clip))$")


@dataclass
class Folder:
    """A folder that reqat wrote, as far as layers need it; ``tensors`` are read in the process that uses them."""

    about: About
    _tensors: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def precision(self) -> Precision:
        """What the model is quantized to."""
        return self.about.precision

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Shifts and static scales, by their names in the sidecar."""
        if self._tensors is None:
            with torch.device("cpu"):
                self._tensors = read_measured(self.about)
        return self._tensors

    def measured(self, name: str) -> Tensor:
        """One of them. Raises ReqatError if it is missing."""
        if name not in self.tensors:
            raise ReqatError(
                f"{self.about.folder}: the precision is {self.precision}, and there is no {name}: calibrate the model "
                "(calibrate_static, or `reqat quantize` with calibration), save it again"
            )
        return self.tensors[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": None}


@register_quantization_config(METHOD)
class ReqatQuantization(QuantizationConfig):
    """The configuration of one model. vLLM makes it of what ``config.json`` or ``reqat.json`` says, then tells where
    the folder is (:meth:`maybe_update_config`)."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given
        self.folder: Folder | None = None

    def get_name(self) -> str:
        """The name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types that a model may compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: nothing here is its own arithmetic."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """What vLLM hands over where ``config.json`` names no method and ``--quantization reqat`` does."""
        return [JSON]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ReqatQuantization:
        """The configuration, which does not know its folder yet."""
        return cls(config)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keeps the sidecar's tensors from being loaded as weights."""
        return WeightsMapper(orig_to_new_regex={_OURS: None})

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the folder. Raises ReqatError, before any weight is read, for one that is damaged, and for what this
        plugin cannot compute."""
        folder = Path(model_name)
        if not folder.is_dir():
            raise ReqatError(
                f"{model_name} is no folder: fetch the model (`hf download {model_name}`) and give its path"
            )
        about = read_about(folder)
        if is_ours(self.given):
            check_agrees(folder, self.given, about)
        if about is None:
            raise ReqatError(f"{folder} has no {JSON}: quantization={METHOD!r} is for folders that reqat wrote")
        _check(about)
        check_files(about)
        self.folder = Folder(about)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None for what is no business of a quantization method."""
        config = get_current_vllm_config_or_none()
        if self.folder is not None and config is not None:
            _check_engine(config)
            _mark(config, self.folder.about)
        if isinstance(layer, LinearBase):
            return self._of_linear(prefix)
        if self.folder is None:
            return None
        precision = self.folder.precision
        if isinstance(layer, RoutedExperts) and precision.quantizes_linear:
            raise ReqatError(f"{prefix}: mixtures of experts are not supported by this plugin")
        if isinstance(layer, AttentionLayerBase) and precision.quantizes_cache:
            found = _LAYER.search(prefix)
            if type(layer) is not Attention or found is None:  # others attend in other ways
                raise ReqatError(
                    f"{prefix}: {type(layer).__name__} is no attention whose keys and values are quantized"
                )
            return ReqatKVMethod(self.folder, prefix, int(found[1]))
        return None

    def _of_linear(self, prefix: str) -> QuantizeMethodBase:
        folder = self.folder
        quantizes = folder is not None and (folder.precision.quantizes_linear or folder.precision.rotation is not None)
        if folder is None or not quantizes or not _LAYER.search(prefix):
            return UnquantizedLinearMethod()
        parent, _, own = prefix.rpartition(".")
        names = tuple(f"{parent}.{part}" for part in self.packed_modules_mapping.get(own, [own]))
        left = [name for name in names if any(fnmatchcase(name, pattern) for pattern in folder.about.skip or ())]
        if left and len(left) < len(names):
            others = [name for name in names if name not in left]
            raise ReqatError(
                f"{', '.join(left)} are skipped and {', '.join(others)} are not, and vLLM joins them in one layer: "
                "skip all of them or none"
            )
        if left:
            return UnquantizedLinearMethod()
        missing = [name for name in names if folder.about.layers and name not in folder.about.layers]
        if missing:
            raise ReqatError(
                f"{folder.about.folder}: the model is frozen, and there are no codes of {missing[0]}, which vLLM has: "
                "its layers have other names here, or reqat does not quantize this one"
            )
        return ReqatLinearMethod(folder, names)


def _check_engine(config: VllmConfig) -> None:
    """Raise ReqatError for CUDA graphs: formats look at values (they refuse NaN), for which a capture cannot wait."""
    if current_platform.is_cuda_alike() and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise ReqatError(
            "quantization='reqat' cannot be captured in CUDA graphs: add --enforce-eager, or compile without them, "
            """--compilation-config '{"cudagraph_mode": "NONE"}'"""
        )


def _mark(config: VllmConfig, about: About) -> None:
    """Let compiled graphs be kept under the precision, too: vLLM finds them by the model's path and the method's name,
    and would take those of what lay there before. What it calls additional configuration goes into that name."""
    if isinstance(config.additional_config, dict):
        shape = {key: about.values.get(key) for key in ("precision", "skip", "kv_shift", "static_scales")}
        config.additional_config[METHOD] = digest(shape)


def _check(about: About) -> None:
    """Raise ReqatError for what a folder asks for and this plugin does not do."""
    about.precision.check_packable("vLLM")
    folder, precision = about.folder, about.precision
    for role in ("inputs", "keys", "values"):
        fmt = getattr(precision, role)
        if fmt is not None and (fmt.global_scale == "dynamic" or fmt.per_tensor):
            raise ReqatError(
                f"{folder}: {role} of {precision} have one scale for all that is computed at once, "
                "so a response would depend on the requests beside it: save the model with global_scale='row' or "
                "'static'"
            )
    if precision.weights is not None and precision.weights.global_scale == "static" and not about.layers:
        raise ReqatError(f"{folder}: weights have a static global scale, and the model is not frozen: freeze it first")
    kinds = {"bases": "changes of basis (QuaRot, FlatQuant)", "clips": "clipped inputs, keys or values"}
    for kind, what in kinds.items():
        if about.values.get(kind, False):
            raise ReqatError(f"{folder}: {what} are not supported by this plugin; `reqat evaluate` computes them")
