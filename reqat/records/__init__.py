"""Records: where each result comes from, how a run is promoted into `results/`, and how a fresh run is held against
it.
"""

from __future__ import annotations

from reqat.records.record import Job, job, read, verify

__all__ = ["Job", "job", "read", "verify"]
