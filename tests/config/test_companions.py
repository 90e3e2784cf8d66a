"""Settings of companions: what is read, what is refused, and what names a part."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml

from reqat.config.companions import (
    FILE,
    Companion,
    Part,
    file_model,
    kinds,
    load_companions,
    note_of,
    part_called,
    source_names,
    write_note,
)
from reqat.config.errors import ReqatError

ROOT = Path(__file__).parents[2]


class Coin(Companion):
    kind: Literal["coin"] = "coin"
    seeds: list[int] = [42, 52]
    needs: tuple[str, ...] = ()

    def parts(self) -> tuple[str, ...]:
        return tuple(f"seed{seed}" for seed in self.seeds)

    def sources(self) -> tuple[str, ...]:
        return self.needs


class Dice(Companion):
    kind: Literal["dice"] = "dice"

    def parts(self) -> tuple[str, ...]:
        return ("a/b",)


MODELS: dict[str, type[Companion]] = {"coin": Coin, "dice": Dice}


def load(folder: Path, companions: list[dict], tier: str = "small") -> dict[str, Part]:
    (folder / FILE).write_text(yaml.safe_dump({"tiers": {"small": companions}}))
    return load_companions(tier, folder, MODELS)


def test_a_part_is_named_by_what_it_depends_on(tmp_path: Path) -> None:
    parts = load(tmp_path, [{"kind": "coin"}])
    assert [part.part for part in parts.values()] == ["seed42", "seed52"]
    assert list(parts) == [part.id for part in parts.values()]
    assert all(id.startswith(f"companion-coin-{part.part}-") for id, part in parts.items())
    assert list(load(tmp_path, [{"kind": "coin", "part_s": 5, "memory_mb": 9}])) == list(parts)
    assert set(load(tmp_path, [{"kind": "coin", "name": "other"}])).isdisjoint(parts)
    assert set(load(tmp_path, [{"kind": "coin", "seeds": [42]}])).isdisjoint(parts)


def test_a_tier_without_a_section_has_none(tmp_path: Path) -> None:
    assert load_companions("small", tmp_path) == {} == load(tmp_path, [{"kind": "coin"}], "large")


@pytest.mark.parametrize(
    ("companions", "says"),
    [
        ([{"kind": "cion"}], r"coin.*\n?.*dice|cion"),
        ([{"kind": "coin", "seed": [1]}], "'seed'.*seeds"),
        ([{"kind": "coin"}, {"kind": "coin"}], "two companions"),
        ([{"kind": "coin", "seeds": []}], "no part"),
        ([{"kind": "coin", "seeds": [1, 1]}], "'seed1'"),
        ([{"kind": "dice"}], "a/b"),
        ([{"kind": "coin", "name": "../x"}], "name"),
        ([{"kind": "coin", "needs": ["bronw"]}], "'bronw'.*brown"),
    ],
)
def test_faults_are_refused_by_name(tmp_path: Path, companions: list[dict], says: str) -> None:
    with pytest.raises(ReqatError, match=says) as error:
        load(tmp_path, companions)
    assert FILE in str(error.value)


def test_a_part_that_there_is_none_of_is_named_with_the_closest(tmp_path: Path) -> None:
    parts = load(tmp_path, [{"kind": "coin"}])
    with pytest.raises(ReqatError, match="seed42"):
        part_called(parts, next(iter(parts))[:-1], "small")


def test_notes_say_how_it_ended(tmp_path: Path) -> None:
    assert note_of(tmp_path / "part.1") is None
    write_note(tmp_path / "part.1", "install it")
    assert note_of(tmp_path / "part.1") == "install it" and (tmp_path / "part.1.json").is_file()
    write_note(tmp_path / "part.1", None)
    assert note_of(tmp_path / "part.1") is None


def test_the_repository_s_file_is_whole() -> None:
    tiers = yaml.safe_load((ROOT / "config" / FILE).read_text())["tiers"]
    assert {"smoke", "laptop", "overnight"} <= set(tiers)
    for tier in tiers:
        for part in load_companions(tier, ROOT / "config").values():
            assert set(part.sources) <= set(source_names())
            assert tier != "smoke" or not part.sources, "smoke reads nothing that must be installed"
    assert {entry["kind"] for entry in tiers["laptop"]} <= set(kinds())
    assert set(file_model(MODELS).model_json_schema()["$defs"]) == {"Coin", "Dice"}
