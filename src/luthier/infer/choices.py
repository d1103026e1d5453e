"""A guide to one of several texts.

Idea: the tokens of the texts are a tree; what was said is a path in it, what may come next are the branches there, and
where a text ends, the tokens that stop. Each text is written with the tokens that the tokenizer itself writes it with,
which are those that a model has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.data.forest import Ints
from luthier.data.tokenizer import Tokenizer
from luthier.infer.guides import Guide


@final
class Choices:
    """The tree of some texts, shared by all continuations that choose among them; a call makes the guide of one.

    `after` are the last tokens of the prompt, where the tokenizer writes a text otherwise behind other text.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: Sequence[str], *, stops: frozenset[int], after: Ints | None = None
    ) -> None:
        if not texts or not all(texts):
            raise RecipeError(f"the choices are {list(texts)}", allowed="one or more texts, none of them empty")
        self.root = _Node()
        self.stops = sorted(stops)
        self.size = 1 + max(tokenizer.vocabulary_size - 1, *self.stops)
        for text in texts:
            node = self.root
            for token in _written(tokenizer, text, after):
                node = node.branches.setdefault(token, _Node())
            node.ends = True

    def __call__(self) -> Guide:
        return _ChoiceGuide(self)

    def mask(self, node: _Node) -> Bool[Tensor, " V"]:
        """Which tokens may follow at a place; made once for each."""
        if node.mask is None:
            node.mask = torch.zeros(self.size, dtype=torch.bool)
            node.mask[[*node.branches, *(self.stops if node.ends else [])]] = True
        return node.mask


@dataclass(eq=False)
class _Node:
    branches: dict[int, _Node] = field(default_factory=dict)
    ends: bool = False
    mask: Tensor | None = None


@final
class _ChoiceGuide(Guide):
    """The place of one continuation in the tree; None where a token led out of it."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._node: _Node | None = choices.root
        self._last = -1

    def allowed(self) -> Bool[Tensor, " V"] | None:
        if self._node is None:
            raise RecipeError(f"token {self._last} was said where no choice goes on with it", allowed="its tokens")
        return self._choices.mask(self._node)

    def said(self, token: int) -> None:
        node, self._last = self._node, token
        if node is not None and not (node.ends and token in self._choices.stops):
            self._node = node.branches.get(token)


def _written(tokenizer: Tokenizer, text: str, after: Ints | None) -> list[int]:
    following = tokenizer.encode_after(after, text) if after is not None and len(after) else None
    return (following or tokenizer.encode(text))[0].tolist()
