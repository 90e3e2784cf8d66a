"""Companion NCE: two-bit accuracy of a small ResNet by how channels are given to its layers, and the claims on it.

All arms of a seed see the same images in the same order, so differences are paired by training seed; the interval is
Student's over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from analysis.report.companion_claims import CORRELATION, SHARE
from analysis.report.companions import Found, verdict
from analysis.report.document import Column, Table, Text, interval, number, percent
from reqat.config.companions.nce import ARMS
from reqat.evaluation.means import Mean, mean_of_seeds
from reqat.evaluation.statistics import holm

NAME = "companion-nce"
COMPANION = "nce"
HEADLINE = ("NCE above TAS", "NCE above the original")
"""How the claims begin that README shows."""

WORDS = {
    "original": "original widths",
    "widened": "all layers widened",
    "uniform": "all layers alike, to the budget",
    "random": "at random, to the budget",
    "tas": "searched, no expansion (TAS)",
    "nce": "searched with expansion (NCE)",
}
ERRORS = "largest where the original's layer loses most"


@dataclass(frozen=True)
class Claim:
    """That two-bit accuracy of arm `a` is above that of `b`; or, without `b`, that NCE's widths go with the errors."""

    text: str
    a: str = "nce"
    b: str = ""
    of_paper: bool = True


CLAIMS = (
    Claim("NCE above TAS, in the same budget", b="tas"),
    Claim("NCE above the original widths", b="original"),
    Claim("NCE above widths all alike, in the same budget (control)", b="uniform", of_paper=False),
    Claim("NCE above random widths, in the same budget (control)", b="random", of_paper=False),
    Claim(f"rank correlation: NCE's widening is {ERRORS}"),
)


def build(found: Found) -> Table:
    """A row an arm, then a row a claim; a section each of several settings."""
    data = arms(found)
    columns = (
        Column("Channels", align="l"),
        Column("multiplications (10^6)"),
        Column("parameters (10^3)"),
        Column("full precision (%)"),
        Column("two bits (%)"),
        Column("Verdict", align="l"),
    )
    sections, claimed = [], []
    for label, part in data.groupby("companion", sort=False):
        sections.append(tuple(_arm_line(row) for row in part.itertuples()))
        findings = list(claims(found.rows[found.rows["companion"] == label]))
        sections.append(tuple(_claim_line(*finding) for finding in findings))
        claimed += [_flat(str(label), *finding) for finding in findings]
    return Table(
        NAME,
        "NCE: channels for a two-bit network",
        "Test accuracy of a small ResNet, trained in full precision and then with two-bit weights (SAWB) and "
        "activations (PACT), by how its channels were chosen. Brackets: 95% intervals over training seeds. Claims are "
        "differences of two-bit accuracy in points, paired by seed, with p-values adjusted by Holm; in parentheses the "
        "difference that 80% power would have found. The paper's own numbers, of CIFAR-10 and of ResNet-50 on "
        "ImageNet, are of other data, and could not be read; what stands here of it are its claims.",
        found.notes,
        columns,
        tuple(sections),
        pd.concat([data, pd.DataFrame(claimed)], ignore_index=True),
    )


