"""QAD's term against the definition of the KL divergence in float64."""

from __future__ import annotations

import pytest
import torch

from reqat.methods.terms.qad import QAD
from reqat.training.objective import TermContext


def test_value_and_gradient_are_the_forward_kl():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(6, 13, generator=g, requires_grad=True)
    teacher = torch.randn(6, 13, generator=g) * 3
    value = QAD()(TermContext(student, torch.zeros(6, dtype=torch.long), teacher))
    value.backward()
    p, q = teacher.double().softmax(-1), student.detach().double().softmax(-1)
    torch.testing.assert_close(value.detach().double(), (p * (p / q).log()).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), q - p, rtol=1e-5, atol=1e-6)


def test_no_teacher_is_an_error():
    with pytest.raises(ValueError, match="give the stage a teacher"):
        QAD()(TermContext(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
