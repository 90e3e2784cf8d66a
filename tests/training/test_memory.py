"""The memory of a training: no tensor of tokens x tokens, gradient checkpointing that changes no bit, and a plan that
counts what autograd keeps."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.memory import CHUNK_BYTES, kept_per_token, parameters, training_memory
from reqat.config.stage import Training
from reqat.config.tier import Shape
from reqat.data import PackedRows, Trace, pack
from reqat.data.tokenizer import build_tokenizer
from reqat.methods.terms.qad import QAD
from reqat.methods.terms.sem import SEM
from reqat.models import kv_quantizers, prepare, save_model
from reqat.training import NLL, Objective, RunSettings, loop, train
from reqat_kernels import sem_loss

VOCABULARY, ROW = 40, 256
KV4 = "NVFP4-W4A4KV4"


def model_of(precision: str = "BF16", layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=ROW,
    )
    model = LlamaForCausalLM(config).train()
    prepare(model, precision)
    for kv in kv_quantizers(model):  # as Q-FIT would leave it
        kv.set_shift(torch.randn(2, 16))
    return model


def rows(row_tokens: int = ROW, count: int = 40) -> PackedRows:
    source = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = int(torch.randint(8, 28, (), generator=source))
        ids = torch.randint(3, VOCABULARY, (length,), generator=source).tolist()
        made.append(Trace(f"t{i}", f"p{i}", "f", "", "", tuple(ids[:3]), tuple(ids[3:])))
    return pack(made, row_tokens, bos_id=1, pad_id=0)


class Largest(TorchDispatchMode):
    """The most elements of one tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return out


