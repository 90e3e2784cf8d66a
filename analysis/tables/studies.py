"""What was measured on which models: a row a study."""

from __future__ import annotations

import pandas as pd

from analysis.report.document import EMPTY, Column, Table, Text
from analysis.report.studies import ByKind
from reqat.config.base import parse
from reqat.config.studies import PlannedStudy

NAME = "studies"
STUDIES = ()


def build(studies: ByKind) -> Table:
    """What was measured on which models: a row a study."""
    lines, data = [], []
    for group in studies.values():
        for study in group:
            planned = parse(PlannedStudy, study.record["config"], str(study.path))
            recipes, precisions = study.settings["recipes"], study.settings["precisions"]
            models = {role: f"{recipe} at {precisions[role]}" for role, recipe in recipes.items()}
            row = {
                "kind": study.kind,
                "name": study.name,
                "models": "; ".join(f"{role}: {text}" for role, text in models.items()),
                "stages": "; ".join(sorted({model.stage for model in planned.models.values()})),
                "split": planned.problems.split if planned.problems else "",
                "problems": planned.problems.n if planned.problems else 0,
                "seeds": len(study.seeds),
                "study": study.id,
                "commit": study.record["commit"],
            }
            data.append(row)
            asked = f"{row['problems']} ({row['split']})" if row["split"] else EMPTY
            shown = row["models"] if len(models) < 3 else ", ".join(models)
            words = [row["kind"], row["name"], shown, asked, str(row["seeds"] or EMPTY), row["study"]]
            lines.append(tuple(Text(str(word)) for word in words))
    dirty = any(study.record["dirty"] is not False for group in studies.values() for study in group)
    commits = sorted({str(row["commit"])[:12] for row in data})
    return Table(
        name=NAME,
        title="Studies of the tier's models",
        caption="Measurements on models that the tier's stages trained, each with its models, problems and sampling "
        "seeds; where there are many, by their labels in the figure. The studies' ids name their folders.",
        footer=(f"Commit {', '.join(commits)}{', with uncommitted changes' if dirty else ''}.",),
        columns=(
            Column("kind", align="l"),
            Column("name", align="l"),
            Column("models", align="l"),
            Column("problems"),
            Column("seeds"),
            Column("study", align="l"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )
