"""The operator of torch by which layers quantize: vLLM's compiler takes it as one piece and does not look inside.

``quantize_dequantize`` looks at values (it refuses NaN, and skips what no value needs), which a compiled graph cannot.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import torch
from vllm.distributed import get_tp_group
from vllm.utils.torch_utils import direct_register_custom_op

from reqat.formats import Format, global_scale_for, quantize_dequantize
from reqat.formats.hadamard import block_hadamard, with_signs


def spelled(fmt: Format | None) -> str:
    """A format as an operator takes it: text; empty for none."""
    return "" if fmt is None else json.dumps(dataclasses.asdict(fmt), sort_keys=True)


@cache
def _format(text: str) -> Format:
    return Format(**json.loads(text))


def largest_of_ranks(amax: torch.Tensor) -> torch.Tensor:
    """The largest of each number over the ranks that share a layer (tensor parallelism); in place."""
    group = get_tp_group()
    if group.world_size > 1:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group.device_group)
    return amax


# torch reads the operator's schema off these annotations.
def _fake_quantize(
    x: torch.Tensor,
    fmt: str,
    shift: torch.Tensor | None,
    signs: int,
    rotation: int,
    global_scale: torch.Tensor | None,
    split: bool,
) -> torch.Tensor:
    """``x`` [..., K] less ``shift`` (broadcast), in the signs of that seed (-1: none), rotated in Hadamard blocks (0:
    not), rounded to ``fmt`` (empty: not) with a given global scale, or the format's own; what is not finite stays as it
    is. ``split`` says that the ranks
    of a tensor-parallel group hold a share of each row: a row's scale is then that of the whole row."""
    if shift is not None:
        x = x - shift.to(x.dtype)
    if signs >= 0:
        x = with_signs(x, signs)
    if rotation:
        x = block_hadamard(x, rotation)
    if not fmt:
        return x.clone()  # an operator returns no argument of its own
    # Where vLLM warms up, its compiled graph computes with memory that attention left as it was.
    undefined = ~torch.isfinite(x)
    given, x = x, x.masked_fill(undefined, 0.0)
    format = _format(fmt)
    if split and format.global_scale == "row" and x.numel():
        global_scale = global_scale_for(largest_of_ranks(x.abs().amax(-1, keepdim=True).float()), format)
    return torch.where(undefined, given, quantize_dequantize(x, format, global_scale=global_scale))


def _shape_of(
    x: torch.Tensor,
    fmt: str,
    shift: torch.Tensor | None,
    signs: int,
    rotation: int,
    global_scale: torch.Tensor | None,
    split: bool,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


direct_register_custom_op(op_name="reqat_fake_quantize", op_func=_fake_quantize, mutates_args=[], fake_impl=_shape_of)


def fake_quantize(
    x: torch.Tensor,
    fmt: str,
    *,
    shift: torch.Tensor | None = None,
    signs: int | None = None,
    rotation: int | None = None,
    global_scale: torch.Tensor | None = None,
    split: bool = False,
) -> torch.Tensor:
    """``x`` in four bits, same shape and dtype; see :func:`_fake_quantize`. ``fmt`` is of :func:`spelled`."""
    return torch.ops.vllm.reqat_fake_quantize(
        x.contiguous(), fmt, shift, -1 if signs is None else signs, rotation or 0, global_scale, split
    )
