"""Cohorts: continuations that began together and go on together, for models whose cache is their own.

Idea: a model whose mixing is not attention carries a state from token to token; a decoder that reads an encoder has two
caches of which one never grows. Both keep what the zoo gives them. A cohort is a batch that such a cache fits: answers
to texts of any length begin with the same token and grow in step; a state takes no padding, so its cohort are texts of
one length. Each row goes by the adapter that it names. A cohort goes on until all of its members are over, and several
of them take turns.
Cost: rows that are over are computed on until their cohort ends; a beam that splits reads its text and answer again.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.infer.continuation import Continuation
from luthier.infer.reader import Counts, Reader, Reading
from luthier.infer.sampler import log_probs_of
from luthier.model.editing.edits import LearnedKeysValues, LearnedRoot, routed
from luthier.model.language_model import LanguageModel
from luthier.model.routes import Routes, batch_routes
from luthier.model.running.encoder_decoder import read_texts, start_of, states_ahead
from luthier.model.zoo import ZooModule

PASS_TOKENS: Final = 512
"""Prompts of texts with a state that are read at once have no more tokens together, if there are several."""


class Cohort(ABC):
    """Members, in the rows of a batch, and the zoo's cache of it. Rows of a `mixed` one name their adapters."""

    def __init__(self, model: LanguageModel, members: Sequence[Continuation], *, mixed: bool) -> None:
        self.model = model
        # Rows of one adapter side by side are one range.
        self.members = sorted(members, key=_adapter)
        self.mixed = mixed
        self.over: set[int] = set()

    @property
    def alive(self) -> list[int]:
        """The rows of members that go on."""
        return [row for row, each in enumerate(self.members) if id(each) not in self.over]

    def routes(self, *widths: int) -> Routes | None:
        """Which row goes by which adapter, through modules that are given the batch in these widths."""
        names = [_adapter(each) for each in self.members]
        return batch_routes(names, widths, dict(self.model.mixes)) if self.mixed else None

    @abstractmethod
    def read(self) -> Float[Tensor, "rows V"]:
        """What each may say next, given what each said last."""


@final
class Answers(Cohort):
    """Answers of an encoder-decoder that are of one length by now; its prompts are read once."""

    def __init__(self, model: LanguageModel, members: Sequence[Continuation], *, mixed: bool) -> None:
        from transformers.modeling_outputs import BaseModelOutput

        super().__init__(model, members, mixed=mixed)
        prompts = [each.request.prompt for each in self.members]
        roots = [root_for(model, _adapter(each), mixed=mixed) for each in self.members]
        counts = [len(prompt) + states_ahead(root) for prompt, root in zip(prompts, roots, strict=True)]
        flat = model.executor.kind == "segments"
        routes = self.routes(max(counts))
        if flat and mixed:
            routes = model.routes(zip(map(_adapter, self.members), counts, strict=True))
        states, self.mask = read_texts(model.module, prompts, flat=flat, roots=roots, routes=routes)
        self.states = BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]
        self.cache = _learned(model, [root for root in roots if isinstance(root, LearnedKeysValues)])
        self.started = False

    def read(self) -> Float[Tensor, "rows V"]:
        first = start_of(self.model.module)
        said = [[first, *each.said] for each in self.members]
        tokens = [own[-1:] for own in said] if self.started else said
        # What reads the encoder is given all of its states.
        with routed(self.model.module, self.routes(len(tokens[0]), self.states.last_hidden_state.shape[1])):
            result = self.model.module(
                encoder_outputs=self.states,
                attention_mask=self.mask,
                decoder_input_ids=torch.tensor(tokens, device=self.model.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache, self.started = result.past_key_values, True
        logits: Tensor = result.logits[:, -1].float()
        return logits


@final
class States(Cohort):
    """Texts of one length of a model that carries a state, and knows their positions from it."""

    def __init__(self, model: LanguageModel, members: Sequence[Continuation], *, mixed: bool) -> None:
        super().__init__(model, members, mixed=mixed)
        self.name = _state_name(model.module)
        self.state: Any = None

    def read(self) -> Float[Tensor, "rows V"]:
        texts = [each.tokens(0 if self.state is None else each.length - 1, each.length) for each in self.members]
        ids = torch.from_numpy(np.stack(texts).astype(np.int64)).to(self.model.device)
        with routed(self.model.module, self.routes(ids.shape[1])):
            result = self.model.module(input_ids=ids, use_cache=True, **{self.name: self.state})
        self.state = result[self.name]
        logits: Tensor = result.logits.float()
        for member, own, labels in zip(self.members, logits, ids, strict=True):
            if member.wants_prompt and not member.said:
                member.prompt_said += log_probs_of(own[:-1], labels[1:], member.request.sampling.likeliest)
        return logits[:, -1]


@final
class CohortReader(Reader):
    """Up to `rows` continuations, in cohorts that take turns. Rows of a `mixed` reader name their adapters."""

    def __init__(self, model: LanguageModel, *, rows: int, mixed: bool) -> None:
        self.model = model
        self.rows = rows
        self.mixed = mixed
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
        alike: dict[tuple[int, int, int], list[Continuation]] = {}
        for _ in range(min(free, len(self.waiting))):
            each = self.waiting.popleft()
            alike.setdefault(self._shape(each), []).append(each)
        made = Answers if self.model.task.name == "seq2seq_lm" else States
        for (_, length, _), members in alike.items():
            most = len(members) if made is Answers else max(1, PASS_TOKENS // length)
            for start in range(0, len(members), most):
                self.cohorts.append(made(self.model, members[start : start + most], mixed=self.mixed))

    def _shape(self, each: Continuation) -> tuple[int, int, int]:
        """What the members of a cohort have in common: how many keys are there before, and how long a text is; one that
        is to be the same in any company has nothing in common with others."""
        alone = id(each) if each.request.batch_invariant else 0
        if self.model.task.name != "seq2seq_lm":
            return 0, each.length, alone
        root = root_for(self.model, _adapter(each), mixed=self.mixed)
        return root.token_count if isinstance(root, LearnedKeysValues) else 0, len(each.said), alone


def root_for(model: LanguageModel, adapter: str, *, mixed: bool) -> LearnedRoot | None:
    """The learned root of a text's adapter, or of what is switched on where requests name none."""
    return model.root_with(adapter) if adapter or mixed else model.active_root


def _adapter(each: Continuation) -> str:
    return each.request.adapter


def _learned(model: LanguageModel, roots: Sequence[LearnedKeysValues]) -> Any:
    """The zoo's cache of a decoder whose learned keys and values are there before its answers; None without any."""
    from transformers import DynamicCache, EncoderDecoderCache

    if not roots:
        return None
    cache = DynamicCache()
    rows = torch.stack([root.keys_values(model.dtype) for root in roots], 2)
    for layer, (keys, values) in enumerate(rows):
        cache.update(keys, values, layer)
    return EncoderDecoderCache(cache, DynamicCache())


def _state_name(module: ZooModule) -> str:
    """What a model calls the state it carries from token to token; attention-free ones have their own names."""
    known = inspect.signature(module.forward).parameters
    found = [name for name in ("past_key_values", "cache_params", "state") if name in known]
    if not found:
        raise RecipeError(
            f"{type(module).__name__} names no state it carries from token to token", do="use a model with a cache"
        )
    return found[0]
