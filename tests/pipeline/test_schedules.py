"""Companion schedules as a job: rows of replayed searches, and tables that are not there or not whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reqat.config.companions.schedules import ANALYTIC, SOURCE, Settings
from reqat.config.errors import ReqatError
from reqat.data import packaged
from reqat.methods.search import METHODS
from reqat.pipeline.companions import Given
from reqat.pipeline.companions.schedules import run
from reqat_kernels.schedules.tables import Unfinished

SMALL = {"seeds": [0, 1], "measurements": 24, "plan": 8, "every": 8}


def given(tmp_path: Path, **folders: Path) -> Given:
    return Given(folders, tmp_path, tmp_path / "kept", lambda text: None)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return run(Settings(tables=(ANALYTIC,), **SMALL), ANALYTIC, given(tmp_path_factory.mktemp("out")))


def test_rows_are_tidy(rows: pd.DataFrame) -> None:
    of_table = rows[rows["method"] == ""]
    assert set(of_table["measure"]) == {"points", "failed", "near", "optimum"}
    counts = rows[rows["method"] != ""].groupby(["method", "measure"]).size()
    for method in METHODS:
        assert counts[method, "best"] == 2 * 3 and counts[method, "to_target"] == 2
        assert ("rank_correlation" in counts[method]) == (method != "uniform")
    curve = rows[rows["measure"] == "best"].pivot(index=["method", "seed"], columns="measurements", values="value")
    assert (np.diff(curve.to_numpy()) >= 0).all() and curve.max(axis=None) <= 1
    assert curve[8].unstack("method").nunique(axis=1).eq(1).all()  # a seed's first plan is the same for all


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    made = Unfinished(folder, "int8-x", {"a": (1, 2, 4, 8), "b": (0, 1, 2, 3, 4, 5, 6)}, ("status", "speed"), {})
    for values in made.left:
        made.add(values, status="ok", speed=values["a"] * values["b"])
    made.finish("GMAC/s")
    return folder


def test_a_measured_table_is_prepared_and_replayed(tables: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepared"
    out.mkdir()
    packaged.prepare(SOURCE, out, tables)
    settings = Settings(tables=("int8-x", "int8-y"), **SMALL)
    frame = run(settings, "int8-x", given(tmp_path, **{SOURCE: out}))
    facts = frame[frame["method"] == ""].set_index("measure")["value"]
    assert facts["points"] == 28 and facts["optimum"] == 48 and facts["failed"] == 4 / 28
    with pytest.raises(ReqatError, match="int8-x"):
        run(settings, "int8-y", given(tmp_path, **{SOURCE: out}))


@pytest.mark.parametrize("damage", ["number", "no csv", "schema", "empty"])
def test_tables_that_are_not_as_they_were_measured(tables: Path, tmp_path: Path, damage: str) -> None:
    csv, meta = tables / "int8-x.csv", tables / "int8-x.json"
    if damage == "number":
        csv.write_text(csv.read_text().replace("8,6,ok,48", "8,6,ok,49"))
    elif damage == "no csv":
        csv.unlink()
    elif damage == "schema":
        meta.write_text("{}")
    else:
        csv.unlink(), meta.unlink()
    with pytest.raises(ReqatError, match="schedules|schedule-tables"):
        packaged.prepare(SOURCE, tmp_path, tables)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tables": ()},
        {"tables": ("a", "a")},
        {"tables": ("../x",)},
        {"methods": ("distinctiv",)},
        {"plan": 200},
        {"seeds": []},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Settings(**({"tables": (ANALYTIC,)} | wrong))  # type: ignore[arg-type]


def test_only_measured_tables_have_a_source() -> None:
    settings = Settings(tables=(ANALYTIC, "int8-x"))
    assert settings.sources() == (SOURCE,) and settings.sources_of(ANALYTIC) == ()
    assert Settings(tables=(ANALYTIC,)).sources() == ()
