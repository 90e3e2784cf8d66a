"""The sidecar of a private model of the hub is fetched with the user's token (HF_TOKEN, or `hf auth login`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from reqat.config.errors import ReqatError
from reqat.hf import quantizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"reqat.json": b'{"schema": 1}', "reqat.safetensors": b"codes"}


class PrivateHub(BaseHTTPRequestHandler):
    """Gives the files of one repository to whoever shows the token."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.removeprefix(f"/someone/private/resolve/{COMMIT}/")
        content = FILES.get(name)
        allowed = self.headers["Authorization"] == "Bearer hf_right"
        self.send_response(200 if allowed and content is not None else 401)
        body = content if allowed and content is not None else b""
        for header, value in (
            ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{name}"'),
            ("Content-Length", str(len(body))),
        ):
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), PrivateHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(quantizer, "is_offline_mode", lambda: False)
    yield
    server.shutdown()
    server.server_close()


def test_the_token_goes_along(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--someone--private/snapshots" / COMMIT
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ReqatError, match="reqat.json.*HF_TOKEN"):
        quantizer._fetch_sidecar(folder, "someone/private")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    quantizer._fetch_sidecar(folder, "someone/private")
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
