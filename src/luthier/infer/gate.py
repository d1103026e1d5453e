"""The gate: which requests can run at all, how long their answers may be, and how much room is taken for them.

What can never run is told when it is asked for, and not when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final, final

import torch

from luthier.core.errors import DataError, RecipeError
from luthier.infer.cache import Layers, layers_of
from luthier.infer.cohorts import CohortReader, root_for
from luthier.infer.reader import PagedReader, Reader, default_room
from luthier.infer.request import Request
from luthier.infer.sampler import require_possible
from luthier.infer.scheduler import Room
from luthier.model.editing.edits import LearnedRoot
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling

SPOKEN_ROWS: Final = 64
"""Prompts of a list that are answered at once."""

WITH_BEAMS: Final = ("max_new_tokens", "stop_ids", "prompt_log_probs", "seed")
"""What of a Sampling a search for the likeliest continuations heeds; it draws nothing, so any seed is as good."""


@final
class Gate:
    """What an engine takes. With `pooled` adapters requests may name them; without, what is switched on computes all.

    `room` is what was asked for; it is found by the memory there is when it is None.
    """

    def __init__(self, model: LanguageModel, room: Room | None, *, reads_text: bool, pooled: bool) -> None:
        self.model = model
        self.room = room
        self.reads_text = reads_text
        self.pooled = pooled
        self.paged = model.executor.kind == "segments" and model.task.name == "causal_lm"

    def check(self, request: Request, what: str) -> None:
        """Raise DataError or RecipeError for a request that can never run; `what` is what its prompt is called."""
        sampling, prompt = request.sampling, request.prompt
        if sampling.stop and not self.reads_text:
            raise DataError("stop strings were given, but no tokenizer to read the text with", do="use stop_ids")
        if len(prompt) == 0:
            raise DataError(f"{what} has no token", allowed="at least one token")
        self._check_beams(request)
        if sampling.prompt_log_probs and self.model.task.name == "seq2seq_lm":
            raise RecipeError(
                f"log-probabilities of the prompt's tokens were asked of {self.model.source}",
                allowed="those of answers: its encoder reads prompts and predicts nothing",
            )
        self.model.require_rows(prompt)
        require_possible(sampling, self.model.vocabulary_size)
        left = self._left(request)
        if left is not None and left <= 0:
            raise DataError(f"{what} has {len(prompt)} tokens", allowed=f"fewer than {len(prompt) + left}")
        self._check_adapter(request.adapter)
        if request.drafts and not self.paged:
            raise RecipeError(
                f"drafts is {request.drafts}, and {self.model.source} has a cache of its own",
                allowed="0 with this model",
            )
        needed = self._places(request)
        if self.room is not None and self.paged and not self.room.holds(needed, self.layers.window):
            raise DataError(
                f"{what} and its answer may take {needed} tokens, and the cache holds {self.room.tokens}",
                allowed=f"{self.room.tokens} together",
                do="ask for fewer new tokens, or start with more room",
            )

    def limit(self, request: Request) -> int:
        """How many tokens an answer may have, whatever runs beside it."""
        left, wanted = self._left(request), request.sampling.max_new_tokens
        return wanted if left is None else min(wanted, left)

    def places_ahead(self, adapter: str) -> int:
        """Places of a learned root in a text's cache, before its prompt."""
        return self._root_tokens(adapter) if self.paged else 0

    def reader(self) -> Reader:
        """What reads requests that come and go."""
        return self._reader(self.room or (default_room(self.model, self.layers) if self.paged else Room(tokens=1)))

    def reader_for(self, requests: Sequence[Request]) -> Reader:
        """What reads just these: with room for the longest of their texts side by side, as far as memory allows."""
        if self.room is not None or not self.paged:
            return self._reader(self.room or Room(tokens=1, rows=SPOKEN_ROWS))
        plain, window = Room(tokens=1), self.layers.window
        texts = [(self._places(each), max(each.choices, each.best_of, each.beams)) for each in requests]
        needs = sorted((plain.held(places, window) for places, count in texts for _ in range(count)), reverse=True)
        wanted = sum(needs[:SPOKEN_ROWS])
        most = default_room(self.model, self.layers).tokens
        # Beams that split run beside those that they take the place of.
        rows = sum(max(each.choices, each.best_of, 2 * each.beams if each.beams > 1 else 1) for each in requests)
        return self._reader(Room(tokens=max(needs[0], min(wanted, most)), rows=min(SPOKEN_ROWS, rows)))

    @cached_property
    def layers(self) -> Layers:
        """What the cache has to hold."""
        with torch.no_grad():
            return layers_of(self.model)

    def _reader(self, room: Room) -> Reader:
        if not self.paged:
            return CohortReader(self.model, rows=room.rows, mixed=self.pooled)
        return PagedReader(self.model, room, self.layers, mixed=self.pooled)

    def _check_adapter(self, name: str) -> None:
        if name and not self.pooled:
            raise RecipeError(
                f"a request names the adapter {name!r}, and {self.model.source} runs what is switched on, "
                "having no pool",
                allowed="requests without an adapter's name",
                do="switch on the adapter that is wanted",
            )
        if self.model.executor.kind == "unrolled" and self._root(name) is not None:
            raise RecipeError(
                f"{name or 'what is switched on'} has a learned root, and the attention of {self.model.source} cannot "
                "be driven by luthier",
                allowed="adapters that work at sites, such as lora",
            )

    def _check_beams(self, request: Request) -> None:
        if request.beams == 1:
            return
        sampling, plain = request.sampling, Sampling()
        others = [name for name in vars(plain) if getattr(sampling, name) != getattr(plain, name)]
        others = [name for name in others if name not in WITH_BEAMS]
        others += [name for name in ("best_of", "drafts") if getattr(request, name)]
        others += ["guide"] if request.guide is not None else []
        if others:
            raise RecipeError(
                f"{request.beams} beams were asked for with {', '.join(others)}",
                allowed=f"beams with {', '.join(WITH_BEAMS)}",
                do="take the others out, or ask for one beam",
            )

    def _places(self, request: Request) -> int:
        return self._root_tokens(request.adapter) + len(request.prompt) + self.limit(request)

    def _left(self, request: Request) -> int | None:
        """How many tokens may follow a prompt, when the context is limited."""
        limit = self.model.context_tokens
        return None if limit is None else limit - len(request.prompt) - self._root_tokens(request.adapter)

    def _root_tokens(self, name: str) -> int:
        root = self._root(name)
        return 0 if root is None else root.token_count

    def _root(self, name: str) -> LearnedRoot | None:
        return root_for(self.model, name, mixed=self.pooled)
