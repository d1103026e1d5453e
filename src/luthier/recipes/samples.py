"""Samples: the same held-out prompts, answered by the base and, again and again, by the model in training."""

from __future__ import annotations

from contextlib import nullcontext
from typing import final

import numpy as np

from luthier.data.answers import text_and_answers
from luthier.data.forest import Ints
from luthier.data.prepare import Prepared
from luthier.data.rendering.rendered import Rendered
from luthier.data.tokenizer import Tokenizer
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Speaker
from luthier.store.runs import RunDirectory

CONTEXT_SHARE = 4
"""A row without answers (plain text) is cut here: its first quarter is the prompt, the rest the reference."""


@final
class Samples:
    """Asks the speaker and writes `samples.jsonl`: prompt, reference, and the base's answer or the tuned model's."""

    def __init__(
        self,
        run: RunDirectory,
        model: LanguageModel,
        speaker: Speaker,
        tokenizer: Tokenizer,
        data: Prepared,
        *,
        count: int,
        max_new_tokens: int,
    ) -> None:
        self.run = run
        self.model = model
        self.speaker = speaker
        self.tokenizer = tokenizer
        views = [data.held_out[index] for index in range(len(data.held_out))] or [data.train[0]]
        answers = model.task.name == "seq2seq_lm"
        self.questions = [asked(view) if answers else question(view, max_new_tokens) for view in views[:count]]
        self.sampling = Sampling(max_new_tokens=max_new_tokens, stop_ids=tuple(sorted(data.store.stop_ids)))

    def ask(self, step: int) -> None:
        """Let the model answer; at step 0, before anything is trained, the base."""
        who = "tuned" if step else "base"
        prompts = [prompt for prompt, _ in self.questions]
        with nullcontext() if step else self.model.without_attachments():
            answers = [self._text(spoken.tokens) for spoken in self.speaker.speak(prompts, self.sampling)]
        for index, (prompt, reference) in enumerate(self.questions):
            row = {"step": step, "index": index, "prompt": self._text(prompt), "reference": self._text(reference)}
            self.run.record_sample({**row, who: answers[index]})

    def _text(self, tokens: Ints) -> str:
        special = self.tokenizer.special_ids | self.tokenizer.stop_ids
        return self.tokenizer.decode([int(token) for token in tokens if int(token) not in special])


def asked(view: Rendered) -> tuple[Ints, Ints]:
    """What an encoder-decoder reads of a view, and the right answer to it."""
    read, answers = text_and_answers(view)
    right = next((answer for answer in answers if answer.right), answers[0])
    return read.tokens, right.tokens[1:]


def question(view: Rendered, max_new_tokens: int) -> tuple[Ints, Ints]:
    """The prompt and the reference answer of a view: what stands before its last trained run, and that run.

    Of several answers to a prompt it is the first.
    """
    if view.answers is not None:
        return view.tokens[view.answers == 0], view.tokens[view.answers == 1]
    trained = np.flatnonzero(view.weights)
    if len(trained) == 0:
        return view.tokens, view.tokens[:0]
    gaps = np.flatnonzero(np.diff(trained) > 1)
    first = int(trained[gaps[-1] + 1]) if len(gaps) else int(trained[0])
    if first <= 1:
        first = max(1, min(len(view.tokens) // CONTEXT_SHARE, len(view.tokens) - max_new_tokens))
    return view.tokens[:first], view.tokens[first : int(trained[-1]) + 1]
