"""The `reqat` application: options shared by all verbs."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from reqat.config.base import canonical
from reqat.config.errors import ReqatError, unknown
from reqat.config.launch import launched
from reqat.config.paths import Paths, load, read_plan
from reqat.config.plan import Plan
from reqat.config.stage import DataSettings

app = typer.Typer(
    name="reqat",
    help="FP4 quantization-aware training, from traces to tables. Run it in the repository, or name that with --root.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Tier = Annotated[
    str, typer.Option("--tier", "-t", help="Tier: a file of config/tiers/, such as smoke, laptop, overnight.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@dataclass
class Session:
    """What the shared options say."""

    root: Path | None = None
    build: Path = Path("build")
    models: Path = Path("models")
    data: Path = Path("data")
    frozen: Path | None = None
    debug: bool = False

    @cached_property
    def paths(self) -> Paths:
        """Paths of the checkout, which becomes the working directory, so that paths in messages stay relative."""
        root = find_root(Path.cwd()) if self.root is None else self.root
        if not (root / "config" / "recipes.yaml").is_file():
            raise ReqatError(f"{root}: no config/recipes.yaml in it, so it is no root of this repository.")
        os.chdir(root)
        return Paths(Path(), self.build, self.models, self.data)

    def plan(self, tier: str) -> Plan:
        """The plan of a tier: what config/ says now, or what it said when `--plan` was written."""
        paths = self.paths
        plan = load(tier, paths) if self.frozen is None else read_plan(self.frozen)
        if plan.tier.name != tier:
            raise ReqatError(f"{self.frozen} is a plan of tier {plan.tier.name}, not {tier}.")
        check_families(plan)
        return plan

    def plan_from_here(self, tier: str) -> Plan:
        """:meth:`plan` without a change of the working directory, for verbs whose own paths are relative to it."""
        with contextlib.chdir("."):
            try:
                return self.plan(tier)
            finally:
                vars(self).pop("paths", None)  # they are relative to the root, where this process does not stay


def check_families(plan: Plan, *, options: bool = False) -> None:
    """Raise `ReqatError` for a task family that there is none of, or (``options``: takes a second) that refuses its
    options: before a base is trained, not when it is graded."""
    from reqat.tasks import FAMILIES, get_family

    asked = [evaluation.problems.families for evaluation in plan.evaluations.values()]
    asked += [stage.settings.families for stage in plan.stages.values() if isinstance(stage.settings, DataSettings)]
    for families in {canonical(families): families for families in asked}.values():
        for name, given in families.items():
            if name not in FAMILIES:
                raise unknown("task family", name, FAMILIES, where=f"tier {plan.tier.name}")
            if options:
                get_family(name).dataset(seed=0, size=1, options=given)


session = Session()
INTERRUPTED = 130


def find_root(start: Path) -> Path:
    """The folder at or above `start` that holds `config/recipes.yaml`. Raises `ReqatError` if there is none."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "config" / "recipes.yaml").is_file():
            return folder
    raise ReqatError(f"{start}: no config/recipes.yaml here or above; run in the repository, or name it with --root.")


#: Verbs that several processes can share.
SHARED = ("train", "stage")


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[Path | None, typer.Option(help="The repository's root (default: found from here upwards).")] = None,
    build: Annotated[Path, typer.Option(help="Where work goes, relative to the root.")] = Path("build"),
    models: Annotated[Path, typer.Option(help="Folder of local models (or REQAT_MODELS).")] = Path("models"),
    data: Annotated[Path, typer.Option(help="Folder of files of traces and benchmarks (or REQAT_DATA).")] = Path(
        "data"
    ),
    plan: Annotated[
        Path | None, typer.Option(help="A plan as `reqat plan --json` prints it, in place of config/.")
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Options of every verb."""
    rank, size, _ = launched()
    if size > 1 and context.invoked_subcommand not in SHARED:
        raise ReqatError(
            f"{context.invoked_subcommand} runs in one process, and this is number {rank} of {size}: start "
            f"{' and '.join(SHARED)} alone by torchrun, or unset WORLD_SIZE and RANK"
        )
    vars(session).pop("paths", None)
    session.root, session.build, session.models, session.data = root, build, models, data
    session.frozen, session.debug = plan, debug


def start_computing(threads: int) -> None:
    """Compute with `threads` threads (0: as many as the environment says). Called before anything imports torch."""
    # transformers imports torchao where it finds it: seconds and warnings for every job, and nothing here uses it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    if threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
