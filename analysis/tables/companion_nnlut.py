"""Companion NN-LUT: what a decoder and an encoder lose when their functions become tables, and the claims on it.

Every arm of a model reads the same windows or sequences, so losses are paired by window (by group of sequences) with
the same model's exact functions. A decoder's are in nats per token, an encoder's in points of accuracy; above 0 is
worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.companion_claims import NATS, POINTS
from analysis.report.companions import Found, verdict
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from reqat.evaluation.means import Mean, detectable, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import holm

NAME = "companion-nnlut"
COMPANION = "nnlut"
HEADLINE = ("NN-LUT loses nothing",)
"""How the claims begin that README shows."""

EXACT, LINEAR, NLI, RELEASED, NN_LUT = "exact", "linear", "nli", "nli released", "nn_lut"
NAMES = {
    EXACT: "exact",
    LINEAR: "equally spaced",
    NLI: "NLI",
    RELEASED: "NLI, 1 + 8 x 4 + 1 segments",
    NN_LUT: "NN-LUT",
}
BELOW = " below"
WHERE = {
    "all": "all",
    "activation": "activation",
    "softmax": "exp, 1/x",
    "norm": "1/sqrt",
    "activation+exp": "activation, exp",
    f"norm{BELOW}": "1/sqrt, the paper's scaling",
}
FULL = "BF16"  # the precision that quantizes nothing
# WikiText-2 perplexity of SmolLM-135M in the public replication (float32), which replaces SiLU and exp alone; its exact
# model has 20.951. Its NLI is the released layout.
REPLICATION = {(EXACT, "all"): 20.951, (NN_LUT, "activation+exp"): 21.137, (RELEASED, "activation+exp"): 20.940}
#: What may be lost by "no loss" of a claim: 1% of perplexity, half a point of accuracy. Ours; the paper names none.
MARGINS = {"decoder": 0.01, "encoder": 0.5}
UNITS = {"decoder": NATS, "encoder": POINTS}
_DIGITS = {"decoder": 4, "encoder": 2}
_LARGE = 1e5  # a perplexity above it is worse than a guess among all tokens

Arm = tuple[str, str, str, bool]
"""(method, arithmetic, functions, calibrated); functions with :data:`BELOW` have the paper's scaling of inputs."""
_ALL, _PAIR = "all", "activation+exp"


@dataclass(frozen=True)
class Claim:
    """The loss of arm `a` less that of `b` is expected below 0."""

    text: str
    a: Arm
    b: Arm


CLAIMS = (
    Claim("NN-LUT below equally spaced", (NN_LUT, "fp32", _ALL, False), (LINEAR, "fp32", _ALL, False)),
    Claim("calibration lowers the loss", (NN_LUT, "fp32", _ALL, True), (NN_LUT, "fp32", _ALL, False)),
    Claim("NLI below NN-LUT, as many entries", (NLI, "fp32", _ALL, False), (NN_LUT, "fp32", _ALL, False)),
    Claim(
        "NLI as released below NN-LUT, activation and exp (the replication's comparison)",
        (RELEASED, "fp32", _PAIR, False),
        (NN_LUT, "fp32", _PAIR, False),
    ),
)


