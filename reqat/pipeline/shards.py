"""An evaluation in parts: jobs that each sample some of its seeds, and the one that puts them together.

A part is an evaluation of fewer seeds under an id of its own (`Evaluation.shards`), a job like any other: with a lock,
a record, and batches that outlive a kill. A response depends on its problem and its seed, so the whole has the outcomes
that one job would have had, in the same order; its record has the arithmetic of the parts, not that of the machine that
put them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.records import record
from reqat.records.pinned import OUTCOMES

if TYPE_CHECKING:
    from reqat.evaluation import Outcomes

# What a record says of how numbers came about.
_COMPUTED = ("hardware", "native", "threads", "versions")


def finished_parts(parts: Iterable[str], paths: Paths, job: record.Job) -> tuple[list[Outcomes], dict[str, Any]]:
    """The outcomes of the parts (ids) of an evaluation, each checked, and what its record says of them. The record of
    ``job``, which puts them together, gets the machine that computed them.

    Raises `ReqatError` for a part that is missing, damaged, of another model than the one that is there now, or made on
    another kind of device than the others.
    """
    from reqat.evaluation.outcomes import Outcomes

    records, read = {}, []
    for id in parts:
        folder = paths.evaluation(id)
        records[id] = record.verify(folder, id=id)
        try:
            record.check_inputs(folder, records[id], {given["id"]: given["sha256"] for given in job.inputs.values()})
        except ReqatError as stale:
            raise ReqatError(f"{stale} Delete that folder and run again.") from None
        read.append(Outcomes.from_parquet(folder / OUTCOMES))
    devices = {id: found["hardware"].get("device") for id, found in records.items()}
    if len(set(devices.values())) > 1:
        raise ReqatError(
            f"{job.id}: its parts ran on different devices ({devices}); delete those of one and run again."
        )
    first = next(iter(records.values()))
    job.computed = {key: first[key] for key in _COMPUTED if key in first}
    return read, _about(records)


def _about(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each part: its seeds, commit, processor and time."""
    return {
        id: {
            "seeds": found["seeds"],
            "commit": found["commit"],
            "cpu": found["hardware"].get("cpu"),
            "gpus": found["hardware"].get("gpus"),
            "wall_s": found["wall_s"],
        }
        for id, found in records.items()
    }
