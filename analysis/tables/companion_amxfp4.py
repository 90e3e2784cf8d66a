"""Companion AMXFP4: perplexity by direct cast over formats, types of scales and rotations, and the claims on it.

Every format reads the same windows, so differences are paired window by window; what a format costs is nats per token
above the unquantized model, of which perplexity is the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.report.companion_claims import NATS
from analysis.report.companions import Found, verdict
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import holm

NAME = "companion-amxfp4"
COMPANION = "amxfp4"
HEADLINE = ("AMXFP4 (E5M2) below MXFP4 (PoT)",)
"""How the claims begin that README shows."""

UNQUANTIZED = "BF16"
Cell = tuple[bool, str, str]
"""(rotated, family, type of scale)."""
MX, AMX, FP16 = ("MXFP4", "PoT"), ("AMXFP4", "E5M2"), ("AMXFP4", "FP16")
_COLUMNS = ("model", "rotated", "family", "scale", "precision", "window", "tokens", "nats")
_DIGITS = 3
_LARGE = 10.0  # from where two digits of a perplexity tell formats apart
_HUGE = 1e5  # a perplexity that says only that the model is destroyed


@dataclass(frozen=True)
class Claim:
    """A difference in nats per token, as a weighted sum of cells, and the sign that the paper expects."""

    text: str
    terms: tuple[tuple[int, Cell], ...]
    sign: int = -1
    of_paper: bool = True


CLAIMS = (
    Claim("AMXFP4 (E5M2) below MXFP4 (PoT)", ((1, (False, *AMX)), (-1, (False, *MX)))),
    Claim("AMXFP4 (E5M2) below MXFP4 (PoT) with rotations", ((1, (False, *AMX)), (-1, (True, *MX)))),
    Claim("AMXFP4 (FP16) below AMXFP4 (E5M2)", ((1, (False, *FP16)), (-1, (False, *AMX)))),
    Claim(
        "rotations gain more with MXFP4 (PoT) than with AMXFP4 (E5M2)",
        ((1, (False, *MX)), (-1, (True, *MX)), (-1, (False, *AMX)), (1, (True, *AMX))),
        sign=1,
    ),
    Claim(
        "two scales a block below one, both E5M2 (control)",
        ((1, (False, *AMX)), (-1, (False, "MXFP4", "E5M2"))),
        of_paper=False,
    ),
)


def build(found: Found) -> Table:
    """A section a model: a row a format, without and with rotations; then a row a claim."""
    rows = measured(found)
    scales = [scale for scale in dict.fromkeys(rows["scale"]) if scale]
    columns = [Column("Model", align="l"), Column("Format", align="l")]
    columns += [Column(scale, group) for group in ("As it is", "Rotated") for scale in scales]
    sections, data = [], []
    for model, part in rows.groupby("model", sort=False):
        table = costs(part)
        data += [{"kind": "perplexity", "model": model} | row for row in table.to_dict("records")]
        families = [name for name in dict.fromkeys(part["family"]) if name != UNQUANTIZED]
        base = table[table["family"] == UNQUANTIZED]["perplexity"].iloc[0]
        digits = 2 if base >= _LARGE else 4
        plain = Text(f"unquantized: {number(base, digits)}")
        lines = [(Text(str(model)), plain, *(Text() for _ in range(2 * len(scales))))]
        for family in families:
            cells = [_cell(table, (rotated, family, scale), digits) for rotated in (False, True) for scale in scales]
            lines.append((Text(str(model)), Text(family), *cells))
        sections.append(tuple(lines))
    tested = claims(rows)
    data += [{"kind": "claim"} | row for row in tested]
    return Table(
        NAME,
        "AMXFP4: perplexity by direct cast",
        "Perplexity with weights, inputs of linear layers and both operands of both products of attention rounded to "
        "four bits, without calibration. MXFP4, AMXFP4, INT4 and AINT4 (with zero points) have blocks of 32, NVFP4 of "
        "16; of it the column E4M3 has its global scale. PoT: powers of two, rounded down; PoT-R: to the nearest. "
        "Rotated: by QuaRot's rotations. In bold the best of a model.",
        (*_verdicts(tested), *_notes(found, rows)),
        tuple(columns),
        tuple(sections),
        pd.DataFrame(data),
    )


def measured(found: Found) -> pd.DataFrame:
    """The rows of perplexity parts; empty texts in `scale` for the unquantized model."""
    rows = found.rows.reindex(columns=list(_COLUMNS))
    rows = rows[rows["nats"].notna()]
    return rows.assign(scale=rows["scale"].fillna("").astype(str), rotated=rows["rotated"].astype(bool))


def observations(rows: pd.DataFrame) -> dict[Cell, np.ndarray]:
    """Cell -> nats per token as one observation a window, [windows], of one model's rows."""
    out = {}
    for cell, part in rows.groupby(["rotated", "family", "scale"], sort=False):
        part = part.sort_values("window")
        sums, counts = (part[name].to_numpy(float)[None] for name in ("nats", "tokens"))
        out[cell] = ratio_observations(sums, counts)[0]
    return out  # type: ignore[return-value]


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of one model, a row a cell: perplexity, and nats per token above the unquantized model with its interval."""
    seen = observations(rows)
    out = []
    for (rotated, family, scale), values in seen.items():
        row = {"rotated": rotated, "family": family, "scale": scale, "perplexity": float(np.exp(values.mean()))}
        if family != UNQUANTIZED:
            above = mean_over_runs((values - seen[rotated, UNQUANTIZED, ""])[None])
            row |= {"above": above.value, "above_lo": above.lo, "above_hi": above.hi}
        out.append(row)
    return pd.DataFrame(out)


def claims(rows: pd.DataFrame) -> list[dict[str, object]]:
    """A row a model and claim whose cells are there: the difference in nats per token, its interval, p adjusted over
    the claims on a model, and the verdict."""
    out = []
    for model, part in rows.groupby("model", sort=False):
        seen = observations(part)
        tested = list(_tested(seen))
        for (claim, mean), p in zip(tested, holm([mean.p for _, mean in tested]), strict=True):
            says = verdict(mean, claim.sign, p=p, comparisons=len(tested), digits=_DIGITS)
            about = {"where": model, "claim": claim.text, "of_paper": claim.of_paper, "windows": mean.n_problems}
            about |= {"unit": NATS}
            numbers = {"difference": mean.value, "difference_lo": mean.lo, "difference_hi": mean.hi, "holm": p}
            out.append(about | numbers | {"verdict": says})
    return out


def _tested(seen: dict[Cell, np.ndarray]) -> Iterator[tuple[Claim, Mean]]:
    for claim in CLAIMS:
        if all(cell in seen for _, cell in claim.terms):
            values = sum(weight * seen[cell] for weight, cell in claim.terms)
            yield claim, mean_over_runs(np.asarray(values)[None])


def _cell(table: pd.DataFrame, cell: Cell, digits: int) -> Text:
    rotated, family, scale = cell
    at = table[(table["rotated"] == rotated) & (table["family"] == family) & (table["scale"] == scale)]
    if at.empty:
        return Text(EMPTY)
    value = at["perplexity"].iloc[0]
    best = table[table["family"] != UNQUANTIZED]["perplexity"].min()
    return Text(number(value, digits) if value < _HUGE else f">{number(_HUGE, 0)}", bold=bool(value == best))


def _verdicts(tested: list[dict[str, object]]) -> list[str]:
    lines = []
    for row in tested:
        value, low, high = (number(float(row[name]), _DIGITS, sign=True) for name in _DIFFERENCE)  # type: ignore[arg-type]
        p = p_value(float(row["holm"]))  # type: ignore[arg-type]
        lines.append(f"{row['where']}: {row['claim']}: {value} [{low}, {high}] nats a token, p {p}: {row['verdict']}.")
    return lines


_DIFFERENCE = ("difference", "difference_lo", "difference_hi")


def _notes(found: Found, rows: pd.DataFrame) -> list[str]:
    settings = next(iter(found.settings.values()))
    read = []
    for model, part in rows.groupby("model", sort=False):
        tokens = int(part.drop_duplicates("window")["tokens"].sum())
        what = {"smollm2": f"windows of {settings['text'].capitalize()}", "testbed": "verified traces"}
        read.append(f"{model} reads {part['window'].nunique()} {what.get(str(model), 'windows')}, {tokens:,} tokens.")
    notes = [
        *read,
        "Intervals: 95%, over windows, one draw of the rotations' signs; p by Holm over the claims on a model.",
        "Paper (WikiText-2, CSQA, VQA): AMXFP4 gains 3 points on VQA over MXFP4 and 1.6 on CSQA over rotations; its "
        "tables of perplexity were not seen.",
    ]
    if "smollm2" in set(rows["model"]):
        notes.append(
            "SmolLM2's weights went through 4-bit integers in blocks of 32 once, which favours INT4 and AINT4."
        )
    if settings["text"] == "brown":
        notes.append("The Brown corpus is commonly read as free for non-commercial use alone.")
    return [*notes, *found.notes]