def build(found: Found) -> Table:
    """A row an arm; a column a model and precision: what it scores, and what it loses against its exact functions."""
    models = dict(_models(found.rows))
    arms = list(dict.fromkeys(arm for seen in models.values() for arm in seen))
    columns = [Column("Tables", align="l"), Column("Functions", align="l"), Column("Arithmetic", align="l")]
    columns += [Column(_precision(about), about[1]) for about in models]
    columns.append(Column("SmolLM-135M", "replication"))
    lines, data = [], []
    for arm in arms:
        method, version, functions, calibrated = arm
        cells = []
        for about, seen in models.items():
            if arm not in seen:
                cells.append(Text(EMPTY))
                continue
            row = scored(about[0], seen, arm)
            cells.append(_cell(about[0], row))
            data.append(
                {"kind": about[0], "model": about[1], "precision": about[2], "method": method, "version": version,
                 "functions": functions, "calibrated": calibrated, **row}
            )  # fmt: skip
        theirs = REPLICATION.get((method, functions)) if version == "fp32" and not calibrated else None
        name = Text(NAMES[method] + (", calibrated" if calibrated else ""))
        if method == EXACT:
            name, where, arithmetic = Text(NAMES[EXACT]), Text(EMPTY), Text("float32")
        else:
            where, arithmetic = Text(WHERE[functions]), Text(version.upper())
        lines.append((name, where, arithmetic, *cells, Text(number(theirs, 3) if theirs else EMPTY)))
    tested = claims(models)
    return Table(
        NAME,
        "NN-LUT: models whose nonlinear functions are tables",
        "Perplexity of decoders and accuracy (%) of encoders; in brackets the loss against exact functions at the "
        "same precision, in nats a token or points, with its interval. Tables of "
        f"{_entries(found)} entries (NLI as released: 34 segments). Activation: SiLU or GELU. 1/sqrt: in norms, inputs "
        "scaled into the table's range by powers of 2^10 (the paper scales up what is below 1, and nothing down). "
        "NN-LUT: mean over training seeds; of single functions and other arithmetics the first seed. On a CPU.",
        (*(_line(row) for row in tested), *_notes(found)),
        tuple(columns),
        (tuple(lines),),
        pd.DataFrame([*data, *({"kind": "claim"} | row for row in tested)]),
    )


About = tuple[str, str, str]
"""(`decoder` or `encoder`, model or task, precision)."""


def _models(rows: pd.DataFrame) -> Iterator[tuple[About, dict[Arm, np.ndarray]]]:
    """Arm -> what a model scores at a precision, one observation a training seed and window or group, [R, P]: nats a
    token, or percent wrong."""
    for what, name, parts, unit, sums, counts in (
        ("decoder", "model", "window", 1.0, "nats", "tokens"),
        ("encoder", "task", "group", 100.0, "wrong", "count"),
    ):
        mine = rows[rows["what"] == what]
        if mine.empty:
            continue
        mine = mine.assign(wrong=mine["count"] - mine["right"]) if what == "encoder" else mine
        mine = mine.assign(functions=mine["functions"] + np.where(mine["scaling"] == "below", BELOW, ""))
        for about, part in mine.groupby([name, "precision"], sort=False):
            seen: dict[Arm, np.ndarray] = {}
            for arm, of_arm in part.groupby(["method", "version", "functions", "calibrated"], sort=False):
                runs = [run.sort_values(parts) for _, run in of_arm.groupby("seed", sort=True)]
                over, under = (np.stack([run[column].to_numpy(float) for run in runs]) for column in (sums, counts))
                seen[arm[0], arm[1], arm[2], bool(arm[3])] = unit * ratio_observations(over, under)
            yield (what, str(about[0]), str(about[1])), seen


def scored(kind: str, seen: dict[Arm, np.ndarray], arm: Arm) -> dict[str, Any]:
    """What an arm scores (perplexity, or accuracy in percent) and loses, with the loss's interval; NaN where a model is
    destroyed."""
    value = float(np.mean(seen[arm]))
    score = float(np.exp(value)) if kind == "decoder" else 100.0 - value
    row: dict[str, Any] = {"score": score, "seeds": len(seen[arm])}
    if arm[0] != EXACT and np.isfinite(value):
        lost = mean_over_runs(seen[arm] - exact(seen))
        row |= {"loss": lost.value, "loss_lo": lost.lo, "loss_hi": lost.hi}
    return row


def exact(seen: dict[Arm, np.ndarray]) -> np.ndarray:
    """What the exact functions score, [1, P]."""
    return next(values for arm, values in seen.items() if arm[0] == EXACT)


