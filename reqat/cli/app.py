"""The `reqat` command: verbs, shared options, and how errors end.

Whatever a user can get wrong ends with one line on standard error and exit code 2; `--debug` shows the traceback. So
does whatever the system refuses: a full disk, a missing permission, a path that is too long. Interrupting ends with
exit code 130 and says how to go on. torch is imported by the verbs that compute, after the number of threads is known.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from reqat.config.errors import ReqatError
from reqat.config.files import explain, os_error
from reqat.config.paths import Paths, load, read_plan
from reqat.config.plan import Plan

app = typer.Typer(
    name="reqat",
    help="FP4 quantization-aware training, from traces to tables. Run it in the repository, or name that with --root.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Tier = Annotated[str, typer.Option("--tier", "-t", help="Tier: smoke, laptop, claims, overnight, smollm, paper.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


@dataclass
class Session:
    """What the shared options say."""

    root: Path | None = None
    build: Path = Path("build")
    models: Path = Path("models")
    frozen: Path | None = None
    debug: bool = False

    @cached_property
    def paths(self) -> Paths:
        """Paths of the checkout, which becomes the working directory, so that paths in messages stay relative."""
        root = find_root(Path.cwd()) if self.root is None else self.root
        if not (root / "config" / "recipes.yaml").is_file():
            raise ReqatError(f"{root}: no config/recipes.yaml in it, so it is no root of this repository.")
        os.chdir(root)
        return Paths(Path(), self.build, self.models)

    def plan(self, tier: str) -> Plan:
        """The plan of a tier: what config/ says now, or what it said when `--plan` was written."""
        paths = self.paths
        if self.frozen is None:
            return load(tier, paths)
        plan = read_plan(self.frozen)
        if plan.tier.name != tier:
            raise ReqatError(f"{self.frozen} is a plan of tier {plan.tier.name}, not {tier}.")
        return plan


session = Session()
INTERRUPTED = 130
READER_GONE = 141


def find_root(start: Path) -> Path:
    """The folder at or above `start` that holds `config/recipes.yaml`. Raises `ReqatError` if there is none."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "config" / "recipes.yaml").is_file():
            return folder
    raise ReqatError(f"{start}: no config/recipes.yaml here or above; run in the repository, or name it with --root.")


@app.callback()
def options(
    root: Annotated[Path | None, typer.Option(help="The repository's root (default: found from here upwards).")] = None,
    build: Annotated[Path, typer.Option(help="Where work goes, relative to the root.")] = Path("build"),
    models: Annotated[Path, typer.Option(help="Folder of local models (or REQAT_MODELS).")] = Path("models"),
    plan: Annotated[
        Path | None, typer.Option(help="A plan as `reqat plan --json` prints it, in place of config/.")
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Options of every verb."""
    vars(session).pop("paths", None)
    session.root, session.build, session.models, session.frozen, session.debug = root, build, models, plan, debug


def start_computing(threads: int) -> None:
    """Compute with `threads` threads (0: as many as the environment says). Called before anything imports torch."""
    # transformers imports torchao where it finds it: seconds and warnings for every job, and nothing here uses it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
    if threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits with 0; 2 for what a user can mend; 130 if interrupted; 1 for a defect; 141, as
    other commands do, if whoever read its output has ended (`reqat plan | head`)."""
    import reqat.cli.bench
    import reqat.cli.doctor
    import reqat.cli.entropy
    import reqat.cli.inspect
    import reqat.cli.intervene
    import reqat.cli.reset
    import reqat.cli.results
    import reqat.cli.run
    import reqat.cli.study
    import reqat.cli.view  # noqa: F401  (they register their verbs)

    given = sys.argv[1:] if arguments is None else arguments
    session.debug = "--debug" in given
    try:
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        _print_all()
    except BrokenPipeError:
        _drop_output()
        sys.exit(READER_GONE)
    except SystemExit as end:
        # typer catches a broken pipe itself and ends with 1, which is our code for a defect.
        sys.exit(READER_GONE if type(sys.stdout).__name__ == "PacifyFlushWrapper" else end.code)
    except (KeyboardInterrupt, typer.Abort):
        _exit(INTERRUPTED, "interrupted; nothing half-written counts as done. The same command goes on from there.")
    except (ValueError, OSError) as error:  # ReqatError among them
        if session.debug:
            raise
        hint = "" if isinstance(error, ReqatError) else " (--debug shows where)"
        text = str(explain(error)) if isinstance(error, OSError) else str(error) or type(error).__name__
        _exit(2, f"{text}{hint}")
    except Exception as error:
        if os_error(error) is not None:  # libraries in Rust have errors of their own for it
            if session.debug:
                raise
            _exit(2, f"{explain(error)} (--debug shows where)")
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if callable(show) and code is not None:  # a usage error: typer words and places it
            show()
            sys.exit(code)
        traceback.print_exc()
        _exit(1, f"{type(error).__name__}: {error} - a defect; please report it with the lines above.")
    sys.exit(code if isinstance(code, int) else 0)


def _print_all() -> None:
    """Write out what is still buffered, while an error can be told: at exit Python only complains of it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise explain(error, "standard output") from error


def _drop_output() -> None:
    """Let standard output lead nowhere, so that nothing fails at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(code: int, message: str) -> None:
    print(f"reqat: error: {message}", file=sys.stderr)
    sys.exit(code)
