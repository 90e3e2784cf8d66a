"""The attention function ``"reqat"``: keys and values in four bits, softmax attention in float32.

transformers lets a model name its attention function (``AttentionInterface``). Ours is used at every precision, BF16
included, so that fine-tuning, QAT and evaluation share one code path; it differs from ``"sdpa"`` in two ways only.

1. Keys and values pass through the layer's :class:`~reqat.models.kv.KVQuantizer` (``module.reqat_kv``), if it has one.
   Keys arrive here after RoPE, which is where the paper quantizes them (ReQAT, section 1); queries and probabilities
   are quantized only where a precision says so.
   Tensors that come from :class:`~reqat.models.cache.Fp4Cache` were quantized when they were appended and are marked.
   Those of :class:`~reqat.inference.packed_cache.PackedCache` hold no numbers; the cache layer behind them attends.
   Asked for attention maps (``output_attentions=True``) it computes them, and the output from them; with
   ``attention_scores=True`` beside it, it hands over what the softmax is taken of. A layer may have a softmax of its
   own (:data:`SOFTMAX`).
2. On a CPU the attention itself always runs in float32, also under bf16 autocast: torch's bf16 CPU backward is several
   times slower than the float32 one, and at head_dim 32 hand-written bf16 matmuls gain nothing over it.

Packed rows need no mask of T x T elements (625 MB at 25k tokens). Where an attention mask is expected they give
:func:`segment_mask`: integers [B, 1, 1, T] that say which trace a token is of. Attention is then computed trace by
trace (:func:`segment_attention`). :func:`dense_mask` is the same as a boolean mask, for other attention functions and
as a reference.

Shapes: B batch, H query heads, G key/value heads, T query tokens, S key tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import BaseQuantizedLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from reqat.config.errors import ReqatError

ATTENTION = "reqat"
#: Attribute of an attention module that, where it has one, computes probabilities in place of :func:`probabilities`.
SOFTMAX = "reqat_softmax"
_MARK = "_reqat_quantized"
_PACKED = "_reqat_packed"
_SEGMENTS = "_reqat_segments"
_ADDED = "_reqat_added"


def mark_quantized(tensor_BGSD: Tensor) -> Tensor:
    """Mark keys or values as quantized already, so that the attention function takes them as they are."""
    setattr(tensor_BGSD, _MARK, True)
    return tensor_BGSD


def is_quantized(tensor_BGSD: Tensor) -> bool:
    """Whether :func:`mark_quantized` was called on this very tensor object."""
    return getattr(tensor_BGSD, _MARK, False)


def segment_mask(segment_ids_BT: Tensor) -> Tensor:
    """What a decoder is given as ``attention_mask`` for packed rows: integers [B, 1, 1, T].

    ``segment_ids_BT``: 0 on padding, and on each trace of a row a number of its own. A token attends to the earlier
    tokens of its trace and to itself, a token of padding to itself alone. For the attention function of this module
    only; any other takes :func:`dense_mask`. transformers hands a 4D mask on as it is.
    """
    return segment_ids_BT[:, None, None]


def dense_mask(segment_ids_BT: Tensor) -> Tensor:
    """:func:`segment_mask` as a boolean mask [B, 1, T, T], True = attend; no row of it is empty."""
    T = segment_ids_BT.shape[1]
    mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    mask_BTT &= torch.ones(T, T, dtype=torch.bool, device=segment_ids_BT.device).tril()
    pad_BT = segment_ids_BT == 0
    own = torch.eye(T, dtype=torch.bool, device=segment_ids_BT.device)
    mask_BTT[pad_BT] = own[pad_BT.nonzero()[:, 1]]
    return mask_BTT[:, None]


@dataclass(frozen=True)
class Segments:
    """What packed rows are made of: row by row, the length of each trace, or run of padding, and whether it is a trace.

    Row by row and in its order, so that lengths are known to the host and tensors can be split.
    """

    rows: tuple[tuple[tuple[int, bool], ...], ...]

    @classmethod
    def of(cls, mask_B11T: Tensor) -> Segments:
        """Read from a :func:`segment_mask`; once, also where it goes through many layers and is on a GPU."""
        version, found = getattr(mask_B11T, _SEGMENTS, (None, None))
        if found is None or version != _version(mask_B11T):
            rows = []
            for row_T in mask_B11T[:, 0, 0].cpu():
                ids, lengths = torch.unique_consecutive(row_T, return_counts=True)
                rows.append(tuple(zip(lengths.tolist(), (ids > 0).tolist(), strict=True)))
            found = cls(tuple(rows))
            setattr(mask_B11T, _SEGMENTS, (_version(mask_B11T), found))
        return found

    @property
    def traces(self) -> list[int]:
        """Lengths of all traces, row after row."""
        return [length for row in self.rows for length, is_trace in row if is_trace]

    @property
    def longest(self) -> int:
        """Tokens of the longest trace; 1 where there is only padding."""
        return max(self.traces, default=1)


class PackedLayer(Protocol):
    """What stands behind the keys of a packed cache: see ``PackedCacheLayer.attend``."""

    def attend(
        self,
        query_BHTD: Tensor,
        length: int,
        attention_mask: Tensor | None,
        *,
        scaling: float | None,
        dropout: float,
        is_causal: bool,
    ) -> Tensor:
        """Attention over its first ``length`` tokens; returns [B, H, T, D]."""


def mark_packed(tensor_BGSD: Tensor, layer: PackedLayer) -> Tensor:
    """Mark keys or values as a stand-in for what ``layer`` holds; the attention function then calls ``attend``."""
    setattr(tensor_BGSD, _PACKED, layer)
    return tensor_BGSD


def softmax_attention(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool = True,
) -> Tensor:
    """Softmax attention with grouped key/value heads; float32 on a CPU (float64 stays float64).

    ``attention_mask`` is broadcastable to [B, H, T, S], boolean (True = attend) or additive; without one the attention
    is causal if ``is_causal`` and T > 1. A row that may attend to nothing gives zeros, not NaN. Returns [B, H, T, D].
    """
    if query_BHTD.device.type == "cpu":
        # The inner autocast region keeps torch from casting the arguments of SDPA back to bf16.
        with torch.autocast("cpu", enabled=False):
            query_BHTD = _widened(query_BHTD)
            return _attend(
                query_BHTD,
                _widened(key_BGSD),
                _widened(value_BGSD),
                _added(attention_mask, query_BHTD.dtype) if attention_mask is not None else None,
                scaling,
                dropout,
                is_causal,
            )
    # Elsewhere SDPA wants one dtype for all four; under autocast it casts them itself.
    key_BGSD, value_BGSD = key_BGSD.to(query_BHTD.dtype), value_BGSD.to(query_BHTD.dtype)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.to(query_BHTD.dtype)
    return _attend(query_BHTD, key_BGSD, value_BGSD, attention_mask, scaling, dropout, is_causal)


def segment_attention(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    segments: Segments,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """:func:`softmax_attention` of packed rows, computed for each trace of ``segments`` alone.

    What the mask of a row throws away is never computed: of a row of 512 tokens with three traces, two thirds, and of
    what is left the half above the diagonal. Same numbers up to rounding. Padding gives its own value, as a softmax
    over one key does. Returns [B, H, T, D].

    On a GPU one call of torch's variable-length flash attention does all traces, where it can: 16-bit numbers (also by
    autocast), no dropout, head_dim up to 256 in eights, compute capability 8.0. Elsewhere there is one call a trace.
    """
    if (dtype := _flash_dtype(query_BHTD, dropout)) is not None:
        return varlen_attention(
            query_BHTD.to(dtype), key_BGTD.to(dtype), value_BGTD.to(dtype), segments, scaling=scaling
        )
    H, G = query_BHTD.shape[1], key_BGTD.shape[1]
    rows = []
    # Split, not sliced: the gradient of a slice is a tensor of zeros as large as the whole.
    for row, *qkv_1TD in zip(segments.rows, *(x.split(1) for x in (query_BHTD, key_BGTD, value_BGTD)), strict=True):
        lengths = [length for length, _ in row]
        parts = []
        for (_, is_trace), q, k, v in zip(row, *(x.split(lengths, 2) for x in qkv_1TD), strict=True):
            if is_trace:
                parts.append(softmax_attention(q, k, v, None, scaling=scaling, dropout=dropout))
            else:
                parts.append(v.repeat_interleave(H // G, 1) if H != G else v)
        dtype = parts[0].dtype  # a run of padding is as wide as values are
        rows.append(torch.cat([part.to(dtype) for part in parts], 2))
    return torch.cat(rows)


def varlen_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, segments: Segments, *, scaling: float | None = None
) -> Tensor:
    """:func:`segment_attention` by one call of ``torch.nn.attention.varlen.varlen_attn``, whose limits it has.

    The tokens of all traces become one sequence [N, heads, D], cut at the traces' cumulative lengths.
    """
    from torch.nn.attention.varlen import varlen_attn

    (B, H, T, D), G, device = query_BHTD.shape, key_BGTD.shape[1], query_BHTD.device
    # [B, heads, T, D] -> [B T, heads, D]
    q, k, v = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (query_BHTD, key_BGTD, value_BGTD))
    real = [is_trace for row in segments.rows for _, is_trace in row]
    runs = [length for row in segments.rows for length, _ in row]
    real_N = torch.repeat_interleave(torch.tensor(real), torch.tensor(runs)).nonzero()[:, 0].to(device)
    ends = torch.tensor([0, *segments.traces], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = segments.longest
    out: Any = varlen_attn(
        q[real_N],
        k[real_N],
        v[real_N],
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=H != G,
    )
    whole = (v.repeat_interleave(H // G, 1) if H != G else v).to(out.dtype)
    return whole.index_copy(0, real_N, out).reshape(B, T, H, D).transpose(1, 2)


def _flash_dtype(query_BHTD: Tensor, dropout: float) -> torch.dtype | None:
    """What variable-length flash attention would compute in here; None where it cannot."""
    if not query_BHTD.is_cuda or dropout or query_BHTD.shape[-1] > 256 or query_BHTD.shape[-1] % 8:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query_BHTD.dtype
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(query_BHTD.device) >= (8, 0)
    return dtype if capable and dtype in (torch.bfloat16, torch.float16) else None


def attention_scores(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool = True,
) -> Tensor:
    """What :func:`softmax_attention` takes the softmax of, [B, H, T, S], float32 (float64 stays float64); minus
    infinity where a mask of booleans, or the causal one, hides a key. Shapes and mask as there."""
    with torch.autocast(query_BHTD.device.type, enabled=False):
        query_BHTD, key_BGSD = _widened(query_BHTD), _widened(key_BGSD).to(_widened(query_BHTD).dtype)
        B, H, T, D = query_BHTD.shape
        G, S = key_BGSD.shape[1:3]
        grouped_BGRTD = query_BHTD.reshape(B, G, H // G, T, D) * (D**-0.5 if scaling is None else scaling)
        logits_BHTS = (grouped_BGRTD @ key_BGSD[:, :, None].transpose(-1, -2)).reshape(B, H, T, S)
        if attention_mask is None and is_causal and T > 1:
            _check_square(T, S)
            attention_mask = torch.ones(T, S, dtype=torch.bool, device=query_BHTD.device).tril()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            logits_BHTS = logits_BHTS.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            logits_BHTS = logits_BHTS + attention_mask.to(logits_BHTS.dtype)
        return logits_BHTS


def probabilities(scores_BHTS: Tensor) -> Tensor:
    """Attention maps: the softmax of :func:`attention_scores` over keys, 0 where they are minus infinity; a row that
    may attend to nothing is 0."""
    empty = scores_BHTS.amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(scores_BHTS.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def _weighted(maps_BHTS: Tensor, value_BGSD: Tensor, dropout: float, kv: Any = None) -> Tensor:
    """Values weighted by attention maps, which ``kv``, if there is one, quantizes first; [B, H, T, D]."""
    B, H, T, S = maps_BHTS.shape
    G = value_BGSD.shape[1]
    with torch.autocast(maps_BHTS.device.type, enabled=False):
        dropped = F.dropout(maps_BHTS, dropout) if dropout else maps_BHTS
        dropped = dropped if kv is None else kv.weights(dropped)
        grouped = dropped.reshape(B, G, H // G, T, S) @ _widened(value_BGSD)[:, :, None].to(maps_BHTS.dtype)
    return grouped.reshape(B, H, T, value_BGSD.shape[-1])


def _check_square(T: int, S: int) -> None:
    if T != S:
        raise ReqatError(
            f"attention of {T} queries over {S} keys without a mask: torch would align the causal triangle at the "
            "wrong corner; pass a 4D attention_mask"
        )


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as torch adds it to the logits. torch makes that of a boolean one in each layer, and autograd keeps them
    all; made here it is kept once, with the mask, for all layers. Where nothing is kept, it is torch's own affair."""
    if mask.dtype != torch.bool or not torch.is_grad_enabled():
        return _widened(mask)
    version, added = getattr(mask, _ADDED, (None, None))
    if added is None or version != _version(mask) or added.dtype != dtype:
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        setattr(mask, _ADDED, (_version(mask), added))
    return added


