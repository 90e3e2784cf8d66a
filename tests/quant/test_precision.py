"""Names of precisions: read, printed, suggested, stored."""

from __future__ import annotations

import json

import pytest

from reqat.formats import get_format
from reqat.quant import KNOWN, Precision


@pytest.mark.parametrize(
    "name",
    [
        *KNOWN,
        "NVFP4-W4A16KV4",
        "NVFP4-W16A4",
        "MXFP4-W4A4+NVFP4-KV4",
        "MXFP4-W4+NVFP4-A4",
        "NVFP4-W4A4+NVFP4-4/6-K4+INT4-row-V4",
        "NVFP4-W4A4K4",
    ],
)
def test_a_name_is_printed_as_it_was_read(name: str) -> None:
    precision = Precision.parse(name)
    assert str(precision) == name
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(name.lower()) == precision


def test_what_names_mean() -> None:
    paper = Precision.parse("NVFP4-W4A4KV4")
    assert (paper.weights, paper.inputs) == (get_format("NVFP4"), get_format("NVFP4"))
    assert paper.keys == paper.values == get_format("NVFP4", element="E1M2")
    assert paper.rotation is None and paper.keys.global_scale == "dynamic"
    assert Precision.parse("NVFP4-W4A4KV4", kv_element="E2M1").keys == get_format("NVFP4")

    mx = Precision.parse("MXFP4-W4A16")
    assert mx.weights == get_format("MXFP4", scale_rule="ceil") and mx.rotation == 32
    assert mx.inputs is None and mx.keys is None
    assert Precision.parse("MXFP4-W4A4", rotation=None).rotation is None
    assert Precision.parse("NVFP4-W4A4", rotation=16).rotation == 16
    assert Precision.parse("MXFP4-KV4").rotation is None

    assert Precision.parse("BF16") == Precision() == Precision.parse("NVFP4-W16A16KV16")
    assert not Precision().quantizes_linear and not Precision().quantizes_cache
    kv = Precision.parse("NVFP4-KV4")
    assert kv.quantizes_cache and not kv.quantizes_linear


def test_global_scale_option_is_for_inputs_and_cache_never_for_weights() -> None:
    for mode in ("row", "static"):
        precision = Precision.parse("NVFP4-W4A4KV4", global_scale=mode)
        assert precision.weights.global_scale == "dynamic"
        assert {f.global_scale for f in (precision.inputs, precision.keys, precision.values)} == {mode}
    assert Precision.parse("MXFP4-W4A4", global_scale="row") == Precision.parse("MXFP4-W4A4")  # it has none


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVPF4-W4A4KV4", "NVFP4-W4A4KV4"),
        ("NVFP4W4A4KV4", "NVFP4-W4A4KV4"),
        ("MXFP4-W4A5", "MXFP4-W4A4"),
        ("MFP4-W4A16", "MXFP4-W4A16"),
        ("BF61", "BF16"),
    ],
)
def test_misspelt_precision_suggests_the_closest(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'") as error:
        Precision.parse(name)
    assert repr(name) in str(error.value)


def test_contradictions_and_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="sets weights twice"):
        Precision.parse("NVFP4-W4A4+MXFP4-W4")
    with pytest.raises(ValueError, match="sets keys twice"):
        Precision.parse("NVFP4-KV4K4")
    with pytest.raises(ValueError, match="global_scale.*rows"):
        Precision.parse("NVFP4-W4A4", global_scale="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="E1M2"):
        Precision.parse("NVFP4-4/6-KV4", kv_element="E1M2")
    with pytest.raises(ValueError, match="unknown precision ''"):
        Precision.parse("")


def test_every_precision_survives_storage() -> None:
    cases = [Precision.parse(name) for name in KNOWN]
    cases += [Precision.parse("NVFP4-W4A4KV4", global_scale="static", kv_element="E2M1", rotation=16, kv_rotation=32)]
    cases += [Precision(weights=get_format("AMXFP4", scale="E4M3"), values=get_format("INT4-row"))]
    for precision in cases:
        assert Precision.from_dict(json.loads(json.dumps(precision.to_dict()))) == precision
