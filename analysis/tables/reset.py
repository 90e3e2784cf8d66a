"""ReSET's ablation as a table: what a temperature that follows the entropy gives a quantized model.

ReSET (arXiv 2606.13233) samples coldly where a model is sure and warmly where it is not, with a threshold fitted to the
quantized model. Part of such a gain may be nothing but a lower temperature, hence the controls: the same model at
constant temperatures. Every line answers the same problems; differences are paired, against the quantized model as it
is.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from analysis.report.document import Column, Table, Text, interval, number, p_value, percent
from analysis.report.studies import ByKind, Study, adjusted, several
from analysis.report.study_words import notes
from reqat.config.errors import ReqatError

NAME = "reset"
STUDIES = ("reset",)

RESET_CITATION = "ReSET, arXiv 2606.13233"
RESET_MODELS = ("R1-Qwen-7B", "R1-Qwen-14B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
# AIME-120 accuracy in percent, as reported, by model; the paper gives no intervals.
RESET_REPORTED = {"NVFP4": (39.6, 52.4, 62.5, 70.4, 74.4), "ReSET": (43.8, 54.0, 64.9, 72.1, 77.5)}
RESET_REPORTED_OVERHEAD = "about 1.5% of a decoding step"
_ARGUMENT = re.compile(r"(\w+)=([^,()]+)")


def decoding_words(decoding: str) -> str:
    """`sample(temperature=0.6, top_p=0.95)` -> `T 0.6, top-p 0.95`; ReSET by its temperatures and threshold."""
    given = dict(_ARGUMENT.findall(decoding))
    if decoding.startswith("reset"):
        return f"ReSET, T {float(given['t_low']):g} or {float(given['t_high']):g}, tau0 {float(given['tau0']):.3g} nats"
    if decoding.startswith("sample"):
        return ", ".join(
            f"{name} {float(given[key]):g}" for key, name in (("temperature", "T"), ("top_p", "top-p")) if key in given
        )
    return decoding


def build(studies: ByKind) -> Table:
    """Table `reset`: the quantized model, with each fitted ReSET, with constant temperatures, and BF16.

    Raises `ReqatError` if the tier has no study of the kind `reset`, or one without the condition `quantized`.
    """
    chosen = several(studies, "reset")
    sections, rows = [], []
    for study in chosen:
        frame = study.conditions
        frame = frame.assign(p_holm=adjusted(frame))
        if "quantized" not in set(frame["condition"]):
            raise ReqatError(f"{study.path}: no condition 'quantized' in summary.json; run the study again.")
        groups: dict[str, list[tuple[Text, ...]]] = {"quantized": [], "control": [], "reference": []}
        first_reset = next((name for name in frame["condition"] if str(name).startswith("reset")), None)
        for found in frame.to_dict("records"):
            name = str(found["condition"])
            group = "reference" if name.casefold() == "bf16" else "control" if name.startswith("also") else "quantized"
            groups[group].append(_line(study, found, name, name == first_reset))
            rows.append(_row(study, found, group))
        sections += [tuple(lines) for lines in groups.values() if lines]
    rows += [
        {"source": "paper", "condition": name, "model": model, "metric": "AIME-120", "value": value}
        for name, values in RESET_REPORTED.items()
        for model, value in zip(RESET_MODELS, values, strict=True)
    ]
    data = pd.DataFrame(rows)
    for column in ("problems", "seeds", "unfinished"):
        data[column] = data[column].astype("Int64")
    return Table(
        NAME,
        "ReSET: sampling by entropy",
        "Accuracy with 95% interval of one quantized model under several decodings, and of the same model unquantized. "
        "Differences are to the quantized model under its usual decoding, in points, from a paired test on the same "
        "problems and sampling seeds, p adjusted for the comparisons of the study (Holm); a decoding with other seeds "
        "(greedy has one) has none. The second block is what constant temperatures give. The block on the right is "
        "what ReSET's paper reports of its own models.",
        (
            *notes(*chosen),
            *(_fitted(study) for study in chosen),
            f"Numbers of the paper: {RESET_CITATION}; it reports an overhead of {RESET_REPORTED_OVERHEAD}.",
        ),
        (
            Column("Precision", align="l"),
            Column("Decoding", align="l"),
            Column("Accuracy (%)"),
            Column("Difference (points)"),
            Column("Mean tokens"),
            Column("Cut off (%)"),
            *(Column(model, "Paper: NVFP4, AIME-120 (%)") for model in RESET_MODELS),
        ),
        tuple(sections),
        data,
    )


def _line(study: Study, found: dict[str, Any], name: str, is_first_reset: bool) -> tuple[Text, ...]:
    precisions = study.settings["precisions"]
    precision = precisions["reference"] if name.casefold() == "bf16" else precisions["quantized"]
    difference = Text()
    if not math.isnan(found.get("difference", math.nan)):
        p = p_value(float(found["p_holm"]))
        ends = interval(float(found["difference_lo"]), float(found["difference_hi"]), sign=True)
        words = f"{ends}, p{p}" if p.startswith("<") else f"{ends}, p={p}"
        difference = Text(percent(float(found["difference"]), sign=True), detail=words)
    reported = RESET_REPORTED["ReSET"] if is_first_reset else RESET_REPORTED["NVFP4"] if name == "quantized" else None
    responses = int(found["problems"]) * int(found["seeds"])
    return (
        Text(precision),
        Text(decoding_words(str(found["decoding"]))),
        Text(percent(float(found["accuracy"])), detail=interval(float(found["lo"]), float(found["hi"]))),
        difference,
        Text(number(float(found["mean_tokens"]))),
        Text(percent(int(found["unfinished"]) / responses)),
        *(Text(number(value)) for value in reported or ()),
        *([] if reported else [Text()] * len(RESET_MODELS)),
    )


def _row(study: Study, found: dict[str, Any], group: str) -> dict[str, Any]:
    keys = ("difference", "difference_lo", "difference_hi")
    precisions = study.settings["precisions"]
    return {
        "source": "measured",
        "tier": study.settings["tier"],
        "study": study.id,
        "condition": found["condition"],
        "precision": precisions["reference" if group == "reference" else "quantized"],
        "decoding": found["decoding"],
        "metric": "accuracy",
        "value": 100 * found["accuracy"],
        "lo": 100 * found["lo"],
        "hi": 100 * found["hi"],
        **{key: 100 * found.get(key, math.nan) for key in keys},
        "p": found.get("p", math.nan),
        "p_holm": found["p_holm"],
        "mean_tokens": found["mean_tokens"],
        "problems": found["problems"],
        "seeds": found["seeds"],
        "unfinished": found["unfinished"],
        "commit": str(study.record["commit"])[:10],
    }


def _fitted(study: Study) -> str:
    """How tau0 was found, in a sentence."""
    fit = study.settings["tau0"]
    ends = f"{number(fit['lo'], 3)} to {number(fit['hi'], 3)}"
    return (
        f"tau0 = {number(fit['value'], 3)} nats (95% interval {ends}): percentile {100 * fit['quantile']:g} of the "
        f"quantized model's entropies over {fit['n_tokens']:,} tokens of {fit['n_problems']} held-out problems."
    )
