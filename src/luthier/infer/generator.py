"""Batched generation with a key-value cache.

Idea: prompts are sorted by length and run in left-padded batches; one prefill, then one token a row and step, until
every row has met its stop. A learned root enters as the first entries of the cache. Each row draws from its own
generator, so its text does not depend on which rows share its batch beyond rounding.
Models whose mixing is not attention keep their own cache and run a row at a time, because padding would enter their
state. An encoder-decoder reads each prompt once, and its decoder begins with the token it starts with.
Source: nucleus sampling: Holtzman et al., arXiv 1904.09751; top-k: Fan et al., arXiv 1805.04833.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Ints
from luthier.model.edits import LearnedKeysValues
from luthier.model.encoder_decoder import read_texts, start_of
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Spoken

Decode = Callable[[Ints], str]


@final
class Generator:
    """Continues prompts with the model as it is now: attachments on or off, training going on or not."""

    def __init__(self, model: LanguageModel, *, decode: Decode | None = None, batch_rows: int = 32) -> None:
        self.model = model
        self.decode = decode
        self._answers = model.task.name == "seq2seq_lm"
        self.batch_rows = batch_rows if model.executor.kind == "segments" or self._answers else 1

    @torch.no_grad()
    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in the order of the prompts."""
        if not self.model.task.speaks:
            raise RecipeError(
                f"{self.model.source} was loaded to classify or to fill in, and says no text",
                do="ask it for classes: luthier classify RUN TEXT",
            )
        self._check(prompts, sampling)
        was_training = self.model.module.training
        self.model.train(False)
        answers: dict[int, Spoken] = {}
        for batch in self._batches(prompts):
            rows = [
                _Row(prompts[index], sampling, seed_offset=index, decode=self.decode, room=self._room(prompts[index]))
                for index in batch
            ]
            if self._answers:
                self._answer(rows)
            else:
                self._run(rows)
            answers.update({index: row.spoken() for index, row in zip(batch, rows, strict=True)})
        self.model.train(was_training)
        return [answers[index] for index in range(len(prompts))]

    def _batches(self, prompts: Sequence[Ints]) -> list[list[int]]:
        """The indices of the prompts, shortest first, in batches."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        batches: list[list[int]] = []
        for index in order:
            full = not batches or len(batches[-1]) == self.batch_rows
            if full or (self._equal_lengths() and len(prompts[batches[-1][0]]) != len(prompts[index])):
                batches.append([])
            batches[-1].append(index)
        return batches

    def _equal_lengths(self) -> bool:
        # Padding lies between a learned root and its text, and would push the root out of a sliding window.
        window = getattr(self.model.module.config.get_text_config(), "sliding_window", None)
        return window is not None and self.model.active_root is not None

    def _check(self, prompts: Sequence[Ints], sampling: Sampling) -> None:
        if sampling.stop and self.decode is None:
            raise DataError("stop strings were given, but no tokenizer to read the text with", do="use stop_ids")
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise DataError(f"prompt {index} has no token", allowed="at least one token")
            self.model.require_rows(prompt)
            room = self._room(prompt)
            if room is not None and room <= 0:
                raise DataError(f"prompt {index} has {len(prompt)} tokens", allowed=f"fewer than {len(prompt) + room}")

    def _run(self, rows: list[_Row]) -> None:
        device = self.model.device
        width = max(len(row.prompt) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, width - len(row.prompt) :] = torch.from_numpy(row.prompt.astype(np.int64))
            mask[index, width - len(row.prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, root_tokens = self._cache(len(rows))
        mask = torch.cat([torch.ones(len(rows), root_tokens, dtype=torch.long), mask], 1)
        tokens, mask, positions = tokens.to(device), mask.to(device), (positions + root_tokens).to(device)
        while True:
            logits, cache = self._forward(tokens, mask, positions, cache)
            chosen = torch.tensor([row.choose(scores) for row, scores in zip(rows, logits, strict=True)])
            if all(row.ended for row in rows):
                break
            tokens = chosen.to(device)[:, None]
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long, device=device)], 1)
            positions = positions[:, -1:] + 1
            if self.model.context_tokens is not None:
                # Rows that have ended go on for as long as the batch does, but never past the last position there is.
                positions = positions.clamp(max=self.model.context_tokens - 1)

    def _answer(self, rows: list[_Row]) -> None:
        """Let an encoder-decoder answer: its prompts are read once, and its answers grow a token a step."""
        model = self.model
        flat = model.executor.kind == "segments"
        states, mask = read_texts(model.module, [row.prompt for row in rows], flat=flat, root=model.active_root)
        start = start_of(model.module)
        tokens = torch.full((len(rows), 1), start, dtype=torch.long, device=model.device)
        cache: Cache | None = None
        learned, _ = self._cache(len(rows)) if isinstance(model.active_root, LearnedKeysValues) else (None, 0)
        if learned is not None:
            cache = EncoderDecoderCache(learned, DynamicCache())
        while True:
            result = model.module(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=tokens,
                past_key_values=cache,
                use_cache=True,
            )
            scores, cache = result.logits[:, -1].float(), result.past_key_values
            chosen = torch.tensor([row.choose(each) for row, each in zip(rows, scores, strict=True)])
            if all(row.ended for row in rows):
                break
            tokens = chosen.to(model.device)[:, None]

    def _room(self, prompt: Ints) -> int | None:
        """How many tokens may follow a prompt, when the context is limited: its own room, whatever shares its batch."""
        limit, root = self.model.context_tokens, self.model.active_root
        return None if limit is None else limit - len(prompt) - (0 if root is None else root.token_count)

    def _cache(self, rows: int) -> tuple[DynamicCache | None, int]:
        if self.model.executor.kind != "segments":
            return None, 0
        cache, root = DynamicCache(), self.model.seen_root()
        if root is None:
            return cache, 0
        for layer in range(self.model.sites.root_layers):
            keys, values = root.keys_values(layer, self.model.dtype)
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache, root.token_count

    def _forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Int[Tensor, "B S"],
        positions: Int[Tensor, "B T"],
        cache: Cache | None,
    ) -> tuple[Float[Tensor, "B V"], Cache | None]:
        if self.model.executor.kind == "segments":
            result = self.model.module(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        else:
            # A model with a state of its own takes no padding, and knows its positions from that state.
            name = _state_name(self.model.module)
            result = self.model.module(input_ids=tokens, use_cache=True, **{name: cache})
            return result.logits[:, -1].float(), result[name]
        return result.logits[:, -1].float(), result.past_key_values


def _state_name(module: PreTrainedModel) -> str:
    """What a model calls the state it carries from token to token; attention-free ones have their own names."""
    known = inspect.signature(module.forward).parameters
    found = [name for name in ("past_key_values", "cache_params", "state") if name in known]
    if not found:
        raise RecipeError(
            f"{type(module).__name__} names no state it carries from token to token", do="use a model with a cache"
        )
    return found[0]


@final
class _Row:
    """One prompt on its way: its generator, what it has said, and whether it has ended."""

    def __init__(
        self, prompt: Ints, sampling: Sampling, *, seed_offset: int, decode: Decode | None, room: int | None
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = sampling.max_new_tokens if room is None else min(sampling.max_new_tokens, room)
        self.decode = decode
        self.generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + seed_offset)
        self.said: list[int] = []
        self.log_probs: list[float] = []
        self.ended = ""

    def choose(self, scores: Float[Tensor, " V"]) -> int:
        """The next token; a row that has ended repeats its last one, which nobody reads."""
        if self.ended:
            return self.said[-1]
        log_probs = torch.log_softmax(scores.cpu(), -1)
        token = self._draw(log_probs)
        self.said.append(token)
        self.log_probs.append(float(log_probs[token]))
        if token in self.sampling.stop_ids or self._met_stop_string():
            self.ended = "stop"
        elif len(self.said) >= self.limit:
            self.ended = "length"
        return token

    def spoken(self) -> Spoken:
        return Spoken(np.array(self.said, dtype=np.int32), self.log_probs, self.ended)

    def _draw(self, log_probs: Float[Tensor, " V"]) -> int:
        settings = self.sampling
        if settings.temperature == 0:
            return int(log_probs.argmax())
        scaled = log_probs / settings.temperature
        if settings.top_k and settings.top_k < len(scaled):
            scaled = scaled.masked_fill(scaled < scaled.topk(settings.top_k).values[-1], float("-inf"))
        if settings.top_p < 1:
            scaled = _nucleus(scaled, settings.top_p)
        return int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=self.generator))

    def _met_stop_string(self) -> bool:
        if not self.sampling.stop or self.decode is None:
            return False
        longest = max(len(text) for text in self.sampling.stop)
        # A token stands for at least a byte, so a stop string cannot span more tokens than it has bytes.
        recent = np.array(self.said[-4 * longest :], dtype=np.int32)
        text = self.decode(recent)
        return any(stop in text for stop in self.sampling.stop)


def _nucleus(scores: Float[Tensor, " V"], top_p: float) -> Float[Tensor, " V"]:
    """Keep the smallest set of tokens whose probability reaches `top_p`, at least one."""
    ordered, indices = scores.sort(descending=True)
    before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
    dropped = indices[before >= top_p]
    return scores.index_fill(0, dropped, float("-inf"))
