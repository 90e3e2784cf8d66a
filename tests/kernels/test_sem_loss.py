"""The fused SEM loss against the formula on full logits in float64, within bounds that follow from float32 rounding."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reqat_kernels import sem_loss
from reqat_kernels.sem_loss import fused_sem_loss
from reqat_kernels.triton import sem_loss as triton_sem_loss
from reqat_kernels.triton.launches import launch

_BLOCK = launch("loss", 0)["BLOCK"]
U = 2.0**-24  # unit roundoff of float32
U_BF16 = 2.0**-9  # half an ulp of bfloat16, relative to the value
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.usefixtures("device")  # skips without a GPU or the interpreter


@pytest.fixture(params=["torch", "triton"])
def rows(request) -> ModuleType:
    """Who does the elementwise work; Triton where it can run."""
    if request.param == "triton":
        request.getfixturevalue("device")
        return triton_sem_loss
    return sem_loss


def problem(N: int, D: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states whose tokens range from undecided to certain, a weight, labels."""
    g = torch.Generator().manual_seed(seed)
    certainty = torch.linspace(0.1, 4, N)[torch.randperm(N, generator=g)]
    hidden = torch.randn(N, D, generator=g) * certainty[:, None]
    weight = torch.randn(V, D, generator=g) / D**0.5
    labels = torch.randint(V, (N,), generator=g)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


class Oracle:
    """Loss, sums and gradients in float64 from full logits, and what float32 may add to each.

    With ``z`` the logits, ``f_v = nll - lam w (log p_v + H)`` and ``g_v = p_v f_v - nll [v = label]``, a value computed
    from rounded inputs is off by (first order; sums of n terms in any order add n u times the sum of magnitudes)::

        z        D u sum_d |h_d W_d|                                              =: dz, the row's largest
        log p    2 dz + (V + 4) u + 3 u (range + |lse|)                           =: e   (also the relative error of p)
        nll      e
        H        e (1 + H) + (V + 4) u (1 + H)                                    =: dH
        w        4 max(dH) / (tau - H_min): four of its inputs are entropies      =: dw
        w H      dw H + w dH
        g        p (e |f| + lam (dw |log p + H| + w (e + dH))) + 4 u p (|f| + nll) + u nll [v = label]
        hidden   sum_v dg |W| + V u sum_v |g W|
        weight   sum_n dg |h| + N u sum_n |g h|

    ``logits``: those of the implementation's own products, where their rounding is not what is tested (bfloat16).
    ``g_rounding``: relative rounding of g before the products.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        lam: float,
        percentile: float = 0.75,
        binary: bool = False,
        eps: float = 1e-12,
        nll: float = 1.0,
        logits: Tensor | None = None,
        g_rounding: float = 0.0,
    ):
        h, W, labels = hidden.detach().double().cpu(), weight.detach().double().cpu(), labels.cpu()
        (N, D), V = h.shape, len(W)
        z = h @ W.T if logits is None else logits.double().cpu()
        z.requires_grad_()
        log_p = z.log_softmax(-1)
        H = -(log_p.exp() * log_p).sum(-1)
        held = H.detach()
        tau, lowest = torch.quantile(held, percentile), held.min()
        ramp = (1 - (held - lowest) / (tau - lowest + eps)).clamp(min=0)
        w = (held < tau).double() if binary else ramp
        nlls = -log_p.gather(1, labels[:, None])[:, 0]
        self.nll, self.sem = float(nlls.detach().sum()), float((w * held).sum())
        loss = nll * nlls.sum() + lam * (w * H).sum()
        (g,) = torch.autograd.grad(loss, z)
        self.loss, self.hidden, self.weight, self.weights = float(loss.detach()), g @ W, g.T @ h, w

        z, log_p = z.detach(), log_p.detach()
        p, lse = log_p.exp(), z.logsumexp(-1)
        dz = (D * U * (h.abs() @ W.abs().T)).amax(-1) if logits is None else torch.zeros(N, dtype=torch.float64)
        e = 2 * dz + (V + 4) * U + 3 * U * (z.amax(-1) - z.amin(-1) + lse.abs())
        dH = e * (1 + held) + (V + 4) * U * (1 + held)
        dw = torch.zeros_like(dH) if binary else 4 * dH.max() / (tau - lowest + eps) * torch.ones_like(dH)
        if binary:  # else the mask is not settled
            assert ((held - tau).abs()[held != tau] > 2 * dH.max()).all()
        f = nll - lam * w[:, None] * (log_p + held[:, None])
        inner = e[:, None] * f.abs() + lam * (
            dw[:, None] * (log_p + held[:, None]).abs() + (w * (e + dH))[:, None].expand(N, V)
        )
        dg = p * inner + 4 * U * p * (f.abs() + nll) + U * nll * F.one_hot(labels, V)
        dg = dg + g_rounding * g.abs()
        self.d_nll = float(e.sum())
        self.d_sem = float((dw * held + w * dH).sum())
        self.d_loss = nll * self.d_nll + lam * self.d_sem + U * abs(self.loss)
        self.d_hidden = dg @ W.abs() + V * U * (g.abs() @ W.abs())
        self.d_weight = dg.T @ h.abs() + N * U * (g.abs().T @ h.abs())

    def check(self, loss: Tensor, parts: dict[str, float], hidden_grad: Tensor, weight_grad: Tensor) -> None:
        assert abs(float(loss.detach()) - self.loss) <= self.d_loss
        assert abs(parts["nll"] - self.nll) <= self.d_nll
        assert abs(parts["sem"] - self.sem) <= self.d_sem or parts["sem"] == 0
        assert ((hidden_grad.double().cpu() - self.hidden).abs() <= self.d_hidden).all()
        assert ((weight_grad.double().cpu() - self.weight).abs() <= self.d_weight).all()


def run(hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0, **options):
    """Loss, parts and both gradients of ``factor`` times the loss."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, parts = fused_sem_loss(hidden, weight, labels, **options)
    return loss.detach(), parts, *torch.autograd.grad(loss * factor, (hidden, weight))


