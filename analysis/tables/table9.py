"""Table 9: what 4 bits take, after k epochs of fine-tuning, or after k epochs of QAT."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, tokens
from analysis.report.rows import footer, made_by, paper_row, tidy
from analysis.report.texts import difference_text, reported_text
from analysis.tables._epochs import HANDED_OVER, by_epochs

NAME = "table9"


def drops(results: Results, entries: list[Entry], model: str) -> dict[str, dict[int, tuple[Entry, Entry]]]:
    """The paper's two lines: method -> epochs -> (BF16, 4 bits)."""
    finetuned, rounded, taq = (by_epochs(results, entries, model, name) for name in ("FT", "FT+PTQ", "TAQ"))
    handed_over = finetuned.get(HANDED_OVER)
    return {
        "FT(k)->PTQ": {k: (finetuned[k], e) for k, e in rounded.items() if k in finetuned},
        f"FT({HANDED_OVER})->QAT(k)": {k: (handed_over, e) for k, e in taq.items()} if handed_over else {},
    }


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 9: points lost to BF16, by epochs."""
    entries = results.of(artifact)
    models = results.models(artifact)
    found = {model: drops(results, entries, model) for model in models}
    shown = sorted({k for of in found.values() for line in of.values() for k in line})
    theirs = {(r.method, int(r.condition["epochs"])): r.value for r in paper.select("table9")}
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        Column("4 bits by", align="l"),
        Column("Compared with", align="l"),
        *(Column(f"k={k}", "Drop (points) after k epochs") for k in shown),
        *(Column(f"k={k}", "Paper: R1-Llama-8B, AIME-120") for k in shown),
    ]
    names = {"FT(k)->PTQ": "rounding after FT of k epochs"}
    sections, rows = [], []
    for model, of in found.items():
        section = []
        for method, line in of.items():
            reference = "FT of k epochs" if "PTQ" in method else f"FT of {HANDED_OVER} epochs"
            cells = [Text(model)] if len(models) > 1 else []
            cells += [Text(names.get(method, f"QAT of k epochs after FT of {HANDED_OVER}")), Text(f"BF16 {reference}")]
            for k in shown:
                d = results.paired(*line[k]) if k in line else None
                cells.append(difference_text(d))
                if d is not None:
                    plain, four_bits = line[k]
                    rows.append(
                        {
                            "source": "measured",
                            "tier": results.plan.tier.name,
                            "model": model,
                            "precision": four_bits.precision,
                            "method": method,
                            "condition": f"epochs={k}",
                            "total_tokens": four_bits.total_tokens,
                            "multiple": four_bits.multiple,
                            "metric": "drop",
                            "value": 100 * d.value,
                            "lo": 100 * d.lo,
                            "hi": 100 * d.hi,
                            "p": d.p,
                            "bf16": 100 * d.value_a,
                            "four_bits": 100 * d.value_b,
                            "bf16_evaluations": " ".join(c.evaluation for c in plain.cells),
                            **made_by(results, four_bits, d.n_problems),
                        }
                    )
            cells += [reported_text(theirs.get((method, k))) for k in shown]
            section.append(tuple(cells))
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table9")]
    subset = tokens(results.plan.tier.budget.qat_tokens)
    return Table(
        artifact,
        results.title(artifact),
        f"Every training goes over the same {subset} tokens of traces. First line: FT of k epochs minus the same model "
        f"rounded to nearest. Second line: FT of {HANDED_OVER} epochs minus QAT of k epochs that started from it. "
        "A positive number is a loss; p from a paired test on the same problems and sampling seeds.",
        footer(results, entries, "Tables 9, 13 and 15 are of the same runs.", *paper.notes("table9")),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