def _version(x: Tensor) -> int:
    """Counts the writes to a tensor; tensors of inference mode have no count."""
    return -1 if x.is_inference() else x._version


def _attend(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool,
) -> Tensor:
    B, H, T, D = query_BHTD.shape
    G, S = key_BGSD.shape[1:3]
    if T == 1 and H != G and (mask is None or mask.shape[1] == 1):
        # One new token: the query heads of a group become its query rows, so keys and values are read once a group.
        grouped = F.scaled_dot_product_attention(
            query_BHTD.reshape(B, G, H // G, D), key_BGSD, value_BGSD, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        return grouped.reshape(B, H, 1, D)
    causal = is_causal and mask is None and T > 1
    if causal:
        _check_square(T, S)
    return F.scaled_dot_product_attention(
        query_BHTD, key_BGSD, value_BGSD, mask, dropout, causal, scale=scaling, enable_gqa=H != G
    )


def reqat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function in transformers' calling convention: query [B, H, T, D], key and value [B, G, S, D].

    Returns [B, T, H, D] in the query's dtype, and with ``output_attentions=True`` the attention maps [B, H, T, S]
    before dropout and rounding (with ``attention_scores=True`` the :func:`attention_scores`), else None.
    ``attention_mask``: see :func:`softmax_attention`, or a :func:`segment_mask`.
    """
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ReqatError(f"attention {ATTENTION!r} does not support {unsupported}={kwargs[unsupported]!r}")
    segments = None
    if attention_mask is not None and not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        if attention_mask.shape != (query.shape[0], 1, 1, key.shape[2]) or query.shape[2] != key.shape[2]:
            raise ReqatError(
                f"an attention mask of integers {tuple(attention_mask.shape)} for {query.shape[2]} queries over "
                f"{key.shape[2]} keys: give one of booleans or numbers to add, or a segment_mask of whole rows"
            )
        segments = Segments.of(attention_mask)
    window = kwargs.get("sliding_window")  # of a layer that slides; within it every earlier token is seen
    reach = key.shape[2] if segments is None else segments.longest
    if window is not None and reach > window:
        raise ReqatError(
            f"attention {ATTENTION!r} over {reach} tokens in a layer with a sliding window of {window}: only "
            f"full attention is supported; keep prompt and response within {window} tokens"
        )
    kv = getattr(module, "reqat_kv", None)
    dtype = query.dtype
    if kv is not None:
        query = kv.query(query)
        if not is_quantized(key):
            if kv.scales_over_tokens and attention_mask is not None and attention_mask.dtype == torch.bool:
                length = _attended(attention_mask)
                key, value, attention_mask = key[:, :, :length], value[:, :, :length], attention_mask[..., :length]
            key, value = kv(key, value)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    packed: PackedLayer | None = getattr(key, _PACKED, None)
    shown_BHTS = None
    rounds = kv is not None and kv.probabilities.format is not None
    softmax = getattr(module, SOFTMAX, None)
    if kwargs.get("output_attentions") or rounds or softmax is not None:
        if packed is not None:
            raise ReqatError(
                "attention maps: a packed cache keeps codes alone and gives none, so nothing can be shown of them or "
                "computed instead; run the prepared model before pack(), or without a cache"
            )
        if segments is not None and attention_mask is not None:
            attention_mask = dense_mask(attention_mask[:, 0, 0])  # maps are as large as it is
        scores_BHTS = attention_scores(query, key, attention_mask, scaling=scaling, is_causal=is_causal)
        maps_BHTS = (probabilities if softmax is None else softmax)(scores_BHTS)
        out_BHTD = _weighted(maps_BHTS, value, dropout, kv)
        if kwargs.get("output_attentions"):
            shown_BHTS = scores_BHTS if kwargs.get("attention_scores") else maps_BHTS
    elif packed is not None:
        out_BHTD = packed.attend(
            query, key.shape[2], attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
        )
    elif segments is not None:
        out_BHTD = segment_attention(query, key, value, segments, scaling=scaling, dropout=dropout)
    else:
        out_BHTD = softmax_attention(
            query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
        )
    return out_BHTD.transpose(1, 2).to(dtype), shown_BHTS


def reqat_mask(*, q_length: int, kv_length: int, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """transformers' mask for SDPA, which leaves a mask out only where queries and keys are the same tokens, or where
    there is one query and every key was written.

    A static cache hands over keys that nobody wrote yet. transformers leaves the mask out there too, for a prompt, and
    relies on torch's upper left triangle; ours is the lower right one.
    """
    unwritten = kv_length != q_length and bool(kwargs.get("q_offset", 0) + q_length != kv_length)
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        allow_is_causal_skip=allow_is_causal_skip and not unwritten,
        **kwargs,
    )


def check_call(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a prepared model's decoder: refuse what would leave its keys and values in other numbers.

    Raises ReqatError for another attention function, and for a cache that quantizes by itself.
    """
    config: Any = decoder.config
    if config._attn_implementation != ATTENTION:
        raise ReqatError(
            f"the model was prepared, and attention {config._attn_implementation!r} would not quantize its keys and "
            f"values: call model.set_attn_implementation({ATTENTION!r})"
        )
    cache = kwargs.get("past_key_values")
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, BaseQuantizedLayer):
            raise ReqatError(
                f"the model quantizes its keys and values itself, and a cache of {type(layer).__name__} would do it a "
                "second time: take another cache (for four bits, reqat's PackedCache)"
            )


def _attended(mask_BHTS: Tensor) -> int:
    """The number of keys up to the last one that any query may attend to."""
    attended_S = mask_BHTS.flatten(0, -2).any(0).nonzero()
    return int(attended_S[-1]) + 1 if len(attended_S) else mask_BHTS.shape[-1]


# Registered with both interfaces: without a mask function transformers would hand over no padding mask at all. A 4D
# mask given by the caller reaches the attention function untouched (transformers.masking_utils).
AttentionInterface.register(ATTENTION, reqat_attention)
AttentionMaskInterface.register(ATTENTION, reqat_mask)