@pytest.mark.parametrize(
    ("N", "D", "V", "chunk", "options"),
    [
        (41, 17, 97, 7, {"lam": 0.1}),
        (41, 17, 97, 41, {"lam": 0.5, "percentile": 0.3}),
        (41, 17, 97, None, {"lam": 0.1, "percentile": 1.0}),
        (42, 17, 97, 7, {"lam": 0.5, "binary": True}),
        (13, 8, 1031, 5, {"lam": 0.5, "nll": 0.25}),
        (13, 8, 53, 1, {"lam": 2.0, "nll": 0.0}),
        (13, 8, 53, 5, {"lam": 0.0}),
    ],
)
def test_value_and_gradients_match_the_formula_on_full_logits(rows, N, D, V, chunk, options) -> None:
    hidden, weight, labels = problem(N, D, V)
    oracle = Oracle(hidden, weight, labels, **options)
    # The bound says something: it is a small part of the gradient, and of what the entropy term adds to it.
    without = Oracle(hidden, weight, labels, **{**options, "lam": 0.0})
    for ours, other, bound in (
        (oracle.hidden, without.hidden, oracle.d_hidden),
        (oracle.weight, without.weight, oracle.d_weight),
    ):
        assert bound.max() < 2e-3 * ours.abs().max()
        assert options["lam"] == 0 or (ours - other).norm() > 20 * bound.norm()
    oracle.check(*run(hidden, weight, labels, chunk=chunk, rows=rows, **options))


def test_plain_cross_entropy_takes_one_sweep(monkeypatch) -> None:
    hidden, weight, labels = problem(10, 5, 31, dtype=torch.float64)
    products = count_logits(monkeypatch)
    loss, parts, hidden_grad, weight_grad = run(hidden, weight, labels, lam=0.0, chunk=4)
    assert products == [2, 4, 4]
    h, W = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.cross_entropy(h @ W.T, labels, reduction="sum")
    expected.backward()
    # float64 through and through: 12 digits are far above its rounding and far below float32's.
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden_grad, h.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight_grad, W.grad, rtol=1e-12, atol=1e-12)
    assert parts["sem"] == 0 and parts["nll"] == pytest.approx(float(expected.detach()), rel=1e-12)


