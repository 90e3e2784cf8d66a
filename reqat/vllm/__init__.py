"""Plugin of vLLM: models that reqat saved, computed by vLLM as reqat computes them.

vLLM's own formats hold NVFP4 weights and inputs, and no engine has E1M2 keys, Q-FIT's shift or scales by row. Here a
folder that ``reqat export --format reqat``, :func:`reqat.models.save_model` or training wrote is fake-quantized inside
vLLM: numbers are rounded to four bits where reqat rounds them, and products are computed in the model's type. That
gives a 4-bit model's responses at vLLM's throughput; it does not save memory.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. It pins
another transformers than reqat, so this package imports nothing of reqat that needs transformers: the layers below it
are :mod:`reqat.config`, :mod:`reqat.formats` and :mod:`reqat.decoding`.

| module | content |
|---|---|
| ``config`` | what is quantized, and what is refused: a ``QuantizationConfig`` of vLLM |
| ``linear``, ``attention`` | layers |
| ``operators`` | the one operator that they call |
| ``reset`` | ReSET as a logits processor |
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method ``reqat`` known to vLLM."""
    import reqat.vllm.config  # noqa: F401  (registers it)
