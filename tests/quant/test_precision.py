"""Names of precisions: read, printed, suggested, stored."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqat.config.base import digest, parse
from reqat.config.errors import ReqatError
from reqat.config.formats import FAMILIES, FORMATS
from reqat.config.precision import PrecisionSpec
from reqat.formats import Format, get_format
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
    nvfp4 = Precision.parse("NVFP4-W4A4KV4")
    assert nvfp4.weights == get_format("NVFP4")
    assert nvfp4.inputs == nvfp4.keys == nvfp4.values == get_format("NVFP4", global_scale="row")
    assert nvfp4.rotation is None and nvfp4.kv_rotation is None
    fitted = Precision.parse("NVFP4-W4A4KV4", kv_element="E1M2")
    assert fitted.keys == fitted.values == get_format("NVFP4", element="E1M2", global_scale="row")
    assert fitted == Precision.parse("nvfp4-w4a4kv4:kv_element=E1M2") != nvfp4

    mx = Precision.parse("MXFP4-W4A16")
    assert mx.weights == get_format("MXFP4", scale_rule="rceil") and mx.rotation is None
    assert mx.inputs is None and mx.keys is None
    assert Precision.parse("MXFP4-W4A4:rotation=32") == Precision.parse("MXFP4-W4A4", rotation=32)
    assert Precision.parse("MXFP4-W4A4", rotation=32).rotation == 32
    assert Precision.parse("MXFP4-KV4", rotation=32).rotation is None

    assert Precision.parse("BF16") == Precision() == Precision.parse("NVFP4-W16A16KV16")
    assert not Precision().quantizes_linear and not Precision().quantizes_cache
    kv = Precision.parse("NVFP4-KV4")
    assert kv.quantizes_cache and not kv.quantizes_linear


def _formats() -> st.SearchStrategy[Format]:
    """Any format of any family."""

    def of(family: str) -> st.SearchStrategy[Format]:
        parts = {part: st.sampled_from(values) for part, values in FAMILIES[family].items()}
        return st.builds(_or_none, st.just(family), st.fixed_dictionaries(parts)).filter(lambda fmt: fmt is not None)

    return st.sampled_from(sorted(FAMILIES)).flatmap(of)


def _or_none(family: str, fields: dict[str, Any]) -> Format | None:
    try:
        return Format(family, **fields)
    except ValueError:  # a scale of AMXFP4 with another one's rule
        return None


_SIZES = st.sampled_from([None, 1, 16, 32])


@given(st.tuples(*[st.none() | _formats()] * 4), _SIZES, _SIZES, st.sampled_from([None, 0, 5]))
def test_what_is_printed_is_read_back_whatever_the_formats(
    formats: tuple[Format | None, ...], rotation: int | None, kv_rotation: int | None, signs: int | None
) -> None:
    linear, cache = any(formats[:2]), any(formats[2:])
    sizes = rotation if linear else None, kv_rotation if cache else None
    precision = Precision(*formats, *sizes, signs if sizes[1] else None)
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse(precision.name, **precision.options) == precision
    assert str(precision).startswith(precision.name)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("NVFP4-W4A4KV4", {}, "NVFP4-W4A4KV4"),
        ("NVFP4-W4A4KV4", {"kv_element": "E2M1", "global_scale": "row"}, "NVFP4-W4A4KV4"),
        ("NVFP4-W4A4KV4", {"kv_element": "E1M2"}, "NVFP4-W4A4KV4:kv_element=E1M2"),
        ("NVFP4-W4A4", {"global_scale": "dynamic", "rotation": 16}, "NVFP4-W4A4:global_scale=dynamic,rotation=16"),
        ("MXFP4-W4A4KV4", {"kv_rotation": 32}, "MXFP4-W4A4KV4:kv_rotation=32"),
        ("NVFP4-KV4", {"kv_signs": 7, "kv_rotation": 16}, "NVFP4-KV4:kv_rotation=16,kv_signs=7"),
        ("NVFP4-W4A4", {"kv_signs": 7, "kv_rotation": 16}, "NVFP4-W4A4"),
        ("MXFP4-W4A4", {"inputs.scale_rule": "floor"}, "MXFP4-W4A4:inputs.scale_rule=floor"),
        ("MXFP4-W4A4", {"scale_rule": "floor"}, "MXFP4-W4A4:scale_rule=floor"),
        ("NVFP4-W4A4KV4", {"keys.element": "E1M2"}, "NVFP4-W4A4KV4:keys.element=E1M2"),
    ],
)
def test_each_option_that_is_not_the_default_is_printed(name: str, options: dict[str, Any], text: str) -> None:
    assert str(Precision.parse(name, **options)) == text


@given(
    st.sampled_from([*KNOWN, "MXFP4-W4A4+NVFP4-KV4", "NVFP4-W4A16KV4", "nvfp4-w4a4kv4"]),
    st.sampled_from([None, "E1M2", "E2M1"]),
    _SIZES,
    _SIZES,
    st.sampled_from([None, "dynamic", "row", "static"]),
    st.sampled_from([None, 0, 5]),
)
def test_configuration_and_library_mean_the_same(
    name: str, element: str | None, rotation: int | None, kv_rotation: int | None, scale: str | None, seed: int | None
) -> None:
    options = {"kv_element": element, "rotation": rotation, "kv_rotation": kv_rotation, "global_scale": scale}
    options["kv_signs"] = seed if kv_rotation else None
    try:
        precision = Precision.parse(name, **options)
    except ReqatError:
        assert element in ("E1M2", "E2M1")  # a family without it
        return
    spec = PrecisionSpec.model_validate({"name": name, **options})
    assert Precision.parse(spec.name, **spec.options()) == precision
    assert str(spec) == str(precision) and PrecisionSpec.model_validate(str(spec)) == spec


def test_options_in_a_name_act_and_agree_with_what_is_given_beside_it() -> None:
    for name in ("NVFP4-W4A16:kv_element=E1M2", "MXFP4-W4A4:global_scale=row,kv_rotation=16"):
        with pytest.raises(ReqatError, match="acts on nothing|no global scale|global_scale"):
            Precision.parse(name)
    with pytest.raises(ReqatError, match="rotation=16.*32"):
        Precision.parse("MXFP4-W4A4:rotation=16", rotation=32)
    for text in ("NVFP4-W4A4:", "NVFP4-W4A4:rotation", "NVFP4-W4A4:rotation=", "NVFP4-W4A4:rotation=16,rotation=16"):
        with pytest.raises(ReqatError, match="rotation|option"):
            Precision.parse(text)
    with pytest.raises(ReqatError, match="kv_elment.*kv_element"):
        Precision.parse("NVFP4-W4A4KV4:kv_elment=E1M2")
    with pytest.raises(ReqatError, match="rounding"):
        Precision.parse("NVFP4-W4A4", rounding=["even"])
    with pytest.raises(ValueError, match="scale_rule"):
        PrecisionSpec.model_validate("MXFP4-W4A4:scale_rule=floor")


def test_global_scale_option_is_for_inputs_and_cache_never_for_weights() -> None:
    for mode in ("row", "static", "dynamic"):
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
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'") as error:
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVFP5-W4A4", "NVFP4-W4A4"),
        ("NVF4-W4A4KV4", "NVFP4-W4A4KV4"),
        ("int3-g64-w3a16", "INT3-g128-W3A16"),
        ("SAWB4-tensr-W4A4", "SAWB4-tensor-W4A4"),
        ("W4A4", "MXFP4-W4A4"),
    ],
)
def test_a_misspelt_precision_names_close_ones_and_few_others(name: str, meant: str) -> None:
    with pytest.raises(ReqatError, match="unknown precision") as caught:
        Precision.parse(name)
    text = str(caught.value)
    suggested = re.findall(r"'([^']+)'", text)[1:]
    assert meant in suggested and len(suggested) <= 3 and "reqat formats" in text
    assert all(str(Precision.parse(one)) == one for one in suggested)
    assert sum(name in text for name in FORMATS) < 15 < len(FORMATS)


def test_every_precision_survives_storage() -> None:
    cases = [Precision.parse(name) for name in KNOWN]
    cases += [Precision.parse("NVFP4-W4A4KV4", global_scale="static", kv_element="E2M1", rotation=16, kv_rotation=32)]
    cases += [Precision.parse("NVFP4-W4A4KV4", kv_rotation=32, kv_signs=4)]
    cases += [Precision(weights=get_format("AMXFP4", scale="E4M3"), values=get_format("INT4-row"))]
    for precision in cases:
        assert Precision.from_dict(json.loads(json.dumps(precision.to_dict()))) == precision


@pytest.mark.parametrize(
    "given", [{"kv_signs": 0}, {"kv_signs": -1, "kv_rotation": 16}, {"kv_signs": True, "kv_rotation": 16}]
)
def test_signs_need_a_seed_and_a_rotation(given: dict[str, Any]) -> None:
    with pytest.raises(ReqatError, match="kv_signs"):
        Precision.parse("NVFP4-KV4", **given)
    with pytest.raises(ValueError, match="kv_signs"):
        PrecisionSpec(name="NVFP4-KV4", **given)


def test_what_has_no_signs_is_stored_as_before_there_were_any() -> None:
    assert "kv_signs" not in Precision.parse("NVFP4-KV4", kv_rotation=16).to_dict()


_PATTERN = st.text(st.sampled_from("ab.*_0[]!?=:+-"), min_size=1, max_size=6)


@given(
    st.sampled_from([*KNOWN, "MXFP4-W4A4+NVFP4-KV4"]),
    _SIZES,
    st.lists(_PATTERN, unique=True, max_size=3),
)
def test_what_is_skipped_is_written_and_read_back(name: str, rotation: int | None, skip: list[str]) -> None:
    spec = PrecisionSpec.model_validate({"name": name, "rotation": rotation, "skip": skip or None})
    again = PrecisionSpec.model_validate(str(spec))
    assert again == spec and digest(again) == digest(spec)
    assert ("skip=" in str(spec)) == (spec.skip is not None)
    without = PrecisionSpec.model_validate({"name": name, "rotation": rotation})
    assert spec.skip is not None or str(spec) == str(without)


@pytest.mark.parametrize("pattern", ["*.down_proj,*.up_proj", "a|b", " a", "a "])
def test_a_pattern_that_a_name_cannot_hold_is_refused(pattern: str) -> None:
    with pytest.raises(ReqatError, match="skip"):
        parse(PrecisionSpec, {"name": "MXFP4-W4A4", "skip": [pattern]}, "test")


def test_what_is_skipped_is_no_part_of_a_precision_of_tensors() -> None:
    with pytest.raises(ReqatError, match="skip.*prepare"):
        Precision.parse("MXFP4-W4A4:skip=*.down_proj")
    with pytest.raises(ReqatError, match="skip"):
        parse(PrecisionSpec, {"name": "MXFP4-W4A4:skip=*.down_proj", "skip": ["*.up_proj"]}, "test")
