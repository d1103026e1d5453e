"""SGD: torch's, with decay on matrices only."""

from __future__ import annotations

import torch

from luthier.optimizers.sgd import SGD


def test_a_step_is_the_equation_of_the_card() -> None:
    """Breaks when momentum or decay reach another argument of torch."""
    start, gradient = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.2, -0.4]])
    for nesterov in (False, True):
        matrix, momentum, expected = start.clone(), torch.zeros_like(start), start.double()
        optimizer = SGD(learning_rate=0.1, momentum=0.8, weight_decay=0.3, nesterov=nesterov).build({"w": matrix})
        for step in (1, 2, 3):
            matrix.grad = gradient * step
            optimizer.step()
            moved = gradient * step + 0.3 * expected
            momentum = 0.8 * momentum + moved
            expected = expected - 0.1 * (moved + 0.8 * momentum if nesterov else momentum)
        torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_momentum_nothing_is_kept() -> None:
    """Breaks when the planner is told of a state that is not there, or nesterov needs it."""
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    method = SGD(learning_rate=0.1, momentum=0.0, weight_decay=0.5, nesterov=True)
    optimizer = method.build({"m": matrix, "v": vector})
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert method.state_bytes({"m": (2, 2)}) == 0
    assert not any(isinstance(value, torch.Tensor) for value in optimizer.state[matrix].values())
    assert float(matrix.max()) < 1 and torch.equal(vector, torch.ones(2))
