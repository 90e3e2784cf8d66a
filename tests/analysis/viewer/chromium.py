"""Drives a headless Chromium with nothing but the standard library: DevTools messages over a pair of pipes.

Chromium started with ``--remote-debugging-pipe`` reads JSON messages that end with a zero byte from file descriptor 3
and writes answers and events to 4. What a page is asked is always JavaScript; what is done to it are real input events
(mouse, keys), so that a test does what a user does.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A page that does not answer within this time has hung; a busy machine is no reason to fail earlier.
PATIENCE_S = 60
# The child moves the pipes to 3 and 4, then becomes Chromium. They lie above 9, so that neither overwrites the other.
LAUNCH = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {"Escape": 27, "Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find() -> str | None:
    """A Chromium on this machine: ``CHROMIUM``, or one of the usual names."""
    given = os.environ.get("CHROMIUM")
    return given or next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """A browser with one page."""

    def __init__(self, binary: str, profile: Path, page: Path) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_child, from_child)]
        for end in (to_child, from_child):
            os.close(end)
        options = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
            "--no-default-browser-check", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
            "--no-sandbox",  # containers have no user namespaces; the only page is ours
            "about:blank",
        ]  # fmt: skip
        self._log = open(profile.with_suffix(".log"), "w")  # noqa: SIM115  (the browser writes to it until it ends)
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, high), binary, *options],
            pass_fds=high, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        for end in high:
            os.close(end)
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        pages = self.ask("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in pages if info["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.open(page)

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._session = None
            if kind is None:
                self.ask("Browser.close")
        finally:
            try:
                self._process.wait(timeout=10 if kind is None else 0.1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._read)
            os.close(self._write)
            self._log.close()

    # -- the protocol -------------------------------------------------------------------------------------------------

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are looked through."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until = time.monotonic() + PATIENCE_S
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE_S} s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium ended: {Path(self._log.name).read_text()[-2000:]}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        event, said = message.get("method"), message.get("params", {})
        if event == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        return message

    # -- what a user does ---------------------------------------------------------------------------------------------

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a page from a file and wait until it has drawn its first problem."""
        self.ask("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri() + fragment)
        self.wait("document.documentElement && document.documentElement.dataset.drawn !== undefined")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression (awaited if it is a promise)."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        until = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            if time.monotonic() > until:
                raise TimeoutError(f"never became true: {condition}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """The visible text of the first element that matches."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def count(self, selector: str) -> int:
        """How many elements match."""
        return int(self.run(f"document.querySelectorAll({json.dumps(selector)}).length"))

    def _middle(self, selector: str) -> tuple[float, float]:
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "if (!e) throw new Error('nothing matches'); e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return float(x), float(y)

    def _mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def hover(self, selector: str) -> None:
        """Move the mouse over the first element that matches."""
        self._mouse("mouseMoved", *self._middle(selector))

    def click(self, selector: str) -> None:
        """Click on the first element that matches."""
        place = self._middle(selector)
        self._mouse("mouseMoved", *place)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, *place, button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Pick an option of a select, as its list would."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            "if (e.selectedIndex < 0) throw new Error('no such option');"
            "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def press(self, *keys: str) -> None:
        """Press and release keys, by their names or letters."""
        for key in keys:
            event: dict[str, Any] = {"key": key}
            if key in KEYS:
                event["windowsVirtualKeyCode"] = KEYS[key]
            else:
                event["text"] = key
            self.ask("Input.dispatchKeyEvent", type="keyDown", **event)
            self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.ask("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the window in CSS pixels."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """What the system prefers: ``light`` or ``dark``."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> bytes:
        """What is on the screen, as PNG, also written to ``path``."""
        data = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data
