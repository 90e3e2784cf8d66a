"""`reqat bench`, and `report` and `pin` of what it measured, for real and small: rows, record, tables and Figure 6."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.report.benchmark import read
from reqat.cli.main import main
from reqat.config.throughput import load_throughput
from reqat.records import record
from reqat.records.pinned import restored

ROOT = Path(__file__).parents[2]
TINY = {"linear": {"m": [1, 2], "nk": [32], "rounds": 2}, "ring_bytes": 1, "burst_ms": 0.001}
DECODE = {"model": "package:no-such-package", "batches": [1], "output_tokens": [2]}


def reqat(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    tiers = {"tiers": {"smoke": {**TINY, "decode": [DECODE]}, "laptop": TINY}}
    (tmp_path / "config" / "throughput.yaml").write_text(yaml.safe_dump(tiers))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_clock_to_figure(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_throughput("smoke", checkout / "config")
    assert settings is not None
    assert reqat("bench", settings.id, "--tier", "smoke", "--quiet") == 0
    printed = capsys.readouterr()
    assert f"{settings.id}: done" in printed.out
    assert "warning: decode: 'package:no-such-package': no Python package" in printed.err
    folder = checkout / "build" / "throughput" / settings.id
    found = record.verify(folder, id=settings.id)
    assert found["kind"] == "throughput" and found["metrics"]["rows"] == len(pd.read_csv(folder / "throughput.csv"))
    rows = read(folder).rows
    assert {"commit", "versions", "hardware", "bytes_moved", "p10_us", "p90_us", "waited"} <= set(rows.columns)
    assert set(rows["shape"]) == {"M=1 N=32 K=32", "M=2 N=32 K=32"} and (rows.roofline_fraction > 0).all()
    assert "torch" in rows.versions[0] and rows.arithmetic.isin(["native", "emulated", "modelled"]).all()

    assert reqat("bench", "--tier", "smoke") == 0  # done already
    assert "already there" in capsys.readouterr().out
    assert reqat("report", "--what", "benchmark", "--tier", "smoke") == 0
    assert (checkout / "build" / "plots" / "smoke" / "figure6.png").stat().st_size > 10_000
    decode = (checkout / "build" / "tables" / "smoke" / "throughput-decode.md").read_text()
    assert "Not measured: decode: 'package:no-such-package'" in decode

    pin = ("pin", "--what", "benchmark", "--tier", "smoke")
    assert reqat(*pin) == 2  # no checkout of git, so nobody knows the code
    assert "uncommitted changes" in capsys.readouterr().err
    assert reqat(*pin, "--figure", "figure6", "--name", "2026-01-02-smoke", "--allow-dirty") == 0
    kept = checkout / "results" / "2026-01-02-smoke"
    assert (kept / "figure6.png").exists() and (kept / "tables" / "throughput-linear.csv").exists()
    with restored(kept, "benchmark") as again:
        at = again.root / "throughput" / settings.id
        assert record.verify(at, id=settings.id) == found
        assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in at.iterdir())
    assert reqat("report", "--pinned", "--tier", "smoke") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "--tier", "paper"], "tier paper has no benchmark; give it a section in config/throughput.yaml"),
        (["bench", "throughput-0", "--tier", "smoke"], "benchmark is throughput-"),
        (["report", "--what", "benchmark", "--tier", "laptop"], "nothing finished here"),
        (["report", "--what", "benchmark", "--tier", "paper"], "tier paper has no benchmark"),
    ],
)
def test_what_a_user_can_mend(
    checkout: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reqat(*arguments) == 2
    assert says in capsys.readouterr().err
