"""A model in texts: it goes on with answers, says how likely continuations of them are, or how good an answer is.

Idea: a prompt with several continuations is a tree, the prompt computed once and a leaf for each continuation. Whoever
generates is asked for by its protocol, so the engine, or one behind HTTP, may do it. A continuation is written with the
tokens that the tokenizer itself writes it with behind the prompt.
Cost: one pass over prompts and leaves; `most_tokens` at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

import numpy as np
import torch

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Conversation, Judged, Message, Row
from luthier.data.forest import Forest, Ints, Segment, Tree
from luthier.data.rendering.renderer import Renderer
from luthier.model.compared import compared_tree
from luthier.model.language_model import LanguageModel
from luthier.model.scorer import Begun, Likely, NoRoom, Said
from luthier.model.speaker import Sampling, Speaker, Spoken
from luthier.model.tasks import SCORES

_AT_ONCE: Final = 8192


@final
class LocalTextModel:
    """A TextModel of a model that is loaded here; `speaker` generates with the same weights."""

    def __init__(
        self, model: LanguageModel, speaker: Speaker, renderer: Renderer, *, most_tokens: int = _AT_ONCE
    ) -> None:
        self._model = model
        self._speaker = speaker
        self._renderer = renderer
        self._most_tokens = most_tokens

    def go_on(
        self, asked: Sequence[Begun], *, most_tokens: int, temperature: float, seed: int
    ) -> list[Said | NoRoom]:
        """One continuation of each, without control tokens."""
        stops = tuple(sorted(self._renderer.stop_ids))
        sampling = Sampling(max_new_tokens=most_tokens, temperature=temperature, seed=seed, stop_ids=stops)
        prompts = [self._prompt(one) for one in asked]
        # An answer has one token at least.
        lacks = [self._lack(len(prompt) + 1) for prompt in prompts]
        fitting = [prompt for prompt, lack in zip(prompts, lacks, strict=True) if lack is None]
        spoken = iter(self._speaker.speak(fitting, sampling) if fitting else [])
        return [self._said(next(spoken)) if lack is None else lack for lack in lacks]

    @torch.no_grad()
    def likely(self, asked: Sequence[Begun], continuations: Sequence[str]) -> list[list[Likely] | NoRoom]:
        """How likely every continuation is after each prompt."""
        trees = [self._tree(self._prompt(one), continuations) for one in asked]
        lengths = [[len(segment.tokens) for segment in tree.segments] for tree in trees]
        lacks = [self._lack(prompt + max(leaves, default=0)) for prompt, *leaves in lengths]
        fitting = [tree for tree, lack in zip(trees, lacks, strict=True) if lack is None]
        with _without_dropout(self._model):
            found = [each for group in _groups(fitting, self._most_tokens) for each in self._likely(group)]
        likely = iter(found)
        return [next(likely) if lack is None else lack for lack in lacks]

    def _lack(self, tokens: int) -> NoRoom | None:
        """What is said of a text of so many tokens that the model has no room for."""
        context, root = self._model.context_tokens, self._model.active_root
        before = 0 if root is None else root.token_count
        if context is None or tokens + before <= context:
            return None
        who = f"{self._model.source} (a context of {context:,} tokens)"
        return NoRoom(who, f"fewer tokens than the {tokens + before:,} of it, its template and what is to follow")

    def _prompt(self, asked: Begun) -> Ints:
        prompt = self._renderer.prompt_ids(asked.messages)
        return np.concatenate([prompt, self._after(prompt, asked.begun)]) if asked.begun else prompt

    def _after(self, prompt: Ints, text: str) -> Ints:
        found = self._renderer.tokenizer.encode_after(prompt, text)
        if found is None or not len(found[0]):
            raise RecipeError(f"no tokens of this tokenizer read as {text!r} behind a prompt", allowed="other text")
        return found[0]

    def _tree(self, prompt: Ints, continuations: Sequence[str]) -> Tree:
        leaves = [self._after(prompt, text) for text in continuations]
        root = Segment(prompt, np.zeros(len(prompt), np.float32))
        return Tree((root, *(Segment(leaf, np.ones(len(leaf), np.float32), 0) for leaf in leaves)))

    def _likely(self, trees: list[Tree]) -> list[list[Likely]]:
        log_probs = iter(self._model.token_outputs(Forest(tuple(trees))).log_probs.tolist())
        counts = [[len(segment.tokens) for segment in tree.segments[1:]] for tree in trees]
        return [[Likely(sum(next(log_probs) for _ in range(count)), count) for count in each] for each in counts]

    def _said(self, spoken: Spoken) -> Said:
        return Said(self._text(spoken.tokens), spoken.ended)

    def _text(self, tokens: Ints) -> str:
        silent = self._renderer.tokenizer.special_ids | self._renderer.stop_ids
        return self._renderer.tokenizer.decode([int(token) for token in tokens if int(token) not in silent])


@final
class LocalTextScorer:
    """A TextScorer of a reward model that is loaded here. Answers are read exactly as those it was trained on."""

    def __init__(self, model: LanguageModel, renderer: Renderer, *, most_tokens: int = _AT_ONCE) -> None:
        if model.task != SCORES:
            raise RecipeError(
                f"{model.source} was loaded as a {model.task.name} model, and was not trained to score answers",
                allowed="a run with objective reward_model",
                do="train one on preferences with objective reward_model",
            )
        self._model = model
        self._renderer = renderer
        self._most_tokens = most_tokens

    @torch.no_grad()
    def scores(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """One number for each; NaN for what cannot be rendered, such as one that is too long."""
        trees = {at: tree for at, each in enumerate(conversations) if (tree := self._tree(at, each)) is not None}
        found: list[float] = []
        with _without_dropout(self._model):
            for group in _groups(list(trees.values()), self._most_tokens):
                scores = self._model.token_outputs(Forest(tuple(group))).scores
                if scores is None:
                    raise RecipeError(f"{self._model.source} gives no scores", allowed="a reward model")
                found += scores.tolist()
        of = dict(zip(trees, found, strict=True))
        return [of.get(at, math.nan) for at in range(len(conversations))]

    def _tree(self, at: int, conversation: Sequence[Message]) -> Tree | None:
        asked = Conversation(tuple(conversation[:-1]))
        try:
            views = self._renderer.render(Row(at, f"answer {at}", Judged(asked, (conversation[-1],), True)))
        except DataError:
            # A row of data would be refused. Here it is the policy's answer: NaN, which nobody takes for a number.
            return None
        tree = compared_tree(views[0], at_end=True) if views else None
        room, root = self._model.context_tokens, self._model.active_root
        before = 0 if root is None else root.token_count
        return None if tree is None or (room is not None and tree.token_count + before > room) else tree


def _groups(trees: Sequence[Tree], most_tokens: int) -> Iterator[list[Tree]]:
    group: list[Tree] = []
    for tree in trees:
        if group and sum(each.token_count for each in (*group, tree)) > most_tokens:
            yield group
            group = []
        group.append(tree)
    if group:
        yield group


@contextmanager
def _without_dropout(model: LanguageModel) -> Iterator[None]:
    was_training = model.module.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
