"""Q-FIT, a quantization-friendly initialization of the keys (ReQAT): scale before RoPE, shift after it, then quantize.

Keys have a few large channels and, after RoPE, a large mean; both waste the four bits of the KV cache. Two rewrites
leave full-precision attention as it is and make keys easier to quantize. A *scale* s per RoPE pair divides keys and
multiplies queries; RoPE mixes only the two channels of a pair, which share s, so the scale passes through it and can be
folded into the projections. A *shift* m is subtracted from the keys after RoPE; it moves all logits of a query by one
number, which softmax does not see, so it is never added back. How much of each is searched per layer on calibration
activations::

    s(a) = s0 ** a,   s0[h, r] = max over tokens of |K| before RoPE in the pair (r, r + D/2)
    m(b) = b * mean over tokens of K~,   K~ = RoPE(K / s(a)),   Q~ = RoPE(Q * s(a))
    E(a, b) = MSE(Attn(Q, K, V), Attn(Q~, QKV4(K~ - m(b)), QKV4(V)))      a, b in {0, 1/20, ..., 19/20}

The attention is causal and scaled by 1/sqrt(D). (0, 0) is on the grid and wins ties, so the error never grows.

What makes 400 attentions a layer affordable, all of it exact:

- RoPE(K / s) = RoPE(K) / s, so RoPE runs once a layer, and the mean scales too: mean K~ = mean K / s.
- Q~ . K^ = RoPE(Q) . (s * K^), so queries, cut into blocks in the layout of a matrix product, stay as they are for
  the whole grid; so do the reference output and the quantized values.
- The reference's log-sum-exp of a query's logits (minus q . m) stands in for the row maximum of softmax. It rides in
  the product as two more columns of Q and K, softmax's denominator as one more column of V: a candidate costs one
  matrix product, one exponential in place and one more product, on the causal blocks alone. Where quantization moved a
  logit so far that this would over- or underflow, the candidate is computed again with its own row maximum.

Models with QK norm (Qwen3) normalize away a scale in the projection, so it goes into the norms' weights. One weight
serves all heads: s is shared over heads (``qk_norm="shared"``, what engines can load), or the weight is widened to one
row a head (``"widened"``).

Shapes: n sequences, T tokens, H query heads, G key/value heads, D head_dim, R query rows of a block, L layers,
A and B sizes of the grid.
"""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import MissingFileError, ReqatError, unknown
from reqat.config.files import explain, parse_json
from reqat.config.progress import bar
from reqat.formats import Format, quantize_dequantize
from reqat.models import QuantLinear, precision_of, prepare
from reqat.models.architecture import DecoderLayer, HeadShape, decoder_layers, head_shape
from reqat.quant import Precision, block_hadamard
from reqat.recipes.layerwise import Step, hooked, on_output, walk

Variant = Literal["paper", "released"]
QKNorm = Literal["shared", "widened"]

_REMEDY = "calibrate again"
# Smallest s0: a channel that calibration never saw move must not blow up when divided by it.
_EPS = 1e-5
# Query rows of a block: small enough to skip most of the causal triangle's empty half, large enough for the products.
_ROWS = 64
_MIN_ROWS = 16
# Logits held at a time: 1 MiB of float32 stays in a core's cache; a GPU wants big launches.
_CPU_LOGITS, _GPU_LOGITS = 2**18, 2**27
# A softmax denominator, relative to the reference's, outside this range may have lost precision: compute it again.
_SAFE = (1e-20, 1e20)


