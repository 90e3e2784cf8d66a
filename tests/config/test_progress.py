"""The line that a long run says every half minute, from made-up log records and a made-up clock."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from reqat.config.progress import Progress, bar, minutes, percent


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


def test_a_job_that_takes_longer_than_was_foreseen_has_no_time_left_to_say() -> None:
    clock = Clock()
    progress = Progress({"pinned": 20.0, "tables": 300.0}, 1, print, clock)
    say(progress, "job_info", jobid=1, rule_name="pinned", rule_msg="pinned")
    clock.now = 10.0
    assert "about 5 min to go" in progress.line()
    clock.now = 200.0
    assert "at least 5 min to go" in progress.line()
    say(progress, "job_finished", job_id=1)
    say(progress, "job_info", jobid=2, rule_name="tables", rule_msg="tables")
    clock.now += 100_000.0
    assert "to go" not in progress.line()


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
    assert progress.line() == "0 of 0 jobs done in 0 s"


def test_times_are_for_people() -> None:
    assert [minutes(s) for s in (-3, 89, 90, 3600, 7200)] == ["0 s", "89 s", "2 min", "60 min", "2.0 h"]


def test_a_bar_in_a_log_is_lines_and_a_run_reads_its_percentage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reqat.config.progress.EVERY_S", 0)
    with bar("train: qat-1", 40_000, "tokens", done=10_000) as shown:
        shown.set_postfix_str("loss 1.2345", refresh=False)
        shown.update(6_000)
    (log := tmp_path / "train.log").write_text(capsys.readouterr().err)
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and not any("\r" in line for line in lines)
    assert lines[0].startswith("train: qat-1:  25%|") and "10.0k/40.0k" in lines[0]
    assert "16.0k/40.0k" in lines[1] and "tokens/s, loss 1.2345]" in lines[1]
    assert percent(log) == ", 40%"


def test_bars_are_quiet_where_they_are_asked_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"enabled": False}, {"logged": False}):
        with bar("generating", 3, "rows", **options) as shown:
            shown.update(3)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_overwrites_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with bar("generating", 3, "rows", logged=False) as shown:
        shown.update(3)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\rgenerating: 100%|" in err and "3/3" in err and " rows/s" in err