def claims(models: dict[About, dict[Arm, np.ndarray]]) -> list[dict[str, Any]]:
    """A row a model, precision and claim whose arms are there; p by Holm over the claims on one model and precision."""
    out = []
    for (kind, model, precision), seen in models.items():
        about = {
            "model": model,
            "precision": precision,
            "where": f"{model}, {_words(precision)}",
            "unit": UNITS[kind],
            "digits": _DIGITS[kind],
        }
        no_loss = (NN_LUT, "fp32", _ALL, False)
        if no_loss in seen and np.isfinite(seen[no_loss]).all():
            lost = mean_over_runs(seen[no_loss] - exact(seen))
            text = f"NN-LUT loses nothing (less than {MARGINS[kind]:g} {UNITS[kind]})"
            out.append(
                about | {"claim": text, **_numbers(lost), "verdict": no_worse(lost, MARGINS[kind], _DIGITS[kind])}
            )
        tested = [
            (claim, mean_over_runs(seen[claim.a] - seen[claim.b]))
            for claim in CLAIMS
            if claim.a in seen and claim.b in seen and np.isfinite(seen[claim.a] - seen[claim.b]).all()
        ]
        for (claim, mean), p in zip(tested, holm([mean.p for _, mean in tested]), strict=True):
            says = verdict(mean, -1, p=p, comparisons=len(tested), digits=_DIGITS[kind])
            out.append(about | {"claim": claim.text, **_numbers(mean), "holm": p, "verdict": says})
    return out


def no_worse(lost: Mean, margin: float, digits: int) -> str:
    """The verdict on "no loss": by where the loss's interval lies to the margin."""
    if lost.hi < margin:
        return "agrees"
    if lost.lo > margin:
        return "disagrees"
    return f"cannot tell at this scale ({number(detectable(lost.std_error, lost.df), digits)})"


def _numbers(mean: Mean) -> dict[str, Any]:
    return {
        "difference": mean.value, "difference_lo": mean.lo, "difference_hi": mean.hi, "seeds": mean.n_training_seeds
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    value, low, high = (number(row[f"difference{end}"], row["digits"], sign=True) for end in ("", "_lo", "_hi"))
    p = f", p {p_value(row['holm'])}" if "holm" in row else ""
    one = " (one training seed)" if row["seeds"] == 1 else ""
    return f"{row['where']}: {row['claim']}: {value} [{low}, {high}] {row['unit']}{p}: {row['verdict']}{one}."


def _cell(kind: str, row: dict[str, Any]) -> Text:
    if not np.isfinite(row["score"]):
        return Text("destroyed")
    detail = ""
    if "loss" in row:
        value, low, high = (number(row[f"loss{end}"], _DIGITS[kind], sign=True) for end in ("", "_lo", "_hi"))
        detail = f"({value} [{low}, {high}])"
    if kind == "decoder":
        return Text(number(row["score"], 3) if row["score"] < _LARGE else f"{row['score']:.1e}", detail=detail)
    return Text(number(row["score"], 2), detail=detail)


def _words(precision: str) -> str:
    return "unquantized" if precision == FULL else precision


def _precision(about: About) -> str:
    return f"{'perplexity' if about[0] == 'decoder' else 'accuracy'}, {_words(about[2])}"


def _entries(found: Found) -> str:
    return ", ".join(dict.fromkeys(str(settings["entries"][0]) for settings in found.settings.values()))


def _notes(found: Found) -> list[str]:
    rows = found.rows
    notes = [
        "Intervals: 95%, over windows or groups of sequences, and training seeds of the networks; p by Holm over the "
        "claims of a model and precision.",
        "The replication (WikiText-2, float32): SmolLM-135M 20.951, NN-LUT of 16 entries 21.137, of 32 22.616, NLI "
        "20.940; SmolLM-360M 12.751, 13.478 (32), 12.787; Qwen2.5-0.5B 14.284, 15.039, 14.265. It divides exactly and "
        "keeps norms. The paper's own tables (GLUE) were not seen.",
    ]
    if (rows.get("model") == "smollm2").any():
        notes.append("SmolLM2-135M-Instruct: its released weights went through 4-bit integers once.")
    seen = rows[rows["what"] == "inputs"]
    for (name, function), part in seen.assign(
        model=seen.get("model", pd.Series(dtype=str)).fillna(seen.get("task"))
    ).groupby(["model", "function"], sort=False):
        row = part.iloc[0]
        notes.append(
            f"{name}: inputs of {function} at {int(row['places'])} places from {row['low']:.4g} to {row['high']:.4g}, "
            f"{100 * row['outside']:.2g}% beyond its range."
        )
    texts = {settings["text"] for settings in found.settings.values() if settings["decoder"] == "smollm2"}
    tasks = {task for settings in found.settings.values() for task in settings["tasks"]}
    if "brown" in texts or any(task.startswith("brown") for task in tasks):
        notes.append("The Brown corpus is commonly read as free for non-commercial use alone.")
    return [*notes, *found.notes]