@dataclass(frozen=True)
class QFitResult:
    """What :func:`calibrate` found, for :func:`fold`, for the record, and for a heat map.

    ``errors`` ``[L, A, B]`` float64: mean squared attention error at ``alphas[i], betas[j]``. ``choice`` ``[L]``: the
    best ``(i, j)``. ``scale``, ``shift`` ``[L, G, D]`` float32: s and m there. ``seconds`` ``[L]``: each grid's time.
    ``qk_norm``: where the scale goes, ``"none"`` for models without QK norm.
    """

    precision: str
    variant: Variant
    qk_norm: Literal["none", "shared", "widened"]
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    errors: Tensor
    choice: tuple[tuple[int, int], ...]
    scale: Tensor
    shift: Tensor
    seconds: tuple[float, ...]

    @property
    def alpha(self) -> tuple[float, ...]:
        """The chosen exponent of each layer."""
        return tuple(self.alphas[i] for i, _ in self.choice)

    @property
    def beta(self) -> tuple[float, ...]:
        """The chosen share of the mean of each layer."""
        return tuple(self.betas[j] for _, j in self.choice)

    @property
    def error_before(self) -> tuple[float, ...]:
        """Attention error of each layer without Q-FIT."""
        return tuple(self.errors[:, 0, 0].tolist())

    @property
    def error_after(self) -> tuple[float, ...]:
        """Attention error of each layer at the chosen point."""
        return tuple(float(self.errors[layer, i, j]) for layer, (i, j) in enumerate(self.choice))

    def metrics(self) -> dict[str, Any]:
        """JSON-ready values for the record: choices, errors before and after, and the error map ``[L][A][B]``."""
        before, after = sum(self.error_before), sum(self.error_after)
        return {
            "precision": self.precision,
            "variant": self.variant,
            "qk_norm": self.qk_norm,
            "alpha": list(self.alpha),
            "beta": list(self.beta),
            "error_before": list(self.error_before),
            "error_after": list(self.error_after),
            "error_reduction": 1 - after / before if before else 0.0,
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "error_map": [[[float(f"{e:.6g}") for e in row] for row in layer] for layer in self.errors.tolist()],
            "seconds_per_layer": list(self.seconds),
        }

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, everything included."""
        about = {
            "kind": "qfit",
            "precision": self.precision,
            "variant": self.variant,
            "qk_norm": self.qk_norm,
            "alphas": self.alphas,
            "betas": self.betas,
            "choice": self.choice,
            "seconds": self.seconds,
        }
        tensors = {"errors": self.errors, "scale": self.scale, "shift": self.shift}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, str(path), {"reqat": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> QFitResult:
        """Read what :meth:`save` wrote. Raises ``ReqatError`` naming the file for any other, or a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such Q-FIT result; calibrate first, or check the path.")
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {})["reqat"]
                tensors = {key: file.get_tensor(key) for key in ("errors", "scale", "shift")}
            about = parse_json(text, str(path), "Q-FIT result", _REMEDY)
            if about["kind"] != "qfit" or not all(isinstance(about[key], str) for key in ("precision", "variant")):
                raise ValueError(f"kind {about['kind']!r}")
            if about["variant"] not in ("paper", "released") or about["qk_norm"] not in ("none", "shared", "widened"):
                raise ValueError(f"variant {about['variant']!r}, QK norm {about['qk_norm']!r}")
            result = cls(
                precision=about["precision"],
                variant=about["variant"],
                qk_norm=about["qk_norm"],
                alphas=tuple(map(float, about["alphas"])),
                betas=tuple(map(float, about["betas"])),
                choice=tuple((operator.index(i), operator.index(j)) for i, j in about["choice"]),
                seconds=tuple(map(float, about["seconds"])),
                **tensors,
            )
            result._check()
        except ReqatError:
            raise
        except OSError as error:
            raise explain(error, path) from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReqatError(f"{path} is not a whole Q-FIT result ({error}); {_REMEDY}.") from error
        return result

    def _check(self) -> None:
        """Raise ValueError unless the parts belong together and hold numbers that calibration gives."""
        layers, grid = len(self.choice), (len(self.alphas), len(self.betas))
        if tuple(self.errors.shape) != (layers, *grid) or len(self.seconds) != layers:
            raise ValueError(f"errors of shape {tuple(self.errors.shape)} for {layers} layers and a grid of {grid}")
        if any(not (0 <= i < grid[0] and 0 <= j < grid[1]) for i, j in self.choice):
            raise ValueError(f"a choice outside the grid of {grid}")
        if self.scale.ndim != 3 or self.scale.shape != self.shift.shape or len(self.scale) != layers:
            raise ValueError(f"scale {tuple(self.scale.shape)} and shift {tuple(self.shift.shape)} of {layers} layers")
        for name, tensor, dtype in (
            ("errors", self.errors, torch.float64),
            ("scale", self.scale, torch.float32),
            ("shift", self.shift, torch.float32),
        ):
            if tensor.dtype != dtype or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is {tensor.dtype}, or not finite, where {dtype} is needed")
        if bool((self.scale <= 0).any()):
            raise ValueError("a scale that is not positive")


