"""The line that a long run says every half minute, from made-up log records and a made-up clock."""

from __future__ import annotations

import logging
from pathlib import Path

from reqat.config.progress import Progress, minutes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def say(progress: Progress, event: str, **more: object) -> None:
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, "", (), None)
    vars(record).update({"event": event} | more)
    progress.emit(record)


def test_a_run_is_told_with_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    clock, log = Clock(), tmp_path / "train.log"
    progress = Progress({"qat-1": 100.0, "qat-2": 100.0, "tables": 10.0}, 1, print, clock)
    assert progress.line() == "0 of 3 jobs done in 0 s, about 4 min to go"
    start = {"jobid": 7, "rule_name": "train", "rule_msg": "train: qat-1", "wildcards": {"id": "qat-1"}}
    say(progress, "job_info", log=[str(log)], **start)
    clock.now = 40.0
    assert progress.line().endswith("about 3 min to go; now: train: qat-1 (40 s)"), "no log, no percentage"
    log.write_text("loading\n\rtrain:  10%|#   | 1/10\rtrain:  42%|####  | 4/10")
    assert progress.line().endswith("now: train: qat-1 (40 s, 42%)")
    clock.now = 200.0  # twice what was foreseen, so the rest is thought to take longer, too
    say(progress, "job_finished", job_id=7)
    slower = progress.line()
    assert slower.startswith("1 of 3 jobs done in 3 min") and "now" not in slower
    assert 110 < progress_left(progress) <= 2 * 110


def progress_left(progress: Progress) -> float:
    """Seconds to go, had the run as many cores as make its minutes seconds."""
    line = progress.line().split("about ")[1]
    return float(line.split()[0]) * (60 if " min" in line else 1)


def test_a_failed_job_is_not_done_and_strange_records_are_left_out() -> None:
    progress = Progress({}, 0, print, Clock())
    say(progress, "job_info", jobid=1, rule_name="figures", rule_msg=None, wildcards=None, log=None)
    assert "now: figures (0 s)" in progress.line()
    say(progress, "job_error", jobid=1)
    say(progress, "job_finished", job_id=99)
    say(progress, "progress", done=1, total=2)
    say(progress, "shellcmd")
    assert progress.line() == "0 of 0 jobs done in 0 s, about 0 s to go"


def test_times_are_for_people() -> None:
    assert [minutes(s) for s in (-3, 89, 90, 3600, 7200)] == ["0 s", "89 s", "2 min", "60 min", "2.0 h"]
