"""RTN: every weight to the nearest code, which is what freezing a prepared model does. The baseline of all PTQ."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from reqat.methods.ptq._method import Method
from reqat.models import freeze, quant_linears


def rtn(model: PreTrainedModel) -> dict[str, Any]:
    """Freeze a prepared ``model`` in place. Raises ``ReqatError`` if it was not prepared."""
    freeze(model)
    return {"method": "rtn", "layers": len(quant_linears(model))}


METHOD = Method(rtn)
