"""A fresh benchmark beside a pinned one: within a type of machine only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from reqat.cli.main import main
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths, load
from reqat.pipeline import pin
from reqat.pipeline.benchmark import benchmark_of
from reqat.pipeline.compare_benchmarks import compare_benchmarks, report
from reqat.records import pinned, record
from tests.analysis.benchmarks import SETTINGS, rows

ROOT = Path(__file__).parents[2]
INTEL = {"cpu": "Intel(R) Xeon(R) Platinum 8481C", "instructions": "amx", "device": "cpu", "cores": 2}
AMD = {"cpu": "AMD EPYC 9B14", "instructions": "avx512", "device": "cpu", "cores": 2}


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "config" / "throughput.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": SETTINGS}}))
    monkeypatch.chdir(tmp_path)
    return Paths()


def measured(paths: Paths, hardware: dict[str, object], times: float) -> None:
    """A made-up benchmark of the smoke tier, each time so many times that of :func:`rows`."""
    settings = benchmark_of("smoke", paths)
    out = paths.throughput(settings.id)
    shutil.rmtree(out, ignore_errors=True)
    made = [row | {"median_us": times * row["median_us"]} for row in rows()]
    with record.job("throughput", settings.id, settings, root=Path(), out=out, tier="smoke") as job:
        pd.DataFrame(made).to_csv(job.partial / "throughput.csv", index=False)
        job.metrics = {"roofline_bytes_per_s": 3e10 / times, "skipped": [], "refused": []}
        job.computed = {"hardware": hardware, "native": {"fingerprint": "0", "instruction_set": "avx512"}}


def pin_it(paths: Paths, name: str) -> Path:
    return pin.pin(load("smoke", paths), paths, ["benchmark"], name=name, allow_dirty=True)


def test_machines_of_several_types_are_pinned_side_by_side_and_compared_each_with_its_own(paths: Paths) -> None:
    measured(paths, AMD, 1.0)
    with pytest.raises(ReqatError, match="AMD EPYC, avx512.*pinned: none"):
        compare_benchmarks("smoke", paths)
    amd = pin_it(paths, "2026-01-02-smoke")
    measured(paths, INTEL, 10.0)
    with pytest.raises(ReqatError, match="Intel Xeon, amx.*AMD EPYC, avx512 .2026-01-02-smoke"):
        compare_benchmarks("smoke", paths)
    intel = pin_it(paths, "2026-01-02-smoke-intel")
    assert pinned.benchmarks("smoke", paths) == {"AMD EPYC, avx512": amd, "Intel Xeon, amx": intel}
    assert json.loads((intel / "manifest.json").read_text())["parts"]["benchmark"]["machine"] == "Intel Xeon, amx"
    measured(paths, INTEL, 20.0)
    found = compare_benchmarks("smoke", paths)
    assert (found.machine, found.pinned) == ("Intel Xeon, amx", "2026-01-02-smoke-intel")
    assert len(found.rows) == len(rows()) and all(now / then == pytest.approx(2) for _, now, then in found.rows)
    assert found.roofline_bytes_per_s == (1.5e9, 3e9)
    text = report(found)
    assert "2.00" in text and "linear M=1 N=64 K=64, reqat NVFP4 W4A4" in text


def test_from_the_command_line(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    def reqat(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main([*arguments])
        return int(end.value.code or 0)

    measured(paths, AMD, 1.0)
    compare = ("compare", "--tier", "smoke", "--what")
    assert reqat(*compare, "benchmark") == 2 and "AMD EPYC, avx512" in capsys.readouterr().err
    pin_it(paths, "2026-01-02-smoke")
    assert reqat(*compare, "benchmark") == 0 and "1.00" in capsys.readouterr().out
    assert reqat(*compare, "studies") == 2 and "benchmark, run" in capsys.readouterr().err
