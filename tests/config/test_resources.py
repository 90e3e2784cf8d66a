"""The memory that the paper tier asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from reqat.config import Paths, Plan, ReqatError, load
from reqat.config.memory import parameters, training_memory
from reqat.config.resources import GIB, need, require

ROOT = Path(__file__).parents[2]
PAPER = load("paper", Paths(root=ROOT))


@pytest.mark.parametrize("label", ["R1-Qwen-14B", "R1-Llama-8B"])
def test_parameters_are_counted_as_transformers_counts_them(label: str):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = PAPER.tier.models[label].shape
    assert shape is not None
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden_size,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                intermediate_size=shape.mlp,
                tie_word_embeddings=shape.tie_embeddings,
            )
        )
    assert parameters(shape) == sum(p.numel() for p in model.parameters())


def paper_in(processes: int) -> Plan:
    """Tier paper with trainings in so many processes."""
    resources = PAPER.tier.resources.model_copy(update={"processes": processes})
    return dataclasses.replace(PAPER, tier=PAPER.tier.model_copy(update={"resources": resources}))


def test_a_training_has_a_gpu_a_process_or_the_fewest_that_hold_it():
    fewest = need(paper_in(1), "training")
    assert fewest is not None
    shape = PAPER.tier.models["R1-Qwen-14B"].shape
    assert shape is not None
    less = training_memory(shape, PAPER.tier.train.qat, quantized=True, ranks=fewest.gpus - 1).peak
    assert less > 0.9 * 80 * GIB, "no more GPUs than it takes"
    more = need(paper_in(fewest.gpus + 3), "training")
    assert more is not None and more.gpus == fewest.gpus + 3
    with pytest.raises(ReqatError, match=f"{fewest.gpus - 1} processes.*resources.processes"):
        need(paper_in(fewest.gpus - 1), "training")


def paper_with(**resources: object) -> Plan:
    """Tier paper with other resources."""
    changed = PAPER.tier.resources.model_copy(update=resources)
    return dataclasses.replace(PAPER, tier=PAPER.tier.model_copy(update={"resources": changed}))


def test_machines_share_a_training_and_each_needs_its_own_part():
    plan = paper_with(processes=8, nodes=2)
    wanted = need(plan, "training")
    assert wanted is not None and wanted.gpus == 16 and wanted.machines == 2
    require(plan, [80 * GIB] * 8, wanted.host_bytes, "training")
    with pytest.raises(ReqatError, match="7 GPUs"):
        require(plan, [80 * GIB] * 7, wanted.host_bytes, "training")


def test_the_first_process_alone_reads_the_whole_model():
    one, eight = need(paper_with(processes=1), "training"), need(paper_with(processes=8), "training")
    assert one is not None and eight is not None and eight.host_bytes == one.host_bytes
    assert PAPER.tier.resources.train_memory_mb * 1e6 >= need(PAPER, "training").host_bytes, "what Slurm is asked for"


def test_one_process_computes_on_one_gpu():
    plan = paper_with(processes=1)
    wanted = need(plan, "training")
    assert wanted is not None and wanted.gpus > 1
    with pytest.raises(ReqatError, match=f"resources.processes to {wanted.gpus}"):
        require(plan, [80 * GIB] * wanted.gpus, 10 * wanted.host_bytes, "training")
    offloaded = paper_with(processes=1, offload=True)
    less = need(offloaded, "training")
    assert less is not None and less.gpus == 1 and less.host_bytes > wanted.host_bytes, "weights, moments, gradients"
    require(offloaded, [80 * GIB], less.host_bytes, "training")


def test_cpu_tiers_need_no_gpu():
    assert need(load("laptop", Paths(root=ROOT))) is None


def test_paper_tier_is_refused_without_its_gpus_and_starts_with_them():
    wanted = need(PAPER)
    assert wanted is not None and wanted.gpus > 1
    shape = PAPER.tier.models["R1-Qwen-14B"].shape
    assert shape is not None
    each = training_memory(shape, PAPER.tier.train.qat, quantized=True, ranks=wanted.gpus).peak
    assert wanted.device_bytes >= each * wanted.gpus > 16 * parameters(shape)
    assert each <= 0.9 * 80 * GIB
    gpu, host = 80 * GIB, 2 * wanted.host_bytes
    with pytest.raises(ReqatError, match=rf"paper.*{wanted.gpus} GPUs of 80 GiB.*0 GPUs.*--dry-run"):
        require(PAPER, [], host)
    with pytest.raises(ReqatError, match="cannot start here"):
        require(PAPER, [gpu] * (wanted.gpus - 1) + [24 * GIB], host)
    with pytest.raises(ReqatError, match="host memory"):
        require(PAPER, [gpu] * wanted.gpus, 0.5 * wanted.host_bytes)
    require(PAPER, [gpu] * wanted.gpus, host)
