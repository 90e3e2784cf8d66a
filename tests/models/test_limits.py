"""Ends, positions, windows and vocabularies, and calibration without padding: held to what transformers does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedModel, Qwen2Config

from reqat.config.errors import ReqatError
from reqat.inference import PackedCache, pack
from reqat.models import attention_window, calibrate_static, check_token_ids, end_ids, position_limit, prepare
from reqat.models.padding import unpadded

Tiny = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("tokenizer_eos", "generation", "config", "expected"),
    [
        (2, None, None, (2,)),
        (2, [5, 2, 7], 9, (2, 5, 7, 9)),
        (None, 5, [5, 6], (5, 6)),
        (None, None, None, ()),
        (2, [61, -1, 3], 2**70, (2, 3)),  # the model has 61 rows
    ],
)
def test_a_response_ends_with_what_tokenizer_or_model_name(
    tiny: Tiny, tokenizer_eos: Any, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    tokenizer: Any = SimpleNamespace(eos_token_id=tokenizer_eos)
    assert end_ids(model, tokenizer) == expected
    if tokenizer_eos is None:
        assert end_ids(model, None) == expected


def rope(positions: int = 32, **scaling: Any) -> Qwen2Config:
    return Qwen2Config(max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **scaling})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (rope(rope_type="default"), 32),
        (rope(rope_type="linear", factor=4.0), 128),
        (rope(rope_type="dynamic", factor=2.0), 64),
        (rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (rope(128, rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (rope(128, rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32), 128),
        (rope(128, rope_type="longrope", short_factor=[1.0] * 16, long_factor=[4.0] * 16,
              original_max_position_embeddings=32), 128),
        (SimpleNamespace(max_position_embeddings=None), None),
        (SimpleNamespace(max_position_embeddings=32, rope_scaling={"type": "linear", "factor": 2.0}), 64),
        (SimpleNamespace(max_position_embeddings=32, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_type": "default"}}), 32),
    ],
)  # fmt: skip
def test_positions_follow_rope_scaling(config: Any, expected: int | None) -> None:
    assert position_limit(config) == expected


def test_a_window_counts_where_a_layer_slides() -> None:
    slides = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 2}
    assert attention_window(MistralConfig(sliding_window=8)) == 8
    assert attention_window(MistralConfig(sliding_window=None)) is None
    assert attention_window(Qwen2Config(sliding_window=8, use_sliding_window=False)) is None
    assert attention_window(Qwen2Config(**slides, max_window_layers=2)) is None  # all layers below it attend in full
    assert attention_window(Qwen2Config(**slides, max_window_layers=1)) == 8
    # As config.json may say it, before the configuration class mends it.
    assert attention_window(SimpleNamespace(sliding_window=8, use_sliding_window=False)) is None


SLIDING = [
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("family", "changes"), SLIDING)
def test_a_sliding_layer_is_exact_within_its_window_and_refuses_more(
    tiny: Tiny, ids: Tensor, family: str, changes: dict[str, Any]
) -> None:
    plain, ours = tiny(family, **changes), tiny(family, **changes)
    prepare(ours, "BF16")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids[:, :8]).logits, plain(ids[:, :8]).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(ReqatError, match="14 tokens.*window of 8"):
            ours(ids)
    found = ours.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = plain.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_packed_model_keeps_to_its_window_too(tiny: Tiny, ids: Tensor, family: str) -> None:
    model = tiny(family, **dict(SLIDING)[family])
    prepare(model, "MXFP4-W4A4KV4", rotation=32)
    pack(model)
    cache = PackedCache(model, 16)
    with torch.no_grad():
        model(ids[:1, :7], past_key_values=cache, use_cache=True)
        model(ids[:1, 7:8], past_key_values=cache, use_cache=True)
        with pytest.raises(ReqatError, match="9 tokens.*window of 8"):
            model(ids[:1, 8:9], past_key_values=cache, use_cache=True)


def test_a_window_that_is_switched_off_hinders_nothing(tiny: Tiny, ids: Tensor) -> None:
    plain, ours = (tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2) for _ in range(2))
    prepare(ours, "BF16")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [61, -1, 2**70])
def test_an_id_without_an_embedding_is_named(tiny: Tiny, bad: int) -> None:
    model = tiny("llama")
    check_token_ids(model, [0, 60], "row")
    check_token_ids(model, [], "row")
    check_token_ids(model, torch.tensor([[0, 60]]), "row")
    with pytest.raises(ReqatError, match=rf"row 3.*token id {bad}\b.*61 tokens"):
        check_token_ids(model, [3, bad, 4], "row 3")
    if abs(bad) < 2**63:
        with pytest.raises(ReqatError, match=rf"token id {bad}\b.*61 tokens"):
            check_token_ids(model, torch.tensor([[3, bad]]), "row 3")
    prepare(model, "NVFP4-W4A4", global_scale="static")
    if abs(bad) < 2**63:
        with pytest.raises(ReqatError, match=rf"token id {bad}\b"):
            calibrate_static(model, [torch.tensor([[3, bad]])])


# --- calibration --------------------------------------------------------------------------------------------------


def scales(tiny: Tiny, family: str, batches: list[Any]) -> dict[str, Tensor]:
    model = tiny(family, pad_token_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 3] = 30.0  # a pad token that would decide every scale
    prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    calibrate_static(model, batches)
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("global_scale")}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [True, False])
def test_padding_does_not_enter_calibration(tiny: Tiny, family: str, side: str, positions: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 61, (1, n), generator=generator) for n in (6, 9, 14)]
    expected = scales(tiny, family, rows)
    T = 16

    def padded(row: Tensor, value: int) -> Tensor:
        more = torch.full((1, T - row.shape[1]), value)
        return torch.cat([more, row] if side == "left" else [row, more], dim=1)

    mask = torch.cat([padded(torch.ones_like(row), 0) for row in [*rows, rows[0][:, :0]]])  # one of padding alone
    batch: dict[str, Tensor] = {
        "input_ids": torch.cat([padded(row, 0) for row in [*rows, rows[0][:, :0]]]),
        "attention_mask": mask,
    }
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = scales(tiny, family, [batch])
    assert len(found) == 2 * (4 + 2)
    for name, scale in found.items():
        assert torch.equal(scale, expected[name]), name


def test_a_batch_without_padding_is_run_whole(ids: Tensor) -> None:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (found,) = unpadded(batch)
    assert found["input_ids"] is ids
    (found,) = unpadded({"input_ids": ids})
    assert found["input_ids"] is ids


def test_tokens_around_a_hole_keep_their_distance() -> None:
    ids = torch.tensor([[7, 8, 9, 5, 6]])
    (row,) = unpadded({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 0, 1, 1]]), "logits_to_keep": 1})
    assert row["input_ids"].tolist() == [[8, 5, 6]] and row["position_ids"].tolist() == [[0, 2, 3]]
    assert row["logits_to_keep"] == 1


def test_a_mask_that_does_not_say_what_is_padding_is_refused(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4", global_scale="static")
    for mask in (torch.ones(3, 1, 14, 14, dtype=torch.bool), torch.ones(3, 13)):
        with pytest.raises(ReqatError, match=r"attention_mask of \(3, .*\[B, T\]"):
            calibrate_static(model, [{"input_ids": ids, "attention_mask": mask}])
