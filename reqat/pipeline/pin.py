"""Pinning: a finished run is checked whole and promoted into `results/`, where git keeps it and no rule ever writes.

What is pinned of a run: its plan, every record, every evaluation's outcomes without the responses' text (the record
still holds the sha256 of the full file), and the tables and plots made of them. Weights are not, but for the base
checkpoint that `make figures` starts from.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.config.paths import Paths, made, read_plan
from reqat.config.plan import Plan
from reqat.config.targets import making
from reqat.records import record

PLAN, PIN, OUTCOMES = "plan.json", "pin.json", "outcomes.parquet"
BASE_BYTES = 8 * 2**20
_LISTED = 8


def check(plan: Plan, paths: Paths, *, allow_dirty: bool = False) -> dict[str, dict[str, Any]]:
    """Records of the whole run by id. Raises `ReqatError` listing what is missing, changed, of another plan, or made
    from a dirty tree.
    """
    wanted = {id: (paths.stage(stage), stage) for id, stage in plan.needed.items() if made(stage)}
    folders = wanted | {id: (paths.evaluation(e), e) for id, e in plan.evaluations.items()}
    found: dict[str, dict[str, Any]] = {}
    digests: dict[str, str] = {}
    troubles: list[str] = []
    for id, (folder, node) in folders.items():
        try:
            entry = record.verify(folder, id=id)
            if entry["config_sha256"] != digest(entry["config"]) or digest(
                type(node).model_validate(entry["config"])
            ) != digest(node):
                raise ReqatError(
                    f"{folder}: its record states another configuration than the plan; delete the folder and run again."
                )
            record.check_inputs(folder, entry, digests)
            found[id], digests[id] = entry, record.outputs_digest(entry)
        except ReqatError as error:
            troubles.append(str(error))
    dirty = [id for id, entry in found.items() if entry["dirty"] is not False]
    if dirty and not allow_dirty:
        troubles.append(
            f"{len(dirty)} results were made from a tree with uncommitted changes (or outside git), {dirty[0]} "
            "among them: commit and run "
            "again, or pass --allow-dirty, which will be recorded."
        )
    if troubles:
        more = [f"... and {len(troubles) - _LISTED} more"] if len(troubles) > _LISTED else []
        raise ReqatError("\n".join([f"tier {plan.tier.name} cannot be pinned:", *troubles[:_LISTED], *more]))
    return found


def pin(
    plan: Plan,
    paths: Paths,
    *,
    allow_dirty: bool = False,
    force: bool = False,
    render: Callable[[Plan, Path, Path], Any] | None = None,
) -> Path:
    """Promote a finished run into `results/<tier>/`; with `force`, in place of what was pinned there. Returns the
    folder.

    `render(plan, source, out)` writes tables and plots of the pinned results `source` under `out`. Raises `ReqatError`
    as `check` does, or if something is there already.
    """
    target = paths.results / plan.tier.name
    with making(target, pinned, replace=force) as draft:
        found = check(plan, paths, allow_dirty=allow_dirty)
        _fill(draft, plan, paths, found, allow_dirty, render)
    return target


def pinned(folder: Path) -> Collection[str]:
    """The files of a pinned run, or of pinned studies, in a folder. Raises `ReqatError` if it holds something else."""
    try:
        return {PIN, *map(str, read_json(folder / PIN, "list of pinned files", "restore it from git")["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise ReqatError(f"nothing that was pinned (no whole {PIN} in it).") from None


def _fill(
    draft: Path,
    plan: Plan,
    paths: Paths,
    found: dict[str, dict[str, Any]],
    allow_dirty: bool,
    render: Callable[[Plan, Path, Path], Any] | None,
) -> None:
    for id, entry in found.items():
        folder = (
            draft / ("evaluations" if id in plan.evaluations else "data" if id.startswith("data-") else "stages") / id
        )
        folder.mkdir(parents=True)
        pinned: dict[str, Any] = {}
        if id in plan.evaluations:
            strip(paths.evaluation(plan.evaluation(id)) / OUTCOMES, folder / OUTCOMES)
            pinned = record.outputs(folder)
        record.write(folder / record.FILE, entry | {"pinned_outputs": pinned})
    record.write(draft / PLAN, plan.dump())
    if render is not None:
        render(plan, draft, draft)
    record.write(
        draft / PIN,
        {
            "schema_version": record.SCHEMA_VERSION,
            "tier": plan.tier.name,
            "pinned": datetime.now(UTC).isoformat(timespec="seconds"),
            "commits": sorted({str(entry["commit"]) for entry in found.values()}),
            "sources": sorted({str(entry.get("source")) for entry in found.values()}),
            "dirty": any(entry["dirty"] is not False for entry in found.values()),
            "allow_dirty": allow_dirty,
            "versions": _distinct(entry["versions"] for entry in found.values()),
            "hardware": _distinct(entry["hardware"] for entry in found.values()),
            "jobs": len(found),
            "job_seconds": round(sum(entry["wall_s"] for entry in found.values()), 1),
            "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in found.values()),
            "files": record.files(draft),
        },
    )


def strip(source: Path, target: Path) -> None:
    """Copy outcomes without the responses' text."""
    from reqat.evaluation import Outcomes

    dataclasses.replace(Outcomes.from_parquet(source), response=None).to_parquet(target)


