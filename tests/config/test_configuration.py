"""What a user can misspell or mistype in configuration, and what the error says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reqat.config import PrecisionSpec, ReqatError, amount, load_catalogue, load_tier, tier_names
from reqat.config import schema as schema_file
from reqat.config.base import parse
from reqat.config.formats import bits_of
from reqat.config.precision import FORMATS, family
from reqat.config.recipe import Catalogue

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of config/ to spoil."""
    return Path(shutil.copytree(CONFIG, tmp_path / "config"))


def edit(folder: Path, name: str, *keys: str, value: object) -> None:
    """Set one key of a tier file."""
    path = folder / "tiers" / f"{name}.yaml"
    data = yaml.safe_load(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    path.write_text(yaml.safe_dump(data))


def test_every_tier_loads():
    assert {"laptop", "overnight", "paper", "smoke", "smollm"} <= set(tier_names(CONFIG))
    for name in tier_names(CONFIG):
        assert load_tier(name, CONFIG).name == name


def test_schema_file_says_what_the_models_say():
    assert (CONFIG / "schema.json").read_text() == schema_file.text(), "run `reqat schema`"


def test_reading_configuration_loads_neither_torch_nor_pandas():
    code = (
        "import sys; from reqat.config import load; import analysis.registry; load('smoke');"
        "print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("bugdet",), {}, ["config/tiers/testbed.yaml", "unknown key 'bugdet'", "Did you mean 'budget'"]),
        (("train", "qat", "learning_rte"), 1, ["train.qat: unknown key 'learning_rte'"]),
        (("train", "qat", "row_token"), 1, ["train.qat: unknown key 'row_token'", "Did you mean 'row_tokens'"]),
        (("train", "qat", "lr"), -1, ["train.qat.lr", "greater than 0", "-1"]),
        (("train", "qat", "lr"), "fast", ["train.qat.lr", "'fast'"]),
        (
            ("train", "rates"),
            {"reqat-tqq": 1e-3},
            ["train.rates", "unknown recipe 'reqat-tqq'", "Did you mean 'reqat-tq"],
        ),
        (("train", "rates"), {"ft": 1e-3}, ["train.rates", "recipe 'ft' has no step qat", "train.finetune.lr"]),
        (("train", "rates"), {"qat": 0}, ["train.rates.qat", "greater than 0"]),
        (("evaluation", "n"), None, ["evaluation.n", "None"]),
        (("budget", "claim_total"), 7, ["claim_total 7 is none of the totals"]),
        (("budget", "totals"), [1, 4], ["totals [1, 4]", "at least 2"]),
        (("only",), {"recipes": ["reqat-tqq"]}, ["unknown recipe 'reqat-tqq'", "Did you mean 'reqat-tq"]),
        (("claim_seeds",), {"precisions": ["NVFP4-W4A5"]}, ["unknown precision 'NVFP4-W4A5'", "NVFP4-W4A4KV4"]),
        (("models", "testbed", "artifacts"), ["tabel1"], ["unknown artifact 'tabel1'", "Did you mean 'table1'"]),
        (("models", "testbed", "source"), "scrach", ["models.testbed.source", "'scratch'", "'scrach'"]),
        (
            ("models", "testbed", "scratch", "architecture", "heads"),
            7,
            ["hidden_size", "must be a multiple of heads 7"],
        ),
    ],
)
def test_a_fault_in_a_tier_names_the_key_and_the_remedy(folder: Path, keys, value, says):
    edit(folder, "testbed", *keys, value=value)
    with pytest.raises(ReqatError) as error:
        load_tier("testbed", folder)
    for words in says:
        assert words in str(error.value)


def test_misspelt_tier_names_the_closest(folder: Path):
    with pytest.raises(ReqatError, match="tier 'latop'.*'laptop'"):
        load_tier("latop", folder)


def test_extends_in_a_circle_is_refused(folder: Path):
    edit(folder, "testbed", "extends", value="overnight")
    with pytest.raises(ReqatError, match="circle"):
        load_tier("overnight", folder)


