"""What a rotation of blocks gains or loses: which tensors have outliers, and which part of a precision pays.

A rotation spreads an outlier over its block. Where blocks have none there is nothing to spread: a rotated block is
nearly Gaussian, and what it was before decides whether that is better or worse. For each kind of tensor that is
quantized (weights, and inputs of q/k/v, o, gate/up and down) this measures

- ``peak``: the mean over blocks of largest magnitude / root mean square (Gaussian blocks of 32: about 2.2), and
  ``kurtosis`` of all numbers divided by their block's root mean square (Gaussian: 3, less in small blocks);
- ``error``: what rounding it changes in the layer's output, relative, mean square;

both as the tensor is and rotated, and for the model as a whole the forward divergence ``KL(full precision || model)``
in nats a response token, with weights alone quantized, inputs alone, and both. ``--methods`` adds post-training methods
at one precision, by the same measure::

    python tools/rotation.py --model results/base/model --tier testbed
    python tools/rotation.py --model results/base/model --tier testbed --methods rtn,quarot,flatquant \\
        --precision INT4-row-W4A4KV4

Traces are those of the tier's families; the first ``--sequences`` calibrate methods, those after them are measured on.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reqat.config.paths import Paths
from reqat.config.stage import DataSettings
from reqat.config.tier import load_tier
from reqat.data import Trace, with_bos
from reqat.evaluation.forcing import batches_by_length, forced_logits
from reqat.formats import get_format, quantize_dequantize
from reqat.methods.ptq import quantize
from reqat.models import load_model, load_tokenizer, prepare
from reqat.models.adapters import blocks_of
from reqat.pipeline.generated import traces
from reqat.quant import block_hadamard

_SPAN = 2048  # tokens of a batch


Pair = tuple[list[int], list[int]]
"""Token ids of prompt and response."""


def pair_of(trace: Trace, tokenizer: Any) -> Pair:
    """What a model reads of a trace."""
    return [*([tokenizer.bos_token_id] if trace.bos else []), *trace.prompt_ids], list(trace.response_ids)


def shape_of(x: Tensor, block: int) -> tuple[float, float]:
    """Mean peak over root mean square of blocks, and kurtosis of the numbers so normalized."""
    blocks = x.double().reshape(-1, block)
    rms = blocks.square().mean(-1, keepdim=True).sqrt()
    kept = (rms > 0).squeeze(-1)
    unit = blocks[kept] / rms[kept]
    return float(unit.abs().amax(-1).mean()), float(unit.pow(4).mean())


def error_of(x: Tensor, w: Tensor, fmt: Any) -> float:
    """Relative mean squared error of ``x W^T`` that rounding x [M, K] to ``fmt`` makes; w [N, K]."""
    exact = x @ w.T
    return float(((quantize_dequantize(x, fmt) @ w.T - exact).double().square().sum()) / exact.double().square().sum())


def divergence(model: Any, reference: Any, pairs: list[Pair]) -> Tensor:
    """``KL(reference || model)`` in nats a response token, of each trace [n]; float64."""
    found = torch.zeros(len(pairs), dtype=torch.float64)
    for batch in batches_by_length([len(p) + len(r) - 1 for p, r in pairs], _SPAN):
        read = [pairs[i] for i in batch]
        with torch.no_grad():
            ours = torch.cat([logits.clone() for _, logits, _ in forced_logits(model, read, None)])
            theirs = torch.cat([logits.clone() for _, logits, _ in forced_logits(reference, read, None)])
        log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1).split([len(response) for _, response in read])
        found[batch] = torch.stack([kl.mean() for kl in each])
    return found


def _mean(values: Tensor) -> str:
    """Mean and its standard error over traces."""
    return f"{float(values.mean()):.4f} +- {float(values.std() / len(values) ** 0.5):.4f}"


@torch.no_grad()
def tensors(model: Any, pairs: list[Pair]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(kind, inputs [M, K], weights [N, K]) of each kind of linear layer, in float32, over all blocks of one width."""
    seen: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}
    hooks = []
    for block in blocks_of(model):
        for group in block.groups():
            kind = "/".join(site.attribute.removesuffix("_proj") for site in group.sites)
            weights.setdefault(kind, []).extend(site.module.weight.detach().float() for site in group.sites)
            hooks.append(
                group.sites[0].module.register_forward_pre_hook(
                    lambda _m, args, kind=kind: seen.setdefault(kind, []).append(args[0].flatten(0, -2).float())
                )
            )
    for prompt, response in pairs[:8]:
        model(torch.tensor([[*prompt, *response]]))
    for hook in hooks:
        hook.remove()
    for kind, inputs in seen.items():
        yield kind, torch.cat(inputs), torch.cat(weights[kind])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tier", default="testbed")
    parser.add_argument("--traces", type=int, default=64, help="held-out traces to measure on")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--sequence-tokens", type=int, default=192)
    parser.add_argument("--methods", default="", help="methods to compare, method or method:option=value+option=value")
    parser.add_argument("--precision", default="", help="of --methods; comma-separated")
    args = parser.parse_args()
    data = load_tier(args.tier, Paths().config).data
    tokenizer = with_bos(load_tokenizer(args.model))
    settings = DataSettings(families=data.families, tokens=1, seed=0, split="validation", tokenizer="model")
    stream = traces(settings, tokenizer)
    need = args.sequences * args.sequence_tokens
    ids: list[int] = []
    for trace in stream:
        ids += itertools.chain(*pair_of(trace, tokenizer))
        if len(ids) >= need:
            break
    calibration = torch.tensor(ids[:need]).reshape(args.sequences, args.sequence_tokens)
    rows = [pair_of(trace, tokenizer) for trace in itertools.islice(stream, args.traces)]
    reference = load_model(args.model, dtype=torch.float32).eval()
    if args.methods:
        first: Tensor | None = None
        for precision, chosen in itertools.product(args.precision.split(","), args.methods.split(",")):
            name, _, given = chosen.partition(":")
            options = dict(option.split("=") for option in given.split("+")) if given else {}
            options = {key: float(value) if "." in value else int(value) for key, value in options.items()}
            model = load_model(args.model, dtype=torch.float32)
            quantize(name, model, precision, calibration, progress=False, **options)
            found_kl = divergence(model, reference, rows)
            first = found_kl if first is None else first
            print(
                f"{precision:26} {chosen:24} KL {_mean(found_kl)}; beyond the first: {_mean(found_kl - first)}",
                flush=True,
            )
        return
    print(f"{'rounded':18} {'peak':>6} {'rot.':>6} {'kurt.':>6} {'rot.':>6}  "
          f"{'MXFP4 error':>11} {'rot.':>8} {'NVFP4 error':>11} {'rot.':>8}")  # fmt: skip
    kinds = []
    for kind, x, w in tensors(reference, rows):
        kinds.append(kind)
        for what, values, other in ((f"{kind} input", x, w), (f"{kind} weight", w, x)):
            found = []
            for name, block in (("MXFP4", 32), ("NVFP4", 16)):
                fmt, turned = get_format(name), block_hadamard(values, block)
                found.append((shape_of(values, block), shape_of(turned, block), error_of(values, other, fmt),
                              error_of(turned, block_hadamard(other, block), fmt)))  # fmt: skip
            (a, b, mx, mx_turned), (_, _, nv, nv_turned) = found
            print(f"{what:18} {a[0]:6.2f} {b[0]:6.2f} {a[1]:6.2f} {b[1]:6.2f}  "
                  f"{mx:11.5f} {mx_turned:8.5f} {nv:11.5f} {nv_turned:8.5f}", flush=True)  # fmt: skip
    for name, block in (("MXFP4", 32), ("NVFP4", 16)):
        parts: list[tuple[str, list[str]]] = [("W4A16", []), ("W16A4", []), ("W4A4", [])]
        parts += [
            ("W16A4", [f"*.{n}_proj" for other in kinds if other != kind for n in other.split("/")]) for kind in kinds
        ]
        for at, (spec, skip) in enumerate(parts):
            plain, turned = (
                divergence(_prepared(args.model, f"{name}-{spec}", rotation, skip), reference, rows)
                for rotation in (None, block)
            )
            label = f"{name}-{spec}" + (f" {kinds[at - 3]}" if at >= 3 else "")
            print(f"{label:22} KL {_mean(plain)}; rotated in blocks of {block}: {_mean(turned)}; "
                  f"difference {_mean(turned - plain)}", flush=True)  # fmt: skip


def _prepared(path: str, precision: str, rotation: int | None, skip: list[str]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers are left alone on purpose
        model = load_model(path, dtype=torch.float32)
        prepare(model, precision, rotation=rotation, skip=skip)
    return model.eval()


if __name__ == "__main__":
    main()
