"""Stands in for `reqat` in tests of the DAG: each verb logs its call and writes small files where the real one writes
its results.

`fail` in the working directory holds a prefix of ids that fail; `crash` one of ids whose process is killed; `hang` one
of ids that never finish; `absent` the name of a source of companions that is not installed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

#: Verbs that are given an id.
NAMED = ("data", "stage", "evaluate", "bench", "study", "source", "companion")


def state_of(build: Path, id: str) -> Path:
    """Where the attempt at a benchmark is noted."""
    return build / "throughput" / f"{id}.json"


def main() -> None:
    """Do what the arguments say."""
    arguments = sys.argv[1:]
    options = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    verb, *rest = arguments[8:]  # after --build B --models M --data D --plan P
    build, tier = Path(options["--build"]), options.get("--tier", "")
    part = options.get("--what", "")
    subject = rest[0] if verb in NAMED else f"{verb}-{part}" if part else verb
    with Path("calls").open("a") as log:
        log.write(f"{subject}\n")
    for trap in ("fail", "crash", "hang"):
        if Path(trap).exists() and subject.startswith(Path(trap).read_text()):
            if trap == "fail":
                sys.exit("reqat: error: told to fail")
            if trap == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
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
    if verb in ("source", "companion"):
        folder = build / {"source": "packaged", "companion": "companions"}[verb]
        folder.mkdir(parents=True, exist_ok=True)
        absent = Path("absent").read_text() if Path("absent").exists() else "nothing"
        missing = absent in subject
        state = {"state": "missing", "reason": f"install {absent}"} if missing else {"state": "there"}
        (folder / f"{subject}.json").write_text(json.dumps(state))
        return
    if verb == "bench":
        out = build / "throughput" / subject
        out.mkdir(parents=True, exist_ok=True)
        time.sleep(1)  # whoever shared the machine would log a call meanwhile
        for name in ("throughput.csv", "record.json"):
            (out / name).write_text(subject)
        state_of(build, subject).write_text(json.dumps({"state": "measured"}))
        with Path("calls").open("a") as log:
            log.write(f"{subject}-ends\n")
        return
    if verb == "bench-failed":
        said = Path(options["--log"]).read_text().strip().removeprefix("reqat: error: ")
        reason = said or f"code {options['--code']}"
        state_of(build, rest[0]).parent.mkdir(parents=True, exist_ok=True)
        state_of(build, rest[0]).write_text(json.dumps({"state": "failed", "reason": reason}))
        return
    from analysis.registry import companion_names, figure_names, study_names, table_names, throughput_names
    from analysis.report.names import FIGURE_SUFFIXES, TABLE_SUFFIXES
    from reqat.config import Paths, load
    from reqat.config.companions import load_companions
    from reqat.config.studies import load_studies
    from reqat.config.throughput import load_throughput

    plan = load(tier, Paths())
    tables, figures = table_names(plan), list(figure_names(plan))
    if part == "benchmark":
        bench = load_throughput(tier, Paths().config)
        assert bench is not None
        tables, figures = throughput_names(bench)
        state = json.loads(state_of(build, bench.id).read_text())
        tier = f"{tier} {state.get('reason', '')}"
    elif part == "studies":
        tables, figures = study_names(load_studies(plan, Paths().config))
    elif part == "companions":
        made = companion_names(load_companions(tier, Paths().config).values())
        tables, figures = made[options["--companion"]]
    for folder, stems, suffixes in (
        (options["--tables"], tables, TABLE_SUFFIXES),
        (options["--plots"], figures, FIGURE_SUFFIXES),
    ):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for stem in stems:
            for suffix in suffixes:
                (Path(folder) / f"{stem}.{suffix}").write_text(f"{tier} {stem}")


if __name__ == "__main__":
    main()
