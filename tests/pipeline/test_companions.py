"""Parts of companions as jobs: run once, again when a source is another, noted when one is missing, pinned, drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pandas as pd
import pytest
import yaml

from analysis.build import build_companions
from analysis.report.companions import load_companions as found_of
from analysis.report.companions import pinned_parts
from reqat.config import companions as configured
from reqat.config.companions import FILE, Companion, Part, note_of
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.pipeline import companions, pin
from reqat.records import pinned, record


class Coin(Companion):
    kind: Literal["coin"] = "coin"
    seeds: list[int] = [1, 2]

    def parts(self) -> tuple[str, ...]:
        return ("fair", "read")

    def sources_of(self, part: str) -> tuple[str, ...]:
        return ("brown",) if part == "read" else ()


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A checkout with one companion; its runs are in `calls` of its module."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / FILE).write_text(yaml.safe_dump({"tiers": {"small": [{"kind": "coin"}]}}))
    monkeypatch.setattr(configured, "kinds", lambda: {"coin": Coin})
    monkeypatch.delenv("REQAT_BROWN", raising=False)
    monkeypatch.chdir(tmp_path)
    module = ModuleType("coin")
    calls: list[str] = []

    def run(settings: Coin, part: str, given: companions.Given) -> pd.DataFrame:
        calls.append(part)
        given.say(f"throwing {part}")
        text = (given.source("brown") / "text").read_text() if part == "read" else ""
        (given.out / "more.csv").write_text("a\n1\n")
        (given.out / "weights.safetensors").write_text("large")
        return pd.DataFrame({"seed": settings.seeds, "heads": [0.1 + 0.2, 3], "text": text})

    module.run, module.calls = run, calls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reqat.pipeline.companions.coin", module)
    return Paths(root=tmp_path)


def parts(paths: Paths) -> dict[str, Part]:
    return {part.part: part for part in companions.companions_of("small", paths).values()}


def bring(paths: Paths, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let source `brown` be prepared with this text."""
    import reqat.data.packaged as packaged

    monkeypatch.setattr(packaged, "prepare", lambda name, out, given: (out / "text").write_text(text))