def count_logits(monkeypatch) -> list[int]:
    """The list to which every product for logits will add its number of tokens."""
    seen: list[int] = []
    original = sem_loss._Head.logits

    def counted(self, c, out_CV):
        seen.append(len(out_CV))
        return original(self, c, out_CV)

    monkeypatch.setattr(sem_loss._Head, "logits", counted)
    return seen


@pytest.mark.parametrize(
    ("chunk", "expected"), [(4, [2, 4, 4] + [4, 2]), (5, [5, 5] + [5]), (10, [10]), (99, [10]), (1, [1] * 19)]
)
def test_the_second_sweep_starts_from_the_logits_that_are_there(monkeypatch, chunk, expected) -> None:
    products = count_logits(monkeypatch)
    run(*problem(10, 5, 31), chunk=chunk)
    assert products == expected


def test_never_more_than_a_chunk_of_logits() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return out

    N, V, chunk = 400, 1000, 16
    hidden, weight, labels = problem(N, 4, V)
    with Largest() as seen:
        run(hidden, weight, labels, chunk=chunk)
    # Two scratch copies of a tile of rows may lie side by side; the whole would be N * V * 4.
    assert chunk * V * 4 <= seen.bytes <= 2 * max(chunk * V * 4, sem_loss._TILE_BYTES * torch.get_num_threads())
    assert seen.bytes < N * V * 4 / 2


def test_one_token_equal_entropies_and_none(rows) -> None:
    hidden, weight, labels = problem(1, 6, 11)
    Oracle(hidden, weight, labels, lam=0.5, eps=1.0).check(*run(hidden, weight, labels, lam=0.5, eps=1.0, rows=rows))
    loss, parts, *_ = run(hidden, weight, labels, binary=True, rows=rows)
    assert parts["sem"] == 0 and float(loss) == pytest.approx(parts["nll"], rel=2 * U)

    flat, labels = torch.zeros(6, 6, device=DEVICE), torch.arange(6, device=DEVICE)
    _, parts, hidden_grad, weight_grad = run(flat, weight, labels, chunk=4, rows=rows)
    # tau = H_min, every weight is 1, and at the uniform distribution the entropy has no gradient.
    assert parts["sem"] == pytest.approx(6 * torch.tensor(11.0, dtype=torch.float64).log().item(), rel=4 * U)
    uniform = (torch.full((6, 11), 1 / 11, device=DEVICE) - F.one_hot(labels, 11)) @ weight
    torch.testing.assert_close(hidden_grad, uniform, rtol=0, atol=40 * U)
    assert not weight_grad.any()

    nothing = torch.zeros(0, 6, device=DEVICE)
    loss, parts, hidden_grad, weight_grad = run(nothing, weight, labels[:0], rows=rows)
    assert float(loss) == 0 and parts == {"nll": 0.0, "sem": 0.0}
    assert hidden_grad.shape == (0, 6) and weight_grad.shape == (11, 6) and not weight_grad.any()


def test_large_logits_stay_finite(rows) -> None:
    hidden = torch.tensor([[1e4, 0.0], [300.0, 1.0], [-300.0, 2.0], [0.0, 0.0]], device=DEVICE)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]], device=DEVICE)
    labels = torch.tensor([0, 1, 2, 1], device=DEVICE)
    loss, parts, *grads = run(hidden, weight, labels, rows=rows)
    assert parts["nll"] == pytest.approx(299 + torch.tensor(3.0).log().item(), rel=4 * U)
    assert all(torch.isfinite(g).all() for g in grads)


