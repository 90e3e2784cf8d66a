"""Token entropies of a model, collected during generation or by teacher forcing on given responses.

Everything is of the raw logits at temperature 1 (:mod:`reqat.decoding.distributions`): the entropy in nats, the most
likely tokens, the probability of the token taken, and the tail mass ``1 - p(top1)``.

* :class:`EntropyRecorder` rides along in :func:`reqat.generation.batches.generate` as a logits processor. It looks
  at each step's logits once, keeps a few dozen steps in memory and spools the rest to a temporary file, so traces may
  be of any length.
* :func:`force_traces` runs several models over the same tokens (teacher forcing): whole responses in one forward pass
  without a cache, logits by the chunk. This is how precisions are compared token by token.

Which of the two: they agree up to the order of summation, where quantizers look at a token alone (``row`` or
``static`` global scales). Per-tensor ``dynamic`` scales see a step's batch in one and a batch of whole responses in
the other, so there the numbers are of two different models.

Shapes: B rows, N tokens, K most likely tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.decoding.distributions import Statistics, token_statistics
from reqat.evaluation.forcing import batches_by_length, forced_logits
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.generation.processors import BatchStart
from reqat.models import ATTENTION, attention_window, check_length, check_token_ids
from reqat.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Steps that a recorder keeps in memory before it spools them.
_SPOOL_STEPS = 64
# Statistics of this many tokens are held until their traces are put back into order.
_WINDOW_TOKENS = 262_144


class RecordedTrace(NamedTuple):
    """A row of :func:`generate`'s ``prompts`` after its batch ended; an end-of-sequence token is the last of
    ``tokens``.
    """

    row: int
    tokens: NDArray[np.int32]
    columns: TokenColumns
    finished: bool


class EntropyRecorder:
    """A logits processor that leaves logits unchanged and records statistics of each distribution.

    Put it first among the ``processors``, so that it sees the raw logits. ``on_trace`` is called for every row once
    its batch is over (when the next begins, or at :meth:`close`), rows in the batch's order.

    Args:
        on_trace: takes each finished :class:`RecordedTrace`.
        k: most likely tokens kept.
        names: what errors call each row of the prompts; their numbers if None.
        spool: folder of the temporary file; the system's if None.

    Raises `ReqatError` naming the row at the first distribution that is not finite. Rows of earlier batches were
    handed over by then.
    """

    def __init__(
        self,
        on_trace: Callable[[RecordedTrace], object],
        *,
        k: int = 5,
        names: Sequence[str] | None = None,
        spool: Any = None,
    ) -> None:
        self.on_trace, self.k, self.names, self._spool_folder = on_trace, k, names, spool
        self._start: BatchStart | None = None
        self._file: IO[bytes] | None = None

    def begin_batch(self, start: BatchStart) -> None:
        """Hand over the batch before, and get ready for this one."""
        self._finish()
        self._start = start
        self._alive_B = torch.arange(len(start.rows))
        self._done_B = torch.zeros(len(start.rows), dtype=torch.bool)
        self._pieces: list[tuple[int, int, NDArray[np.int64]]] = []  # bytes before, steps, columns of the batch
        self._file = tempfile.TemporaryFile(dir=self._spool_folder)  # noqa: SIM115  (closed when the batch is over)
        self._eos = torch.tensor(start.eos_ids, dtype=torch.int64)
        self._buffer: NDArray[Any] | None = None
        self._filled = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at ``scores`` [B, V]; returns them as they are."""
        k = min(self.k, scores.shape[-1])
        found = token_statistics(scores, k)
        self._check(found.entropy_N)
        if self._buffer is None:
            self._buffer = np.empty((_SPOOL_STEPS, len(scores)), dtype=_record(k))
        step = self._buffer[self._filled]
        step["entropy"], step["tail"] = found.entropy_N.cpu().numpy(), found.tail_N.cpu().numpy()
        step["top"], step["top_prob"] = found.top_NK.cpu().numpy(), found.top_prob_NK.cpu().numpy()
        self._last = found, scores
        return scores

    def take_tokens(self, tokens_B: Tensor) -> None:
        """The tokens that were taken from the distributions just looked at."""
        assert self._buffer is not None
        found, scores_BV = self._last
        step = self._buffer[self._filled]
        step["prob"], step["token"] = found.prob(scores_BV, tokens_B).cpu().numpy(), tokens_B.cpu().numpy()
        self._filled += 1
        if len(self._eos):
            self._done_B |= torch.isin(tokens_B.cpu(), self._eos)
        if self._filled == _SPOOL_STEPS:
            self._spool()

    def select_rows(self, index: Tensor) -> None:
        """Go on with these rows."""
        self._spool()
        self._alive_B, self._done_B, self._buffer = self._alive_B[index.cpu()], self._done_B[index.cpu()], None

    def close(self) -> None:
        """Hand over the last batch."""
        self._finish()

    def _check(self, entropy_B: Tensor) -> None:
        finite_B = torch.isfinite(entropy_B)
        if bool(finite_B.all()):
            return
        start = self._start
        assert start is not None
        # A finished row is fed its end again; what follows is no part of its response.
        bad = (~finite_B.cpu() & ~self._done_B).nonzero()[:, 0].tolist()
        if bad:
            row = start.rows[int(self._alive_B[bad[0]])]
            name = self.names[row] if self.names is not None else f"row {row}"
            step = sum(steps for _, steps, _ in self._pieces) + self._filled
            raise ReqatError(
                f"{name}: the distribution at position {step} is not finite; look for NaN weights, a diverged run, or "
                "a logits processor that forbids every token."
            )

    def _spool(self) -> None:
        if not self._filled:
            return
        assert self._file is not None and self._buffer is not None
        self._pieces.append((self._file.tell(), self._filled, self._alive_B.numpy()))
        self._file.write(self._buffer[: self._filled].data)
        self._filled = 0

    def _finish(self) -> None:
        if self._start is None or self._file is None:
            return
        self._spool()
        self._file.flush()
        dtype = _record(self.k) if self._buffer is None else self._buffer.dtype
        maps = [
            (np.memmap(self._file, dtype=dtype, mode="r", offset=at, shape=(steps, len(alive))), alive)
            for at, steps, alive in self._pieces
        ]
        column_of = [dict(zip(alive.tolist(), range(len(alive)), strict=True)) for _, alive in maps]
        ends = self._eos.numpy()
        for i, row in enumerate(self._start.rows):
            parts = [m[:, where[i]] for (m, _), where in zip(maps, column_of, strict=True) if i in where]
            records = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
            is_end = np.isin(records["token"], ends)
            finished = bool(is_end.any())
            records = records[: int(is_end.argmax()) + 1] if finished else records
            self.on_trace(RecordedTrace(row, records["token"].copy(), _columns(records), finished))
        self._file.close()
        self._start = self._file = None


