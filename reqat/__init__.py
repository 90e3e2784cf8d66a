"""reqat: quantization-aware training of reasoning models in 4-bit floating point.

The package has layers: ``config`` and ``formats`` at the bottom, then ``quant``, then ``models``, ``data`` and
``tasks``, and so on up to the command line. Importing ``reqat`` itself loads nothing: the public names below are loaded
on first use, so that a command that only reads configuration does not import torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reqat.export import export_model
    from reqat.formats import Format, QuantizedTensor, get_format, quantize, quantize_dequantize
    from reqat.formats.precision import Precision
    from reqat.inference import pack
    from reqat.models import calibrate_static, freeze, load_model, prepare

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed (our tests compare with it), and torchao warns about GPU
# libraries that it cannot load on a CPU. Nothing here uses it but the benchmark.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

__all__ = [
    "Format",
    "Precision",
    "QuantizedTensor",
    "__version__",
    "calibrate_static",
    "export_model",
    "freeze",
    "get_format",
    "load_model",
    "pack",
    "prepare",
    "quantize",
    "quantize_dequantize",
]

_HOMES = {
    "Format": "reqat.formats",
    "QuantizedTensor": "reqat.formats",
    "get_format": "reqat.formats",
    "quantize": "reqat.formats",
    "quantize_dequantize": "reqat.formats",
    "Precision": "reqat.formats.precision",
    "calibrate_static": "reqat.models",
    "export_model": "reqat.export",
    "freeze": "reqat.models",
    "load_model": "reqat.models",
    "pack": "reqat.inference",
    "prepare": "reqat.models",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the package that defines it (PEP 562), and keep it."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'reqat' has no attribute {name!r}; public names are {', '.join(__all__)}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
