"""Tables and figure of companion AMXFP4 on rows with known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.figures import companion_amxfp4 as figure
from analysis.report import style
from analysis.report.companions import Found, missing_table
from analysis.tables import companion_amxfp4, companion_amxfp4_blocks

COSTS = {
    ("BF16", ""): (0.0, 0.0),
    ("MXFP4", "PoT"): (0.5, 0.3),
    ("MXFP4", "E5M2"): (0.4, 0.3),
    ("AMXFP4", "E5M2"): (0.2, 0.1),
    ("AMXFP4", "FP16"): (0.2, 0.1),
}  # nats a token above BF16: as it is, rotated


def rows(noise: float) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    out = []
    for (family, scale), costs in COSTS.items():
        for rotated in (False, True):
            for window in range(8):
                tokens = 50 + 10 * window
                nats = tokens * (2 + 0.1 * window + costs[rotated] + noise * rng.standard_normal())
                out.append(("tiny", rotated, family, scale or None, window, tokens, nats))
    frame = pd.DataFrame(out, columns=["model", "rotated", "family", "scale", "window", "tokens", "nats"])
    return frame.assign(companion="amxfp4", part="tiny-plain")


def blocks() -> pd.DataFrame:
    roles = [(role, rotated) for role in ("weights", "values") for rotated in (False, True)]
    return pd.DataFrame(
        {"model": "tiny", "rotated": rotated, "role": role, "blocks": 10, "one_sided": 4 - 3 * rotated}
        | {"error_mxfp4": 0.02, "error_amxfp4": 0.01}
        for role, rotated in roles
        for _ in range(2)
    )


def found(*frames: pd.DataFrame) -> Found:
    return Found("amxfp4", pd.concat(frames, ignore_index=True), {"amxfp4": {"text": "austen"}}, tier="small")


def test_perplexities_and_verdicts_follow_from_the_rows() -> None:
    given = found(rows(0.001), blocks())
    table = companion_amxfp4.build(given)
    data = table.data
    cell = data[(data["family"] == "MXFP4") & (data["scale"] == "PoT") & ~data["rotated"].astype(bool)].iloc[0]
    raw = rows(0.001).query("family == 'MXFP4' and scale == 'PoT' and not rotated")
    assert cell["perplexity"] == pytest.approx(np.exp(raw["nats"].sum() / raw["tokens"].sum()))
    assert cell["above"] == pytest.approx(0.5, abs=0.01) and cell["above_lo"] < cell["above"] < cell["above_hi"]
    verdicts = dict(data[data["kind"] == "claim"][["claim", "verdict"]].to_numpy())
    differences = dict(data[data["kind"] == "claim"][["claim", "difference"]].to_numpy())
    (first, rotations, finer, helps, control) = (claim.text for claim in companion_amxfp4.CLAIMS)
    assert [verdicts[text] for text in (first, rotations, control)] == ["agrees"] * 3
    assert verdicts[finer].startswith("cannot tell")
    assert differences[first] == pytest.approx(-0.3, abs=0.01)
    assert differences[helps] == pytest.approx(0.2 - 0.1, abs=0.01) and verdicts[helps] == "agrees"
    assert all(any(text in note for note in table.footer) for text in verdicts)
    table.markdown(), table.latex()


def test_noise_decides_nothing_and_the_other_sign_disagrees() -> None:
    noisy = companion_amxfp4.claims(companion_amxfp4.measured(found(rows(3.0))))
    assert all(str(row["verdict"]).startswith("cannot tell") for row in noisy)
    swapped = rows(0.001)
    swapped["family"] = swapped["family"].replace({"MXFP4": "AMXFP4", "AMXFP4": "MXFP4"})
    swapped.loc[swapped["family"].eq("MXFP4") & swapped["scale"].eq("FP16"), "scale"] = "PoT"
    swapped.loc[swapped["family"].eq("AMXFP4") & swapped["scale"].eq("PoT"), "scale"] = "FP16"
    first = companion_amxfp4.claims(companion_amxfp4.measured(found(swapped)))[0]
    assert first["verdict"] == "disagrees"


def test_shares_are_of_all_blocks() -> None:
    data = companion_amxfp4_blocks.build(found(rows(0.1), blocks())).data
    assert list(data["share"]) == [0.4, 0.4, 0.1, 0.1] and list(data["role"]) == ["weights", "values"] * 2


@pytest.mark.parametrize("frames", [(rows(0.1), blocks()), (rows(0.1),), (blocks(),)], ids=["both", "rows", "blocks"])
def test_each_is_drawn_of_what_is_there(frames: tuple[pd.DataFrame, ...], tmp_path: Path) -> None:
    given = found(*frames)
    for module in (companion_amxfp4, companion_amxfp4_blocks):
        module.build(given).write(tmp_path)
    with style.context():
        assert figure.build(given).axes


def test_nothing_there_says_what_to_install() -> None:
    table = missing_table("companion-amxfp4", Found("amxfp4", pd.DataFrame(), {}, missing={"apt install x": ("a",)}))
    assert "apt install x" in table.markdown() and list(table.data["reason"]) == ["apt install x"]
