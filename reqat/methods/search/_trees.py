"""AutoTVM's cost model: boosted trees that learn which of two schedules is the faster one.

AutoTVM's default is XGBoost with the objective ``rank:pairwise``. For two measured schedules i and j of which i is
faster, and the model's scores s, the loss is ``log(1 + exp(s_j - s_i))``; each round fits a tree to its gradient by
Newton's method. Only the order of speeds counts, not their size, which is all that a search needs.

The trees are scikit-learn's, with AutoTVM's settings: depth 3, rate 0.3, L2 of a leaf's value 1, at least a Hessian of
1 in each leaf. XGBoost draws a partner for each schedule; here the loss is the expectation over all partners, so a
model is a function of its data alone. Boosting ends as in AutoTVM: when the average recall on the measured points (how
many of the n fastest the model puts among its first n, for n up to the size of a plan) has not risen for 20 rounds; the
cap of :data:`MOST_ROUNDS` is ours (AutoTVM: 8,000, which small samples never reach).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reqat.methods.search._space import Floats

DEPTH, RATE, L2, LEAST_HESSIAN = 3, 0.3, 1.0, 1.0
PATIENCE, MOST_ROUNDS = 20, 200


class RankingTrees:
    """Scores whose order is that of speeds, learned from ``features`` [n, knobs] and ``speeds`` [n].

    ``plan``: how many of the best the recall looks at.
    """

    def __init__(self, features: Floats, speeds: Floats, plan: int) -> None:
        from sklearn import config_context
        from sklearn.tree import DecisionTreeRegressor

        features = np.ascontiguousarray(features, dtype=np.float32)  # as the trees hold it
        self._trees: list[tuple[Any, Floats]] = []
        score, best, best_round = np.zeros(len(speeds)), -1.0, 0
        faster = np.sign(speeds[:, None] - speeds[None, :])
        for number in range(MOST_ROUNDS):
            gradient, hessian = _pairwise(score, faster)
            total = float(hessian.sum())
            if total <= LEAST_HESSIAN:  # equal speeds, or nothing left to learn
                return
            tree = DecisionTreeRegressor(
                max_depth=DEPTH, min_weight_fraction_leaf=min(0.5, LEAST_HESSIAN / total), random_state=0
            )
            kept = hessian > 0
            # Hundreds of small trees: what scikit-learn checks of its arguments would take longer than the fits.
            with config_context(skip_parameter_validation=True, assume_finite=True):
                target = -gradient[kept] / hessian[kept]
                tree.fit(features[kept], target, sample_weight=hessian[kept], check_input=False)
            leaf = tree.tree_.apply(features)
            size = int(tree.tree_.node_count)
            values = -np.bincount(leaf, gradient, size) / (np.bincount(leaf, hessian, size) + L2)
            self._trees.append((tree, RATE * values))
            score = score + RATE * values[leaf]
            recall = average_recall(score, speeds, plan)
            if recall > best:
                best, best_round = recall, number
            elif number - best_round >= PATIENCE:
                return

    def scores(self, features: Floats) -> Floats:
        """A score for each row of ``features`` [n, knobs]; higher is faster. Without a unit."""
        features, out = np.ascontiguousarray(features, dtype=np.float32), np.zeros(len(features))
        for tree, values in self._trees:
            out += values[tree.tree_.apply(features)]
        return out


def _pairwise(score: Floats, faster: Floats) -> tuple[Floats, Floats]:
    """Gradient and Hessian's diagonal of the loss by score, [n] each; ``faster`` [n, n]: 1, 0 or -1.

    Each point counts as two pairs: one that it draws, and one in which it is drawn.
    """
    chance = 1 / (
        1 + np.exp(np.clip(faster * (score[:, None] - score[None, :]), -50, 50))
    )  # that the pair is misjudged
    share = 2 / max(1, len(score) - 1)
    gradient = -(faster * chance).sum(axis=1) * share
    hessian = (np.abs(faster) * chance * (1 - chance)).sum(axis=1) * share
    return gradient, hessian


def average_recall(score: Floats, speeds: Floats, top: int) -> float:
    """Mean over n = 1..top of the share of the n fastest that are among the n of highest score."""
    top = min(top, len(speeds))
    place = np.empty(len(speeds), dtype=np.int64)  # by speed, of each point
    place[np.argsort(-speeds, kind="stable")] = np.arange(len(speeds))
    chosen, n = place[np.argsort(-score, kind="stable")][:top], np.arange(1, top + 1)
    # A point is among both the n first and the n fastest from the larger of its two places on.
    hits = np.cumsum(np.bincount(np.maximum(chosen, n - 1), minlength=len(speeds)))[:top]
    return float((hits / n).mean())
