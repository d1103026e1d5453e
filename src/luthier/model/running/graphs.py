"""CUDA graphs of a model's blocks: a pass is recorded once and played again, where to start kernels takes longest.

Idea: a block is some twenty kernels forward and more backward. In a small model each takes less time than the host
needs to start it; a recorded pass starts them all at once. It is recorded for a number of tokens, so a micro-batch is
filled up to the next of a few sizes with a text of its own that nothing is predicted from and nobody sees. Where texts
begin is a tensor on the device, filled up with texts of no tokens, so the same recording serves any rows. Embedding
and blocks are recorded; the last norm, the head and the loss depend on how many tokens are predicted, and are not.
Trust: each recording is compared once with the pass itself, states and gradients. What differs, or cannot be recorded,
is said, and its sizes run as they always did.
Source: torch.cuda.make_graphed_callables; NVIDIA's CUDA graphs, through PyTorch's documentation of them.
Cost: the activations of the largest size stay reserved; at most 1/8 of a micro-batch is computed for nothing.
Use when: the model is small, and texts see only themselves. Not when: blocks are recomputed, there is a learned root, a
    shared prefix, several adapters, a window that is shorter than a micro-batch, or something that watches modules.
Written against torch 2.13. The filling up and the playing again are tested on a CPU; it has not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from luthier.model.attending.attention import ForestPlan
from luthier.model.attending.kept import AttentionCall
from luthier.model.editing.edits import EditedModule

SIZES: Final = 8
"""Sizes that a micro-batch is filled up to, evenly apart: so many recordings at most."""
TOKENS_OF_A_TEXT: Final = 16
"""Of shorter texts, on average, there are more than a recording has places for."""
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far states and gradients may lie from those of the pass itself, as a share of the largest."""

Played = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens, positions and where texts begin, to states."""


Recorder = Callable[[nn.Module, tuple[Tensor, ...]], Played]
"""Records a module's forward and backward pass over arguments like these; what plays them again copies its arguments to
where the recording reads them."""


def cuda_recorder() -> Recorder:
    """Torch's, all recordings in one pool: only one of them is being played at any time."""
    pool = torch.cuda.graph_pool_handle()

    def record(module: nn.Module, sample: tuple[Tensor, ...]) -> Played:
        played: Any = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True, pool=pool)
        return played

    return record


