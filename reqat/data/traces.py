"""Traces in their order: what one is, many of them in four arrays, and the ranges that training stages see.

TAQ is a statement about data: stage 2 must see the very traces of stage 1, token by token (ReQAT section 3.2). Traces
therefore have one order, and a stage takes a contiguous range of it by token count (:func:`select`), so "the same
traces" is a prefix and "different traces" is what follows. :class:`Traces` holds token ids as int32, four bytes a token
where a Python list takes forty-five, in memory or mapped from a file; it hands out a :class:`Trace` when asked for one.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError

IDS = 2**31
"""Token ids of a store lie below."""
# Mapped token ids are dropped from this process's memory after so many were read in one sweep (64 MiB).
_SWEEP = 2**24


@dataclass(frozen=True)
class Trace:
    """One prompt and verified response. Ids exclude ``<bos>``; ``response_ids`` ends with the end-of-sequence token.

    ``bos`` says whether ``<bos>`` comes before ``prompt_ids``: a chat template may write none. A store holds the key
    only where it is false. The texts are empty in a store that holds token ids alone, and a response that was cut to
    fit has no end.
    """

    id: str
    problem_id: str
    family: str
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    bos: bool = True

    @property
    def n_tokens(self) -> int:
        """Tokens of the trace as trained on, with its ``<bos>`` if it has one."""
        return int(self.bos) + len(self.prompt_ids) + len(self.response_ids)


Texts = Callable[[int], tuple[str, str, str, str, str]]
"""``id``, ``problem_id``, ``family``, ``prompt`` and ``response`` of a trace by its number."""


class Traces(Sequence[Trace]):
    """Traces in their order, as arrays. Slices (of step 1) share them.

    Attributes, for n traces: ``starts`` int64 [n + 1], where each trace's ids begin in ``ids`` (int32; the prompt's,
    then the response's, without ``<bos>``); ``prompts`` int64 [n], how many are of the prompt; ``bos`` bool [n].
    """

    def __init__(
        self,
        ids: NDArray[Any],
        starts: NDArray[np.int64],
        prompts: NDArray[np.int64],
        bos: NDArray[np.bool_],
        texts: Texts,
        first: int = 0,
    ) -> None:
        self.ids, self.starts, self.prompts, self.bos = ids, starts, prompts, bos
        self._texts, self._first = texts, first

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> Traces:
        """The same traces as arrays; ``traces`` itself where it is one."""
        if isinstance(traces, Traces):
            return traces
        given = list(traces)
        starts, prompts, bos = array("q", [0]), array("q"), array("b")
        ids = array("q")
        for trace in given:
            ids.extend((*trace.prompt_ids, *trace.response_ids))
            starts.append(len(ids))
            prompts.append(len(trace.prompt_ids))
            bos.append(trace.bos)
        wide = np.array(ids, dtype=np.int64)
        narrow = wide.size == 0 or (wide.min() >= 0 and wide.max() < IDS)  # else a check names what no model reads

        def texts(number: int) -> tuple[str, str, str, str, str]:
            t = given[number]
            return t.id, t.problem_id, t.family, t.prompt, t.response

        whole = wide.astype(np.int32) if narrow else wide
        return cls(whole, np.array(starts), np.array(prompts), np.array(bos, dtype=bool), texts)

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> Traces: ...
    def __getitem__(self, index: int | slice) -> Trace | Traces:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ReqatError(f"traces are sliced in steps of 1, not {step}; select() takes ranges")
            stop = max(start, stop)
            starts = self.starts[start : stop + 1]
            prompts, bos = self.prompts[start:stop], self.bos[start:stop]
            return Traces(self.ids, starts, prompts, bos, self._texts, self._first + start)
        number = range(len(self))[index]
        tokens, prompt = self.tokens(number).tolist(), int(self.prompts[number])
        texts = self._texts(self._first + number)
        return Trace(*texts, tuple(tokens[:prompt]), tuple(tokens[prompt:]), bool(self.bos[number]))

    def id(self, number: int) -> str:
        """The id of a trace."""
        return self._texts(self._first + number)[0]

    def tokens(self, number: int) -> NDArray[Any]:
        """Token ids of a trace, prompt then response, without ``<bos>``."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each trace as trained on (:attr:`Trace.n_tokens`), [n]."""
        return np.diff(self.starts) + self.bos

    @property
    def n_tokens(self) -> int:
        """Tokens of all traces."""
        return int(self.lengths.sum())

    def extremes(self) -> tuple[int, int]:
        """The smallest and the largest token id; (0, 0) of no tokens."""
        low, high = [], []
        for at in range(int(self.starts[0]), int(self.starts[-1]), _SWEEP):
            part = self.ids[at : min(at + _SWEEP, int(self.starts[-1]))]
            low.append(int(part.min()))
            high.append(int(part.max()))
            self.forget()
        return min(low, default=0), max(high, default=0)

    def forget(self) -> None:
        """Drop what was read of a mapped file from this process's memory; it is read again when it is needed."""
        mapped = getattr(self.ids, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def select(traces: Sequence[Trace], tokens: int, *, skip_tokens: int = 0) -> Sequence[Trace]:
    """The contiguous range that starts after ``skip_tokens`` tokens and holds ``tokens`` tokens, both rounded up to
    whole traces: a slice of ``traces``.

    The first ranges of equal ``skip_tokens`` are prefixes of one another; a range with ``skip_tokens=k`` starts where
    one of ``tokens=k`` ends. Raises ``ReqatError`` where the store is too small, naming both numbers.
    """
    if tokens < 1 or skip_tokens < 0:
        raise ReqatError(
            f"select() wants tokens >= 1 and skip_tokens >= 0, got tokens={tokens}, skip_tokens={skip_tokens}"
        )
    lengths = traces.lengths if isinstance(traces, Traces) else np.array([t.n_tokens for t in traces], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    start = int(np.searchsorted(ends, skip_tokens))
    if start == len(ends) or ends[-1] - ends[start] < tokens:
        raise ReqatError(
            f"{tokens} tokens after the first {skip_tokens} were asked for, the store holds {ends[-1]}; write more "
            "traces"
        )
    return traces[start : int(np.searchsorted(ends, ends[start] + tokens))]
