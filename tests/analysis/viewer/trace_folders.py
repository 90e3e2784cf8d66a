"""Makes small folders of token traces for tests: made-up numbers in the form that collecting writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "<eos>", "\n", " 0", " 1", " 2", " 3", " 4", " 5", " 6", " 7", " 8", " 9", " +", " -", " =", " Then", " So",
    " the", " answer", " is", ".", " Next", ",", " gives", " makes", " total", " running", " We", " have", "First",
]  # fmt: skip
LABELS = ("BF16", "NVFP4-W4A4KV4")


def trace_schema() -> pa.Schema:
    """Columns of traces.parquet."""
    text = {name: pa.string() for name in ("problem", "family", "source", "prompt", "response", "answer")}
    types = text | {"trace": pa.int32(), "seed": pa.int32(), "tokens": pa.int32()}
    types |= {"correct": pa.bool_(), "finished": pa.bool_()}
    order = ("trace", "problem", "family", "seed", "source", "prompt", "response", "answer", "correct", "finished")
    return pa.schema([(name, types[name]) for name in (*order, "tokens")])


def token_schema(labels: tuple[str, ...]) -> pa.Schema:
    """Columns of tokens.parquet."""
    fields = [("trace", pa.int32()), ("position", pa.int32()), ("token", pa.int32())]
    for label in labels:
        fields += [(f"entropy_{label}", pa.float32()), (f"prob_{label}", pa.float32())]
        fields += [(f"top_{label}", pa.list_(pa.int32())), (f"top_prob_{label}", pa.list_(pa.float32()))]
    return pa.schema(fields)


def token_columns(
    rng: np.random.Generator, trace: int, token: np.ndarray, labels: tuple[str, ...], vocabulary: int, k: int
) -> dict[str, Any]:
    """Made-up distributions: the first label peaked at the token, the others blurred versions of it."""
    n = len(token)
    columns: dict[str, Any] = {"trace": np.full(n, trace, np.int32), "position": np.arange(n, dtype=np.int32)}
    columns["token"] = token
    # Among a few candidates: a peak whose height varies from token to token, as real ones do.
    candidates = min(vocabulary, 24)
    ids = (token[:, None] + np.arange(candidates)[None, :] * 7) % vocabulary if vocabulary > 168 else None
    if ids is None:
        ids = (token[:, None] + np.arange(candidates)[None, :]) % vocabulary
    logits = rng.normal(0, 1.2, (n, candidates))
    logits[:, 0] += rng.gamma(2.0, 4.0, n)
    for at, label in enumerate(labels):
        noisy = logits * (1 - 0.1 * at) + rng.normal(0, 0.5 * at, logits.shape)
        p = np.exp(noisy - noisy.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        order = np.argsort(-p, axis=1, kind="stable")[:, :k]
        columns[f"entropy_{label}"] = -(p * np.log(p + 1e-30)).sum(1).astype(np.float32)
        columns[f"prob_{label}"] = p[:, 0].astype(np.float32)
        columns[f"top_{label}"] = np.take_along_axis(ids, order, 1).astype(np.int32)
        columns[f"top_prob_{label}"] = np.take_along_axis(p, order, 1).astype(np.float32)
    return columns


def write_tokens(path: Path, pieces: list[dict[str, Any]], labels: tuple[str, ...]) -> None:
    """Write the columns of all traces, a row group for a few of them."""
    schema = token_schema(labels)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for columns in pieces:
            arrays = []
            for field in schema:
                values = columns[field.name]
                if isinstance(values, np.ndarray) and values.ndim == 2:
                    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
                    arrays.append(pa.ListArray.from_arrays(offsets, pa.array(values.ravel())))
                else:
                    arrays.append(pa.array(values, field.type))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def make_folder(
    folder: Path,
    *,
    problems: int = 6,
    tokens: int = 40,
    pairs: bool = True,
    labels: tuple[str, ...] = LABELS,
    words: list[str] | None = None,
    k: int = 5,
    seed: int = 0,
    prompts: dict[int, str] | None = None,
) -> Path:
    """A folder of ``problems`` problems: a trace sampled by each label (``pairs``), or one trace read by all of them.

    Paired traces are equal up to a third of their length. Outcomes run through all combinations.
    """
    words = WORDS if words is None else words
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, pieces = [], []
    for problem in range(problems):
        first: np.ndarray | None = None
        for at, source in enumerate(labels if pairs else labels[:1]):
            n = tokens - at if tokens > 1 else tokens
            token = rng.integers(1, len(words), n).astype(np.int32)
            if first is not None:
                shared = n // 3
                token[:shared] = first[:shared]
                if shared < n and token[shared] == first[shared]:
                    token[shared] = 1 + token[shared] % (len(words) - 1)
            if n:
                token[-1] = 0
            first = token if first is None else first
            number = len(rows)
            rows.append(
                {
                    "trace": number,
                    "problem": f"p{problem:04d}",
                    "family": ("chain_sum", "leg_counting")[problem % 2],
                    "seed": 0,
                    "source": source,
                    "prompt": (prompts or {}).get(problem, f"{problem} + {problem + 3} - 2 =\n"),
                    "response": "".join(words[id] for id in token),
                    "answer": str(2 * problem + 1),
                    "correct": bool((problem >> at) & 1) if pairs else bool(problem & 1),
                    "finished": problem % 5 != 4,
                    "tokens": n,
                }
            )
            if n:
                pieces.append(token_columns(rng, number, token, labels, len(words), k))
    pq.write_table(pa.Table.from_pylist(rows, schema=trace_schema()), folder / "traces.parquet")
    write_tokens(folder / "tokens.parquet", pieces, labels)
    meta = {
        "labels": list(labels),
        "vocabulary": words,
        "k": k,
        "decoding": "sample(temperature=0.6, top_p=0.95)",
        "seeds": [0],
        "models": dict.fromkeys(labels, "made-up"),
        "n": problems,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder
