"""Traces: a tokenizer with one token a digit, an ordered store of tokenized traces, and their packing into rows."""

from __future__ import annotations

from reqat.data.images import ImageBatch, ImageRows, Images
from reqat.data.labelled import LabelledRows, classified_rows, tagged_rows
from reqat.data.packing import Batch, PackedRows, batches, pack
from reqat.data.rows import AnyBatch, Reader, Rows, Sequences
from reqat.data.store import TraceStore, write_arrays, write_store
from reqat.data.tokenizer import build_tokenizer, encode_prompt, unknown_id, with_bos, without_bos
from reqat.data.traces import Trace, Traces, select

__all__ = [
    "AnyBatch",
    "Batch",
    "ImageBatch",
    "ImageRows",
    "Images",
    "LabelledRows",
    "PackedRows",
    "Reader",
    "Rows",
    "Sequences",
    "Trace",
    "TraceStore",
    "Traces",
    "batches",
    "build_tokenizer",
    "classified_rows",
    "encode_prompt",
    "pack",
    "select",
    "tagged_rows",
    "unknown_id",
    "with_bos",
    "without_bos",
    "write_arrays",
    "write_store",
]
