"""Whether two results stand on the same weights: studies measured later than the run whose tables they stand beside."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from reqat.config.paths import made
from reqat.config.plan import Plan
from reqat.config.studies import PlannedStudy
from reqat.records import record


def same_stages(
    plan: Plan, studies: Iterable[PlannedStudy], there: Mapping[str, str], run: Mapping[str, Mapping[str, Any]]
) -> bool | None:
    """Whether studies stand on the very weights that a pinned run tabulates (`run`: its records by id); warns where
    they do not.

    None where one of the stages is missing on either side, so that nothing can be said. A pinned base is not asked
    about: the sha256 of its weights is part of the ids.
    """
    kept = {id: record.outputs_digest(found) for id, found in run.items()}
    used = sorted({id for study in studies for id in study.inputs.values() if made(plan.stage(id))})
    other = [id for id in used if id in kept and id in there and kept[id] != there[id]]
    if other:
        print(
            f"reqat: warning: the studies stand on other weights than the pinned run: {', '.join(other)}; "
            "their numbers and its tables are of different trainings.",
            file=sys.stderr,
        )
        return False
    return True if set(used) <= kept.keys() & there.keys() else None
