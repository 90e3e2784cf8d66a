"""The trace store of a file of traces, or of a data set of the hub: of `reqat train`, and of a tier's data stage.

Rows are tokenized by the model that is to be trained on them, in their order. The file has to be the one that the
settings describe (its sha256), before and after it is read.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.stage import TraceSource
from reqat.records.record import sha256

DEFAULT_ROW_TOKENS = 4096
"""Longest row where none is asked for: what autograd keeps grows with it (`reqat train --plan`)."""


def import_store(
    source: str,
    asked: TraceSource,
    model: Path,
    out: Path,
    cache: Path,
    *,
    processes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the trace store of ``source`` and the tokenizer of ``model`` into the folder ``out``; returns metrics.

    Args:
        source: a file, or ``owner/name@COMMIT``.
        asked: its digest, its columns, the longest trace.
        model: folder of the model whose tokenizer counts.
        cache: where `datasets` keeps its copy meanwhile; removed at the end.
        processes: that tokenize side by side.

    Raises `ReqatError` for a file that is missing or is another one than ``asked`` says, for rows longer than the model
    reads, for token ids that its embedding has no rows for, and as `import_traces` does.
    """
    from reqat.data.sources import Columns, import_traces, read_source
    from reqat.data.store import TraceStore
    from reqat.models import load_tokenizer
    from reqat.models.folder import check_config
    from reqat.pipeline.generated import STORE, TOKENIZER

    check_file(source, asked)
    limit = positions(model)
    if asked.row_tokens is not None and limit is not None and asked.row_tokens > limit:
        raise ReqatError(
            f"--row-tokens {asked.row_tokens}: the model has {limit} positions; lower it (of a tier, row_tokens)."
        )
    tokenizer = load_tokenizer(model)
    rows = read_source(source, cache, progress=progress)
    found = import_traces(
        rows,
        tokenizer,
        out,
        STORE,
        columns=Columns(asked.messages, asked.prompt, asked.response),
        where=asked.name,
        row_tokens=asked.row_tokens,
        most_row_tokens=min(DEFAULT_ROW_TOKENS, limit or DEFAULT_ROW_TOKENS),
        over_long=asked.over_long,
        processes=processes,
        progress=progress,
    )
    check_file(source, asked)
    _check_ids(out, STORE, check_config(model).get("vocab_size"), tokenizer)
    tokenizer.save_pretrained(out / TOKENIZER)
    del rows
    shutil.rmtree(cache, ignore_errors=True)
    return {**asdict(found), "vocabulary": len(tokenizer), "digest": TraceStore.read(out).digest}


def check_file(source: str, asked: TraceSource) -> None:
    """Raise `ReqatError` for a file that is missing, or is another one than when its digest was taken."""
    path = Path(source)
    if asked.sha256 is None:  # of the hub, whose commit names it
        return
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of traces; put it there, one JSON object a line.")
    if (found := sha256(path)) != asked.sha256:
        raise ReqatError(
            f"{path} changed since the run began (sha256 {found[:12]}, then {asked.sha256[:12]}): restore it, or begin "
            "anew, with other stages (reqat train: --no-resume)."
        )


def positions(model: Path) -> int | None:
    """Tokens that the model in a folder reads at most; None where nothing bounds them."""
    from transformers import AutoConfig

    from reqat.models import position_limit

    return position_limit(AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False))


def _check_ids(folder: Path, name: str, vocabulary: int | None, tokenizer: Any) -> None:
    from reqat.data.store import TraceStore

    traces = TraceStore.read(folder, name).traces
    high = traces.extremes()[1]
    if vocabulary is None or high < vocabulary:
        return
    number = next(i for i in range(len(traces)) if int(traces.tokens(i).max()) >= vocabulary)
    raise ReqatError(
        f"{traces.id(number)} of the traces: token id {high} ({tokenizer.convert_ids_to_tokens(high)!r}) is unknown to "
        f"the model, whose vocabulary has {vocabulary} tokens; take the tokenizer that belongs to it, or resize its "
        "embeddings."
    )
