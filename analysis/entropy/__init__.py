"""Effects of quantization on single tokens: statistics of trace folders (:mod:`reqat.evaluation.trace_files`).

ReQAT's claim (arXiv 2606.15682, section 3) is that four bits hurt most where a model is all but certain: digits and
operators. Each function here reads the columns that it needs and returns a tidy data frame
(:mod:`analysis.entropy.frames`). Tokens of one problem are not independent, so every interval is clustered by problem
(:func:`reqat.evaluation.statistics.clustered_means`).

    analysis.entropy.tokens            mean entropy of each token type; statistics by bin of the reference's entropy
    analysis.entropy.lengths           accuracy by length of the response
    analysis.entropy.divergences       where two responses to one problem first differ
    analysis.entropy.mistakes          what first went wrong in a response, of its text alone
    analysis.entropy.wrong_responses   the same of a trace folder, with entropies
    analysis.entropy.single_decisions  two positions with what both models would have said
    analysis.entropy.pair_report       all of it, as `reqat entropy` writes it
    analysis.entropy.pair_plots        its figures
    analysis.entropy.walkthrough       what the notebooks draw

The functions of the first six are handed out here.
"""

from __future__ import annotations

from analysis.entropy.divergences import divergence_shares, first_divergences, low_entropy, outcome_shares
from analysis.entropy.frames import trace_source
from analysis.entropy.lengths import accuracies, accuracy_by_length, length_bins, length_edges
from analysis.entropy.mistakes import ERRORS, Derailment, Step, first_error, solution_steps, steps
from analysis.entropy.single_decisions import examples
from analysis.entropy.tokens import (
    EPS,
    KINDS,
    damage_by_bin,
    entropy_by_token,
    entropy_change,
    equal_count_bins,
    kinds_by_bin,
    token_kinds,
)
from analysis.entropy.wrong_responses import derailment_shares, derailments, token_at

__all__ = [
    "EPS",
    "ERRORS",
    "KINDS",
    "Derailment",
    "Step",
    "accuracies",
    "accuracy_by_length",
    "damage_by_bin",
    "derailment_shares",
    "derailments",
    "divergence_shares",
    "entropy_by_token",
    "entropy_change",
    "equal_count_bins",
    "examples",
    "first_divergences",
    "first_error",
    "kinds_by_bin",
    "length_bins",
    "length_edges",
    "low_entropy",
    "outcome_shares",
    "solution_steps",
    "steps",
    "token_at",
    "token_kinds",
    "trace_source",
]
