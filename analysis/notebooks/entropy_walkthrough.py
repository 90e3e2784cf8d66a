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
# # Where does FP4 hurt? A walk through the entropies of a pair of models
#
# A reasoning model is sure of most of its tokens and weighs alternatives at a few. The *entropy* of its next-token
# distribution, in nats, says which is which. This notebook holds a model in BF16 against the same model under
# NVFP4-W4A4KV4, token by token, and asks: does four-bit arithmetic do its damage where the model hesitates, or where
# it was sure?
#
# Everything is read from a *trace folder*, which `reqat entropy` writes. Name one of yours in the environment
# variable `REQAT_TRACES`; without it, a small one is collected from the base model that comes with the repository.
# The question and the statistics are those of [arXiv 2606.15682](https://arxiv.org/abs/2606.15682), section 3.

# %%
import os
import subprocess
import sys
from pathlib import Path

import reqat
from analysis import entropy
from analysis.entropy import walkthrough
from analysis.entropy.pair_plots import figures
from analysis.entropy.pair_report import report
from reqat.evaluation.trace_folder import TraceFolder

ROOT = Path(reqat.__file__).parents[1]

# %% tags=["parameters"]
traces = Path(os.environ.get("REQAT_TRACES", ROOT / "build/notebooks/pair"))
problems = int(os.environ.get("REQAT_NOTEBOOK_PROBLEMS", "60"))  # where a folder has to be collected
bins = 20

# %% [markdown]
# ## The traces
#
# Both models answer every problem with the same random numbers; then both read every answer, and for each token we
# keep the entropy, the most likely tokens and the probability of the token that was taken. The cell below is what you
# would type into a terminal; it takes a minute or two the first time.

# %%
if not traces.exists():
    command = [
        *("entropy", "--reference", ROOT / "results/base/model", "--candidate-precision", "NVFP4-W4A4KV4"),
        *("--families", "chain_sum,leg_counting", "--tier", "laptop", "--n", problems, "--out", traces, "--quiet"),
    ]
    verb = Path(sys.executable).with_name("reqat")
    subprocess.run([str(part) for part in (verb, *command)], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

folder = TraceFolder(traces)
reference, candidate = folder.labels[:2]
print(f"{len(folder.traces):,} traces, {folder.n_tokens:,} tokens, {folder.traces['problem'].nunique():,} problems")
folder.traces.groupby("source")[["correct", "finished"]].mean().astype(float).round(3)

# %% [markdown]
# ## Most tokens are certain
#
# Each line gives the share of tokens whose entropy exceeds a value. Under four bits the line moves; where it moves
# most is the question.

# %%
walkthrough.show(walkthrough.draw_entropies(folder, (reference, candidate)))

# %% [markdown]
# ## Which tokens are which
#
# Averaged by token type, the lowest entropies belong to what the problem dictates and the highest to how one goes on
# telling. Digits and operators, the tokens that carry a calculation, are coloured. (`more_than` is 100 in the paper;
# a small folder needs less.)

# %%
source = entropy.trace_source(folder, reference)
more_than = 100 if folder.n_tokens > 20_000 else 10
types = entropy.entropy_by_token(folder, reference, more_than=more_than, source=source)
walkthrough.show(walkthrough.draw_token_types(types, notes=[f"Seen more than {more_than} times."]))

# %% [markdown]
# ## Where the damage lies
#
# Tokens are sorted by their BF16 entropy into bins of equal count, lowest first.
#
# * **Tail mass**: $M = 1 - p(\text{top 1})$, what the model gives to everything but its favourite. The ratio of the
#   two models' tail masses is 1 where quantization changes nothing. At a token that BF16 was sure of, a large ratio
#   is a risk that was not there before: sampling may now take a wrong digit.
# * **Top-1 mismatch**: how often the two favourites differ.

# %%
found = report(folder, reference, candidate, bins=bins, more_than=more_than)
drawn = figures(found)
walkthrough.show(drawn["entropy-damage"])

# %%
found.table.data[["statistic", "where", "value", "lo", "hi", "n", "clusters"]].head(12).round(4)

# %% [markdown]
# ## Where answers part
#
# Both models drew with the same random numbers, so their answers agree up to the first token at which quantization
# made a difference. *Derailed* are the pairs that BF16 solved and four bits did not. If damage were spread evenly
# over tokens, a quarter of all first divergences would fall below the 25th percentile of entropy (the dashes in the
# figure).

# %%
divergences = entropy.first_divergences(folder, reference, candidate)
parted = divergences["position"] >= 0
print(f"{int(parted.sum())} of {len(divergences)} pairs part; {int(divergences['derailed'].sum())} of them derail")
walkthrough.show(drawn["entropy-errors"])

# %% [markdown]
# ## One pair, token by token
#
# A derailed pair, if there is one: of these, the one that parts at the lowest entropy. The outlined token is the
# first that differs; colour is the entropy under the model that wrote the text (pale: sure; dark: hesitating).

# %%
pair = walkthrough.pair_to_show(divergences)
at = int(pair["position"])
print(f"{pair['problem']}, seed {pair['seed']}: parts at token {at}, where {reference} has {pair['entropy']:.3g} nats")
walkthrough.token_html(folder, pair["trace_reference"], reference, mark=at)

# %%
walkthrough.token_html(folder, pair["trace_candidate"], candidate, mark=at)

# %% [markdown]
# Around that token, with the entropies that both models have while reading the *candidate's* answer; and what each
# would have said there.

# %%
walkthrough.show(walkthrough.draw_around(folder, pair["trace_candidate"], at, (reference, candidate)))

# %%
walkthrough.choices(folder, pair["trace_candidate"], at, (reference, candidate)).round(4)

# %% [markdown]
# ## On from here
#
# `reqat view FOLDER` makes one HTML page of all traces, to browse by hand. The other verbs ask what would help:
# `reqat route` lets one precision write where entropy is low and the other where it is high, `reqat noise` disturbs
# only one kind of token, and `reqat reset` lowers the temperature where the model is sure.
