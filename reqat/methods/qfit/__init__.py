"""Q-FIT, a quantization-friendly initialization of the keys (ReQAT): scale before RoPE, shift after it, then quantize.

Keys have a few large channels and, after RoPE, a large mean; both waste the four bits of the KV cache. Two rewrites
leave full-precision attention as it is and make keys easier to quantize. A *scale* s per RoPE pair divides keys and
multiplies queries; RoPE mixes only the two channels of a pair, which share s, so the scale passes through it and can be
folded into the projections. A *shift* m is subtracted from the keys after RoPE; it moves all logits of a query by one
number, which softmax does not see, so it is never added back. How much of each is searched per layer on calibration
activations::

    s(a) = s0 ** a,   s0[h, r] = max over tokens of |K| before RoPE in the pair (r, r + D/2)
    m(b) = b * mean over tokens of K~,   K~ = RoPE(K / s(a)),   Q~ = RoPE(Q * s(a))
    E(a, b) = MSE(Attn(Q, K, V), Attn(Q~, QKV4(K~ - m(b)), QKV4(V)))      a, b in {0, 1/20, ..., 19/20}

The attention is causal and scaled by 1/sqrt(D). (0, 0) is on the grid and wins ties, so the error never grows.

What makes 400 attentions a layer affordable, all of it exact:

- RoPE(K / s) = RoPE(K) / s, so RoPE runs once a layer, and the mean scales too: mean K~ = mean K / s.
- Q~ . K^ = RoPE(Q) . (s * K^), so queries, cut into blocks in the layout of a matrix product, stay as they are for
  the whole grid; so do the reference output and the quantized values.
- The reference's log-sum-exp of a query's logits (minus q . m) stands in for the row maximum of softmax. It rides in
  the product as two more columns of Q and K, softmax's denominator as one more column of V: a candidate costs one
  matrix product, one exponential in place and one more product, on the causal blocks alone. Where quantization moved a
  logit so far that this would over- or underflow, the candidate is computed again with its own row maximum.

Models with QK norm (Qwen3) normalize away a scale in the projection, so it goes into the norms' weights. One weight
serves all heads: s is shared over heads (``qk_norm="shared"``, what engines can load), or the weight is widened to one
row a head (``"widened"``).

Shapes: n sequences, T tokens, H query heads, G key/value heads, D head_dim, R query rows of a block, L layers,
A and B sizes of the grid.
"""

from __future__ import annotations

from reqat.methods.qfit.activations import Activations, activations, rope
from reqat.methods.qfit.calibrate import calibrate, fold
from reqat.methods.qfit.result import QFitResult
from reqat.methods.qfit.search import AttentionError, pair_scale

__all__ = ["Activations", "AttentionError", "QFitResult", "activations", "calibrate", "fold", "pair_scale", "rope"]
