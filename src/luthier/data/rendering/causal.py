"""The one way from a row to the tokens of a causal decoder: ids, roles, spans and loss weights in one pass.

Idea: what is trained follows from renderings (`turns.py`) and from token ids that are compared, never from marker
strings. A trained turn is everything that the model has to say after what inference shows it, up to and including the
one token that ends the turn; what the template writes after that token is context. The ids of each prompt are a prefix
of the ids of its row, because that is what inference will feed. What cannot be made so is refused with its address.

The class of a text stands at its last token, and that of a word at the word's last: these have seen all of it.

Use it through `render`; `prompt_ids` is what generation feeds; `stop_ids` is where generation has to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from luthier.core.errors import DataError, RecipeError, TemplateError
from luthier.data.conversation import (
    WORDS,
    Asked,
    Content,
    Conversation,
    Judged,
    Labelled,
    Message,
    Preference,
    Row,
    Tagged,
    Text,
)
from luthier.data.forest import Ints
from luthier.data.rendering.batch import Batch, Tokens
from luthier.data.rendering.classified import ClassRenderer
from luthier.data.rendering.compared import MOST_ANSWERS, Part, joined, longest, shortened
from luthier.data.rendering.cutting import beginning_cut
from luthier.data.rendering.document import document
from luthier.data.rendering.layout import Filled, Layouts
from luthier.data.rendering.marked import plain, plain_words
from luthier.data.rendering.rendered import Rendered
from luthier.data.rendering.renderer import OverLength, Staged, Stages, TrainOn, refused
from luthier.data.rendering.shown import Notice, Shown, show, turn_weights
from luthier.data.rendering.spans import alike, lead, message_weights, role_of_each
from luthier.data.rendering.template import Template, Wanted
from luthier.data.rendering.turns import Answer, Stage, View, lay_out, placed
from luthier.data.rendering.weighed import Trained, trained_turn, weighed
from luthier.data.tokenizer import Tokenizer

_ENCODED = 64
"""Texts of one row whose tokens are remembered."""


@final
class CausalRenderer(ClassRenderer):
    """Rows to tokens for a causal decoder: one tokenizer, one template."""

    kind = "causal"
    takes = (*WORDS, "labelled", "tagged", "preference", "judged", "asked")
    at_last = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        *,
        train_on: TrainOn = "answers",
        over_length: OverLength = "raise",
        max_tokens: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            tokenizer, template, train_on=train_on, over_length=over_length, max_tokens=max_tokens, classes=classes
        )
        self._encoded: dict[str, tuple[Ints, Ints]] = {}
        self._ahead: dict[str, tuple[Ints, Ints]] = {}
        self._layouts = Layouts(tokenizer, self._outlines)
        self._tokens_ahead: Tokens | None = None

    def stage(self, row: Row) -> Staged:
        """The row as the template gets it, or why it cannot get it, and what there is to notice about that."""
        self._staged_rows += 1
        if isinstance(row.content, Conversation) and self.train_on != "all" and self.native_rows is not None:
            filled = self._layouts.fill(row.content)
            if filled is not None:
                return Staged(row, filled, ())
        return self._staged(row)

    def apart(self, staged: Staged) -> Staged:
        """The row staged so that it can be finished by itself."""
        if not isinstance(staged.ready, Filled):
            return staged
        one = self._staged(staged.row)
        self.foresee([one])
        if self._tokens_ahead is not None:
            self._ahead.update(self._tokens_ahead.of_row(staged.ready))
        return one

    def learn(self, staged: Sequence[Staged]) -> None:
        """See what the outlines of these rows say of all rows like them."""
        for one in staged:
            if isinstance(one.row.content, Conversation) and one.stages:
                self._layouts.learn(one.row.content, one.stages[0])

    def _staged(self, row: Row) -> Staged:
        told: list[tuple[str, str]] = []

        def notice(text: str, example: str = "") -> None:
            told.append((text, example))

        content = row.content
        try:
            if isinstance(content, Conversation):
                return Staged(row, (self._stage(content, notice),), told)
            if isinstance(content, Preference | Judged):
                return Staged(row, self._stages(content, notice), told)
            if isinstance(content, Asked):
                return Staged(row, (self._stage(content.asked, notice, answered=False),), told)
            return Staged(row, content, told)
        except DataError as error:
            return Staged(row, placed(error, row.where), told)

    def encode_ahead(self, staged: Sequence[Staged]) -> None:
        """Make the tokens of all texts that these rows are known to need, at once; kept until the next call."""
        laid = [(one.row, one.ready) for one in staged if isinstance(one.ready, Filled)]
        self._tokens_ahead = Tokens.of([row for row, _ in laid], [filled for _, filled in laid], self.tokenizer)
        texts: dict[str, None] = {}
        for one in staged if len(laid) < len(staged) else ():
            if isinstance(one.ready, Text):
                texts[one.ready.text] = None
            if not isinstance(one.row.content, Asked):
                texts.update(dict.fromkeys(text for stage in one.stages for text in stage.texts()))
        self._ahead = {}
        self._ahead = dict(zip(texts, self.tokenizer.encode_closed(list(texts)), strict=True))

    def weigh_ahead(self) -> Batch | None:
        """The rows that were encoded last and are laid out, with all that is known of them; None where there are none.

        Each of them may be accepted or finished.
        """
        ahead, rows = self._tokens_ahead, self.native_rows
        if ahead is None or rows is None:
            return None
        return ahead.weighed(rows, self.tokenizer, longest=self.max_tokens)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
        """What inference feeds to get the answer that follows `messages`."""
        shown = show(Conversation(tuple(messages), tuple(tools)), self.template, _quiet)
        wanted = Wanted([message.fields for message in shown], tools, add_generation_prompt=True)
        return self._encode(self._write(wanted), _quiet)[0].copy()

    # Conversations

    def _stages(self, content: Preference | Judged, notice: Notice) -> Stages:
        """The prompt with each of its answers; of these the assistant's turns are trained."""
        if self.train_on == "all":
            raise RecipeError("data.train_on is 'all'", allowed="answers or last, where answers are compared or judged")
        answers = content.answers if isinstance(content, Preference) else (content.answer,)
        if len(answers) > MOST_ANSWERS:
            raise DataError(f"{len(answers)} answers to one prompt", allowed=f"at most {MOST_ANSWERS}")
        if any(message.weight not in (None, 0, 1) for answer in answers for message in answer):
            raise DataError(
                "a message of an answer has a weight of its own", allowed="0 or 1: answers are compared as wholes"
            )
        asked = content.asked
        whole = [Conversation((*asked.messages, *answer), asked.tools) for answer in answers]
        # As shown: the results of several tools may have become one message.
        given = len(show(asked, self.template, _quiet))
        return tuple(self._stage(each, notice, given=given) for each in whole)

    def _stage(
        self, conversation: Conversation, notice: Notice, *, given: int = 0, answered: bool = True
    ) -> Stage:
        """A conversation; what follows the first `given` shown messages may be trained, if it is `answered`."""
        if not conversation.messages:
            raise DataError("the conversation has no message")
        for message in conversation.messages:
            if self.tokenizer.specials.within(message.content):
                notice("a message contains the text of a control token, which is read as that token")
        shown = show(conversation, self.template, notice)
        trained = turn_weights(shown, last=self.train_on == "last") if answered else {}
        weights = {index: weight for index, weight in trained.items() if index >= given}
        return Stage(shown, self._write, conversation.tools, weights)

    def _write(self, wanted: Wanted) -> str:
        """The one place where the template is asked, but for what was asked of it ahead."""
        for stage in self._now.stages if self._now is not None else ():
            if (known := stage.prompt_like(wanted)) is not None:
                return known
        ask = wanted.add_generation_prompt
        return self.template.render(wanted.messages, tools=wanted.tools, add_generation_prompt=ask)

    def _views(self, row: Row, ready: Stages | Content) -> list[Rendered]:
        self._encoded.clear()
        if isinstance(ready, tuple):
            content = row.content
            if isinstance(content, Preference):
                right = [place == 0 for place in range(len(content.answers))]
                return self._compared(row, ready, right, content.scores)
            if isinstance(content, Judged):
                return self._compared(row, ready, [content.good], None)
            return self._asked(row, ready[0]) if isinstance(content, Asked) else self._talk(row, ready[0])
        if isinstance(ready, Text):
            return self._document(row, ready)
        if isinstance(ready, Labelled):
            return self._labelled(row, ready, plain(self.tokenizer, ready.text, ready.pair))
        if isinstance(ready, Tagged):
            return self._tagged(row, ready, plain_words(self.tokenizer, ready.words))
        raise refused(row, self)

    def _talk(self, row: Row, stage: Stage) -> list[Rendered]:
        views = lay_out(stage, self._notice)
        if self.train_on == "all":
            # Only the last view holds the whole conversation; earlier ones would train its words twice.
            views = views[-1:]
        made: list[Rendered] = []
        for view in views:
            for rendered, trained in self._tokens(row, view, stage.shown):
                made.extend(self._fit(row, rendered, trained))
        return made

    def _compared(
        self, row: Row, stages: Stages, right: Sequence[bool], scores: Sequence[float] | None
    ) -> list[Rendered]:
        """One view of a prompt with its answers."""
        parts = []
        for stage in stages:
            views = lay_out(stage, self._notice)
            made = [each for view in views for each in self._tokens(row, view, stage.shown)]
            if len(made) != 1 or not made[0][1]:
                raise TemplateError(
                    f"an answer becomes {len(made)} texts",
                    allowed="answers of one assistant message, or a template that shows turns alike once others follow",
                )
            rendered, trained = made[0]
            parts.append(Part(rendered, trained[0].start, trained[-1].stop, views[0].answers[0].start))
        view = joined(row.number, parts, right, scores)
        fate = self._fate(row, longest(view), "the prompt with its longest answer")
        if fate == "cut" and self.max_tokens is not None:
            cut = shortened(view, self.max_tokens, self.tokenizer.bos_id if self.tokenizer.adds_bos else None)
            if cut is None:
                self.counts.answers_too_long += 1
                return []
            self.counts.truncated += 1
            return [cut]
        return [view] if fate == "fits" else []

    def _asked(self, row: Row, stage: Stage) -> list[Rendered]:
        """One view of a prompt alone. One that is too long is dropped where others are truncated: half a question is
        another one."""
        text, bounds = stage.prompt()
        tokens, spans = self._encode(text, self._notice)
        fate = self._fate(row, len(tokens), "the prompt")
        if fate == "cut":
            self.counts.dropped += 1
        if fate != "fits":
            return []
        roles = role_of_each(spans, View(text, (), bounds), stage.shown)
        return [Rendered(row.number, text, tokens, np.zeros(len(tokens), np.float32), roles, spans)]

    def _tokens(self, row: Row, view: View, shown: Sequence[Shown]) -> list[tuple[Rendered, list[Trained]]]:
        notice = self._notice
        tokens, spans = self._encode(view.text, notice)
        prompts: list[Ints] = []
        for answer in view.answers:
            prompt = self._encode(view.text[: answer.start], _quiet)[0]
            if not alike(tokens[: len(prompt)], prompt):
                break
            prompts.append(prompt)
        if len(prompts) < len(view.answers):
            if len(view.answers) > 1:
                # Each answer then follows exactly the ids that inference feeds, history included.
                notice("a token would straddle the start of an answer: one view for each answer")
                alone = [view.alone(answer) for answer in view.answers]
                alone = alone[-1:] if self.train_on == "all" else alone
                return [made for one in alone for made in self._tokens(row, one, shown)]
            tokens, spans, prompts = self._in_two(view)
        rows, ids = None if self.train_on == "all" else self.native_rows, self.tokenizer
        if rows is not None and (
            made := weighed(tokens, spans, view=view, shown=shown, prompts=prompts, tokenizer=ids, rows=rows)
        ):
            roles, weights, turns = made
            return [(Rendered(row.number, view.text, tokens, weights, roles, spans), turns)]
        trained = [
            self._trained(tokens, spans, answer, len(prompt))
            for answer, prompt in zip(view.answers, prompts, strict=True)
        ]
        roles = role_of_each(spans, view, shown)
        weights = np.zeros(len(tokens), np.float32)
        if self.train_on == "all":
            weights = message_weights(spans, view, shown)
        for turn in trained:
            weights[turn.start : turn.stop] = turn.weight
        if len(weights):
            weights[0] = 0.0
        if self.tokenizer.bos_id is not None and self.tokenizer.adds_bos:
            weights[: lead(tokens, self.tokenizer.bos_id)] = 0.0
        return [(Rendered(row.number, view.text, tokens, weights, roles, spans), trained)]

    def _in_two(self, view: View) -> tuple[Ints, Ints, list[Ints]]:
        """Prompt and answer encoded apart, where a token of the whole text would straddle the boundary."""
        answer = view.answers[0]
        prompt, prompt_spans = self._encode(view.text[: answer.start], _quiet)
        rest = self.tokenizer.encode_after(prompt, view.text[answer.start :])
        if rest is None:
            raise TemplateError(
                f"the answer of message {answer.message + 1} has no encoding that continues its prompt",
                do="choose another template with data.template",
            )
        self._notice("prompt and answer were encoded apart: a token would straddle the start of the answer")
        tokens = np.concatenate([prompt, rest[0]])
        return tokens, np.concatenate([prompt_spans, rest[1] + answer.start]).astype(np.int32), [prompt]

    def _trained(self, tokens: Ints, spans: Ints, answer: Answer, start: int) -> Trained:
        """An answer up to its stop token, which generation stops at from now on."""
        turn = trained_turn(tokens, spans, answer, start=start, tokenizer=self.tokenizer)
        stop = int(tokens[turn.stop - 1])
        if stop not in self.tokenizer.stop_ids:
            self._found_stops.add(stop)
            ends = self.tokenizer.token_text(stop)
            self._notice(f"{ends!r} ends answers but is no stop token of the model; it is added")
        return turn

    # Length

    def _fit(self, row: Row, view: Rendered, trained: Sequence[Trained]) -> list[Rendered]:
        """`view` if it is not too long, and otherwise what `over_length` makes of it."""
        fate = self._fate(row, len(view.tokens), "the conversation")
        if fate == "cut" and trained and self.max_tokens is not None:
            bos = self.tokenizer.bos_id if self.tokenizer.adds_bos else None
            cut = beginning_cut(view, trained, self.max_tokens, bos=bos, notice=self._notice)
            self.counts.truncated += cut is not None
            self.counts.answers_too_long += cut is None
            return [] if cut is None else [cut]
        if fate == "cut":
            self.counts.dropped += 1
        return [view] if fate == "fits" else []

    # Tokens

    def _document(self, row: Row, content: Text) -> list[Rendered]:
        # Nobody asks for a text again, and it may be long.
        encoded = self._ahead.pop(content.text, None) or self.tokenizer.encode_closed([content.text])[0]
        return document(row.number, content.text, encoded, self.tokenizer, self.max_tokens, notice=self._notice)

    def _encode(self, text: str, notice: Notice) -> tuple[Ints, Ints]:
        """The ids of a rendered text, with exactly one BOS at its start where the tokenizer adds one."""
        known = self._ahead.get(text) or self._encoded.get(text)
        if known is None:
            # The prompt of a row is asked for again when the row is checked.
            if len(self._encoded) >= _ENCODED:
                self._encoded.clear()
            known = self._encoded[text] = self.tokenizer.encode_closed([text])[0]
        tokens, spans = known
        bos = self.tokenizer.bos_id
        if bos is None or not self.tokenizer.adds_bos:
            return tokens, spans
        written = lead(tokens, bos)
        if written > 1:
            notice("the template writes BOS more than once at the start; one is kept")
            return tokens[written - 1 :], spans[written - 1 :]
        if written == 0 and not text.lstrip().startswith(self.bos_text):
            notice("the template writes no BOS; it is added")
            tokens = np.concatenate([np.array([bos], np.int32), tokens])
            spans = np.concatenate([np.zeros((1, 2), np.int32), spans])
        return tokens, spans


def _quiet(text: str, example: str = "") -> None:
    """Prompts are encoded again to compare ids; what is noticed in them was counted with the whole text."""