def pinned_tiers(paths: Paths) -> list[str]:
    """Tiers with pinned results."""
    return sorted(path.parent.name for path in paths.results.glob(f"*/{PLAN}"))


def restore(tier: str, paths: Paths) -> Plan:
    """The plan of a pinned run, as it was when it was pinned. Raises `ReqatError` if there is none."""
    path = paths.results / tier / PLAN
    if not path.is_file():
        there = ", ".join(pinned_tiers(paths)) or "none yet"
        raise ReqatError(
            f"no pinned results of tier {tier!r} in {paths.results} (pinned: {there}); `reqat pin` promotes a "
            "finished run."
        )
    return read_plan(path)


def verify(tier: str, paths: Paths) -> int:
    """Check every pinned file of a tier against its recorded sha256; returns how many. Raises `ReqatError` naming the
    first that differs.
    """
    folder = paths.results / tier
    stated = read_json(folder / PIN, "list of pinned files", "restore it from git").get("files")
    if not isinstance(stated, dict) or not all(isinstance(e, dict) and "sha256" in e for e in stated.values()):
        raise ReqatError(f"{folder / PIN}: not a list of pinned files; restore it from git.")
    for name, entry in stated.items():
        path = folder / name
        if not path.is_file() or record.sha256(path) != entry["sha256"]:
            raise ReqatError(f"{path} is not the file that was pinned; restore it from git.")
    return len(stated)


def pin_base(
    plan: Plan,
    model: str,
    paths: Paths,
    *,
    allow_dirty: bool = False,
    force: bool = False,
    dtype: str | None = None,
) -> Path:
    """Promote the base model trained from scratch into `results/base/`; with `force`, in place of the one pinned
    there. `dtype` (e.g. `bfloat16`) stores the weights in it.

    Raises `ReqatError` if it was not trained, is not what its record says, is larger than 8 MB, or if something is
    there already.
    """
    if model not in plan.scratch:
        raise ReqatError(
            f"tier {plan.tier.name}: model {model!r} has no `scratch` section; it has "
            f"{', '.join(plan.scratch) or 'none'}."
        )
    with making(paths.base, record.belongs("base"), replace=force) as draft:
        stage = plan.stage(plan.scratch[model])
        folder = paths.stage(stage)
        entry = record.verify(folder, id=stage.id)
        if entry["dirty"] is not False and not allow_dirty:
            raise ReqatError(
                f"{folder} was made from a tree with uncommitted changes; commit and train again, or pass "
                "--allow-dirty."
            )
        if dtype is None:
            shutil.copytree(folder / "model", draft / "model")
        else:
            import torch

            from reqat.models import load_model, load_tokenizer, save_model

            source = folder / "model"
            save_model(load_model(source), load_tokenizer(source), draft / "model", dtype=getattr(torch, dtype))
        files = record.outputs(draft)
        size = sum(file["bytes"] for file in files.values())
        if size > BASE_BYTES:
            raise ReqatError(
                f"the base checkpoint is {size / 2**20:.1f} MiB, more than the {BASE_BYTES / 2**20:.0f} MiB that the "
                "repository takes: "
                "pin it with --dtype bfloat16, or train a smaller one."
            )
        trained = record.outputs_digest(entry)
        record.write(draft / record.FILE, entry | {"outputs": files, "dtype": dtype, "trained_outputs_sha256": trained})
    return paths.base


def _distinct(values: Any) -> list[Any]:
    seen = {digest(value): value for value in values}
    return [seen[key] for key in sorted(seen)]
