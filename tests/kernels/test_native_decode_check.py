"""Layers and steps of the native decoder are checked before C reads their addresses: every part, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from reqat.formats import get_format, quantize
from reqat_kernels.native import instruction_set
from reqat_kernels.native.decode_check import LayerWeights, check_cache, check_layers, check_step
from reqat_kernels.native.states import PackedStates
from reqat_kernels.native.weights import PackedWeight, pack_weight

pytestmark = pytest.mark.skipif(instruction_set() == "torch", reason="no native library")

HIDDEN, MLP, H, G, D = 64, 96, 4, 2, 32
SHAPES = [
    (H * D, HIDDEN),
    (G * D, HIDDEN),
    (G * D, HIDDEN),
    (HIDDEN, H * D),
    (MLP, HIDDEN),
    (MLP, HIDDEN),
    (HIDDEN, MLP),
]
PARTS = ["query", "key", "value", "out", "gate", "up", "down"]


def weight(rows: int, columns: int) -> PackedWeight:
    return pack_weight(quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), "NVFP4"))


@pytest.fixture(scope="module")
def layer() -> LayerWeights:
    return LayerWeights(
        linears=[(weight(*shape), None) for shape in SHAPES],
        norms=[torch.ones(HIDDEN), torch.ones(HIDDEN), torch.ones(D), None],
        eps=1e-6,
        heads=(H, G, D),
        inputs=get_format("NVFP4", global_scale="row"),
        global_scales=[None] * 4,
        rotation=0,
        shift=torch.zeros(G, D),
        scaling=D**-0.5,
    )


def test_a_layer_that_fits_is_taken(layer: LayerWeights) -> None:
    check_layers([layer, dataclasses.replace(layer, inputs=None, rotation=32, shift=None)])


def with_linear(layer: LayerWeights, at: int, value: Any) -> LayerWeights:
    return dataclasses.replace(layer, linears=[value if i == at else own for i, own in enumerate(layer.linears)])


@pytest.mark.parametrize("at", range(7), ids=PARTS)
def test_every_weight_and_bias_must_have_its_shape(layer: LayerWeights, at: int) -> None:
    rows, columns = SHAPES[at]
    for shape in ((rows + 16, columns), (rows, columns + 16)):
        with pytest.raises(ValueError, match="must be"):
            check_layers([with_linear(layer, at, (weight(*shape), None))])
    with pytest.raises(ValueError, match=f"{rows}"):
        check_layers([with_linear(layer, at, (layer.linears[at][0], torch.zeros(rows - 1)))])
    with pytest.raises(TypeError, match=PARTS[at]):
        check_layers([with_linear(layer, at, (torch.zeros(rows, columns), None))])


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"norms": [torch.ones(HIDDEN - 1), torch.ones(HIDDEN), None, None]}, "input norm"),
    ({"norms": [torch.ones(HIDDEN), None, None, None]}, "attention norm"),
    ({"norms": [torch.ones(HIDDEN), torch.ones(HIDDEN), torch.ones(D + 1), None]}, "query norm"),
    ({"norms": [torch.ones(HIDDEN), torch.ones(HIDDEN), None, torch.ones(1, D)]}, "key norm"),
    ({"norms": [torch.ones(HIDDEN)]}, "norms"),
    ({"linears": []}, "linears"),
    ({"heads": (H, 3, D)}, "3"),
    ({"heads": (H, G, D - 1)}, str(D - 1)),
    ({"heads": (H, 0, D)}, "0"),
    ({"heads": (H, -G, D)}, str(-G)),
    ({"heads": (2 * H, G, D)}, "query"),
    ({"global_scales": [torch.tensor(1.0), None, None, None]}, "four"),
    ({"global_scales": [torch.tensor(-1.0)] * 4}, "-1"),
    ({"global_scales": [torch.tensor(float("nan"))] * 4}, "nan"),
    ({"inputs": get_format("NVFP4", global_scale="static")}, "four"),
    ({"inputs": get_format("MXFP4")}, "MXFP4"),
    ({"rotation": 24}, "24"),
    ({"rotation": 64}, "64"),  # 96 channels are no multiple of it
    ({"rotation": -32}, "-32"),
    ({"shift": torch.zeros(G, D + 1)}, "shift"),
    ({"shift": torch.zeros(G * D)}, "shift"),
    ({"eps": float("nan")}, "eps"),
    ({"scaling": float("inf")}, "scaling"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(CHANGES)])
def test_every_other_part_is_checked_by_name(layer: LayerWeights, change: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        check_layers([dataclasses.replace(layer, **change)])
    with pytest.raises((ValueError, TypeError), match=named):
        check_layers([layer, dataclasses.replace(layer, **change)])


def test_no_layers_and_layers_of_two_sizes(layer: LayerWeights) -> None:
    with pytest.raises(ValueError, match="no layers"):
        check_layers([])
    wide = [
        (2 * rows if i in (3, 6) else rows, 2 * columns if i not in (3, 6) else columns)
        for i, (rows, columns) in enumerate(SHAPES)
    ]
    other = dataclasses.replace(
        layer, linears=[(weight(*shape), None) for shape in wide], norms=[torch.ones(2 * HIDDEN)] * 2 + [None, None]
    )
    check_layers([other])
    with pytest.raises(ValueError, match=f"{HIDDEN}"):
        check_layers([layer, other])


def test_a_cache_must_be_keys_and_values_of_one_shape() -> None:
    def states(kind: str, G: int = G, tokens: int = 32, D: int = D) -> PackedStates:
        return PackedStates.allocate(kind, get_format("NVFP4", global_scale="row"), 1, G, tokens, D)  # type: ignore[arg-type]

    check_cache(states("key"), states("value"), G, D)
    with pytest.raises(TypeError, match="key"):
        check_cache(states("value"), states("value"), G, D)
    with pytest.raises(ValueError, match=f"{G + 1}"):
        check_cache(states("key", G + 1), states("value", G + 1), G, D)
    with pytest.raises(ValueError, match="differ"):
        check_cache(states("key"), states("value", tokens=48), G, D)


STEPS: list[tuple[str, Callable[[], Any]]] = [
    ("x", lambda: torch.zeros(2, 3, HIDDEN, dtype=torch.float64)),
    ("x", lambda: torch.zeros(2, 3, HIDDEN + 1)),
    ("x", lambda: torch.zeros(2, HIDDEN)),
    ("x", lambda: torch.zeros(2, 0, HIDDEN)),
    ("x", lambda: torch.zeros(3, 2, HIDDEN).transpose(0, 1)),
    ("cos", lambda: torch.zeros(3, 3, D)),
    ("cos", lambda: torch.zeros(2, 1, D)),
    ("cos", lambda: torch.zeros(2, 3, D - 1)),
    ("cos", lambda: torch.zeros(2, 3, D, dtype=torch.bfloat16)),
    ("sin", lambda: torch.zeros(1, 3, D)),
    ("mask", lambda: torch.ones(2, 10)),
    ("mask", lambda: torch.ones(2, 9, dtype=torch.bool)),
    ("mask", lambda: torch.ones(10, 2, dtype=torch.bool).T),
]


@pytest.mark.parametrize(("name", "make"), STEPS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(STEPS)])
def test_a_step_is_checked_by_name(name: str, make: Callable[[], Any]) -> None:
    given = {
        "x": torch.zeros(2, 3, HIDDEN), "cos": torch.zeros(2, 3, D), "sin": torch.zeros(2, 3, D),
        "mask": torch.ones(2, 10, dtype=torch.bool),
    }  # fmt: skip
    check_step(*given.values(), HIDDEN, D, 7)
    given[name] = make()
    with pytest.raises((ValueError, TypeError), match=name):
        check_step(*given.values(), HIDDEN, D, 7)