def per_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a companion, arm and seed."""
    return rows.drop_duplicates(["companion", "arm", "seed"])


def arms(found: Found) -> pd.DataFrame:
    """A row an arm, in the order of the settings: means over seeds of cost and accuracies with their intervals."""
    out = []
    for (label, arm), part in per_seed(found.rows).groupby(["companion", "arm"], sort=False):
        row = {"companion": label, "arm": arm, "seeds": len(part), "images": int(part["images"].iloc[0])}
        row |= {name: part[name].mean() for name in ("macs", "parameters", "expansions")}
        for name in ("full", "two_bit"):
            mean = mean_of_seeds(part[name].to_numpy(float))
            row |= {name: mean.value, f"{name}_lo": mean.lo, f"{name}_hi": mean.hi}
        out.append(row)
    data = pd.DataFrame(out)
    order = {arm: i for i, arm in enumerate(ARMS)}
    return data.sort_values("arm", key=lambda names: names.map(order), kind="stable").sort_values(
        "companion", kind="stable", ignore_index=True
    )


def claims(rows: pd.DataFrame) -> Iterator[tuple[Claim, Mean, float, int]]:
    """(claim, mean difference over seeds, adjusted p-value, how many claims) of those whose arms are there."""
    values = {claim: _values(rows, claim) for claim in CLAIMS}
    means = {claim: mean_of_seeds(found) for claim, found in values.items() if len(found)}
    tested = [claim for claim, mean in means.items() if not np.isnan(mean.p)]
    adjusted = dict(zip(tested, holm([means[claim].p for claim in tested]), strict=True))
    for claim, mean in means.items():
        yield claim, mean, adjusted.get(claim, float("nan")), len(tested)


def _values(rows: pd.DataFrame, claim: Claim) -> np.ndarray:
    """The claim's quantity, one a seed."""
    if claim.b:
        accuracy = per_seed(rows).pivot(index="seed", columns="arm", values="two_bit")
        if not {claim.a, claim.b} <= set(accuracy):
            return np.zeros(0)
        return (accuracy[claim.a] - accuracy[claim.b]).dropna().to_numpy(float)
    return np.array(list(correlations(rows).values()))


def correlations(rows: pd.DataFrame) -> dict[int, float]:
    """Seed -> Spearman's correlation over two-bit layers of NCE's width, as a share of the original's, with the error
    of the layer's output in the original network of that seed."""
    out = {}
    for seed, of_seed in rows.groupby("seed"):
        layers = {arm: part.set_index("layer") for arm, part in of_seed.groupby("arm")}
        if not {"nce", "original"} <= set(layers) or "output_error" not in of_seed:
            continue
        ratio = (layers["nce"]["width"] / layers["nce"]["original"]).rename("ratio")
        both = pd.concat([ratio, layers["original"]["output_error"]], axis=1).dropna()
        if both.nunique().min() > 1:
            out[int(seed)] = float(spearmanr(both["ratio"], both["output_error"]).statistic)
    return out


def _arm_line(row: object) -> tuple[Text, ...]:
    full, two = (
        Text(percent(getattr(row, name), 2), detail=interval(getattr(row, f"{name}_lo"), getattr(row, f"{name}_hi")))
        for name in ("full", "two_bit")
    )
    text = WORDS[row.arm]  # type: ignore[attr-defined]
    cost = (Text(number(row.macs / 1e6, 3)), Text(number(row.parameters / 1e3, 2)))  # type: ignore[attr-defined]
    return Text(text), *cost, full, two, Text()


def _claim_line(claim: Claim, mean: Mean, p: float, comparisons: int) -> tuple[Text, ...]:
    scale = 100 if claim.b else 1
    inside = interval(mean.lo * scale / 100, mean.hi * scale / 100, sign=True)
    value = Text(number(mean.value * scale, 2, sign=True), detail=inside if claim.b else _plain(mean))
    source = "paper: yes; here: " if claim.of_paper else ""
    return Text(claim.text), Text(), Text(), Text(), value, Text(source + _verdict(claim, mean, p, comparisons))


def _plain(mean: Mean) -> str:
    return "" if np.isnan(mean.lo) else f"[{number(mean.lo, 2, sign=True)}, {number(mean.hi, 2, sign=True)}]"


def _verdict(claim: Claim, mean: Mean, p: float, comparisons: int) -> str:
    if np.isnan(p):
        return "one training seed"
    scale = 100 if claim.b else 1
    in_points = Mean(
        mean.value * scale,
        mean.lo * scale,
        mean.hi * scale,
        mean.p,
        mean.std_error * scale,
        mean.n_problems,
        mean.n_training_seeds,
        mean.df,
    )
    return verdict(in_points, 1, p=p, comparisons=max(1, comparisons), digits=2)


def _flat(label: str, claim: Claim, mean: Mean, p: float, comparisons: int) -> dict[str, object]:
    return {
        "companion": label,
        "where": label,
        "claim": claim.text,
        "unit": SHARE if claim.b else CORRELATION,
        "difference": mean.value,
        "difference_lo": mean.lo,
        "difference_hi": mean.hi,
        "p": mean.p,
        "p_holm": p,
        "seeds": mean.n_training_seeds,
        "verdict": _verdict(claim, mean, p, comparisons),
    }
