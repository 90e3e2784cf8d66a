"""Random search: every point is as likely as any other. What a model is worth shows against it."""

from __future__ import annotations

from reqat.methods.search._method import Method

METHOD = Method(None)
