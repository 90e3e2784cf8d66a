"""lm-evaluation-harness: our tasks in its form, and a model type that evaluates prepared models.

Two independent parts. The *tasks* (``tasks/``, YAML files beside two modules of functions) run with any of its model
types, also on other machines than ours: their problems are generated here or read from a file or the hub, and graded
by :mod:`reqat.tasks`, as our own evaluations are. The *model type* ``reqat`` (:mod:`reqat.lm_eval.model`) runs any of
its tasks on a model of ours, at a precision, through the one generation path.

``reqat lm-eval`` registers both; ``lm_eval --include_path`` with :data:`TASKS` knows the tasks alone.
"""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
"""The folder of task files, as ``--include_path`` takes it."""
