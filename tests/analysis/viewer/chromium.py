"""Chromium for the tests of the viewer: Playwright drives the one that is installed, with a user's mouse and keys.

What a page is asked is JavaScript; what is done to it are real input events.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A page that does not answer within this time has hung; a busy machine is no reason to fail earlier.
PATIENCE_S = 60


def find() -> str | None:
    """A Chromium on this machine: ``CHROMIUM``, or one of the usual names."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """A browser with one page, and what its scripts complained of and asked the network for since it was opened."""

    def __init__(self, binary: str) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        with ExitStack() as stack:
            playwright = stack.enter_context(sync_playwright())
            browser = stack.enter_context(playwright.chromium.launch(executable_path=binary, timeout=1000 * PATIENCE_S))
            self.page = browser.new_page(no_viewport=True)
            self.protocol = self.page.context.new_cdp_session(self.page)
            self._stack = stack.pop_all()
        self.page.set_default_timeout(1000 * PATIENCE_S)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a page from a file and wait until it has drawn its first problem."""
        self.page.goto("about:blank")
        self.errors.clear()
        self.requests.clear()
        self.page.goto(page.resolve().as_uri() + fragment)
        self.wait("document.documentElement.dataset.drawn !== undefined")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression (awaited if it is a promise)."""
        return self.page.evaluate(expression)

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true. (Playwright's own way to wait is ``eval``, which the page forbids.)"""
        until = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            if time.monotonic() > until:
                raise TimeoutError(f"never became true: {condition}")
            self.page.wait_for_timeout(20)

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        return self.page.locator(selector).first.inner_text()

    def count(self, selector: str) -> int:
        """How many elements match."""
        return self.page.locator(selector).count()

    def hover(self, selector: str) -> None:
        """Move the mouse over the first element that matches."""
        self.page.locator(selector).first.hover()

    def click(self, selector: str) -> None:
        """Click on the first element that matches."""
        self.page.locator(selector).first.click()

    def choose(self, selector: str, value: str) -> None:
        """Pick an option of a select."""
        self.page.select_option(selector, value)

    def press(self, *keys: str) -> None:
        """Press and release keys, by their names or letters."""
        for key in keys:
            self.page.keyboard.press(key)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.page.keyboard.insert_text(text)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol, for what Playwright has no words for."""
        return self.protocol.send(method, parameters)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the window in CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def prefer(self, scheme: Any) -> None:
        """What the system prefers: ``light`` or ``dark``."""
        self.page.emulate_media(color_scheme=scheme)

    def screenshot(self, path: Path) -> bytes:
        """What is on the screen, as PNG, also written to ``path``."""
        return self.page.screenshot(path=path)
