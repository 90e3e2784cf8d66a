"""Pinning: finished results are checked whole and promoted into `results/`, where git keeps them and no rule writes.

What a pinned run is: :mod:`reqat.records.pinned`. The base checkpoint that tiers start from is a model, not a run, and
has a place of its own, `results/base/` or `results/base-<label>/`; its record lists its files, and the sha256 of its
weights is part of the ids.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reqat.config.base import digest
from reqat.config.companions import Part as CompanionPart
from reqat.config.companions import load_companions, restored
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import write_file
from reqat.config.paths import Paths, made
from reqat.config.plan import Plan
from reqat.config.studies import PlannedStudy, load_studies
from reqat.config.targets import making
from reqat.config.throughput import load_throughput
from reqat.pipeline.benchmark import benchmark_of
from reqat.pipeline.companions import companions_of
from reqat.pipeline.studies import require_inputs, stages_there, studies_of
from reqat.records import pinned, record
from reqat.records.pinned import PARTS, Part
from reqat.records.same_stages import same_stages

BASE_BYTES = 8 * 2**20
_LISTED = 8
_NAME = re.compile(r"\d{4}-\d\d-\d\d-[A-Za-z0-9][A-Za-z0-9._-]*")


def parts_of(plan: Plan, paths: Paths) -> list[Part]:
    """The parts that a tier has: a run, and what config/ gives it besides."""
    has = {
        "run": True,
        "studies": bool(load_studies(plan, paths.config)),
        "benchmark": load_throughput(plan.tier.name, paths.config) is not None,
        "companions": bool(load_companions(plan.tier.name, paths.config)),
    }
    return [part for part in PARTS if has[part]]


def companions_asked(tier: str, kinds: Sequence[str], paths: Paths) -> dict[str, CompanionPart]:
    """The parts of a tier's companions by id, of these kinds or (none named) of all.

    Raises `ReqatError` for a kind that the tier does not have.
    """
    planned = companions_of(tier, paths)
    there = {part.kind for part in planned.values()}
    for kind in kinds:
        if kind not in there:
            raise unknown("companion", kind, there, where=f"tier {tier}")
    return {id: part for id, part in planned.items() if part.kind in (kinds or there)}


def begun(plan: Plan, part: Part, paths: Paths) -> bool:
    """Whether a part of a tier has any result in the build folder, or a note of a benchmark that failed."""
    if part == "run":
        folders = [paths.evaluation(evaluation) for evaluation in plan.evaluations.values()]
    elif part == "studies":
        folders = [paths.study(id) for id in load_studies(plan, paths.config)]
    elif part == "companions":
        folders = [paths.companion(id) for id in load_companions(plan.tier.name, paths.config)]
    else:
        settings = benchmark_of(plan.tier.name, paths)
        if paths.throughput_state(settings.id).is_file():
            return True
        folders = [paths.throughput(settings.id)]
    return any((folder / record.FILE).is_file() for folder in folders)


def check(
    plan: Plan, paths: Paths, parts: Sequence[Part], *, companions: Sequence[str] = (), allow_dirty: bool = False
) -> dict[str, dict[str, Any]]:
    """Records of the whole parts by their jobs' folders within `build/`; of companions, those of the named kinds (none:
    all). Raises `ReqatError` listing what is missing, changed, of another plan, or made from a dirty tree.
    """
    found: dict[str, dict[str, Any]] = {}
    troubles: list[str] = []

    def take(folder: Path, whole: Callable[[Path, Any], dict[str, Any]], node: Any) -> None:
        try:
            found[folder.relative_to(paths.work).as_posix()] = whole(folder, node)
        except ReqatError as error:
            troubles.append(str(error))

    digests: dict[str, str] = {}

    def job(folder: Path, node: Any) -> dict[str, Any]:
        entry = record.verify(folder, id=node.id)
        stated = digest(type(node).model_validate(entry["config"]))
        if entry["config_sha256"] != digest(entry["config"]) or stated != digest(node):
            raise ReqatError(
                f"{folder}: its record states another configuration than the plan; delete the folder and run again."
            )
        record.check_inputs(folder, entry, digests)
        digests[node.id] = record.outputs_digest(entry)
        return entry

    def study(folder: Path, node: PlannedStudy) -> dict[str, Any]:
        require_inputs(plan, node, folder, there)
        return record.verify(folder, id=node.id)

    def companion(folder: Path, node: CompanionPart) -> dict[str, Any]:
        entry = record.verify(folder, id=node.id)
        if entry["config_sha256"] != digest(entry["config"]) or restored(entry["config"], str(folder)).id != node.id:
            raise ReqatError(f"{folder}: its record states other settings; delete the folder and run the part again.")
        return entry

    if "run" in parts:
        for stage in filter(made, plan.needed.values()):
            take(paths.stage(stage), job, stage)
        for evaluation in plan.evaluations.values():
            take(paths.evaluation(evaluation), job, evaluation)
    if "studies" in parts:
        planned = studies_of(plan, paths)
        there = stages_there(plan, planned.values(), paths)
        for id, node in planned.items():
            take(paths.study(id), study, node)
    if "benchmark" in parts:
        bench = benchmark_of(plan.tier.name, paths)
        take(paths.throughput(bench.id), lambda folder, node: record.verify(folder, id=node.id), bench)
    if "companions" in parts:
        for id, one in companions_asked(plan.tier.name, companions, paths).items():
            take(paths.companion(id), companion, one)
    dirty = [job for job, entry in found.items() if entry["dirty"] is not False]
    if dirty and not allow_dirty:
        troubles.append(
            f"{len(dirty)} results were made from a tree with uncommitted changes (or outside git), {dirty[0]} "
            "among them: commit and run again, or pass --allow-dirty, which will be recorded."
        )
    if troubles:
        more = [f"... and {len(troubles) - _LISTED} more"] if len(troubles) > _LISTED else []
        more += [f"To leave a part out, name the others with --what ({', '.join(parts)})."] if len(parts) > 1 else []
        raise ReqatError("\n".join([f"tier {plan.tier.name} cannot be pinned:", *troubles[:_LISTED], *more]))
    return found


def pin(
    plan: Plan,
    paths: Paths,
    parts: Sequence[Part] = ("run",),
    *,
    name: str | None = None,
    figures: Sequence[str] = (),
    companions: Sequence[str] = (),
    allow_dirty: bool = False,
) -> Path:
    """Promote finished parts of a tier into a new folder `results/<name>/`; returns it.

    `name` begins with a date; by default it is today's (UTC), the tier, and the `companions` that are named: kinds, the
    others of which are left out. `figures` are kept as PNG; of tables, the CSV. Raises `ReqatError` as `check` does,
    and if a folder of that name is there: it is never written again.
    """
    from analysis.report.studies import STUDIES

    name = name or "-".join([str(datetime.now(UTC).date()), plan.tier.name, *companions])
    if not _NAME.fullmatch(name):
        raise ReqatError(f"--name {name}: begin it with a date, such as 2026-11-26-{plan.tier.name}.")
    target = paths.results / name
    with making(target, _written_once) as draft:
        found = check(plan, paths, parts, companions=companions, allow_dirty=allow_dirty)
        originals = pinned.fold(paths.work, list(found), draft)
        record.write(draft / pinned.PLAN, plan.dump())
        if "studies" in parts:
            planned = {id: study.model_dump(mode="json") for id, study in studies_of(plan, paths).items()}
            write_file(draft / "studies" / STUDIES, json.dumps(planned, indent=1) + "\n")  # in the order of config/
        _draw(draft, parts, figures, paths)
        more = {"allow_dirty": allow_dirty, "same_stages_as_pinned_run": None}
        if "studies" in parts:
            more["same_stages_as_pinned_run"] = _on_the_same_stages(plan, paths, found)
        pinned.write_manifest(draft, plan.tier.name, found, originals, **more)
    return target


def _written_once(folder: Path) -> Collection[str]:
    raise ReqatError("a pinned run, which is never written again (--name).")


def _draw(draft: Path, parts: Sequence[Part], figures: Sequence[str], paths: Paths) -> None:
    """Draw from what was folded, so that nothing is pinned which cannot be drawn again."""
    from analysis.build import build_pinned

    with tempfile.TemporaryDirectory(prefix="reqat-") as scratch:
        tables, plots = Path(scratch, "tables"), Path(scratch, "plots")
        for part in parts:
            build_pinned(pinned.unfold(draft, part, Path(scratch, part)), part, tables, plots, paths)
        (draft / "tables").mkdir()
        for table in sorted(tables.glob("*.csv")):
            shutil.copyfile(table, draft / "tables" / table.name)
        for figure in figures:
            drawn = plots / f"{figure}.png"
            if not drawn.is_file():
                there = ", ".join(sorted(path.stem for path in plots.glob("*.png"))) or "none"
                raise ReqatError(f"--figure {figure}: not drawn of these parts (they have {there}).")
            shutil.copyfile(drawn, draft / drawn.name)


def _on_the_same_stages(plan: Plan, paths: Paths, found: dict[str, dict[str, Any]]) -> bool | None:
    """Whether the studies stand on the stages of the run beside them, else of the newest pinned one."""
    run = {entry["id"]: entry for job, entry in found.items() if pinned.part_of(job) == "run"}
    if not run and (folder := pinned.newest(paths).get((plan.tier.name, "run"))) is not None:
        with pinned.restored(folder, "run") as kept:
            run = kept.records
    planned = studies_of(plan, paths).values()
    return same_stages(plan, planned, stages_there(plan, planned, paths), run)


def pin_base(plan: Plan, model: str, paths: Paths, *, allow_dirty: bool = False, dtype: str | None = None) -> Path:
    """Promote a base model trained from scratch into its folder of `results/` (`Paths.pinned_base`). `dtype` (e.g.
    `bfloat16`) stores the weights in it.

    Raises `ReqatError` if it was not trained, is not what its record says, is larger than 8 MB, or if something is
    there already.
    """
    if model not in plan.scratch:
        raise ReqatError(
            f"tier {plan.tier.name}: model {model!r} has no `scratch` section; it has "
            f"{', '.join(plan.scratch) or 'none'}."
        )
    target = paths.pinned_base(model)
    if (target / record.FILE).exists():
        raise ReqatError(
            f"{target} is there already, and plans start from its weights; to pin another, remove it first "
            f"(git rm -r {target})."
        )
    with making(target, record.belongs("base")) as draft:
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
    return target
