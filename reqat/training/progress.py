"""Progress of a long run: a bar in a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 30.0


class StepProgress:
    """Shows tokens done, loss, tokens/s and time left. ``total`` and ``done`` are in tokens."""

    def __init__(self, label: str, total: int, done: int = 0, *, enabled: bool = True) -> None:
        self.label, self.total, self.done = label, total, done
        self._enabled = enabled
        self._tty = enabled and sys.stderr.isatty()
        self._began = self._logged = time.monotonic()
        self._at_start = done
        self._bar: Progress | None = None

    def __enter__(self) -> StepProgress:
        if self._tty:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[info]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, info="")
        return self

    def advance(self, tokens: int, *, loss: float) -> None:
        """Count ``tokens`` more and show ``loss`` (nats a token)."""
        self.done += tokens
        now = time.monotonic()
        rate = (self.done - self._at_start) / max(1e-9, now - self._began)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, info=f"loss {loss:.4f}  {rate:,.0f} tokens/s")
        elif self._enabled and (now - self._logged > _LOG_SECONDS or self.done >= self.total):
            self._logged = now
            left = (self.total - self.done) / max(1e-9, rate)
            print(
                f"{self.label}: {self.done:,} of {self.total:,} tokens  loss {loss:.4f}  "
                f"{rate:,.0f} tokens/s  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
