"""What tables and figures of studies say alike: names of models, footers, entropies in two digits."""

from __future__ import annotations

from analysis.report.cells import arithmetic_of, commit_of
from analysis.report.document import MINUS
from analysis.report.studies import Study


def short(precision: str) -> str:
    """`NVFP4-W4A4KV4` -> `NVFP4`."""
    return precision.partition("-")[0]


def method_words(recipe: str) -> str:
    """A recipe as text names its method: `reqat-tq` -> `ReQAT-TQ`, `ft-ptq` -> `FT+PTQ`."""
    words = recipe.upper().replace("REQAT", "ReQAT")
    return words.replace("FT-", "FT+", 1) if words.startswith("FT-") else words


def roles(study: Study) -> tuple[str, str]:
    """What reference and candidate of a study of two models are called: their formats, where these differ."""
    names = study.settings["precisions"]
    a, b = short(names["reference"]), short(names["candidate"])
    return (a, b) if a != b else ("reference", "candidate")


def notes(*chosen: Study) -> list[str]:
    """Footer: tier, precisions, n and seeds of each study (once where they agree), arithmetic, commits, intervals."""
    asked: dict[str, list[str]] = {}
    for study in chosen:
        s = study.settings
        decoding = s.get("decoding", "")
        size = f"{s['n']:,} problems, {len(study.seeds)} sampling {'seed' if len(study.seeds) == 1 else 'seeds'}"
        asked.setdefault(f"{size}{f', {decoding}' if decoding else ''}", []).append(study.name)
    sizes = list(asked)
    if len(sizes) > 1:
        sizes = [f"{', '.join(dict.fromkeys(names))}: {size}" for size, names in asked.items()]
    precisions = sorted({name for study in chosen for name in study.settings["precisions"].values()})
    arithmetic = sorted({arithmetic_of(study.record) for study in chosen})
    commits = sorted({commit_of(study.record) for study in chosen})
    return [
        f"{', '.join(sorted({study.tier for study in chosen}))}; {' and '.join(precisions)}.",
        *(f"{size}." for size in sizes),
        f"Arithmetic: {'; '.join(arithmetic)}.",
        "Intervals: 95%, clustered by problem; one training run.",
        f"Commit {', '.join(commits)}.",
    ]


def nats(value: float) -> str:
    """An entropy in two digits."""
    if value <= 0:
        return "0"
    text = f"{value:.2g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", MINUS)


def made_notes(study: Study) -> list[str]:
    """Arithmetic and commit, as every footer says them."""
    return [f"Arithmetic: {arithmetic_of(study.record)}.", f"Commit {commit_of(study.record)}."]
