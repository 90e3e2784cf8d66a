"""transformers' own server, an endpoint that speaks OpenAI's protocol, with one loaded model behind it.

``transformers serve`` loads what a request names by ``from_pretrained``, which knows neither a sidecar alone nor packed
models. So the model is loaded here, and the server is given it in place of its own loading; everything else (routes,
chat template, streaming, settings of generation) is transformers'.
"""

from __future__ import annotations

import socket
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from reqat.config.errors import ReqatError


def check_server(host: str, port: int) -> None:
    """Raise ReqatError, before a model is loaded, where the server's packages are missing or ``host:port`` is taken."""
    if not is_serve_available():
        raise ReqatError("transformers' server needs FastAPI, Uvicorn and OpenAI's types: make env, or "
                         "pip install 'transformers[serving]'")  # fmt: skip
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ReqatError(f"--host {host} --port {port}: cannot listen there ({error}); name another.") from error


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, host: str, port: int) -> None:
    """Serve ``model`` as ``name`` under ``/v1`` of ``host`` and ``port`` until interrupted; requests for
    other models are refused.

    Raises ReqatError as :func:`check_server` does.
    """
    check_server(host, port)
    from transformers.cli import serve as command
    from transformers.cli.serving import model_manager

    class Loaded(model_manager.ModelManager):
        """The one model in place of what would be loaded."""

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return tokenizer

        def _load_model(self, *_: Any, **__: Any) -> Any:
            return model

    own = model_manager.ModelManager
    model_manager.ModelManager = Loaded  # type: ignore[misc]  # where the command below looks for it
    try:
        command.Serve(force_model=name, host=host, port=port)
    finally:
        model_manager.ModelManager = own  # type: ignore[misc]