def test_a_part_runs_once_and_its_record_says_of_what(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    part = parts(paths)["fair"]
    for _ in range(2):
        companions.run_part(part, paths, tier="small")
    out, calls = paths.companion(part.id), sys.modules["reqat.pipeline.companions.coin"].calls
    assert calls == ["fair"] and "already there" in capsys.readouterr().out
    assert (out / "rows.csv").read_text() == "seed,heads,text\n1,0.30000000000000004,\n2,3.0,\n"
    found = record.verify(out, id=part.id)
    assert (found["kind"], found["seeds"], found["tier"]) == ("companion", [1, 2], "small")
    assert configured.restored(found["config"], "here") == part


def test_a_missing_source_costs_its_own_part(paths: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part, calls = parts(paths)["read"], sys.modules["reqat.pipeline.companions.coin"].calls
    with pytest.raises(companions.MissingSourceError, match="npm install"):
        companions.run_part(part, paths, tier="small")
    companions.run_part(part, paths, tier="small", note_missing=True)
    companions.run_source("brown", paths, tier="small", note_missing=True)
    reason = note_of(paths.companion(part.id))
    assert reason and "npm install" in reason and note_of(paths.packaged("brown")) == reason and calls == []

    companions.run_part(parts(paths)["fair"], paths, tier="small")
    source = paths.work / "companions"
    (found,) = found_of(parts(paths).values(), source, {part.id: reason}, tier="small")
    assert set(found.rows["part"]) == {"fair"} and found.missing == {reason: ("coin read",)}
    assert any(reason in note for note in found.notes)
    with pytest.raises(ReqatError, match=f"reqat companion {part.id}"):
        found_of(parts(paths).values(), source, {}, tier="small")

    bring(paths, monkeypatch, "one")
    companions.run_part(part, paths, tier="small", note_missing=True)
    assert note_of(paths.companion(part.id)) is None and calls == ["fair", "read"]
    bring(paths, monkeypatch, "two")
    companions.run_source("brown", paths, tier="small", force=True)
    companions.run_part(part, paths, tier="small")
    assert calls == ["fair", "read", "read"] and "two" in (paths.companion(part.id) / "rows.csv").read_text()


def test_a_part_reads_what_it_lists(tmp_path: Path) -> None:
    given = companions.Given({"brown": tmp_path}, tmp_path, tmp_path)
    assert given.source("brown") == tmp_path
    with pytest.raises(ReqatError, match="'austen'"):
        given.source("austen")


def test_pinned_parts_are_drawn_as_fresh_ones(paths: Paths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(tier=SimpleNamespace(name="small", title=""), dump=dict)
    bring(paths, monkeypatch, "one")
    with pytest.raises(ReqatError, match="cannot be pinned"):
        pin.check(plan, paths, ["companions"])
    for part in parts(paths).values():
        companions.run_part(part, paths, tier="small")
    found = pin.check(plan, paths, ["companions"], allow_dirty=True)
    assert [entry["config"]["part"] for entry in found.values()] == ["fair", "read"]

    kept, root = tmp_path / "kept", tmp_path / "root"
    kept.mkdir()
    pinned.fold(paths.work, list(found), kept)
    monkeypatch.setattr(pinned, "read_plan", lambda path: plan)
    restored = pinned.unfold(kept, "companions", root)
    names = {path.name for path in (root / "companions").rglob("*") if path.is_file()}
    assert names == {"record.json", "rows.csv", "more.csv"}, "no weights"
    planned = pinned_parts(restored.records)
    assert planned == list(parts(paths).values())
    (fresh,), (old,) = (
        found_of(planned, folder, {}, tier="small") for folder in (paths.work / "companions", root / "companions")
    )
    pd.testing.assert_frame_equal(fresh.rows, old.rows)
    assert build_companions(planned, root / "companions", tmp_path, tmp_path) == [], "no table declares this kind"

    next(paths.companion(part.id) for part in planned).joinpath("rows.csv").write_text("changed")
    with pytest.raises(ReqatError, match="rows.csv"):
        pin.check(plan, paths, ["companions"], allow_dirty=True)


def test_companions_are_pinned_one_by_one_and_each_is_found_where_it_was_finished_last(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Die(Coin):
        kind: Literal["die"] = "die"  # type: ignore[assignment]

    monkeypatch.setattr(configured, "kinds", lambda: {"coin": Coin, "die": Die})
    monkeypatch.setitem(sys.modules, "reqat.pipeline.companions.die", sys.modules["reqat.pipeline.companions.coin"])
    (paths.config / FILE).write_text(yaml.safe_dump({"tiers": {"small": [{"kind": "coin"}, {"kind": "die"}]}}))
    plan: Any = SimpleNamespace(tier=SimpleNamespace(name="small", title=""), dump=dict)
    monkeypatch.setattr(pinned, "read_plan", lambda path: plan)
    bring(paths, monkeypatch, "one")

    def finish(kind: str, name: str) -> Path:
        for part in pin.companions_asked("small", [kind], paths).values():
            companions.run_part(part, paths, tier="small", force=True)
        return pin.pin(plan, paths, ["companions"], companions=[kind], name=name, allow_dirty=True)

    coin = finish("coin", "2026-01-01-small-coin")
    with pytest.raises(ReqatError, match="companion-die"):
        pin.check(plan, paths, ["companions"], allow_dirty=True)
    with pytest.raises(ReqatError, match="'dye'"):
        pin.check(plan, paths, ["companions"], companions=["dye"])
    assert pinned.companions("small", paths) == {"coin": coin} and pinned.companions("large", paths) == {}
    die = finish("die", "2026-01-02-small-die")
    assert pinned.companions("small", paths) == {"coin": coin, "die": die}
    with pinned.restored(die, "companions") as kept:
        assert {part.kind for part in pinned_parts(kept.records)} == {"die"}
    both = pin.pin(plan, paths, ["companions"], name="2026-01-03-small", allow_dirty=True)
    assert pinned.companions("small", paths) == {"coin": both, "die": both}
    again = finish("coin", "2026-01-04-small-coin")
    assert pinned.companions("small", paths) == {"coin": again, "die": both}

    # A manifest of before kinds were named: its records name them.
    stated = pinned.manifest(die)
    assert stated["parts"]["companions"].pop("companions") == ["die"]
    for folder in (both, again, coin):
        (folder / pinned.MANIFEST).unlink()
    record.write(die / pinned.MANIFEST, stated)
    assert pinned.companions("small", paths) == {"die": die}
