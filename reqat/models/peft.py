"""What PEFT leaves in a model: layers that it wraps, and modules that it puts beside them."""

from __future__ import annotations

from torch import nn

#: Names under which PEFT keeps the layer that it wraps: LoRA and its kin, and ``modules_to_save``.
WRAPPED = ("base_layer", "original_module")


def plain_name(name: str) -> str:
    """A module's name in a checkpoint: ``...q_proj`` of ``...q_proj.base_layer``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def peft_modules(module: nn.Module) -> set[nn.Module]:
    """All modules in ``module`` that PEFT brought along: whatever stands beside a layer that it wraps."""
    return {
        inner
        for wrapper in module.modules()
        for name, child in wrapper.named_children()
        if name not in WRAPPED and any(isinstance(getattr(wrapper, w, None), nn.Module) for w in WRAPPED)
        for inner in child.modules()
    }
