"""Cohorts: continuations that began together and go on together, for models whose cache is their own.

Idea: a model whose mixing is not attention carries a state from token to token; a decoder that reads an encoder has two
caches of which one never grows. Both keep what the zoo gives them. A cohort is a batch that such a cache fits: answers
to texts of any length begin with the same token and grow in step; a state takes no padding, so its cohort is one text.
A cohort goes on until all of its members are over, and several of them take turns.
Cost: rows that are over are computed on until their cohort ends.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from luthier.core.errors import RecipeError
from luthier.infer.continuation import Continuation
from luthier.infer.reader import Counts, Reader, Reading
from luthier.infer.sampler import log_probs_of
from luthier.model.edits import LearnedKeysValues
from luthier.model.encoder_decoder import read_texts, start_of
from luthier.model.language_model import LanguageModel


class Cohort(ABC):
    """Members, in the rows of a batch, and the zoo's cache of it."""

    def __init__(self, members: Sequence[Continuation]) -> None:
        self.members = list(members)
        self.over: set[int] = set()

    @property
    def alive(self) -> list[int]:
        """The rows of members that go on."""
        return [row for row, each in enumerate(self.members) if id(each) not in self.over]

    @abstractmethod
    def read(self) -> Float[Tensor, "rows V"]:
        """What each may say next, given what each said last."""


@final
class Answers(Cohort):
    """Answers of an encoder-decoder; its prompts are read once."""

    def __init__(self, model: LanguageModel, members: Sequence[Continuation]) -> None:
        super().__init__(members)
        self.model = model
        flat = model.executor.kind == "segments"
        prompts = [each.request.prompt for each in members]
        states, self.mask = read_texts(model.module, prompts, flat=flat, root=model.active_root)
        self.states = BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]
        self.cache = _learned(model, len(members))

    def read(self) -> Float[Tensor, "rows V"]:
        first = start_of(self.model.module)
        tokens = [each.said[-1] if each.said else first for each in self.members]
        result = self.model.module(
            encoder_outputs=self.states,
            attention_mask=self.mask,
            decoder_input_ids=torch.tensor(tokens, device=self.model.device)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = result.past_key_values
        logits: Tensor = result.logits[:, -1].float()
        return logits


@final
class State(Cohort):
    """One text of a model that carries a state, and knows its positions from it."""

    def __init__(self, model: LanguageModel, member: Continuation) -> None:
        super().__init__([member])
        self.model = model
        self.name = _state_name(model.module)
        self.state: Any = None

    def read(self) -> Float[Tensor, "rows V"]:
        (member,) = self.members
        tokens = member.request.prompt.astype(np.int64) if not member.said else np.array(member.said[-1:])
        ids = torch.from_numpy(tokens).to(self.model.device)[None]
        result = self.model.module(input_ids=ids, use_cache=True, **{self.name: self.state})
        self.state = result[self.name]
        logits: Tensor = result.logits[0].float()
        if member.wants_prompt and not member.said:
            labels = ids[0, 1:]
            member.prompt_said += log_probs_of(logits[:-1], labels, member.request.sampling.likeliest)
        return logits[-1:]


@final
class CohortReader(Reader):
    """Up to `rows` continuations, in cohorts that take turns."""

    def __init__(self, model: LanguageModel, *, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.waiting: deque[Continuation] = deque()
        self.cohorts: deque[Cohort] = deque()
        self._read = 0

    def add(self, each: Continuation) -> None:
        self.waiting.append(each)

    def remove(self, each: Continuation) -> None:
        if each in self.waiting:
            self.waiting.remove(each)
        for cohort in self.cohorts:
            if each in cohort.members:
                cohort.over.add(id(each))
        self.cohorts = deque(cohort for cohort in self.cohorts if cohort.alive)

    def fork(self, source: Continuation, twin: Continuation) -> bool:
        self.waiting.append(twin)
        return False

    def agree(self, each: Continuation) -> None:
        """Nothing is drafted."""

    def forget(self) -> None:
        """Nothing is kept from one text for another."""

    @property
    def counts(self) -> Counts:
        running = sum(len(cohort.alive) for cohort in self.cohorts)
        return Counts(len(self.waiting), running, read=self._read)

    def read(self) -> Reading | None:
        self._admit()
        if not self.cohorts:
            return None
        cohort = self.cohorts[0]
        self.cohorts.rotate(-1)
        self._read += sum(1 if each.said else len(each.request.prompt) for each in cohort.members)
        logits = cohort.read()
        rows = cohort.alive
        return Reading([cohort.members[row] for row in rows], logits[rows])

    def _admit(self) -> None:
        free = self.rows - sum(len(cohort.members) for cohort in self.cohorts)
        members = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        if members and self.model.task.name == "seq2seq_lm":
            self.cohorts.append(Answers(self.model, members))
        else:
            self.cohorts.extend(State(self.model, each) for each in members)


def _learned(model: LanguageModel, rows: int) -> Cache | None:
    """The cache of a decoder whose learned keys and values are there before its answers; None without any."""
    if not isinstance(model.active_root, LearnedKeysValues):
        return None
    root, cache = model.seen_root(), DynamicCache()
    if root is None:
        return None
    for layer in range(model.sites.root_layers):
        keys, values = root.keys_values(layer, model.dtype)
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return EncoderDecoderCache(cache, DynamicCache())


def _state_name(module: PreTrainedModel) -> str:
    """What a model calls the state it carries from token to token; attention-free ones have their own names."""
    known = inspect.signature(module.forward).parameters
    found = [name for name in ("past_key_values", "cache_params", "state") if name in known]
    if not found:
        raise RecipeError(
            f"{type(module).__name__} names no state it carries from token to token", do="use a model with a cache"
        )
    return found[0]