@final
class Pass(nn.Module):
    """The part of a pass that is recorded, with the modules whose parameters it uses."""

    def __init__(self, body: nn.Module, states: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.states = states

    def forward(
        self, tokens: Int[Tensor, " T"], positions: Int[Tensor, " T"], starts: Int[Tensor, " starts"]
    ) -> Float[Tensor, "T d"]:
        """The states after the last block."""
        return self.states(tokens, positions, starts)


@final
@dataclass
class Graphs:
    """Recordings of one model's passes by their size; `most` tokens is the largest. `refused` says why some are not.

    They are of the model as it was when the first was made: in training, with the same adapters switched on.
    """

    record: Recorder
    most: int
    played: dict[int, Played | None] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    _model: object = None
    _going: Callable[[], _Going | None] = field(default=lambda: None)

    def told(self) -> dict[str, object]:
        """The sizes that are played, and why others are not."""
        sizes = sorted(size for size, played in self.played.items() if played is not None)
        return {"sizes": sizes, "refused": {str(size): why for size, why in self.refused.items()}}

    def size(self, tokens: int, texts: int) -> int | None:
        """The size that so many tokens in so many texts are filled up to; None where there is none."""
        step = -(-self.most // SIZES)
        size = -(-tokens // step) * step
        return size if tokens <= self.most and texts < size // TOKENS_OF_A_TEXT else None

    def take(self, tokens: Tensor, plan: ForestPlan, calls: Mapping[int, AttentionCall]) -> bool:
        """Whether this is a pass of texts of token ids that see themselves alone, and learns."""
        beside = (plan.outer, plan.captured, plan.kept, plan.routes, plan.root, plan.seen)
        alone = all(each is None for each in beside) and not plan.both_ways
        near = all(call.window is None or call.window >= self.most for call in calls.values())
        return alone and near and torch.is_grad_enabled() and not tokens.is_floating_point()

    def states(
        self, tokens: Int[Tensor, " T"], positions: Int[Tensor, " T"], plan: ForestPlan, whole: Pass
    ) -> Float[Tensor, "T d"] | None:
        """The states after the last block; None where the pass has to be made as it always was."""
        size, model, before = self.size(len(tokens), len(plan.spans)), _as_it_is(whole.body), self._going()
        if size is None or (self.played and model != self._model):
            return None
        if before is not None and not before.over:
            # What is recorded has one memory: another pass would write over what this one's backward pass reads.
            return None
        self._model = model
        given = _filled_up(tokens, positions, plan, size)
        if size not in self.played:
            self.played[size] = self._recorded(whole, given, size)
        play = self.played[size]
        if play is None:
            return None
        going = _Going()
        self._going = ref(going)
        states: Tensor = _Noted.apply(play(*given), going)
        return states[: len(tokens)]

    def _recorded(self, whole: Pass, given: tuple[Tensor, Tensor, Tensor], size: int) -> Played | None:
        """A recording that does what the pass does. No random number of the run depends on its being made."""
        devices = [given[0].device] if given[0].device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                play = self.record(whole, tuple(each.clone() for each in given))
            expected = _outcome(lambda *each: Pass.forward(whole, *each), whole, given, devices)
            found = _outcome(play, whole, given, devices)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as failure:
            self.refused[size] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            return None
        if not all(_near(one, other) for one, other in zip(found, expected, strict=True)):
            self.refused[size] = "what was recorded is not what the pass gives"
            return None
        return play


def _as_it_is(body: nn.Module) -> object:
    """What tells a model from itself with other adapters switched on, or without dropout."""
    edited = (each for each in body.modules() if isinstance(each, EditedModule))
    return body.training, tuple((frozenset(each.edits), frozenset(each.disabled)) for each in edited)


@final
class _Going:
    """A pass whose backward pass may still come."""

    over = False


class _Noted(torch.autograd.Function):
    """The same states; their graph holds on to `going`, and says when the backward pass has come."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, going: _Going) -> Tensor:
        ctx.going = going
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # What follows in this backward pass is the recording's, and nothing else is made before it is done.
        ctx.going.over = True
        return grad, None


def _filled_up(
    tokens: Int[Tensor, " T"], positions: Int[Tensor, " T"], plan: ForestPlan, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions with a text more, up to `size`; where texts begin, and the end as often as there is room."""
    lacking = size - len(tokens)
    more = torch.zeros(lacking, dtype=tokens.dtype, device=tokens.device)
    begin = [span.start for span in plan.spans] + [len(tokens)]
    begin += [size] * (size // TOKENS_OF_A_TEXT + 1 - len(begin))
    starts = torch.tensor(begin, dtype=torch.int32).to(tokens.device, non_blocking=True)
    places = torch.arange(lacking, dtype=positions.dtype, device=tokens.device)
    return torch.cat([tokens, more]), torch.cat([positions, places]), starts


def _outcome(
    play: Played, whole: Pass, given: tuple[Tensor, Tensor, Tensor], devices: Iterable[torch.device]
) -> list[Tensor]:
    """States, and the gradients of an uneven sum of them in all that is trained."""
    trained = [each for each in whole.parameters() if each.requires_grad]
    with torch.random.fork_rng(devices=devices):
        states = play(*given)
        slopes = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states).to(states.dtype)
        found = torch.autograd.grad(states, trained, slopes, allow_unused=True)
    # Copies: the next to play it writes over what was recorded.
    return [states.detach().clone(), *(each.clone() for each in found if each is not None)]


def _near(one: Tensor, other: Tensor) -> bool:
    apart = (one - other).abs().max() <= TOLERANCES[other.dtype] * other.abs().max()
    return bool(apart)