@pytest.mark.parametrize("precision", ["BF16", KV4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trace_by_trace_no_tensor_has_tokens_x_tokens_elements(precision: str, checkpointing: bool) -> None:
    model, packed = model_of(precision), rows()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = {}
    for apart in (True, False):
        batch = dataclasses.replace(packed.batch([0]), apart=apart)
        with Largest() as largest:
            loop.batch_loss(model, None, Objective(), batch, autocast=False)[0].backward()
        found[apart] = largest.elements
    assert found[True] < ROW**2 <= found[False]


@pytest.mark.parametrize("precision", ["BF16", KV4])
@pytest.mark.parametrize("attention", ["rows", "traces"])
@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_checkpointing_changes_no_bit(precision: str, attention: Any, distilled: bool, tmp_path: Path) -> None:
    """With weights quantized once a step, several batches a step, a shift of the keys, and a teacher."""
    found = []
    for checkpointing in (False, True):
        settings = RunSettings(
            lr=1e-2, rows_per_batch=2, accumulation=2, attention=attention, gradient_checkpointing=checkpointing
        )
        model, teacher = model_of(precision), model_of() if distilled else None
        objective = Objective((NLL(), QAD())) if distilled else Objective()
        folder = tmp_path / str(checkpointing)
        result = train(model, rows(64), objective, settings, folder, teacher=teacher, progress=False)
        found.append(([h["loss"] for h in result.history], dict(model.named_parameters())))
    (losses, weights), (again, other) = found
    assert losses == again and len(losses) > 2
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def kept(model: LlamaForCausalLM, batch: Any) -> int:
    """Bytes that autograd keeps for the backward pass of the decoder, weights and what is made of them left out."""
    held: dict[int, Tensor] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def note(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loop.run_model(model, batch, batch.labels >= 0)
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    return sum(x.untyped_storage().nbytes() for x in held.values() if tuple(x.shape) not in shapes)


def test_what_autograd_keeps_of_a_token_is_counted() -> None:
    shape = Shape(hidden_size=64, layers=1, heads=4, kv_heads=2, head_dim=16, mlp=96, vocabulary=VOCABULARY)
    for precision, apart in (("BF16", False), ("BF16", True), (KV4, False), (KV4, True)):
        batch = dataclasses.replace(rows().batch([0]), apart=apart)
        one, three = (kept(model_of(precision, layers), batch) for layers in (1, 3))
        expected = kept_per_token(shape, copied=apart or precision != "BF16")
        assert (three - one) / 2 / ROW == pytest.approx(expected, rel=0.03), (precision, apart)


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    assert CHUNK_BYTES == sem_loss.CHUNK_BYTES == loop.FUSE_ABOVE_BYTES


@pytest.mark.parametrize("terms", [(NLL(),), (NLL(), SEM()), (QAD(),), (NLL(), QAD(), SEM())])
def test_copies_of_logits_that_are_there_together_are_counted(terms: tuple[Any, ...]) -> None:
    """As tensors, without what an allocator makes of them: logits so large that nothing else counts."""
    words, model, teacher = 20_000, model_of(), model_of()
    for one in (model, teacher):
        one.resize_token_embeddings(words)
    batch, objective = rows(count=20).batch([0]), Objective(terms)
    copy = 4 * words * batch.n_response_tokens
    gc.collect()  # what an earlier test left would be freed meanwhile, and taken off
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        loop.batch_loss(model, teacher, objective, batch, autocast=False)[0].backward()
    found = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    there, most = 0, 0
    for _, size in sorted(found, key=lambda event: event[0]):
        there += size
        most = max(most, there)
    shape = Shape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, vocabulary=words)
    asked = Training(objective=[{"name": term.name} for term in terms], row_tokens=ROW, rows_per_batch=1)
    planned = training_memory(shape, asked, quantized=False, response_tokens=batch.n_response_tokens).logits
    assert planned / copy == pytest.approx(most / copy, rel=0.15)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("setting", ["BF16,2", "BF16,2,sem", "BF16,2,qad"])
def test_the_plan_of_a_large_vocabulary_is_what_a_process_takes(setting: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=60_000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), build_tokenizer(["a b"]), tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--row-tokens", "700", "--settings", setting]
    tool = Path(__file__).parents[2] / "tools" / "memory.py"
    done = subprocess.run([sys.executable, str(tool), *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["planned"] == pytest.approx(found["peak"], rel=0.15)


def test_moments_are_those_of_the_optimizer() -> None:
    shape = Shape(hidden_size=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, vocabulary=VOCABULARY)
    model = model_of()
    for name in get_args(Training.model_fields["optimizer"].annotation):
        asked = Training(optimizer=name, row_tokens=ROW, rows_per_batch=1)
        optimizer = loop.optimizer_of(model, list(model.parameters()), asked)
        loop.batch_loss(model, None, Objective(), rows().batch([0]), autocast=False)[0].backward()
        optimizer.step()
        kept = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")
        count = sum(parameter.numel() for parameter in model.parameters())
        assert training_memory(shape, asked, quantized=False, count=count).moments == kept
        offloaded = training_memory(shape, asked, quantized=False, count=count, offload=True)
        assert offloaded.host == 8 * count + kept


def test_a_plan_follows_the_settings() -> None:
    shape = Shape(hidden_size=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocabulary=49152)
    usual = Training(rows_per_batch=4, row_tokens=1024, autocast="none", attention="traces")

    def peak(quantized: bool = False, ranks: int = 1, **changes: Any) -> float:
        return training_memory(shape, usual.model_copy(update=changes), quantized=quantized, ranks=ranks).peak

    assert peak(gradient_checkpointing=True) < 0.5 * peak() < peak(rows_per_batch=2)
    assert peak(row_tokens=2048) > 1.5 * peak()
    assert peak(accumulation=2) == pytest.approx(peak() + 4 * parameters(shape))
    assert peak(autocast="bf16") < peak() < peak(quantized=True)
    under_mask = training_memory(shape, usual.model_copy(update={"attention": "rows"}), quantized=True)
    assert under_mask.mask == 5 * 4 * 1024**2
    assert peak(ranks=8) < peak() and peak(quantized=True, ranks=8) < peak(quantized=True, ranks=4)
    offloaded = training_memory(shape, usual, quantized=True, offload=True)
    assert offloaded.host == 16 * parameters(shape) and offloaded.moments == 0
    memory = training_memory(shape, usual, quantized=True)
    assert offloaded.peak < memory.peak and memory.mask == 0
    assert training_memory(shape, usual, quantized=True, cpu=True).peak > memory.peak
    assert memory.moments == 2 * memory.weights == 2 * memory.gradients
    assert memory.peak == max(memory.backward_begins, memory.backward_ends) <= sum(memory.parts.values())