def calibrate(
    model: PreTrainedModel,
    precision: Precision | str,
    input_ids: Tensor,
    *,
    grid: int = 20,
    scale: bool = True,
    shift: bool = True,
    variant: Variant = "paper",
    qk_norm: QKNorm = "shared",
    queries: int | None = None,
    progress: bool = True,
) -> QFitResult:
    """Search scale and shift of every layer on the full-precision ``model``, which is left as it is.

    Args:
        model: a decoder whose linear layers and KV cache are not quantized.
        precision: how keys and values will be quantized (a static global scale is taken from the calibration data).
        input_ids: ``[n, T]`` int64, whole sequences without padding.
        grid: the exponents a and shares b are 0, 1/grid, ..., (grid-1)/grid.
        scale, shift: False holds a (or b) at 0: the paper's ablations.
        variant: ``"paper"``; or ``"released"``, where the authors' code differs: the shift starts from the mean of the
            keys *before* RoPE, and the attention of the calibration is neither causal nor scaled by 1/sqrt(D).
        qk_norm: for models with QK norm, see the module's docstring; ignored for others.
        queries: compare the attention outputs of this many query positions a sequence, evenly spread, instead of all
            (None: exact). Keys and values are always all there; time falls in proportion.
        progress: show a bar.

    Raises:
        ValueError: no quantized keys, a model that is quantized already or not supported, bad ``input_ids`` or options.
    """
    precision = Precision.parse(precision)
    if precision.keys is None:
        raise ReqatError(f"precision {precision} does not quantize keys, so there is nothing for Q-FIT to fit")
    if grid < 1:
        raise ReqatError(f"Q-FIT's grid must have at least 1 point a side, got {grid}")
    if variant not in ("paper", "released"):
        raise unknown("Q-FIT variant", variant, ("paper", "released"))
    if qk_norm not in ("shared", "widened"):
        raise unknown("qk_norm", qk_norm, ("shared", "widened"))
    if queries is not None and queries < 1:
        raise ReqatError(f"Q-FIT needs at least 1 query position a sequence, got queries={queries}")
    layers = decoder_layers(model)
    _check_full_precision(layers)
    heads = head_shape(model)
    points = tuple(i / grid for i in range(grid))
    alphas, betas = points if scale else (0.0,), points if shift else (0.0,)
    norms = [_has_qk_norm(layer.attention) for layer in layers]
    where = qk_norm if all(norms) else "none"
    found, seconds = [], []
    with bar("Q-FIT", len(layers) * len(alphas), "scales", enabled=progress) as shown:
        for step in walk(model, input_ids):
            activations = _capture(step, heads)
            began = time.perf_counter()
            found.append(
                _search(
                    activations,
                    precision,
                    alphas,
                    betas,
                    causal=variant == "paper",
                    scaling=_scaling(step.layer, heads) if variant == "paper" else 1.0,
                    mean_before_rope=variant == "released",
                    share_heads=where == "shared",
                    queries=queries,
                    name=step.layer.name,
                    advance=shown.update,
                )
            )
            seconds.append(time.perf_counter() - began)
    return QFitResult(
        precision=str(precision),
        variant=variant,
        qk_norm=where,
        alphas=alphas,
        betas=betas,
        errors=torch.stack([f.errors for f in found]),
        choice=tuple(f.choice for f in found),
        scale=torch.stack([f.scale for f in found]),
        shift=torch.stack([f.shift for f in found]),
        seconds=tuple(seconds),
    )


