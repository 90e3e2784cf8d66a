"""Verb `lm-eval`: lm-evaluation-harness with our tasks and our model type."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli.app import app, session, start_computing
from reqat.config.errors import ReqatError
from reqat.lm_eval import TASKS

# lm-eval's commands; without one it runs.
_COMMANDS = ("run", "ls", "validate")


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def lm_eval(
    context: typer.Context,
    where: Annotated[
        bool, typer.Option("--where", help="Print the folder of our tasks (for `lm_eval --include_path`), and end.")
    ] = False,
) -> None:
    """lm-eval with tasks reqat_* and model type reqat; its own options follow (`reqat lm-eval run -h`).

    For example: reqat lm-eval --model reqat --model_args pretrained=FOLDER,precision=NVFP4-W4A4KV4
    --tasks reqat_gsm_symbolic --limit 5 (docs/lm-eval.md has all tasks and arguments).
    """
    if where:
        if context.args:
            raise ReqatError(f"--where takes nothing else; leave {' '.join(context.args)} out")
        print(TASKS)
        return
    given = list(context.args) or ["-h"]
    if given[0] not in (*_COMMANDS, "-h"):
        given = ["run", *given]
    # It takes one folder: one that is given stands in place of ours.
    if given[0] != "-h" and "-h" not in given and not any(word.startswith("--include_path") for word in given):
        given += ["--include_path", str(TASKS)]
    start_computing(0)
    try:
        from lm_eval.__main__ import cli_evaluate

        import reqat.lm_eval.model  # noqa: F401  (registers the model type)
    except ImportError as error:
        raise ReqatError(f"lm-eval is not whole ({error}); install it: `make env`, or pip install lm-eval") from error
    sys.argv = ["reqat lm-eval", *given]
    try:
        cli_evaluate()
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, ReqatError) or session.debug or not _of_lm_eval(error):
            raise
        reason = " ".join(str(error.args[0] if error.args else error).split())
        raise ReqatError(f"lm-eval: {reason} (`reqat lm-eval ls tasks` lists tasks, `run -h` options)") from error


def _of_lm_eval(error: Exception) -> bool:
    """Whether lm-eval itself raised the error, by which it says that an option is wrong."""
    *_, last = traceback.extract_tb(error.__traceback__)
    file = Path(last.filename)
    return "lm_eval" in file.parts and TASKS.parent not in file.parents
