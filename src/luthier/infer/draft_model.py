"""Drafts by a smaller model of the same vocabulary.

Idea: the smaller model goes ahead by a few tokens, each a cheap pass, and the large one looks at all of them in one. It
chooses by the settings of the request, and draws with the very numbers that will draw the text: where the two
distributions are alike, the same number draws the same token, so a draft is right more often than the likeliest tokens
would be. A draft is certain once it is made, so it is taken as any other is (`sampler.choose_drafted`), and the text is
the one that is drawn without drafts.
Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. There drafts are drawn with numbers of their
    own and accepted with probability min(1, p / q); common numbers keep a seed's text what it is.
Cost: for each token of a draft a pass of the smaller model, which reads the draft so far again; its keys of each text.
Use when: the smaller model takes a fraction of the time of a pass, and few texts grow at once.
Not when: batches are full; a pass that computes as much as it reads gains nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, final

import torch

from luthier.core.errors import RecipeError
from luthier.infer.cache import Layers, layers_of
from luthier.infer.continuation import Continuation
from luthier.infer.drafts import Drafter
from luthier.infer.reader import LONGEST, PagedReader
from luthier.infer.request import Request
from luthier.infer.sampler import choose
from luthier.infer.scheduler import DRAFTED_ROWS, Room
from luthier.model.language_model import LanguageModel

AHEAD: Final = DRAFTED_ROWS - 1
"""Tokens of the longest draft: with the last one of the text they are a pass."""


@final
class DraftModel:
    """Makes drafters of one model for the texts of another of `vocabulary` tokens; what is switched on computes."""

    def __init__(self, model: LanguageModel, *, vocabulary: int) -> None:
        if model.executor.kind != "segments" or model.task.name != "causal_lm":
            raise RecipeError(
                f"{model.source} cannot draft: its attention is not driven by luthier",
                allowed="decoders of attention, such as those of llama's family",
            )
        self.model = model
        self.vocabulary = vocabulary
        with torch.no_grad():
            # All pages are kept, windows or not: a draft that was wrong is read over.
            widths = layers_of(model).widths
            self.layers = Layers(widths, (None,) * len(widths))

    def __call__(self, request: Request, draw: int) -> Drafter:
        return _Ahead(self, request, draw)


@final
class _Proposed(Drafter):
    """What is proposed so far, as a draft that the smaller model itself reads."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def said(self, token: int) -> None:
        """A token that is said was proposed, or is none of the text."""

    def propose(self, count: int) -> list[int]:
        return self.tokens[:count]


@final
class _Ahead(Drafter):
    """The same text in the smaller model, which knows what was said and goes ahead of it."""

    def __init__(self, drafts: DraftModel, request: Request, draw: int) -> None:
        sampling = replace(request.sampling, stop=(), likeliest=0, prompt_log_probs=False)
        own = Request(prompt=request.prompt, sampling=sampling, drafts=AHEAD)
        self._drafts = drafts
        self._proposed = _Proposed()
        places = len(request.prompt) + sampling.max_new_tokens + AHEAD
        self._text = Continuation(0, 0, own, draw=draw, limit=places, drafter=self._proposed)
        self._room = Room(tokens=places, rows=1)
        self._reader: PagedReader | None = None
        self._strange = int(request.prompt.max()) >= drafts.model.vocabulary_size

    def said(self, token: int) -> None:
        self._text.chooser.said.append(token)
        counts = self._text.chooser.counts
        counts[token] = counts.get(token, 0) + 1
        self._strange = self._strange or token >= self._drafts.model.vocabulary_size

    def propose(self, count: int) -> list[int]:
        model = self._drafts.model
        left = min(count, AHEAD, (model.context_tokens or LONGEST) - self._text.length)
        # A model may have rows for tokens that no tokenizer makes, and others may not.
        if self._strange or left <= 0:
            return []
        if self._reader is None:
            self._reader = PagedReader(model, self._room, self._drafts.layers, mixed=False)
            self._reader.add(self._text)
        tokens = self._proposed.tokens = []
        chooser = self._text.chooser.ahead()
        while len(tokens) < left:
            reading = self._reader.read()
            if reading is None:
                break
            if not reading.continuations:
                # A piece of a long prompt.
                continue
            # The last token of the text is read with every draft: so there always is one to go on from.
            self._reader.agree(self._text)
            (said,) = choose([chooser], reading.logits[-1:], backend=model.executor.backend)
            if said.token >= self._drafts.vocabulary:
                break
            tokens.append(said.token)
        self._proposed.tokens = []
        return tokens