@torch.no_grad()
def fold(model: PreTrainedModel, result: QFitResult) -> PreTrainedModel:
    """Put scale and shift into ``model``, in place, and return it; what it computes in full precision stays the same.

    The scale multiplies the rows of Wq and bq and divides those of Wk and bk (with QK norm: the norms' weights). The
    shift becomes ``attention.reqat_kv.shift``, which takes effect where keys are quantized; a model that was not
    prepared is prepared for BF16 to have the place. Computed in float64, rounded once to the weights' type.

    Raises ReqatError for a result of another model, and for frozen weights.
    """
    layers = decoder_layers(model)
    heads = head_shape(model)
    expected = (len(layers), heads.kv_heads, heads.head_dim)
    if tuple(result.scale.shape) != expected:
        raise ReqatError(
            f"the Q-FIT result is of another model: it has layers, KV heads and head_dim {tuple(result.scale.shape)}, "
            f"this model has {expected}"
        )
    normed = all(_has_qk_norm(layer.attention) for layer in layers)
    if normed != (result.qk_norm != "none"):
        raise ReqatError(
            f"the Q-FIT result is of another model: it was calibrated with qk_norm={result.qk_norm!r}, and this model "
            f"{'has' if normed else 'has no'} QK norm"
        )
    _check_full_precision(layers, frozen_only=True)
    if precision_of(model) is None:
        prepare(model, "BF16")
    repeat = heads.query_heads // heads.kv_heads
    for layer, scale_GD, shift_GD in zip(layers, result.scale.double(), result.shift, strict=True):
        attention: Any = layer.attention
        scale_HD = scale_GD.repeat_interleave(repeat, dim=0)
        if result.qk_norm == "none":
            _multiply_rows(attention.q_proj, scale_HD.reshape(-1))
            _multiply_rows(attention.k_proj, scale_GD.reciprocal().reshape(-1))
        else:
            widen = result.qk_norm == "widened"
            _multiply_norm(attention.q_norm, scale_HD, widen)
            _multiply_norm(attention.k_norm, scale_GD.reciprocal(), widen)
        attention.reqat_kv.set_shift(shift_GD.to(attention.k_proj.weight.device))
    return model


def _multiply_rows(linear: nn.Linear, factors: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    factors = factors.to(weight.device)
    weight.copy_(weight.double() * factors[:, None])
    if bias is not None:
        bias.copy_(bias.double() * factors)


def _multiply_norm(norm: Any, factors_HD: Tensor, widen: bool) -> None:
    weight = norm.weight
    factors_HD = factors_HD.to(weight.device)
    if not widen and weight.ndim == 1:
        assert (factors_HD == factors_HD[0]).all(), "one norm weight serves all heads"
        weight.copy_(weight.double() * factors_HD[0])
    else:
        # [D] or [heads, D]; the norm's own code multiplies [..., heads, D] by it either way.
        wide = (weight.double() * factors_HD).to(weight)
        norm.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)


# --- the model's side: what a layer's attention sees ------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Full-precision attention inputs of one layer, float32: ``query`` [n, H, T, D], ``key``, ``value`` [n, G, T, D].

    Queries and keys are taken before RoPE (after QK norm); ``cos``, ``sin`` [T, D] are RoPE's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor


def activations(model: PreTrainedModel, input_ids: Tensor) -> list[Activations]:
    """What every layer's attention works on for ``input_ids`` [n, T] (whole sequences without padding): what
    :func:`calibrate` searches on, for looking at keys.

    Raises ``ReqatError`` for ids that the model does not know, and models without rotary embeddings.
    """
    heads = head_shape(model)
    return [_capture(step, heads) for step in walk(model, input_ids)]


def _has_qk_norm(attention: nn.Module) -> bool:
    return isinstance(getattr(attention, "q_norm", None), nn.Module)


