"""Traces of one's own: a JSON, JSON-lines or Parquet file, or a data set of the Hugging Face hub, to a trace store.

`datasets` reads and maps the source; several processes tokenize it; what comes out is a store of arrays
(:mod:`reqat.data.store`) in the source's order. A row is a conversation (``messages``: the loss is on the last message,
which is the assistant's) or a ``prompt`` and a ``response``. A prompt is encoded as generation encodes it
(:func:`reqat.data.tokenizer.encode_prompt`); the response is encoded as text and ended with the end-of-sequence token,
never through the chat template: those of reasoning models delete the reasoning from an assistant's message.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError, unknown
from reqat.config.files import explain
from reqat.data.encoding import check_text
from reqat.data.store import write_arrays
from reqat.data.tokenizer import encode_messages, encode_prompt, without_bos

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Other names of keys and roles of a message, as ShareGPT and OpenThoughts have them.
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_ROLES = {"human": "user", "gpt": "assistant"}
_THINK = "<think>"
_BATCH = 1000  # rows that a process tokenizes at a time
# A process for each so many rows: starting one takes longer than tokenizing fewer.
_ROWS_A_PROCESS = 2000


@dataclass(frozen=True)
class Columns:
    """Where a row has its parts: ``messages``, or ``prompt`` and ``response``."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None

    def found(self, names: Sequence[str], where: str) -> Columns:
        """Those to read of a source with columns ``names``: the ones given, else the usual ones that are there.

        Raises `ReqatError` for a column that is not there, or where none of the usual ones is.
        """
        for column in (self.messages, self.prompt, self.response):
            if column is not None and column not in names:
                raise unknown("column", column, names, where=where)
        if self.messages is not None:
            return Columns(messages=self.messages)
        pair = Columns(prompt=self.prompt or "prompt", response=self.response or "response")
        if pair.prompt in names and pair.response in names:
            return pair
        usual = next((name for name in ("messages", "conversations") if name in names), None)
        if usual is None or self.prompt is not None or self.response is not None:
            raise ReqatError(
                f"{where}: its columns are {', '.join(names) or 'none'}; messages, or prompt and response are needed: "
                "name them (--messages-column, or --prompt-column and --response-column)."
            )
        return Columns(messages=usual)


@dataclass(frozen=True)
class Imported:
    """What became of a source: traces and their tokens; rows that were too long and left out, or cut."""

    traces: int
    tokens: int
    left_out: int
    cut: int
    longest: int
    """Tokens of the longest row of the source, whatever became of it."""
    row_tokens: int
    """Longest trace that was kept."""


def check_source(source: str) -> None:
    """Raise `ReqatError` for a source that cannot be one: no such file, another format, a hub id without commit."""
    path = Path(source)
    if path.is_dir():
        raise ReqatError(f"{source} is a folder; name a file ({', '.join(FORMATS)}).")
    if path.suffix.lower() in FORMATS or path.is_file():
        if not path.is_file():
            raise ReqatError(f"{source}: no such file of traces.")
        if path.suffix.lower() not in FORMATS:
            raise ReqatError(f"{source}: traces are read from {', '.join(FORMATS)}, not {path.suffix or 'no suffix'}.")
        if path.stat().st_size == 0:
            raise ReqatError(f"{source} is empty; write at least one trace into it.")
        return
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise ReqatError(f"{source}: no such file, and no data set of the hub (owner/name@COMMIT).")
    if not _COMMIT.fullmatch(match["revision"] or ""):
        raise ReqatError(
            f"{source}: no such file; of a data set of the hub, name the commit (40 hexadecimal digits, which its "
            f"history lists): {match['name']}@COMMIT, so that the next run reads the same data."
        )


def read_source(source: str, cache: Path, *, progress: bool = True) -> Dataset:
    """The rows of a source, mapped from ``cache``, where `datasets` keeps its copy.

    Raises `ReqatError` naming file and line of what is not JSON, and for a hub id that cannot be reached.
    """
    check_source(source)
    with _datasets(progress) as datasets:
        path = Path(source)
        options: dict[str, Any] = {"cache_dir": str(cache)}
        if path.is_file():
            kind = FORMATS[path.suffix.lower()]
            try:
                # What it takes is a pattern.
                found = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
            except Exception as error:  # of datasets, pyarrow, pandas
                if kind == "json":
                    _check_lines(path)
                raise ReqatError(f"{source}: cannot be read as {kind} ({_said(error)}); correct it.") from error
        else:
            match = HUB_ID.fullmatch(source)
            assert match is not None
            try:
                found = datasets.load_dataset(
                    match["name"], revision=match["revision"], split=match["split"] or "train", **options
                )
            except Exception as error:
                raise ReqatError(
                    f"{source}: no such file here, and the data set of the hub cannot be loaded ({_said(error)}); "
                    "without a network, download it elsewhere and name the file."
                ) from error
    if not len(found):
        raise ReqatError(f"{source} holds no rows; write at least one trace into it.")
    return found


