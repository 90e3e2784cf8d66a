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
    subject = rest[0] if verb in ("data", "stage", "evaluate", "bench", "study") else verb
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
    if verb == "study":
        out = build / "studies" / subject
        out.mkdir(parents=True, exist_ok=True)
        (out / "record.json").write_text(subject)
        return
    if verb == "bench":
        out = build / "throughput" / subject
        out.mkdir(parents=True, exist_ok=True)
        time.sleep(1)  # whoever shared the machine would log a call meanwhile
        for name in ("throughput.csv", "record.json"):
            (out / name).write_text(subject)
        with Path("calls").open("a") as log:
            log.write(f"{subject}-ends\n")
        return
    from analysis.names import FIGURE_SUFFIXES, TABLE_SUFFIXES, figure_names, study_names, table_names, throughput_names
    from reqat.config import Paths, load
    from reqat.config.studies import load_studies
    from reqat.config.throughput import load_throughput

    if verb in ("throughput", "study-report"):
        if verb == "throughput":
            tables, figures = throughput_names(load_throughput(tier, Paths().config))
        else:
            tables, figures = study_names(load_studies(load(tier, Paths()), Paths().config))
        for folder, stems, suffixes in (
            (options["--tables"], tables, TABLE_SUFFIXES),
            (options["--plots"], figures, FIGURE_SUFFIXES),
        ):
            Path(folder).mkdir(parents=True, exist_ok=True)
            for stem in stems:
                for suffix in suffixes:
                    (Path(folder) / f"{stem}.{suffix}").write_text(f"{tier} {stem}")
        return

    plan, out = load(tier, Paths()), Path(options["--out"])
    names, suffixes = (table_names, TABLE_SUFFIXES) if verb == "tables" else (figure_names, FIGURE_SUFFIXES)
    out.mkdir(parents=True, exist_ok=True)
    for name in names(plan):
        for suffix in suffixes:
            (out / f"{name}.{suffix}").write_text(f"{tier} {name}")


if __name__ == "__main__":
    main()
