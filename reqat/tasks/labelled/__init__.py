"""Tasks of encoders: texts with classes, made of a corpus. A new one is one file here that defines ``TASK``.

Texts are divided by their source (a text of the corpus, a mail), never by sentence, so that nothing of a test text was
trained on.
"""

from __future__ import annotations

import importlib

from reqat.config.catalogue import LABELLED_TASKS
from reqat.tasks.labelled._task import SPLITS, Classified, LabelledTask, Tagged, chosen

__all__ = ["SPLITS", "TASKS", "Classified", "LabelledTask", "Tagged", "chosen"]

TASKS: dict[str, LabelledTask] = {name: importlib.import_module(f"{__name__}.{name}").TASK for name in LABELLED_TASKS}
