"""The JSON schema of the configuration files, exported from the models: editors complete and check against it, and a
test holds `config/schema.json` to what the models say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reqat.config.companions import file_model, kinds
from reqat.config.files import write_file
from reqat.config.recipe import Catalogue
from reqat.config.studies import StudiesFile
from reqat.config.throughput import ThroughputFile
from reqat.config.tier import Tier

FILE = "schema.json"


def schema() -> dict[str, Any]:
    """Schemas of a tier file (`tier`, all keys optional where the file extends another), of `recipes.yaml`
    (`recipes`), of `throughput.yaml` (`throughput`), of `studies.yaml` (`studies`) and of `companions.yaml`
    (`companions`)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "reqat configuration",
        "tier": Tier.model_json_schema(),
        "recipes": Catalogue.model_json_schema(),
        "companions": file_model(kinds()).model_json_schema(),
        "studies": StudiesFile.model_json_schema(),
        "throughput": ThroughputFile.model_json_schema(),
    }


def text() -> str:
    """The schema file's text."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def write(folder: Path) -> Path:
    """Write `schema.json` into a configuration folder; returns its path."""
    path = folder / FILE
    write_file(path, text())
    return path
