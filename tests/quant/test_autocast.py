"""bfloat16 autocast: the same products on every CPU, up to the order of their sums."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from reqat.quant.autocast import attention, autocast, linear


def computed(x: Tensor, layer: nn.Linear, ours: bool) -> list[Tensor]:
    """Output and gradients of a layer under autocast: by :func:`linear`, or with torch's own."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, layer.weight, layer.bias) if ours else layer(x)
    y.float().sin().sum().backward()
    return [y.detach(), *(t.grad.clone() for t in (x, *layer.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32), (0, 32)])
def test_products_and_gradients_are_torchs_up_to_one_rounding(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 48, bias=bias), torch.randn(shape)
    for mine, theirs in zip(computed(x, layer, True), computed(x, layer, False), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        # A sum in another order may round to the neighbouring bfloat16.
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=2**-7 * 0.1)


def test_the_result_is_the_exact_product_of_rounded_operands_rounded_once() -> None:
    torch.manual_seed(1)
    x, w = torch.randn(16, 64), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, w)
    exact = x.bfloat16().double() @ w.bfloat16().double().T
    assert y.dtype == torch.bfloat16
    # Half a step of bfloat16, and what a float32 sum of 64 products may add.
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 2**-18 * 64).all()


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "added"])
def test_attention_is_that_of_rounded_operands_rounded_once(mask: str | None) -> None:
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 9, 16, generator=g).requires_grad_()
    k, v = (torch.randn(2, 2, 9, 16, generator=g).requires_grad_() for _ in range(2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    given = {
        None: None,
        "causal": None,
        "boolean": causal,
        "added": torch.randn(9, 9, generator=g).bfloat16().float(),
    }[mask]
    options = {"is_causal": mask == "causal", "enable_gqa": True}
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, given, **options)
    y.float().sin().sum().backward()
    grads = [t.grad for t in (q, k, v)]
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (q, k, v)]
    added = given.double() if mask == "added" and given is not None else given
    z = torch.nn.functional.scaled_dot_product_attention(*exact, added, **options)
    assert y.dtype == torch.bfloat16
    # Half a step of bfloat16, and the softmax's error in float32.
    assert ((y.double() - z).abs() <= z.abs() * 2**-8 + 1e-5).all()
    y.detach().float().cos().bfloat16().double().mul(z).sum().backward()  # the gradient that sin() hands back
    for mine, theirs in zip(grads, exact, strict=True):
        assert mine is not None and theirs.grad is not None
        torch.testing.assert_close(mine.double(), theirs.grad, rtol=2**-8, atol=1e-5)


def test_without_bfloat16_products_layers_go_that_way_and_otherwise_torchs() -> None:
    code = (
        "import torch; from reqat.quant.autocast import autocast, linear\n"
        "import reqat.quant.autocast as module, sys\n"
        "module = sys.modules['reqat.quant.autocast']; module.cpu_multiplies = lambda dtype: False\n"
        "torch.manual_seed(0); x, layer = torch.randn(64, 96), torch.nn.Linear(96, 80)\n"
        "with autocast('cpu', torch.bfloat16): y = layer(x)\n"
        "with torch.autocast('cpu', torch.bfloat16): z = linear(x, layer.weight, layer.bias)\n"
        "with autocast('cpu', None): plain = layer(x)\n"
        "q = torch.randn(1, 2, 5, 16); sdpa = torch.nn.functional.scaled_dot_product_attention\n"
        "with autocast('cpu', torch.bfloat16): a = sdpa(q, q, q)\n"
        "with torch.autocast('cpu', torch.bfloat16): b = module.attention(q, q, q)\n"
        "assert torch.equal(a, b) and a.dtype == torch.bfloat16\n"
        "assert torch.equal(y, z) and y.dtype == torch.bfloat16 and plain.dtype == torch.float32\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_dtype_and_not_enabled_mean_none() -> None:
    x, layer = torch.randn(4, 32), nn.Linear(32, 32)
    for region in (autocast("cpu", None), autocast("cpu", torch.bfloat16, enabled=False)):
        with region:
            assert layer(x).dtype == torch.float32
