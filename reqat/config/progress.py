"""Progress of a long run: a bar for each job (:func:`bar`), and a line every half minute about all jobs together.

Snakemake says when a job starts and ends; the jobs' own output goes to their logs, so that nothing is heard for as long
as a training takes. :class:`Progress` listens to Snakemake's log records and says what their sum is. It only ever
reads and prints: whatever it cannot make out, it leaves out.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY_S = 30.0
_TAIL_BYTES = 4096
_PERCENT = re.compile(r"(\d{1,3})%\|")


@dataclass
class Running:
    """A job at work: what it is called, its id in the plan (or its rule), its log, when it began."""

    name: str
    id: str
    log: Path | None
    began: float


@dataclass
class Progress(logging.Handler):
    """Counts the jobs of a run by Snakemake's log records. ``expected``: id -> seconds that each job still to be run is
    thought to take; ``cores``: how many run side by side."""

    expected: Mapping[str, float]
    cores: int
    say: Callable[[str], object]
    clock: Callable[[], float] = time.monotonic
    running: dict[Any, Running] = field(default_factory=dict)
    spent: float = 0.0
    """Seconds that finished jobs took, each on its own."""
    foreseen: float = 0.0
    """Seconds that these had been thought to take."""
    done: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.began = self.clock()
        self.left = dict(self.expected)

    def __hash__(self) -> int:
        return id(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Note a job's start or end."""
        event = str(getattr(record, "event", ""))
        if event == "job_info":
            wildcards = getattr(record, "wildcards", None) or {}
            rule = str(getattr(record, "rule_name", ""))
            log = [str(path) for path in getattr(record, "log", None) or []]
            name = str(getattr(record, "rule_msg", None) or rule)
            job = Running(name, str(wildcards.get("id", rule)), Path(log[0]) if log else None, self.clock())
            self.running[getattr(record, "jobid", None)] = job
        elif event in ("job_finished", "job_error"):
            ended = self.running.pop(getattr(record, "job_id", getattr(record, "jobid", None)), None)
            if ended is not None and event == "job_finished":
                self.done += 1
                self.spent += self.clock() - ended.began
                self.foreseen += self.left.pop(ended.id, 0.0)

    def line(self) -> str:
        """Where the run is: ``3 of 16 jobs done in 4 min, about 20 min to go; now: train: qat-1 (2 min, 45%)``.

        Nobody knows how much longer a job goes on that took all the time that was foreseen for it: beside others the
        rest is then ``at least`` theirs, and alone there is none.
        """
        now = self.clock()
        # Jobs so far took so many times what was foreseen; half a job's foresight counts as seen, so that the first
        # does not decide alone.
        prior = 0.5 * sum(self.expected.values()) / max(1, len(self.expected))
        pace = (self.spent + prior) / (self.foreseen + prior) if prior > 0 else 1.0
        left, late = pace * sum(self.left.values()), False
        for job in list(self.running.values()):
            took, foreseen = now - job.began, pace * self.left.get(job.id, 0.0)
            left -= min(took, foreseen)
            late |= took >= foreseen
        jobs = [f"{job.name} ({minutes(now - job.began)}{percent(job.log)})" for job in list(self.running.values())]
        at_work = f"; now: {', '.join(jobs)}" if jobs else ""
        left /= max(1, self.cores)
        to_go = f", {'at least' if late else 'about'} {minutes(left)} to go" if left >= 1 else ""
        return f"{self.done} of {len(self.expected)} jobs done in {minutes(now - self.began)}{to_go}{at_work}"

    def start(self) -> None:
        """Say :meth:`line` every half minute until the process ends."""

        def speak() -> None:
            while True:
                time.sleep(EVERY_S)
                if self.running:
                    self.say(self.line())

        threading.Thread(target=speak, name="progress", daemon=True).start()


def bar(label: str, total: int, unit: str, *, done: int = 0, enabled: bool = True, logged: bool = True) -> Any:
    """A tqdm bar on standard error, with rate and time left. Where that is no terminal: a line every half minute (and
    the first and last state), or nothing without ``logged``. Large numbers of tokens are abbreviated."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=f" {unit}",
        unit_scale=unit == "tokens",
        disable=not enabled or not (terminal or logged),
        file=sys.stderr if terminal else _Lines(),
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else EVERY_S,
        miniters=0,  # the time alone decides
        smoothing=0,  # the rate since the beginning
    )


class _Lines:
    """Standard error for a bar in a log: each state on a line of its own, where tqdm would overwrite it."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(log: Path | None) -> str:
    """How far a job is, by the last progress bar in its log: ``, 45%``; empty where there is none."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            found = _PERCENT.findall(file.read().decode("utf-8", errors="replace"))
    except OSError:
        return ""
    return f", {found[-1]}%" if found else ""
