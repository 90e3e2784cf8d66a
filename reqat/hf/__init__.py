"""reqat as a quantization method of transformers: importing this package registers ``"reqat"``.

``AutoModelForCausalLM.from_pretrained(folder, quantization_config=ReqatConfig("NVFP4-W4A4KV4"))`` is then
:func:`reqat.prepare` of the loaded model, and a folder that such a model was saved to loads by itself. transformers
finds no quantizer on its own, so ``import reqat.hf`` has to stand in every program that loads such a folder; without it
the folder is the dense model, with a warning.
"""

from __future__ import annotations

from reqat.hf.config import ReqatConfig
from reqat.hf.lora import quantized_lora
from reqat.hf.quantizer import ReqatHfQuantizer

__all__ = ["ReqatConfig", "ReqatHfQuantizer", "quantized_lora"]
