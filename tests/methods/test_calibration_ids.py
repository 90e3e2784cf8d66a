"""Token ids for calibration: whole sequences of one length, of the model's vocabulary, without padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.methods import ptq
from reqat.methods.layerwise import check_input_ids

Tiny = Callable[..., PreTrainedModel]
PAD = 7


def ids(*, first: int = 9, last: int = 9, inside: int = 9) -> Tensor:
    """[2, 12] token ids; the second sequence has the given ones at its ends and in its middle."""
    out = torch.full((2, 12), 9)
    out[1, 0], out[1, 5], out[1, -1] = first, inside, last
    return out


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_sequence_that_begins_or_ends_with_padding_is_refused_by_every_method(tiny: Tiny, where: str) -> None:
    model = tiny()
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = PAD, 1, 2
    model.generation_config.eos_token_id = 2
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for method in ptq.METHODS:
        with pytest.raises(ReqatError, match=f"padding.*{PAD}"):
            ptq.quantize(method, model, "NVFP4-W4A4", ids(**{where: PAD}))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()), "refused before work began"


def test_an_id_that_means_padding_and_something_else_is_text(tiny: Tiny) -> None:
    model = tiny()
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = PAD, 1, PAD
    check_input_ids(model, ids(last=PAD))
    model.config.eos_token_id, model.config.bos_token_id = 2, PAD
    model.generation_config.eos_token_id = 2
    check_input_ids(model, ids(first=PAD))
    model.config.bos_token_id = 1
    check_input_ids(model, ids(inside=PAD))
    model.config.pad_token_id = None
    check_input_ids(model, ids(first=PAD, last=PAD))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([[1, 2]], "list"),
        (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        (torch.zeros(0, 4, dtype=torch.int64), r"\(0, 4\)"),
        (torch.zeros(2, 4), "float32"),
        (torch.full((1, 4), 61), "61"),
        (torch.full((1, 4), -1), "-1"),
        (torch.ones(1, 129, dtype=torch.int64), "129"),
    ],
)
def test_other_ids_are_refused_naming_the_value(tiny: Tiny, given: object, named: str) -> None:
    with pytest.raises(ReqatError, match=named):
        check_input_ids(tiny(), given)  # type: ignore[arg-type]