def import_traces(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    *,
    columns: Columns,
    where: str,
    row_tokens: int | None = None,
    most_row_tokens: int,
    over_long: Literal["drop", "truncate"] = "drop",
    processes: int = 1,
    progress: bool = True,
) -> Imported:
    """Tokenize the rows of a source into the trace store ``name`` of ``folder``, in their order.

    Args:
        rows: of `read_source`, called ``where`` in errors.
        columns: where a row has its parts.
        row_tokens: longest trace; None: as long as the longest row, up to ``most_row_tokens``.
        over_long: what becomes of a longer one: left out, or its response cut (then it has no end). A row whose prompt
            alone is too long is left out.
        processes: that tokenize side by side, at most.

    Raises `ReqatError` naming the row (from 1) without a response, of the wrong types, or that the tokenizer refuses;
    and where no row is short enough.
    """
    if tokenizer.eos_token_id is None:
        raise ReqatError("the tokenizer has no eos_token, so no trace could end: set it in tokenizer_config.json")
    columns = columns.found(rows.column_names, where)
    with _datasets(progress) as datasets:
        kinds = {"ids": datasets.List(datasets.Value("int32")), "prompt": datasets.Value("int32")}
        features = datasets.Features({**kinds, "bos": datasets.Value("bool"), "row": datasets.Value("int64")})
        wanted = max(1, min(processes, len(rows) // _ROWS_A_PROCESS))
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if wanted > 1 else "true"  # one or the other
        try:
            encoded = rows.map(
                partial(_encode, tokenizer=tokenizer, columns=columns, where=where),
                with_indices=True,
                batched=True,
                batch_size=_BATCH,
                remove_columns=rows.column_names,
                features=features,
                num_proc=wanted if wanted > 1 else None,
                load_from_cache_file=False,
                new_fingerprint=f"reqat-{name}",  # or it hashes the tokenizer
                desc="tokenizing",
            )
        finally:
            if before is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before
    longest = max(int((index[:, 0] + index[:, 2]).max()) for _, index in _parts(encoded))
    limit = row_tokens or min(longest, most_row_tokens)
    counts = {"traces": 0, "tokens": 0, "left_out": 0, "cut": 0}
    if not any(bool(_kept(index, limit, over_long).any()) for _, index in _parts(encoded)):
        raise ReqatError(
            f"{where}: every row is longer than {limit} tokens; raise --row-tokens (the longest has {longest}), or cut "
            "them (--long truncate)."
        )
    write_arrays(folder, name, (_cut(ids, index, limit, over_long, counts) for ids, index in _parts(encoded)))
    return Imported(longest=longest, row_tokens=limit, **counts)


def _parts(encoded: Dataset) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Ids of some traces one after the other, and their index [n, 4] (:mod:`reqat.data.store`)."""
    for table in encoded.with_format("arrow").iter(batch_size=_BATCH):
        lists = table["ids"].combine_chunks()
        lengths = np.diff(lists.offsets.to_numpy())
        rest = [table[name].to_numpy().astype(np.int64) for name in ("prompt", "bos", "row")]
        yield lists.flatten().to_numpy(), np.stack([lengths, *rest], axis=1)


def _kept(index: NDArray[np.int64], limit: int, over_long: str) -> NDArray[np.bool_]:
    lengths, prompts, bos, _ = index.T
    return (prompts if over_long == "truncate" else lengths - 1) + bos < limit


def _cut(
    ids: NDArray[Any], index: NDArray[np.int64], limit: int, over_long: str, counts: dict[str, int]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The traces of at most ``limit`` tokens, and what is left of longer ones; adds to ``counts``."""
    kept = _kept(index, limit, over_long)
    lengths = index[:, 0]
    short = np.where(kept, np.minimum(lengths, limit - index[:, 2]), 0)
    place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out = index[kept].copy()
    out[:, 0] = short[kept]
    counts["traces"] += len(out)
    counts["tokens"] += int(out[:, 0].sum() + out[:, 2].sum())
    counts["left_out"] += int((~kept).sum())
    counts["cut"] += int((kept & (short < lengths)).sum())
    return ids[place < np.repeat(short, lengths)], out


def _encode(
    batch: Mapping[str, list[Any]],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    where: str,
) -> dict[str, list[Any]]:
    """Token ids of some rows; ``numbers`` counts them from 0."""
    prompts: list[list[int]] = []
    responses: list[str] = []
    opens_thought = _THINK in str(tokenizer.chat_template or "")
    for i, number in enumerate(numbers):
        try:
            prompt, response = _row({name: batch[name][i] for name in batch}, columns)
            ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else encode_messages(tokenizer, prompt)
            check_text(response)
        except ReqatError as error:
            raise ReqatError(f"{where}, row {number + 1}: {error}") from None
        if opens_thought:
            response = _without_opening(response, str(tokenizer.decode(ids[-8:])))
        prompts.append(ids)
        responses.append(response)
    encoded = tokenizer(responses, add_special_tokens=False)["input_ids"]
    out: dict[str, list[Any]] = {"ids": [], "prompt": [], "bos": [], "row": [number + 1 for number in numbers]}
    for prompt_ids, response_ids in zip(prompts, encoded, strict=True):
        has_bos, ids = without_bos(tokenizer, prompt_ids)
        out["ids"].append(np.array([*ids, *response_ids, tokenizer.eos_token_id], dtype=np.int32))
        out["prompt"].append(len(ids))
        out["bos"].append(has_bos)
    return out


def _row(row: Mapping[str, Any], columns: Columns) -> tuple[str | list[dict[str, str]], str]:
    """Prompt (a text, or the messages before the last) and response of a row. Raises `ReqatError`."""
    if columns.messages is None:
        assert columns.prompt is not None and columns.response is not None
        prompt, response = row[columns.prompt], row[columns.response]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ReqatError(f"{columns.prompt} is {_short(prompt)}, where a text is needed.")
    else:
        given = row[columns.messages]
        if not isinstance(given, list) or len(given) < 2:
            raise ReqatError(f"{columns.messages} is {_short(given)}, where two messages or more are needed.")
        messages = [_message(message) for message in given]
        prompt = messages[:-1]
        response = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    if not isinstance(response, str) or not response.strip():
        what = columns.response or f"the last of {columns.messages}, which must be the assistant's,"
        raise ReqatError(f"it has no response: {what} is {_short(response)}; give one, or leave the row out.")
    return prompt, response


def _message(message: Any) -> dict[str, str]:
    if isinstance(message, Mapping):
        found = [next((message[k] for k in keys if message.get(k) is not None), None) for keys in (_ROLE, _CONTENT)]
        if all(isinstance(value, str) for value in found):
            return {"role": _ROLES.get(str(found[0]), str(found[0])), "content": str(found[1])}
    raise ReqatError(f"the message {_short(message)} has no role and content of text.")


def _without_opening(response: str, prompt_end: str) -> str:
    """The response without the ``<think>`` that the template already opened it with."""
    start = response.lstrip()
    if not (prompt_end.rstrip().endswith(_THINK) and start.startswith(_THINK)):
        return response
    rest = start.removeprefix(_THINK)
    return rest.lstrip("\n") if prompt_end.endswith("\n") else rest


def _check_lines(path: Path) -> None:
    """Raise `ReqatError` naming the first line of a file of JSON lines that is no object; nothing for an array."""
    try:
        with path.open("rb") as file:
            if file.read(4096).lstrip()[:1] == b"[":
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ReqatError(f"{path}, line {number}: not JSON ({_said(error)}); correct the line.") from None
                if not isinstance(value, dict):
                    raise ReqatError(f"{path}, line {number}: {_short(value)} is no object; correct the line.")
    except OSError as error:
        raise explain(error, path) from error


@contextmanager
def _datasets(progress: bool) -> Iterator[Any]:
    """The package `datasets`, with its bars only where they are wanted."""
    try:
        import datasets
    except ImportError:
        raise ReqatError("reading traces of your own needs the package datasets: pip install datasets") from None
    hidden, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if not progress:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what matters is raised as an error
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()


def _said(error: BaseException) -> str:
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {' '.join(str(inner).split())[:200]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
