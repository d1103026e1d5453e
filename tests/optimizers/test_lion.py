"""Lion: algorithm 2 of the paper, line by line."""

from __future__ import annotations

import torch

from luthier.optimizers.lion import Lion


def test_a_step_is_the_equation_of_the_card() -> None:
    """Breaks when the vote is taken after the mean has moved, or the two rates are swapped."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4, generator=generator)
    expected, mean = matrix.double(), torch.zeros(5, 4, dtype=torch.float64)
    optimizer = Lion(learning_rate=0.01, weight_decay=0.2, beta1=0.7, beta2=0.95).build({"w": matrix})
    for _ in range(6):
        matrix.grad = torch.randn(5, 4, generator=generator)
        gradient = matrix.grad.double()
        optimizer.step()
        expected = expected - 0.01 * (torch.sign(0.7 * mean + 0.3 * gradient) + 0.2 * expected)
        mean = 0.95 * mean + 0.05 * gradient
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_no_vote_and_vectors_never_decay() -> None:
    """Breaks when a zero is counted as a sign, or a norm is pulled to zero."""
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    optimizer = Lion(learning_rate=0.1, weight_decay=0.5).build({"m": matrix, "v": vector})
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix, torch.full((2, 2), 0.95))
    assert torch.equal(vector, torch.ones(2))
