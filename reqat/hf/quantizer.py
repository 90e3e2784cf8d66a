"""What transformers does with a model whose quantization method is ``"reqat"``.

The weights are loaded as of a plain model, since ours are dense beside their codes; then the model is put into its
precision by :func:`reqat.models.prepare`, with the sidecar of its folder. Whatever can be refused is refused before
weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils.hub import is_offline_mode

from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.formats.described import METHOD, check_agrees, is_ours
from reqat.formats.stored import JSON, TENSORS
from reqat.hf.config import ReqatConfig
from reqat.models import ATTENTION, prepare, quant_linears
from reqat.models.adapters import cached_attentions
from reqat.models.asked import settle
from reqat.models.folder import CONFIG, REMEDY, Header, check_unquantized, weight_shapes
from reqat.models.loading import is_widened
from reqat.models.prepare import check_geometry
from reqat.models.pretrained import plain_state
from reqat.models.released import KEY, saved_with
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision

_PLAIN_ATTENTION = (None, ATTENTION, "sdpa")


@register_quantizer(METHOD)
class ReqatHfQuantizer(HfQuantizer):
    """Puts a model that ``from_pretrained`` loads into the precision of a :class:`ReqatConfig`."""

    requires_calibration = False
    quantization_config: ReqatConfig

    def __init__(self, quantization_config: ReqatConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.model: PreTrainedModel | None = None
        self._asked_attention: str | None = None
        self._folder: Path | None = None
        self._sidecar: Sidecar | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ReqatError for a device map that keeps weights elsewhere than where they are computed with."""
        if isinstance(device_map, Mapping):
            _check_devices(device_map)

    def update_attn_implementation(self, config: Any) -> Any:
        """Note which attention function was asked for, before transformers chooses one."""
        self._asked_attention = config._attn_implementation
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Read the sidecar, and refuse what cannot be prepared while the model has no weights yet."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise ReqatError(
                "distributed_config and tp_plan split weights, and a row's global scale is that of the whole row: load "
                "the model whole"
            )
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            self._folder = Path(checkpoint_files[0]).parent
            self._read(self._folder, model, [Path(file) for file in checkpoint_files])
        elif self.pre_quantized or not checkpoint_files:
            raise ReqatError(
                f"{JSON} and {TENSORS} stand beside the weights, and these weights are in no folder (state_dict), or "
                "in files other than safetensors: give from_pretrained the folder"
            )
        else:
            raise ReqatError(f"{checkpoint_files[0]}: pickled weights can execute code; convert them to safetensors")
        precision, skip = self._settled()
        if cached_attentions(model) and self._asked_attention not in _PLAIN_ATTENTION:
            raise ReqatError(
                f"attn_implementation={self._asked_attention!r} would not quantize keys and values: leave it out "
                f"(reqat's own attention, {ATTENTION!r}, is taken)"
            )
        check_geometry(model, precision, list(skip))
        _widen_norms(model, checkpoint_files)
        return model

    def _read(self, folder: Path, model: PreTrainedModel, files: Sequence[Path]) -> None:
        _fetch_sidecar(folder, str(model.config.name_or_path))
        config = read_json(folder / CONFIG, "model configuration", REMEDY) if (folder / CONFIG).is_file() else {}
        check_unquantized(folder, config)
        stored = {name: Header(file, shape) for file in files for name, shape in weight_shapes(file).items()}
        self._sidecar = saved_with(folder, config, stored)
        about = config.get("quantization_config")
        if about is not None and is_ours(about):
            check_agrees(folder, about, self._sidecar)

    def _settled(self) -> tuple[Precision, tuple[str, ...]]:
        """The precision to prepare and the layers to skip. Raises ReqatError where neither configuration nor folder
        names one, or both differ."""
        wanted, sidecar = self.quantization_config, self._sidecar
        saved = sidecar.precision if sidecar is not None else Precision()
        skip = None if sidecar is None else sidecar.skip
        if wanted.precision is None:
            if saved == Precision():
                raise ReqatError(
                    f"ReqatConfig() takes the precision of a folder with {JSON}, and {self._folder} has none: name one,"
                    " ReqatConfig('NVFP4-W4A4KV4')"
                )
            asked = settle(saved, wanted.skip, {}, saved, skip, override=wanted.override)
        else:
            asked = settle(wanted.precision, wanted.skip, wanted.options, saved, skip, override=wanted.override)
        if sidecar is not None:
            sidecar.check(asked.precision)
        return asked.precision, asked.skip

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Prepare the loaded model, and note in its configuration what for."""
        _check_devices(getattr(model, "hf_device_map", None) or {})
        away = [name for name, p in model.named_parameters() if p.is_meta]
        if away:
            raise ReqatError(
                f"{away[0]} is not in memory (offloaded, or missing from the weights): load the model on one device, "
                "device_map='cpu' or 'cuda:0'"
            )
        if self._sidecar is not None and self._folder is not None:
            self._sidecar.attach(model, self._folder)
        if hasattr(model.config, KEY):  # of a released checkpoint; it is in the sidecar now, which is saved along
            delattr(model.config, KEY)
        wanted = self.quantization_config
        precision, _ = self._settled() if wanted.precision is None else (wanted.precision, None)
        report = prepare(model, precision, skip=wanted.skip, override=wanted.override, **wanted.options)
        # A configuration of its own: the user's may serve for other models, too.
        self.quantization_config = ReqatConfig(report.precision, skip=report.skip)
        model.config.quantization_config = self.quantization_config
        self.model = model
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained beside any prepared model that is not packed."""
        return not getattr(self.model, "_reqat_packed", False)

    @property
    def is_qat_trainable(self) -> bool:
        """Its own weights can be trained until they are frozen: their codes would not follow."""
        frozen = self.model is not None and any(linear.frozen for linear in quant_linears(self.model).values())
        return self.is_trainable and not frozen

    @property
    def is_compileable(self) -> bool:
        """``generate`` must not compile the model: the attention function looks at values of the mask."""
        return False

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes codes and scales into the sidecar, which a packed model does not have."""
        return self.is_trainable

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, str]]:
        """The tensors of the plain model."""
        return plain_state(model), {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Refused: training may have changed the weights, and reading them again is as easy."""
        raise ReqatError(
            "a prepared model is not taken back to the plain one in place: load its folder without quantization, "
            "reqat.load_model(folder)"
        )


