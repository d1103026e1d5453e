"""AdamW: torch's own, with decay on matrices only, and the bytes it says it keeps."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.optimizers.adamw import AdamW


def test_a_step_is_the_equation_of_the_card() -> None:
    """Breaks when a knob reaches another argument of torch, or decay goes through the gradient."""
    start, gradient = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.2, -0.4]])
    matrix = start.clone()
    method = AdamW(learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3)
    optimizer = method.build({"w": matrix})
    first, second, expected = torch.zeros_like(start), torch.zeros_like(start), start.double()
    for step in (1, 2, 3):
        matrix.grad = gradient * step
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient * step
        second = 0.9 * second + 0.1 * (gradient * step) ** 2
        corrected = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
        expected = expected - 0.1 * (corrected + 0.3 * expected)
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-6)
    assert method.peak_learning_rate == 0.1


def test_vectors_never_decay() -> None:
    """Breaks when norms and biases are pulled to zero."""
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.5).build({"m": matrix, "v": vector})
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert float(matrix.max()) == pytest.approx(0.95) and torch.equal(vector, torch.ones(2))


@pytest.mark.parametrize("knobs", [{"learning_rate": 0.0}, {"beta1": 1.0}, {"weight_decay": -0.1}, {"betas": 0.9}])
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    """Breaks when a knob takes what the equation cannot."""
    with pytest.raises(RecipeError):
        validate(AdamW, knobs)