def _scaling(layer: DecoderLayer, heads: HeadShape) -> float:
    scaling = getattr(layer.attention, "scaling", None)
    return float(scaling) if scaling is not None else heads.head_dim**-0.5


def _check_full_precision(layers: list[DecoderLayer], *, frozen_only: bool = False) -> None:
    for layer in layers:
        for name, module in layer.module.named_modules():
            if not isinstance(module, QuantLinear):
                continue
            if module.frozen:
                raise ReqatError(f"{layer.name}.{name} is frozen: calibrate before quantizing, on the model as loaded")
            quantized = module.weight_quantizer.format or module.input_quantizer.format
            if quantized is not None and not frozen_only:
                raise ReqatError(
                    f"Q-FIT calibrates on the full-precision model, but {layer.name}.{name} is quantized to "
                    f"{quantized}: calibrate before prepare(model, precision)"
                )
        kv: Any = getattr(layer.attention, "reqat_kv", None)
        if kv is not None and not frozen_only and (kv.key.format or kv.value.format):
            raise ReqatError(
                f"Q-FIT calibrates on the full-precision model, but the KV cache of {layer.name} is quantized: "
                "calibrate before prepare(model, precision)"
            )


def _capture(step: Step, heads: HeadShape) -> Activations:
    """Run ``step`` once and keep what its attention works on."""
    attention: Any = step.layer.attention
    query_from, key_from = attention.q_proj, attention.k_proj
    if _has_qk_norm(attention):
        query_from, key_from = attention.q_norm, attention.k_norm
    kept: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}

    def keep(role: str, count: int) -> Any:
        def look(out: Tensor) -> None:
            split = out.reshape(*out.shape[:2], count, heads.head_dim)
            kept[role].append(split.transpose(1, 2).to(torch.float32, copy=True))

        return look

    handles = [
        on_output(query_from, keep("query", heads.query_heads)),
        on_output(key_from, keep("key", heads.kv_heads)),
        on_output(attention.v_proj, keep("value", heads.kv_heads)),
    ]
    with hooked(handles):
        step.outputs = step.run()
    position = step.kwargs[0].get("position_embeddings")
    if position is None or position[0].shape[-1] != heads.head_dim:
        found = None if position is None else tuple(position[0].shape)
        raise ReqatError(
            f"{step.layer.name}: Q-FIT needs rotary position embeddings over the whole head_dim of {heads.head_dim}, "
            f"found {found}"
        )
    query, key, value = (torch.cat(kept[role]) for role in ("query", "key", "value"))
    return Activations(query, key, value, position[0][0].float(), position[1][0].float())


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [..., T, D], pairs (r, r + D/2), by ``cos`` and ``sin`` [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    errors: Tensor  # [A, B] float64
    choice: tuple[int, int]
    scale: Tensor  # [G, D]
    shift: Tensor  # [G, D]


def pair_scale(key: Tensor, *, share_heads: bool = False) -> Tensor:
    """s0 [G, D] from keys before RoPE [n, G, T, D]: the largest magnitude of each pair, the same in both halves."""
    amax_GD = key.abs().amax(dim=(0, 2))
    first, second = amax_GD.chunk(2, dim=-1)
    pair = torch.maximum(first, second).clamp(min=_EPS)
    if share_heads:
        pair = pair.amax(dim=0, keepdim=True).expand_as(pair)
    return torch.cat((pair, pair), dim=-1)


@torch.no_grad()
def _search(
    act: Activations,
    precision: Precision,
    alphas: tuple[float, ...],
    betas: tuple[float, ...],
    *,
    causal: bool,
    scaling: float,
    mean_before_rope: bool,
    share_heads: bool,
    queries: int | None,
    name: str,
    advance: Callable[[], None],
) -> _Found:
    assert precision.keys is not None
    query, key = rope(act.query, act.cos, act.sin), rope(act.key, act.cos, act.sin)
    s0_GD = pair_scale(act.key, share_heads=share_heads).double()
    mean_GD = (act.key if mean_before_rope else key).double().mean(dim=(0, 2))
    value_hat = act.value if precision.values is None else _quantized(act.value, precision.values, f"{name} values")
    error = AttentionError(
        query, key, act.value, value_hat, mean_GD.float(), causal=causal, scaling=scaling, queries=queries
    )
    errors = torch.zeros(len(alphas), len(betas), dtype=torch.float64)
    scales_AGD = torch.stack([(s0_GD**a).float() for a in alphas])
    # [A, B, G, D]; mean K~ = mean K / s.
    shifts = torch.stack([torch.stack([(b * mean_GD / s).float() for b in betas]) for s in scales_AGD.double()])
    for i in range(len(alphas)):
        scaled = key / scales_AGD[i][:, None]
        for j, b in enumerate(betas):
            shifted = scaled - shifts[i, j][:, None]
            if precision.kv_rotation is not None:  # back into the queries' basis after quantizing
                shifted = block_hadamard(shifted, precision.kv_rotation)
            key_hat = _quantized(shifted, precision.keys, f"{name} keys")
            if precision.kv_rotation is not None:
                key_hat = block_hadamard(key_hat, precision.kv_rotation)
            errors[i, j] = error(key_hat, b, scales_AGD[i])
        advance()
    best = int(errors.argmin())
    # argmin names no winner among equals; the first one is wanted.
    best = int((errors.flatten() == errors.flatten()[best]).nonzero()[0])
    i, j = divmod(best, len(betas))
    return _Found(errors, (i, j), scales_AGD[i].cpu(), shifts[i, j].cpu())


def _quantized(x: Tensor, fmt: Format, name: str) -> Tensor:
    if fmt.global_scale == "static":  # calibrated on these very activations
        fmt = fmt.replace(global_scale="dynamic")
    return quantize_dequantize(x, fmt, name=name)


class AttentionError:
    """Mean squared difference of attention outputs from the full-precision ones, for many candidate keys.

    Args:
        query: [n, H, T, D] after RoPE.
        key: [n, G, T, D] after RoPE; ``value`` likewise.
        value_hat: quantized values.
        mean: [G, D]; a candidate's keys are shifted by ``share * mean`` (in the queries' basis, not divided by s).
        causal, scaling: of the attention.
        queries: how many query positions a sequence, evenly spread, are compared; None for all.

    Calling it with ``key_hat`` [n, G, T, D], ``share`` and the ``scale`` [G, D] by which the keys were divided gives
    the error.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        value_hat: Tensor,
        mean: Tensor,
        *,
        causal: bool = True,
        scaling: float,
        queries: int | None = None,
    ) -> None:
        n, H, T, D = query.shape
        G = key.shape[1]
        group = H // G
        self.batch, self.tokens, self.head_dim = n * G, T, D
        positions = torch.arange(T, device=query.device)
        if queries is not None and queries < T:
            # The last of each of `queries` equal stretches, so that the average context is a little over half of T.
            positions = (torch.arange(1, queries + 1, device=query.device) * T) // queries - 1
        self.numel = n * H * len(positions) * D
        grouped = query.reshape(n, G, group, T, D) * scaling
        value_one = _with_columns(value, 1.0).flatten(0, 1)
        self._value_hat = _with_columns(value_hat, 1.0).flatten(0, 1)
        limit = _CPU_LOGITS if query.device.type == "cpu" else _GPU_LOGITS
        key_flat = key.flatten(0, 1)
        self._blocks: list[_QueryBlock] = []
        # Fewer rows are fewer a block, so that a block spans the same stretch and skips as much of the triangle.
        for rows in positions.split(max(_MIN_ROWS, _ROWS * len(positions) // T) if causal else _ROWS):
            end = int(rows[-1]) + 1 if causal else T
            # Keys that every row of the block sees need no mask; [start, end) are the others.
            start = int(rows[0]) + 1 if causal else T
            seen = (torch.arange(start, end, device=query.device) <= rows[:, None]).float()
            q = grouped[:, :, :, rows].reshape(self.batch, group * len(rows), D)
            chunk = max(1, limit // (q.shape[1] * end))
            block = _QueryBlock(q, q, seen.repeat(group, 1) if start < end else None, start, end, chunk)
            columns, reference = [], []
            for part in block.parts(self.batch):
                logits = torch.bmm(q[part], key_flat[part, :end].transpose(1, 2))
                block.hide_(logits)
                lse = logits.logsumexp(-1, keepdim=True)
                weighted = torch.bmm(logits.sub_(lse).exp_(), value_one[part, :end])
                reference.append(weighted[..., :D])
                columns.append(-lse)
            shifted = torch.matmul(q.view(n, G, -1, D), mean[:, :, None]).reshape(self.batch, -1, 1)
            # Q gets the columns [-lse, q . mean], K [1, share]: the product is the logit minus its maximum's stand-in.
            block.query = torch.cat([q, torch.cat(columns), shifted], dim=-1)
            block.reference = torch.cat(reference)
            self._blocks.append(block)
        largest = max(b.query.shape[1] * b.end * min(b.chunk, self.batch) for b in self._blocks)
        self._logits = query.new_empty(largest)
        self._key = query.new_empty(self.batch, T, D + 2)
        self._key[..., D] = 1.0

    def __call__(self, key_hat: Tensor, share: float, scale: Tensor | None = None) -> float:
        """The error of ``key_hat`` [n, G, T, D]."""
        D = self.head_dim
        n, G, T, _ = key_hat.shape
        keys = self._key.view(n, G, T, D + 2)[..., :D]
        if scale is None:
            keys.copy_(key_hat)
        else:
            torch.mul(key_hat, scale[:, None], out=keys)
        self._key[..., D + 1] = share
        error, safe = self._sum(own_maximum=False)
        if not safe:
            error, _ = self._sum(own_maximum=True)
        return error / self.numel

    def _sum(self, own_maximum: bool) -> tuple[float, bool]:
        D = self.head_dim
        total = self._logits.new_zeros((), dtype=torch.float64)
        low, high = [], []
        for block in self._blocks:
            for part in block.parts(self.batch):
                q = block.query[part]
                shape = (q.shape[0], q.shape[1], block.end)
                logits = self._logits[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.bmm(q, self._key[part, : block.end].transpose(1, 2), out=logits)
                if own_maximum:
                    block.hide_(logits)
                    logits.sub_(logits.amax(-1, keepdim=True))
                logits.exp_()
                # Hiding with zeros after exp, not -inf before: exp of what underflows is many times slower. An unseen
                # logit that overflowed makes NaN here, and the candidate is computed again.
                if block.seen is not None:
                    logits[..., block.start :].mul_(block.seen)
                weighted = torch.bmm(logits, self._value_hat[part, : block.end])
                denominator = weighted[..., D:]
                least, most = torch.aminmax(denominator)
                low.append(least)
                high.append(most)
                out = torch.div(weighted[..., :D], denominator).sub_(block.reference[part]).flatten()
                total += torch.dot(out, out)
        safe = bool(torch.stack(low).amin() > _SAFE[0]) and bool(torch.stack(high).amax() < _SAFE[1])
        return float(total), safe


@dataclass
class _QueryBlock:
    """Query rows of all sequences and heads that are handled together.

    ``query`` [n G, group R, D + 2]; ``reference`` [n G, group R, D]; ``seen`` [group R, end - start], 1 where a row may
    see the key and 0 elsewhere, None if it is all 1; ``chunk`` of the n G at a time.
    """

    query: Tensor
    reference: Tensor
    seen: Tensor | None
    start: int
    end: int
    chunk: int

    def parts(self, batch: int) -> list[slice]:
        """Slices of the first axis."""
        return [slice(i, i + self.chunk) for i in range(0, batch, self.chunk)]

    def hide_(self, logits: Tensor) -> None:
        """Set the logits of unseen keys to -inf, in place."""
        if self.seen is not None:
            logits[..., self.start :].masked_fill_(self.seen == 0, -torch.inf)


def _with_columns(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), value)], dim=-1)
