"""Stands in for `reqat` in tests of the DAG: each verb logs its call and writes small files where the real one writes
its results.

`fail` in the working directory holds a prefix of ids that fail; `hang` one of ids that never finish.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main() -> None:
    """Do what the arguments say."""
    arguments = sys.argv[1:]
    options = {k: arguments[i + 1] for i, k in enumerate(arguments) if k.startswith("--")}
    verb, *rest = arguments[6:]  # after --build B --models M --plan P
    build, tier = Path(options["--build"]), options["--tier"]
    subject = rest[0] if verb in ("data", "stage", "evaluate") else verb
    with Path("calls").open("a") as log:
        log.write(f"{subject}\n")
    for trap in ("fail", "hang"):
        if Path(trap).exists() and subject.startswith(Path(trap).read_text()):
            if trap == "fail":
                sys.exit("stub: told to fail")
            time.sleep(600)
    if verb in ("data", "stage", "evaluate"):
        kind = {"data": "data", "stage": "stages", "evaluate": "evaluations"}[verb]
        out = build / kind / subject
        out.mkdir(parents=True, exist_ok=True)
        (out / "outcomes.parquet").write_text(subject)
        (out / "record.json").write_text(subject)
        return
    from analysis.names import FIGURE_SUFFIXES, TABLE_SUFFIXES, figure_names, table_names
    from reqat.config import Paths, load

    plan, out = load(tier, Paths()), Path(options["--out"])
    names, suffixes = (table_names, TABLE_SUFFIXES) if verb == "tables" else (figure_names, FIGURE_SUFFIXES)
    out.mkdir(parents=True, exist_ok=True)
    for name in names(plan):
        for suffix in suffixes:
            (out / f"{name}.{suffix}").write_text(f"{tier} {name}")


if __name__ == "__main__":
    main()
