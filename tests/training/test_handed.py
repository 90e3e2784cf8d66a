"""A model that the first process alone loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from reqat.config.errors import ReqatError
from reqat.formats.digests import tensors_digest
from reqat.models import kv_quantizers, set_gradient
from reqat.training.distributed import Ranks
from reqat.training.handed import from_outline, is_outline, outline
from tests.training.processes import together
from tests.training.test_distributed import QAT, model


def prepared(tied: bool = True, seed: int = 0) -> nn.Module:
    made = model(**QAT, tied=tied, seed=seed)
    for kv in kv_quantizers(made):  # as Q-FIT would leave it
        kv.set_shift(torch.randn(1, 16))
    return made.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_an_outline_is_the_model_without_its_numbers(tied: bool) -> None:
    whole = prepared(tied)
    found = from_outline(outline(whole))
    assert is_outline(found) and not is_outline(whole)
    for kind in ("named_parameters", "named_buffers"):
        own, other = (dict(getattr(one, kind)(remove_duplicate=False)) for one in (whole, found))
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            about = [(t.shape, t.dtype, t.stride(), t.requires_grad, type(t)) for t in (tensor, other[name])]
            assert about[0] == about[1] and other[name].is_meta, name
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert found._reqat_report.precision == whole._reqat_report.precision
    modules = [dict(one.named_modules()) for one in (whole, found)]
    assert {name: type(m) for name, m in modules[0].items()} == {name: type(m) for name, m in modules[1].items()}


@pytest.mark.parametrize("tied", [True, False])
def test_every_process_gets_its_share_of_the_first_ones_numbers(tmp_path: Path, tied: bool) -> None:
    def compute(ranks: Ranks) -> dict[str, object]:
        torch.manual_seed(ranks.rank)
        made = ranks.made(lambda: prepared(tied))
        without = is_outline(made)
        start = ranks.digest(made)
        ranks.place(made)
        shares = [p.to_local().numel() for p in made.parameters() if isinstance(p, DTensor)]
        plain = prepared(tied, seed=5) if ranks.first else None
        ranks.fill(plain, made)
        buffers = {name: tensor.tolist() for name, tensor in made.named_buffers()}
        filled = tensors_digest(dict(plain.named_parameters())) if plain is not None else ""
        return {"without": without, "start": start, "shares": sum(shares), "filled": filled, "buffers": buffers}

    first, second = (each["result"] for each in together(2, tmp_path, compute))
    torch.manual_seed(0)
    whole = prepared(tied)
    assert (first["without"], second["without"]) == (False, True)
    assert first["start"] == second["start"] == tensors_digest(whole.state_dict())
    assert first["filled"] == tensors_digest(dict(whole.named_parameters()))
    assert second["buffers"] == first["buffers"] and first["buffers"]
    count = sum(p.numel() for p in whole.parameters())
    assert second["shares"] == pytest.approx(count / 2, rel=0.05)


def test_an_error_of_the_first_is_raised_on_all(tmp_path: Path) -> None:
    def refuse() -> nn.Module:
        raise ReqatError("no such model")

    for each in together(2, tmp_path, lambda ranks: ranks.made(refuse) and None):
        assert "no such model" in each["error"]


def test_learned_scales_come_along() -> None:
    whole = model(**QAT)
    set_gradient(whole, "clipped")
    found = from_outline(outline(whole))
    assert [type(m) for m in found.modules()] == [type(m) for m in whole.modules()]
