"""NN-LUT: a small ReLU network learns a function, and is then rewritten exactly as a table (DAC 2022).

A network of one hidden layer, ``y = sum_i m_i relu(n_i x + b_i)`` without an output bias, is linear between the points
``d_i = -b_i / n_i`` where its neurons switch. With the d sorted, the slope of a segment is the sum of ``m_i n_i`` over
the neurons that are active there (n > 0 to the right of d, n < 0 to its left), the intercept that of ``m_i b_i``. So 15
neurons are a table of 16 entries whose breakpoints were learned. Nothing keeps two neurons from switching at the same
place: such a table has fewer entries that count (:meth:`.Table.effective`).

Neurons begin as the paper has it: n and b normal (GELU), positive (exp), or n negative and b positive (1/x, 1/sqrt).
Training is the public replication's: L1 loss, Adam at 1e-3 with cosine decay to 5e-6, 15,000 steps of 2,048 samples, of
all FP16 numbers in the range for 1/x and 1/sqrt, else of equally spaced points. (The paper: 100,000 samples, rate
lowered in steps, by a reader's notes.) Output weights begin as ``torch.nn.Linear`` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.methods.nonlinear._function import Function, check_entries
from reqat.methods.nonlinear._table import Table, merged

STEPS, BATCH, LR, LAST_LR = 15_000, 2_048, 1e-3, 5e-6
_POINTS = 1_000_000  # samples; there are fewer FP16 numbers
_FIRST = 0.01  # of a neuron's weight and bias, where their sign is fixed: 0.01 to 1


@dataclass(frozen=True, eq=False)
class Network:
    """``inner`` n, ``bias`` b, ``outer`` m, each [H]: ``y = sum m relu(n x + b)``."""

    inner: Tensor
    bias: Tensor
    outer: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Values, of the shape of ``x``, in the dtype of its weights."""
        return torch.relu(x[..., None].to(self.inner.dtype) * self.inner + self.bias) @ self.outer

    def table(self) -> Table:
        """The same function as a table of H + 1 entries, fewer where neurons switch at one point or never (float64).

        Raises ReqatError if the network holds NaN or infinity.
        """
        n, b, m = (x.detach().double() for x in (self.inner, self.bias, self.outer))
        switching = n != 0
        constant = (m * b.clamp(min=0))[~switching].sum()
        n, b, m = n[switching], b[switching], m[switching]
        d, order = torch.sort(-b / n)
        n, b, m = n[order], b[order], m[order]
        # Segment k lies right of d_0 .. d_(k-1): of those the rising neurons are active, of the rest the falling.
        after = torch.arange(len(d) + 1)[:, None] > torch.arange(len(d))
        active = (after == (n > 0)).double()
        return merged(d, active @ (m * n), active @ (m * b) + constant)


def initial(function: Function, hidden: int, generator: torch.Generator) -> Network:
    """The network that training begins with, float32."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(hidden, generator=generator)

    if function.start == "normal":
        n, b = torch.randn(hidden, generator=generator), torch.randn(hidden, generator=generator)
    else:
        n, b = uniform(_FIRST, 1.0), uniform(_FIRST, 1.0)
        n = n if function.start == "rising" else -n
    return Network(n, b, uniform(-(hidden**-0.5), hidden**-0.5))


def train(
    function: Function,
    network: Network,
    samples: Tensor,
    generator: torch.Generator,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    lr: float = LR,
    last_lr: float = LAST_LR,
) -> Network:
    """``network`` after ``steps`` steps of Adam on the L1 error at ``batch`` of the ``samples`` [S] each. Samples
    [P, S] train P networks of weights [P, H] side by side, each on its own, which is faster than one after another.

    Raises ReqatError for no samples or ones that are not finite, or steps and batches that are not positive.
    """
    if steps < 1 or batch < 1:
        raise ReqatError(f"{steps} steps of {batch} samples: both must be positive")
    if samples.numel() == 0 or not bool(samples.isfinite().all()):
        raise ReqatError(f"{function.name}: training needs samples, all of them finite; {samples.numel()} are given")
    samples = samples.float()
    values = function(samples.double()).float()
    n, b, m = weights = [x.detach().float().clone() for x in (network.inner, network.bias, network.outer)]
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, last_lr)
    for _ in range(steps):
        picked = torch.randint(samples.shape[-1], (*samples.shape[:-1], batch), generator=generator)
        x, y = samples.gather(-1, picked), values.gather(-1, picked)
        for weight, gradient in zip(weights, gradients(n, b, m, x, y), strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
    return Network(n, b, m)


def gradients(n: Tensor, b: Tensor, m: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mean of ``|f(x) - y|`` over samples [..., B], by n, b and m [..., H]; written out, it takes a third of
    autograd's time, and these networks are so small that nothing else counts."""
    hidden_HB = torch.addcmul(b[..., None], n[..., None], x[..., None, :]).clamp_(min=0)
    sign_B1 = torch.sign(m[..., None, :] @ hidden_HB - y[..., None, :]).mT / x.shape[-1]
    active_HB = (hidden_HB > 0).float()
    by_inner, by_bias = active_HB @ (sign_B1 * x[..., None]), active_HB @ sign_B1
    return m * by_inner[..., 0], m * by_bias[..., 0], (hidden_HB @ sign_B1)[..., 0]


def trained(
    function: Function, hidden: int, *, seed: int = 0, steps: int = STEPS, batch: int = BATCH, lr: float = LR
) -> Network:
    """A network of ``hidden`` neurons from its beginning; arguments as of :func:`train`."""
    generator = torch.Generator().manual_seed(seed)
    start = initial(function, hidden, generator)
    return train(function, start, function.samples(_POINTS), generator, steps=steps, batch=batch, lr=lr)


def fit(
    function: Function, entries: int = 16, *, seed: int = 0, steps: int = STEPS, batch: int = BATCH, lr: float = LR
) -> Table:
    """The table of a trained network of ``entries - 1`` neurons. Raises ReqatError as :func:`train`, and for too few
    entries."""
    check_entries(function, entries, 2)
    return trained(function, entries - 1, seed=seed, steps=steps, batch=batch, lr=lr).table()


FIT = fit
