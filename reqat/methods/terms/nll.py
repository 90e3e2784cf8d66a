"""The negative log-likelihood of the trace, which every objective but pure distillation holds."""

from __future__ import annotations

from reqat.training import NLL

TERM = NLL