def _record(k: int) -> np.dtype[Any]:
    """What is kept of a row and step."""
    return np.dtype(
        [
            ("token", np.int32),
            ("entropy", np.float32),
            ("tail", np.float32),
            ("prob", np.float32),
            ("top", np.int32, (k,)),
            ("top_prob", np.float32, (k,)),
        ]
    )


def _columns(records: NDArray[Any]) -> TokenColumns:
    entropy, tail, prob, top, top_prob = (
        np.ascontiguousarray(records[name]) for name in ("entropy", "tail", "prob", "top", "top_prob")
    )
    return TokenColumns(entropy, tail, prob, top, top_prob)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """The text of each token id below ``size``, as it reads on its own."""
    known = len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(min(size, known))], skip_special_tokens=False)
    return [*texts, *(f"<{i}>" for i in range(known, size))]


@dataclass(frozen=True)
class ForcedTrace:
    """A given response that several models are teacher-forced on.

    ``prompt_ids`` and ``response_ids`` are what the models read; ``logprobs_at`` are the positions of the response
    whose whole distributions are kept.
    """

    info: TraceInfo
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs_at: tuple[int, ...] = ()


@torch.no_grad()
def force_traces(
    models: Mapping[str, PreTrainedModel],
    traces: Iterable[ForcedTrace],
    writer: TraceWriter,
    *,
    batch_tokens: int = 8192,
    skip_bad: bool = False,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Run every model over every response, token by token as given; returns the number of traces written.

    Responses are read in windows, batched by length and padded on the right (under causal attention nothing looks at
    what follows it, so there is no mask), and written in the order given. Only one window's statistics and one
    chunk's logits are in memory.

    Args:
        models: the precisions by label, those of the writer; all are in memory at once.
        traces: what to run over; may be a generator.
        batch_tokens: padded tokens of a batch; one long response may exceed it.
        skip_bad: leave out a trace at fault and say so in the writer, instead of raising.
        autocast: e.g. ``torch.bfloat16`` to run the models under ``torch.autocast``.
        progress: called with the traces and tokens done so far.

    Raises `ReqatError` naming the trace that is empty, holds an unknown token id, is too long for a model, or has a
    distribution that is not finite (unless ``skip_bad``).
    """
    if tuple(models) != writer.labels:
        raise ReqatError(f"models for {', '.join(models)}, but the writer is for {', '.join(writer.labels)}.")
    before = writer.n_traces
    with evaluating(*models.values()):
        for window in _windows(traces):
            good = []
            for trace in window:
                try:
                    good.append(_checked(trace, models, writer))
                except ReqatError as error:
                    if not skip_bad:
                        raise
                    writer.leave_out(trace.info, str(error))
            columns: list[dict[str, TokenColumns]] = [{} for _ in good]
            sizes = [len(trace.prompt_ids) + len(trace.response_ids) - 1 for trace in good]
            for batch in batches_by_length(sizes, batch_tokens):
                for label, model in models.items():
                    for i, found in zip(
                        batch, _force(model, [good[i] for i in batch], writer.k, autocast), strict=True
                    ):
                        columns[i][label] = found
            for trace, by_label in zip(good, columns, strict=True):
                try:
                    writer.add(trace.info, trace.response_ids, by_label)
                except ReqatError as error:
                    if not skip_bad:
                        raise
                    writer.leave_out(trace.info, str(error))
            if progress is not None:
                progress(writer.n_traces, writer.n_tokens)
    return writer.n_traces - before


def _windows(traces: Iterable[ForcedTrace]) -> Iterator[list[ForcedTrace]]:
    window: list[ForcedTrace] = []
    tokens = 0
    for trace in traces:
        window.append(trace)
        tokens += len(trace.response_ids)
        if tokens >= _WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _checked(trace: ForcedTrace, models: Mapping[str, PreTrainedModel], writer: TraceWriter) -> ForcedTrace:
    """The trace, after checking what can be checked without running a model."""
    writer.check(trace.info, trace.response_ids)
    if not trace.prompt_ids:
        raise ReqatError(f"{trace.info.name}: its prompt has no token; give it at least <bos>.")
    writer.check(trace.info, trace.prompt_ids)
    length = len(trace.prompt_ids) + len(trace.response_ids) - 1  # the last token is read by nobody
    for label, model in models.items():
        check_token_ids(model, (*trace.prompt_ids, *trace.response_ids), trace.info.name, label=label)
        check_length(model.config, length, trace.info.name, label=label)
        window = attention_window(model.config) if model.config._attn_implementation == ATTENTION else None
        if window is not None and length > window:
            raise ReqatError(f"{trace.info.name}: {length} tokens, but {label} has a sliding window of {window}.")
    outside = [p for p in trace.logprobs_at if not 0 <= p < len(trace.response_ids)]
    if outside:
        raise ReqatError(
            f"{trace.info.name}: no position {outside[0]} in a response of {len(trace.response_ids)} tokens."
        )
    return trace


def _force(
    model: PreTrainedModel, traces: Sequence[ForcedTrace], k: int, autocast: torch.dtype | None
) -> list[TokenColumns]:
    """Statistics of the responses of a batch under one model."""
    wanted = {}
    first = 0
    for b, trace in enumerate(traces):
        wanted.update({first + p: (b, p) for p in trace.logprobs_at})
        first += len(trace.response_ids)
    parts: list[tuple[Statistics, Tensor]] = []
    logprobs: list[dict[int, NDArray[np.float32]]] = [{} for _ in traces]
    rows = [(trace.prompt_ids, trace.response_ids) for trace in traces]
    for low, logits_NV, tokens_N in forced_logits(model, rows, autocast):
        found = token_statistics(logits_NV, k)
        parts.append((found, found.prob(logits_NV, tokens_N)))
        for n in [n for n in wanted if low <= n < low + len(logits_NV)]:
            b, p = wanted[n]
            logprobs[b][p] = logits_NV[n - low].log_softmax(dim=-1).cpu().numpy()
    joined = {
        "entropy": torch.cat([s.entropy_N for s, _ in parts]),
        "tail": torch.cat([s.tail_N for s, _ in parts]),
        "prob": torch.cat([p for _, p in parts]),
        "top": torch.cat([s.top_NK for s, _ in parts]).int(),
        "top_prob": torch.cat([s.top_prob_NK for s, _ in parts]),
    }
    lengths = [len(trace.response_ids) for trace in traces]
    split = {name: [x.cpu().numpy() for x in values.split(lengths)] for name, values in joined.items()}
    return [TokenColumns(**{name: x[b] for name, x in split.items()}, logprobs=logprobs[b]) for b in range(len(traces))]
