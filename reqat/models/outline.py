"""What a model is, before its weights are read: its class, geometry and family, from ``config.json`` alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.models.adapters import cached_attentions
from reqat.models.folder import CONFIG, REMEDY, check_config, weight_headers
from reqat.models.loading import quiet
from reqat.models.prepare import check_geometry
from reqat.quant import Precision


def outline(folder: Path, precision: str | Precision) -> PreTrainedModel:
    """The causal language model in ``folder`` without numbers (on torch's meta device), as its configuration has it.

    Takes no memory and a second, so that a training can be refused before traces are tokenized. Raises ReqatError for a
    damaged folder, a model that no adapter knows, one that keeps no keys and values, or a layer that the blocks of
    ``precision`` do not divide.
    """
    check_config(folder)
    weight_headers(folder)
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ReqatError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ReqatError(
            f"{folder / CONFIG}: no causal language model ({type(error).__name__}: {reason}); {REMEDY}."
        ) from error
    if not cached_attentions(model):
        raise ReqatError(f"{folder}: {type(model).__name__} is an encoder; traces train a decoder.")
    asked = Precision.parse(precision) if isinstance(precision, str) else precision
    check_geometry(model, asked, [])
    return model