def test_a_certain_label_keeps_a_gradient() -> None:
    """p = 1 - 1e-7 leaves p - 1 without a correct digit in float32; -1e-7 all the same is what must come back."""
    margin = 16.118095  # 1 / (1 + e^margin) is close to 1e-7
    hidden = torch.tensor([[margin]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    loss, _ = fused_sem_loss(hidden, weight, torch.tensor([0]), lam=0.0)
    loss.backward()
    expected = -torch.sigmoid(torch.tensor(-margin, dtype=torch.float64))
    assert hidden.grad is not None
    # log p = z - lse is a multiple of ulp(16) = 2^-19, which is why no more than its own rounding is promised.
    assert abs(hidden.grad.double() - expected) <= 2.0**-20


@pytest.mark.parametrize("chunk", [None, 7])
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(chunk) -> None:
    hidden, weight, labels = problem(23, 16, 61)
    h, W = hidden.bfloat16(), weight.bfloat16()
    # What the head itself would give under autocast; the gradient of the logits is rounded to bfloat16 once more.
    oracle = Oracle(h, W, labels, lam=0.5, logits=h @ W.T, g_rounding=U_BF16)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, parts, hidden_grad, weight_grad = run(hidden, weight, labels, lam=0.5, chunk=chunk)
    assert loss.dtype == hidden_grad.dtype == weight_grad.dtype == torch.float32
    # The products' results are rounded too, the weight's once a chunk.
    chunks = 1 if chunk is None else -(-23 // chunk)
    oracle.d_hidden += 2 * U_BF16 * oracle.hidden.abs()
    oracle.d_weight += 2 * U_BF16 * chunks * oracle.weight.abs().amax() + 2 * U_BF16 * oracle.weight.abs()
    oracle.check(loss, parts, hidden_grad, weight_grad)


def test_blocks_of_the_vocabulary_change_no_more_than_their_rounding(monkeypatch) -> None:
    hidden, weight, labels = problem(23, 16, 61)
    with torch.autocast(DEVICE, torch.bfloat16):
        whole = run(hidden, weight, labels, lam=0.0, chunk=9)
        monkeypatch.setattr(sem_loss, "_BLOCK_BYTES", 16 * 4 * 10)  # 10 of 61 columns
        blocks = run(hidden, weight, labels, lam=0.0, chunk=9)
    h, W = hidden.double(), weight.double()
    z = h @ W.T
    # A logit near a tie may be rounded to either neighbour, one ulp apart (a product of another shape sums in another
    # order), which moves log p by at most twice that and p by that share of itself.
    e = 2 * (2 * U_BF16) * z.abs().amax(-1)
    assert abs(float(whole[0] - blocks[0])) <= float(e.sum())
    p, label = z.softmax(-1), F.one_hot(labels, 61)
    dg = 2 * e[:, None] * p + 2 * U_BF16 * (p + label)
    # Results: hidden's is a sum over seven blocks, each rounded to bfloat16; weight's over three chunks.
    assert ((whole[2] - blocks[2]).abs() <= dg @ W.abs() + 2 * U_BF16 * (p + label) @ W.abs()).all()
    assert ((whole[3] - blocks[3]).abs() <= dg.T @ h.abs() + 2 * U_BF16 * (p + label).T @ h.abs()).all()


def test_low_precision_without_autocast_and_strided_inputs() -> None:
    hidden, weight, labels = problem(15, 8, 29)
    h, W = hidden.bfloat16(), weight.bfloat16()
    *_, hidden_grad, weight_grad = run(h, W, labels, chunk=4)
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16
    wide = run(hidden, weight, labels, chunk=4)
    strided_h = torch.stack([hidden, hidden], -1)[..., 0]
    strided_W = weight.T.contiguous().T
    assert not strided_h.is_contiguous() and not strided_W.is_contiguous()
    oracle = Oracle(hidden, weight, labels, lam=0.1)
    oracle.check(*run(strided_h, strided_W, labels, chunk=4))
    oracle.check(*wide)


def test_the_factor_of_backward_and_what_takes_no_gradient() -> None:
    hidden, weight, labels = problem(9, 5, 17)
    _, _, hidden_1, weight_1 = run(hidden, weight, labels)
    _, _, hidden_s, weight_s = run(hidden, weight, labels, factor=0.25)
    assert torch.equal(hidden_s, 0.25 * hidden_1) and torch.equal(weight_s, 0.25 * weight_1)

    frozen = fused_sem_loss(hidden.clone().requires_grad_(), weight, labels)[0]
    frozen.backward()
    head_only = weight.clone().requires_grad_()
    fused_sem_loss(hidden, head_only, labels)[0].backward()
    assert torch.equal(head_only.grad, weight_1)
    with torch.no_grad():
        value, _ = fused_sem_loss(hidden, head_only, labels)
    assert not value.requires_grad and torch.equal(value, frozen.detach())


def test_tied_weight_gets_both_gradients() -> None:
    weight = problem(1, 5, 17)[1].double()
    tokens, labels = torch.tensor([3, 1, 4, 1], device=DEVICE), torch.tensor([1, 4, 1, 5], device=DEVICE)
    tied, plain = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    fused_sem_loss(F.embedding(tokens, tied), tied, labels, lam=0.0)[0].backward()
    F.cross_entropy(F.embedding(tokens, plain) @ plain.T, labels, reduction="sum").backward()
    torch.testing.assert_close(tied.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_backward_only_once() -> None:
    hidden, weight, labels = problem(3, 5, 17)
    loss, _ = fused_sem_loss(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="passed backward before"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_named(value) -> None:
    hidden, weight, labels = problem(3, 5, 17)
    broken = hidden.clone()
    broken[1, 2] = value
    with pytest.raises(ValueError, match="hidden holds 1 .*of 15"):
        fused_sem_loss(broken, weight, labels)
    weight[0, 0] = value
    with pytest.raises(ValueError, match="logits of 3 of 3 tokens"):
        fused_sem_loss(hidden.abs() + 1, weight, labels)


def test_inputs_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = problem(3, 5, 17)
    for arguments, message in (
        ((hidden[None], weight, labels), r"takes hidden \[N, D\]"),
        ((hidden, weight.T, labels), r"takes hidden \[N, D\]"),
        ((hidden, weight, labels[:2]), r"takes hidden \[N, D\]"),
        ((hidden, weight, labels.int()), "must be int64"),
        ((hidden, weight, labels - 100), r"must lie in \[0, 17\)"),
        ((hidden, weight, labels + 17), r"must lie in \[0, 17\)"),
        ((hidden.long(), weight, labels), "floating point"),
        ((hidden.half(), weight, labels), "convert one of them"),
        ((hidden, weight.to("meta"), labels), "one device"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_sem_loss(*arguments)
    for options in ({"percentile": 1.5}, {"eps": 0.0}, {"lam": -1.0}, {"lam": float("nan")}, {"chunk": 0}):
        with pytest.raises(ValueError, match="must be|must lie"):
            fused_sem_loss(hidden, weight, labels, **options)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, _BLOCK, 2 * _BLOCK + 37])
def test_triton_rows_equal_their_twins(V, dtype) -> None:
    g = torch.Generator().manual_seed(V)
    logits = (torch.randn(3, V, generator=g) * torch.tensor([[0.1], [3.0], [30.0]])).to(DEVICE, dtype)
    logits[0] = logits[0].sort().values  # the running maximum moves all the time
    pull = torch.tensor([0.0, 0.05, 0.1], device=DEVICE)
    twin, ours = sem_loss.row_statistics(logits), triton_sem_loss.row_statistics(logits)
    z = logits.double()
    # As for Oracle's e and dH, with the logits given; an extra rounding of both sums each block.
    e = 2 * (V + 8) * U + 3 * U * (z.amax(-1) - z.amin(-1) + z.logsumexp(-1).abs())
    for mine, theirs, bound in zip(ours, twin, (e, 2 * e * (1 + twin[1])), strict=True):
        assert ((mine.double() - theirs.double()).abs() <= bound).all()
    assert torch.equal(triton_sem_loss.row_statistics(logits, entropy=False)[0], ours[0])
    for pulls in (None, pull):
        a = sem_loss.row_gradient_(logits.clone(), *twin, pulls, 0.5).double()
        b = triton_sem_loss.row_gradient_(logits.clone(), *twin, pulls, 0.5).double()
        # Both from the same statistics: exponential, product and sum, a few ulps; of bfloat16 where that is stored
        # (the interpreter truncates it). An exponential below the normal numbers may be anything down to 0.
        # Torch's exponential is that of 2, of a rounded product: log p, rounded three more times.
        log_p = z - twin[0].double()[:, None]
        magnitude = log_p.exp() * (0.5 + 0.1 * (log_p.abs() + twin[1].double()[:, None]))
        last = 2.0**-7 if dtype == torch.bfloat16 else 0.0
        assert ((a - b).abs() <= (8 + 3 * log_p.abs()) * U * magnitude + last * a.abs() + 2.0**-126).all()


@needs_triton
def test_triton_rows_refuse_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="contiguous rows"):
        triton_sem_loss.row_statistics(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous rows"):
        triton_sem_loss.row_statistics(torch.zeros(3, 2, device=DEVICE).T)
