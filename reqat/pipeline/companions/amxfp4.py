"""AMXFP4 by direct cast: perplexity over formats, types of scales and rotations, and how one-sided blocks are.

As in the public code of the paper: weights and inputs of all linear layers and both operands of both products of
attention are rounded, each along the axis that is summed over, nothing is calibrated, and norms and the head stay. A
block of values thus spans tokens, later ones among them, which a decoder with a cache could not do. Rotations are
QuaRot's. Differs from there: ties go to the even code but for AMXFP4's; NVFP4 is added, with its global scales.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pandas as pd

from reqat.config.companions import SMOLLM2, TESTBED
from reqat.config.companions.amxfp4 import BLOCKS, ROTATED, Settings
from reqat.pipeline.companions import Given

BITS = "W4A4Q4KV4P4"
REFERENCE = "BF16"
_POWERS = {"PoT": ("E8M0", "floor"), "PoT-R": ("E8M0", "even")}
_BATCH_TOKENS = 1024


def precision_of(family: str, scale: str) -> str | None:
    """The name of a cell of the grid; None where there is no such format (four-over-six has E4M3 scales alone, as NVFP4
    by its name; of other scales NVFP4's row is of blocks of 16 without a global scale)."""
    stored, rule = _POWERS.get(scale, (scale, None))
    power = rule is not None
    if family in ("NVFP4", "NVFP4-4/6") and scale == "E4M3":
        return f"{family}-{BITS}"
    if family == "NVFP4-4/6":
        return None
    if family == "MXFP4" and power:
        return f"MXFP4-{BITS}:scale_rule={rule}"
    name = {"INT4": "INT4-g32", "AINT4": "AINT4-g32", "MXFP4": "FP4-g32", "AMXFP4": "AMXFP4", "NVFP4": "FP4-g16"}[
        family
    ]
    return f"{name}-{BITS}:scale={stored}" + (f",scale_rule={rule}" if power else "")


def cells(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """(family, scale, precision) of every cell of the grid that there is, behind the unquantized model."""
    yield REFERENCE, "", REFERENCE
    for family in settings.families:
        for scale in settings.scales:
            if (precision := precision_of(family, scale)) is not None:
                yield family, scale, precision


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """Of a perplexity part a row a format, scale and window: `tokens`, `nats` (summed over them). Of the part `blocks`
    a row a tensor: `blocks`, `one_sided`, and errors relative to its squares."""
    name, what = part.split("-")
    model, rows = _model_and_rows(name, settings, given)
    if what == BLOCKS:
        return _blocks(name, model, rows, settings, given)
    if what == ROTATED:
        _rotate(model, rows, settings)
    return _perplexities(name, what == ROTATED, model, rows, settings, given)


def _perplexities(
    name: str, rotated: bool, model: Any, rows: list[Any], settings: Settings, given: Given
) -> pd.DataFrame:
    from reqat.evaluation.likelihood import log_likelihoods

    out = []
    for family, scale, precision in cells(settings):
        prepared = _prepared(model, precision)
        nats = -log_likelihoods(prepared, rows, batch_tokens=_BATCH_TOKENS)
        given.say(f"{name} {'rotated ' if rotated else ''}{precision}: {nats.sum():.1f} nats")
        about = {"model": name, "rotated": rotated, "family": family, "scale": scale, "precision": precision}
        out += [
            about | {"window": i, "tokens": len(row[1]), "nats": float(value)}
            for i, (row, value) in enumerate(zip(rows, nats, strict=True))
        ]
    return pd.DataFrame(out)


def _blocks(name: str, model: Any, rows: list[Any], settings: Settings, given: Given) -> pd.DataFrame:
    import torch

    from reqat.evaluation.block_signs import block_signs
    from reqat.formats import get_format

    formats = {"MXFP4": get_format("MXFP4", scale_rule="floor"), "AMXFP4": get_format("AMXFP4")}
    shortest = min(len(row[0]) + len(row[1]) for row in rows)
    ids = torch.tensor([[*row[0], *row[1]][:shortest] for row in rows])
    out = []
    for rotated in (False, True):
        if rotated:
            _rotate(model, rows, settings)
        for seen in block_signs(_prepared(model, f"MXFP4-{BITS}"), ids, formats):
            errors = {f"error_{label.lower()}": error / seen.square for label, error in seen.errors.items()}
            about = {"model": name, "rotated": rotated, "role": seen.role, "layer": seen.layer, "tensor": seen.name}
            out.append(about | {"blocks": seen.blocks, "one_sided": seen.one_sided} | errors)
    return pd.DataFrame(out)


def _prepared(model: Any, precision: str) -> Any:
    """A copy of a model, at a precision."""
    from reqat.models import prepare, quantize_values_along_tokens

    prepared = copy.deepcopy(model)
    prepare(prepared, precision, override=True)
    quantize_values_along_tokens(prepared)
    return prepared


def _rotate(model: Any, rows: list[Any], settings: Settings) -> None:
    import torch

    from reqat.methods.ptq.quarot import rotate
    from reqat.quant import Precision

    first = torch.tensor([[*rows[0][0], *rows[0][1]]])
    rotate(model, Precision(), first, seed=settings.seed, progress=False)


def _model_and_rows(name: str, settings: Settings, given: Given) -> tuple[Any, list[Any]]:
    """A model, and what it reads: (token ids before, token ids that are scored) a window or trace."""
    from reqat.models import load_model, load_tokenizer

    if name == "tiny":
        return _tiny(settings)
    folder = given.source(SMOLLM2 if name == "smollm2" else TESTBED)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if name == "testbed":
        from reqat.evaluation.dynamics import verified_traces

        traces = verified_traces(settings.problems, tokenizer, n=settings.traces, seed=settings.seed)
        return model, [(trace.prompt_ids, trace.response_ids) for trace in traces]
    return model, windows(_text(settings, given), tokenizer, settings.windows, settings.window_tokens)


def _text(settings: Settings, given: Given) -> str:
    """Running English: two novels, or the last tenth of the Brown corpus."""
    if settings.text == "austen":
        from reqat.data.packaged import austen

        return "\n".join(austen.load(given.source("austen"), title) for title in ("emma", "persuasion"))
    from reqat.data.packaged import brown

    texts = [text for text in brown.load(given.source("brown")) if text["id"].endswith("0")]
    return "\n".join(" ".join(brown.written(s) for s in text["sentences"]) for text in texts)


def windows(text: str, tokenizer: Any, count: int, length: int) -> list[tuple[list[int], list[int]]]:
    """`count` windows of `length` tokens without overlap, spread evenly over a text; the first token of each is given.

    Raises `ReqatError` for a text that is too short."""
    from reqat.config.errors import ReqatError

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        raise ReqatError(f"the text has {len(ids)} tokens, {count} windows of {length} are asked for: lower windows.")
    step = len(ids) // count
    return [(ids[i * step : i * step + 1], ids[i * step + 1 : i * step + length]) for i in range(count)]


def _tiny(settings: Settings) -> tuple[Any, list[Any]]:
    """A model of random weights, and random tokens: a check that everything runs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, config.vocab_size, (settings.windows, settings.window_tokens)).tolist()
    return LlamaForCausalLM(config).eval(), [(row[:1], row[1:]) for row in ids]
