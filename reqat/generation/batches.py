"""The one generation path: every response that this project grades or analyses is decoded here.

A batch of prompts is padded on the left, its keys and values are computed once (once for each *distinct* prompt:
sampling seeds share them), and then every row grows by one token a step. Four things make this fast enough for a CPU,
and none of them may change a row's tokens:

* prompts of like length are batched together, so there is little padding; where all are equal there is no mask at all;
* padding positions repeat the row's first token and see only themselves, so they compute what that token computes and
  add nothing to the largest magnitude that a dynamic quantizer looks for;
* finished rows leave the batch, and the cache, once they are a quarter of it;
* random numbers belong to the row and the step, not to the batch (:mod:`reqat.generation.sampling`).

What can still tie a row to its batch is the model: per-tensor ``dynamic`` scales look at all rows by definition, and
matrix kernels may sum in another order for another batch size. ``row`` and ``static`` scales have only the latter.

Shapes: B rows, U distinct prompts, P padded prompt length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import read_json_list, write_file
from reqat.config.policy import Decoding
from reqat.config.progress import bar
from reqat.generation.processors import BatchStart
from reqat.generation.reset import ReSET
from reqat.generation.sampling import greedy_tokens, row_state, sample_tokens, uniforms
from reqat.inference.backend import checked_at_end
from reqat.inference.decode_step import DecodeStep, reason_against, warn_of
from reqat.inference.packed import is_packed, packs_cache
from reqat.inference.packed_cache import PackedCache
from reqat.models.attention import ATTENTION
from reqat.models.cache import Fp4Cache
from reqat.models.limits import attention_window, check_token_ids, end_ids, forget_lengths, position_limit
from reqat.models.modes import evaluating
from reqat.quant import autocast

if TYPE_CHECKING:
    from transformers import Cache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

# Finished rows are dropped when they are this share of the batch: copying the cache costs about a step, and the sizes
# it is copied at fall geometrically, so all compactions of a batch together cost about four copies of the first.
_COMPACT_SHARE = 0.25
# Default batches fit in this many bytes and rows. Beyond about a thousand rows a CPU core gains nothing.
_BATCH_BYTES = 768 * 2**20
_BATCH_ROWS = 1024
# Random numbers are drawn for this many steps at a time.
_RANDOM_STEPS = 64


@dataclass(frozen=True)
class Generation:
    """A response: its tokens without the end-of-sequence token, whether it ended with one, and with which."""

    token_ids: tuple[int, ...]
    finished: bool
    end_id: int | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that the model generated, the end-of-sequence token included."""
        return len(self.token_ids) + int(self.finished)

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Every token that the model generated, the end-of-sequence token included."""
        return self.token_ids if self.end_id is None else (*self.token_ids, self.end_id)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    row_keys: Sequence[str],
    decoding: Decoding,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
    processors: LogitsProcessorList | None = None,
    batch_rows: int | None = None,
    autocast: torch.dtype | None = None,
    kept: Path | None = None,
    progress: bool | str = False,
) -> list[Generation]:
    """Responses to ``prompts`` (token ids, no padding, at least one id each), in their order.

    Args:
        model: a decoder of transformers: plain, prepared, or prepared and frozen (fast: weights are quantized once).
        tokenizer: its ``eos_token_id`` ends a response too, where ``eos_id`` is not given; may be None, but for a
            ``reset`` policy, which reads the text of tokens.
        prompts: token ids of each row.
        seeds: one sampling seed a row.
        row_keys: one stable name a row (a problem's id): with the seed it fixes the row's random numbers.
        decoding: the policy.
        max_new_tokens: a row without an end after so many tokens is returned unfinished.
        eos_id: token id (or several, or ``()`` for none) that ends a response; None: what tokenizer and model say
            (:func:`reqat.models.end_ids`).
        processors: transformers' logits processors, called with the ids so far (padded prompts and responses,
            [B, P + step]) and float32 logits before ``decoding``. Those with the hooks of :class:`StatefulProcessor`
            are told of batches and of dropped rows.
        batch_rows: rows a batch; None picks as many as fit in 768 MiB, 1,024 at most.
        autocast: e.g. ``torch.bfloat16`` to run the model under ``torch.autocast``.
        kept: a folder where finished batches outlive a kill, so that the same call goes on with the others. It belongs
            to this model and these arguments (rows and seeds are checked, no more); removing it is the caller's.
        progress: show a progress bar; a string is its caption.

    Raises:
        ValueError: for `kept` with ``processors``, which may know of the rows that they saw, for lists of different
            lengths, an empty prompt, a token id that the model does not know, prompts too long for the model's
            positions or sliding window, a sampled policy with a repeated (seed, row key), or logits that are not
            finite.
    """
    eos_ids = check_arguments(model, tokenizer, prompts, seeds, row_keys, decoding, max_new_tokens, eos_id, batch_rows)
    if not prompts:
        return []
    if kept is not None and processors:
        raise ReqatError("kept batches would leave logits processors without the rows of an earlier attempt")
    if decoding.rule is not None:
        from transformers import LogitsProcessorList

        if tokenizer is None:
            raise ReqatError(f"decoding {decoding} needs the tokenizer: the text of tokens says where steps end")
        processors = LogitsProcessorList([*(processors or []), ReSET(decoding.rule, tokenizer)])
    # Like lengths together, equal prompts side by side; the caller's order breaks ties, so batches are reproducible.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
    rows = batch_rows or _default_batch_rows(model, max(map(len, prompts)), max_new_tokens)
    n_batches = -(-len(order) // rows)
    bounds = [len(order) * b // n_batches for b in range(n_batches + 1)]  # batches of equal size, give or take one
    states = np.array([row_state(s, k) for s, k in zip(seeds, row_keys, strict=True)], dtype=np.uint64)
    out: list[Generation | None] = [None] * len(prompts)
    # no_grad and not inference_mode: layers may look at a tensor's version counter, which inference tensors lack.
    caption = progress if isinstance(progress, str) else "generating"
    shown = bar(caption, len(prompts), "rows", enabled=bool(progress), logged=False)
    with evaluating(model), torch.no_grad(), shown:
        for low, high in zip(bounds, bounds[1:], strict=False):
            chosen = order[low:high]
            file = None if kept is None else kept / f"{digest([[row_keys[i], int(seeds[i])] for i in chosen], 16)}.json"
            if file is not None and file.is_file():
                found = _read_batch(file)
                shown.update(len(chosen))
            else:
                with checked_at_end(model):
                    batch = RunningBatch(model, [prompts[i] for i in chosen], max_new_tokens, autocast)
                    tokens_NB = _decode(batch, chosen, states[chosen], decoding, eos_ids, processors, shown)
                found = list(_split(tokens_NB, eos_ids))
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_file(file, json.dumps([[g.token_ids, g.finished, g.end_id] for g in found]) + "\n")
            for row, generation in zip(chosen, found, strict=True):
                out[row] = generation
    return cast("list[Generation]", out)


def _read_batch(file: Path) -> list[Generation]:
    """What :func:`generate` kept of a batch. Raises `ReqatError` for a damaged file."""
    remedy = "delete it to decode that batch anew"
    try:
        return [Generation(tuple(ids), *rest) for ids, *rest in read_json_list(file, "kept batch", remedy)]
    except (TypeError, ValueError) as error:
        raise ReqatError(f"{file}: not a kept batch ({error}); {remedy}.") from None


def check_arguments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    row_keys: Sequence[str],
    decoding: Decoding,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None,
    batch_rows: int | None,
) -> tuple[int, ...]:
    """Check the arguments of :func:`generate`; returns the end-of-sequence ids."""
    if not len(prompts) == len(seeds) == len(row_keys):
        raise ReqatError(
            f"generate() wants one seed and one row key a prompt, got {len(prompts)} prompts, {len(seeds)} seeds and "
            f"{len(row_keys)} row keys"
        )
    if max_new_tokens < 1:
        raise ReqatError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if batch_rows is not None and batch_rows < 1:
        raise ReqatError(f"batch_rows={batch_rows} must be at least 1; leave it out to let the memory decide")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ReqatError(f"the prompt of row {row} ({row_keys[row]!r}) is empty; give it at least <bos>")
        check_token_ids(model, prompt, f"the prompt of row {row} ({row_keys[row]!r})", tokenizer=tokenizer)
    _check_lengths(model, [len(prompt) for prompt in prompts], max_new_tokens)
    if not decoding.is_greedy:
        seen: set[tuple[int, str]] = set()
        for pair in zip(seeds, row_keys, strict=True):
            if pair in seen:
                raise ReqatError(
                    f"two rows have seed {pair[0]} and row key {pair[1]!r}: they would get the same random numbers; "
                    "give them different seeds"
                )
            seen.add(pair)
    if eos_id is None:
        return end_ids(model, tokenizer)
    return (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


def _check_lengths(model: PreTrainedModel, lengths: list[int], max_new_tokens: int) -> None:
    """Prompts and responses fit into the model's positions, and into its sliding window where that must be.

    Past the window our attention function has no answer; a plain model's has, but not under our masks of padding.
    """
    longest = max(lengths, default=0)
    bounds = {"positions": position_limit(model.config)}
    if model.config._attn_implementation == ATTENTION or len(set(lengths)) > 1:
        bounds["tokens of sliding window"] = attention_window(model.config)
    for what, limit in bounds.items():
        if limit is not None and longest + max_new_tokens > limit:
            raise ReqatError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} {what}; "
                f"lower max_new_tokens to {max(0, limit - longest)} or leave out longer prompts"
            )


def _default_batch_rows(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """Rows whose cache, logits and prompt activations fit in the budget (float32, a rough upper estimate)."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * (prompt_tokens + max_new_tokens)
    # Prefill holds a few activations a prompt token, the widest in the MLP; sampling a few copies of the logits.
    activations = prompt_tokens * (4 * config.hidden_size + 3 * getattr(config, "intermediate_size", 0))
    per_row = 4 * (cache + activations + 4 * config.vocab_size)
    return int(max(1, min(_BATCH_ROWS, _BATCH_BYTES // per_row)))


def _new_cache(model: PreTrainedModel, capacity: int) -> tuple[Cache, Callable[[Tensor], None]]:
    """A cache for a new batch, and the function that selects its rows.

    Packed models get the packed cache, prepared ones the fake-quantized one, both of fixed capacity; others have
    transformers' own, which grows by concatenation.
    """
    if is_packed(model) and packs_cache(model):
        packed = PackedCache(model, capacity)
        return packed, packed.select_rows
    if model.config._attn_implementation == ATTENTION:
        cache = Fp4Cache(model, capacity)
        return cache, cache.select_rows
    from transformers import DynamicCache

    past = DynamicCache(config=model.config)
    return past, past.batch_select_indices


def _wants_fixed_steps(model: PreTrainedModel) -> bool:
    """Whether it pays to replay steps from a CUDA graph."""
    return model.device.type == "cuda" and is_packed(model) and packs_cache(model)


class RunningBatch:
    """The rows that are being decoded together: the model's cache, positions and mask, and one step of the model.

    A packed model on a GPU replays its steps from a CUDA graph, where it can (:mod:`reqat.inference.decode_step`).
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[Sequence[int]], max_new_tokens: int, autocast: torch.dtype | None
    ) -> None:
        """Pad the sorted ``prompts``, run the model on the distinct ones; ``logits`` [B, V] follow the last token."""
        self.model, self.autocast, self.device = model, autocast, model.device
        forget_lengths(model)
        distinct: list[Sequence[int]] = []
        of_row: list[int] = []
        for prompt in prompts:
            if not distinct or list(distinct[-1]) != list(prompt):
                distinct.append(prompt)
            of_row.append(len(distinct) - 1)
        lengths = torch.tensor([len(p) for p in distinct])
        P = int(lengths.max())
        self.capacity = P + max_new_tokens
        self.length = P
        ids_UP = torch.tensor([[p[0]] * (P - len(p)) + list(p) for p in distinct])
        start_U1 = (P - lengths)[:, None]
        position_UP = (torch.arange(P)[None, :] - start_U1).clamp_(min=0)
        ragged = bool((start_U1 > 0).any())
        of_row_B = torch.tensor(of_row)
        self.input_ids = ids_UP[of_row_B].to(self.device)
        self.attention = (torch.arange(P)[None, :] >= start_U1)[of_row_B].to(self.device)
        self.position_B1 = lengths[of_row_B][:, None].to(self.device)
        self.rows_mask: Tensor | None = None
        prompt_mask: Tensor | None = None
        if ragged:
            # Keys that a row may see from any new token on; capacity long, so that a step takes a view.
            self.rows_mask = torch.ones(len(prompts), self.capacity, dtype=torch.bool, device=self.device)
            self.rows_mask[:, :P] = self.attention
            query, key = torch.arange(P)[:, None], torch.arange(P)[None, :]
            prompt_mask = ((key <= query) & (key >= start_U1[:, :, None])) | (key == query)  # [U, P, P]
        self.past, self._select_cache_rows = _new_cache(model, self.capacity)
        self._fixed_step: DecodeStep | None = None
        self._wants_fixed_steps = _wants_fixed_steps(model)
        if not ragged:
            position_UP = position_UP[:1]
        self.logits = self._forward(ids_UP.to(self.device), position_UP.to(self.device), self._as_4d(prompt_mask))[:, 0]
        if len(distinct) < len(prompts):
            of_row_B = of_row_B.to(self.device)
            self._select_cache_rows(of_row_B)
            self.logits = self.logits[of_row_B]

    def _as_4d(self, mask: Tensor | None) -> Tensor | None:
        """A mask [B, K] or [B, Q, K] in the form that the model's attention function takes, [B, 1, Q, K]."""
        if mask is None:
            return None
        mask = mask.to(self.device)
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        if self.model.config._attn_implementation == "eager":  # adds the mask to the scores
            dtype = self.model.dtype
            return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
        return mask

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, keep: int = 1) -> Tensor:
        """Append ``ids`` [B, Q] to the cache; the float32 logits that follow the last ``keep``, [B, keep, V]."""
        with _autocast(self.device, self.autocast):
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.past,
                use_cache=True,
                logits_to_keep=keep,
            )
        return out.logits[:, -keep:].float()

    def step(self, tokens_B: Tensor) -> None:
        """Feed one token a row; ``logits`` then follow it."""
        self.length += 1
        fixed = self._fixed()
        if fixed is not None:
            self.logits = fixed(tokens_B)
        else:
            mask = None if self.rows_mask is None else self._as_4d(self.rows_mask[:, : self.length])
            self.logits = self._forward(tokens_B[:, None], self.position_B1, mask)[:, 0]
        self.position_B1 = self.position_B1 + 1

    def _fixed(self) -> DecodeStep | None:
        """The step in fixed buffers, made anew after rows were dropped; None where there is none, which is said."""
        if not self._wants_fixed_steps or self._fixed_step is not None:
            return self._fixed_step
        reason = reason_against(self.model, self.past)
        if reason is not None:
            self._wants_fixed_steps = False
            warn_of(reason)
            return None
        self._fixed_step = DecodeStep(
            self.model,
            cast("PackedCache", self.past),
            self.position_B1,
            self._as_4d(self.rows_mask),
            records=self.device.type == "cuda",
            autocast=lambda: _autocast(self.device, self.autocast),
        )
        return self._fixed_step

    def step_tokens(self, tokens: Sequence[int]) -> Tensor:
        """Feed several tokens to the only row; the logits that follow each, [T, V]."""
        self._fixed_step, self._wants_fixed_steps = None, False  # those are for a token at a time
        ids_1T = torch.tensor([tokens], device=self.device)
        positions = self.position_B1 + torch.arange(len(tokens), device=self.device)
        self.length += len(tokens)
        self.position_B1 = self.position_B1 + len(tokens)
        return self._forward(ids_1T, positions, None, keep=len(tokens))[0]

    def forget(self, tokens: int) -> None:
        """Take the last ``tokens`` out of the cache, as if they had not been fed."""
        if tokens:
            self.past.crop(-tokens)
        self.length -= tokens
        self.position_B1 = self.position_B1 - tokens

    def select_rows(self, index: Tensor) -> None:
        """Go on with the rows ``index`` alone (after the tokens of this step were chosen, before they are fed)."""
        self._select_cache_rows(index)
        self._fixed_step = None
        self.position_B1 = self.position_B1[index]
        if self.rows_mask is not None:
            self.rows_mask = self.rows_mask[index]


def _decode(
    batch: RunningBatch,
    rows: list[int],
    states_B: np.ndarray[Any, np.dtype[np.uint64]],
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    processors: LogitsProcessorList | None,
    shown: Any,
) -> Tensor:
    """Tokens of all rows of a batch, int64 [N, B] on the CPU; a row ends at its first end-of-sequence id."""
    device = batch.device
    stateful = [p for p in processors or [] if hasattr(p, "begin_batch")]
    takers = [p for p in processors or [] if hasattr(p, "take_tokens")]
    for processor in stateful:
        processor.begin_batch(
            BatchStart(batch.input_ids, batch.attention, tuple(rows), batch.capacity, tuple(states_B.tolist()), eos_ids)
        )
    max_new_tokens = batch.capacity - batch.length
    eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
    out_NB = torch.full((max_new_tokens, len(rows)), eos_ids[0] if eos_ids else 0, dtype=torch.int64, device=device)
    alive_B = torch.arange(len(rows), device=device)  # of each row in the batch, its column in out_NB
    ids_BT = batch.input_ids if processors else None
    n_done, step, n_tokens, began = 0, 0, 0, time.monotonic()
    done_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
    uniforms_SB = torch.empty(0)
    while True:
        scores_BV = batch.logits if ids_BT is None else cast("Callable[..., Tensor]", processors)(ids_BT, batch.logits)
        if decoding.is_greedy:
            tokens_B = greedy_tokens(scores_BV)
        else:
            if step % _RANDOM_STEPS == 0:
                uniforms_SB = uniforms(states_B, step, _RANDOM_STEPS).to(device)
            tokens_B = sample_tokens(scores_BV, uniforms_SB[step % _RANDOM_STEPS], decoding.temperature, decoding.top_p)
        # A finished row's tokens are thrown away: it is fed its end again until it is dropped.
        if n_done:
            tokens_B = torch.where(done_B, eos[0], tokens_B)
        out_NB[step].index_copy_(0, alive_B, tokens_B)
        for processor in takers:
            processor.take_tokens(tokens_B)
        step += 1
        was_done = n_done
        if eos_ids:
            done_B = tokens_B == eos[0] if len(eos_ids) == 1 else torch.isin(tokens_B, eos)
            n_done = int(done_B.sum())
        n_tokens += len(alive_B) - was_done
        shown.set_postfix_str(f"{n_tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
        shown.update(n_done - was_done)
        if n_done == len(alive_B) or step == max_new_tokens:
            shown.update(len(alive_B) - n_done)
            return out_NB[:step].cpu()
        if ids_BT is not None:
            ids_BT = torch.cat([ids_BT, tokens_B[:, None]], dim=1)
        if n_done >= _COMPACT_SHARE * len(alive_B):
            keep = (~done_B).nonzero()[:, 0]
            batch.select_rows(keep)
            for processor in stateful:
                processor.select_rows(keep)
            alive_B, tokens_B = alive_B[keep], tokens_B[keep]
            states_B = states_B[keep.cpu().numpy()]
            uniforms_SB = uniforms_SB[:, keep] if uniforms_SB.numel() else uniforms_SB
            ids_BT = None if ids_BT is None else ids_BT[keep]
            done_B, n_done = torch.zeros_like(keep, dtype=torch.bool), 0
        batch.step(tokens_B)


def _split(tokens_NB: Tensor, eos_ids: tuple[int, ...]) -> Iterator[Generation]:
    """The response in each column, cut at its first end-of-sequence id."""
    tokens_BN = tokens_NB.T.contiguous()
    is_end_BN = torch.isin(tokens_BN, torch.tensor(eos_ids, dtype=torch.int64))
    finished = is_end_BN.any(dim=1).tolist()
    # argmax of 0/1 is the first 1
    lengths = torch.where(is_end_BN.any(dim=1), is_end_BN.int().argmax(dim=1), tokens_BN.shape[1]).tolist()
    for row, length, ended in zip(tokens_BN.tolist(), lengths, finished, strict=True):
        yield Generation(tuple(row[:length]), ended, row[length] if ended else None)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else autocast(device.type, dtype)
