"""Operators by class, as the clock of a real step sees them."""

import torch

from hardware_models.cpu import kernel_class
from validation.operator_times import ClassTimes


def test_products_of_complex_numbers_are_a_class_of_their_own() -> None:
    x = torch.randn(4, 6, 2, requires_grad=True)

    def passes() -> None:
        turned = torch.view_as_complex(x) * torch.ones(6, dtype=torch.complex64)
        (torch.view_as_real(turned) * 2).sum().backward()

    times = ClassTimes(kernel_class)
    times.step(passes, lambda: None)
    # backward copies the conjugates
    assert times.calls() == {"complex": 2, "elementwise": 2 + 1, "reduction": 1}