def _check_devices(device_map: Mapping[str, Any]) -> None:
    """Raise ReqatError for weights that stay on disk, or in the memory of the CPU while another device computes."""
    places = {str(device) for device in device_map.values()}
    away = {place for place in places if place in ("disk", "meta") or (place == "cpu" and len(places) > 1)}
    if away:
        raise ReqatError(
            f"device_map puts weights on {', '.join(sorted(map(repr, away)))}, from where they are copied whenever "
            "they are needed (offloading), and a quantized layer has to keep its own: use one device "
            "(device_map='cpu', 'cuda:0'), or several GPUs that hold the whole model"
        )


def _widen_norms(model: nn.Module, files: Sequence[str] | None) -> None:
    """Give QK norms one row a head where the checkpoint has them so (Q-FIT), or transformers would not load them."""
    for file in files or ():
        for name, shape in weight_shapes(Path(file)).items():
            parent, _, attribute = name.rpartition(".")
            try:
                norm: Any = model.get_submodule(parent)
            except AttributeError:
                continue  # of another class: transformers says so
            weight = getattr(norm, attribute, None)
            if isinstance(weight, nn.Parameter) and is_widened(name, shape, tuple(weight.shape)):
                setattr(norm, attribute, nn.Parameter(weight.new_empty(shape)))


def _fetch_sidecar(folder: Path, source: str) -> None:
    """Of a model of the Hub, bring the sidecar beside the weights: transformers fetches only what it knows.

    Raises ReqatError where it cannot be found out whether there is one. Offline the cache is all that there is.
    """
    parts = folder.parts
    if Path(source).is_dir() or "snapshots" not in parts[2:-1] or is_offline_mode():
        return
    at = len(parts) - 1 - parts[::-1].index("snapshots")  # cache / models--owner--name / snapshots / commit / subfolder
    for name in (JSON, TENSORS):
        if (folder / name).is_file():
            continue
        place = "/".join((*parts[at + 2 :], name))
        cache = str(Path(*parts[: at - 1]))
        if try_to_load_from_cache(source, place, cache_dir=cache, revision=parts[at + 1]) is _CACHED_NO_EXIST:
            continue
        try:
            hf_hub_download(source, place, cache_dir=cache, revision=parts[at + 1])
        except LocalEntryNotFoundError as error:  # no network: also a kind of the next
            raise _not_fetched(source, name, error) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the hub, of the network, of the disk: as many kinds as ways to fail
            raise _not_fetched(source, name, error) from error


def _not_fetched(source: str, name: str, error: Exception) -> ReqatError:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ReqatError(
        f"{source}: whether it has {name} (scales, shift, codes) cannot be found out ({said}); a private model needs "
        "`hf auth login` or HF_TOKEN, as transformers does not pass its token= on. Or fetch the model with "
        "`hf download` and give its folder; if the cache has all of it, set HF_HUB_OFFLINE=1"
    )