def test_file_that_is_not_yaml_is_named(folder: Path):
    (folder / "tiers" / "testbed.yaml").write_text("budget: [1,\n")
    with pytest.raises(ReqatError, match=r"testbed\.yaml: not valid YAML"):
        load_tier("testbed", folder)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("recipes: [ft]", "recipes: [ftt]", "unknown recipe 'ftt'. Did you mean 'ft'"),
        ("tokens: 0.5 qat", "tokens: half qat", "unknown token amount 'half'"),
        ("tokens: 0.5 qat", "tokens: 0.5 * * qat", "cannot read the token amount"),
        ("formats: [NVFP4]", "formats: [NVFP5]", "unknown format 'NVFP5'. Did you mean 'NVFP4'"),
        ("variant: released", "variant: leaked", "'released'"),
        ("name: sem,", "name: semm,", "'sem'"),
        ("binary: true", "binery: true", "Did you mean 'binary'"),
    ],
)
def test_a_fault_in_recipes_names_it(folder: Path, old: str, new: str, says: str):
    path = folder / "recipes.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ReqatError) as error:
        load_catalogue(folder)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "name", ["W4A4", "NVFP4", "NVFP4-W8A8", "FP8-W4A4", "", "BF16-W4A4", "NVFP4-W4A4 KV4", "NVFP4-W4A4KV4 "]
)
def test_precision_that_does_not_exist_is_refused(name: str):
    with pytest.raises(ReqatError, match="unknown precision"):
        family(name)


def test_many_faults_are_counted_beyond_the_first():
    faults = {f"r{i}": {"method": "M", "precision": {"MXFP4": {"rotation": 3}}} for i in range(20)}
    with pytest.raises(ReqatError) as error:
        parse(Catalogue, {"recipes": faults, "artifacts": {}}, "recipes.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 6 and "r0.precision.MXFP4.rotation" in lines[0] and "15 faults more" in lines[-1]


def test_precision_options_that_a_name_does_not_use_leave_its_identity_alone():
    assert PrecisionSpec(name="MXFP4-W4A16", kv_element="E2M1", global_scale="static") == PrecisionSpec(
        name="MXFP4-W4A16"
    )
    assert PrecisionSpec(name="BF16", rotation=32) == PrecisionSpec(name="BF16")
    assert PrecisionSpec(name="NVFP4-W4A4KV4") == PrecisionSpec(
        name="nvfp4-w4a4kv4", kv_element="E2M1", global_scale="row", rotation=None
    )
    assert PrecisionSpec(name="AMXFP4-W4A4KV4", kv_element="E2M1") == PrecisionSpec(name="AMXFP4-W4A4KV4")
    assert PrecisionSpec(name="NVFP4-W4A4KV4", kv_element="E1M2") != PrecisionSpec(name="NVFP4-W4A4KV4")
    assert PrecisionSpec(name="MXFP4-W4A4", rotation=32) != PrecisionSpec(name="MXFP4-W4A4")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bits", ["W4A16", "W4A4", "KV4", "W4A4KV4", "W4A16KV4"])
def test_every_name_that_configuration_takes_is_a_precision(kind: str, bits: str):
    from reqat.quant import Precision

    name = f"{kind}-{bits.replace('4', str(bits_of(kind)))}"
    spec = PrecisionSpec(name=name)
    parsed = Precision.parse(name, **spec.options())
    assert str(parsed) == name
    assert parsed == Precision.parse(name)  # all that configuration states is what the name alone means


@given(st.integers(1, 10**6), st.integers(2, 9), st.integers(1, 4))
def test_amounts_are_sums_of_their_names(qat: int, multiple: int, k: int):
    values = {"total": multiple * qat, "qat": qat, "ft": (multiple - 1) * qat}
    assert amount("total", values) == multiple * qat
    assert amount("total - qat", values) == amount("ft", values) == amount("total-qat", values)
    assert amount(f"{k} qat + ft", values) == (k + multiple - 1) * qat
    assert amount(12_345, values) == 12_345


def test_amount_that_is_not_positive_is_refused():
    with pytest.raises(ReqatError, match="must be positive"):
        amount("qat - total", {"total": 3, "qat": 1, "ft": 2})
