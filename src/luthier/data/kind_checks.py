"""What must hold of rows with classes, of an encoder's rows, of an encoder-decoder's, and of answers to one prompt;
`checks.py` calls it.

Idea: as there: only the finished tokens are looked at, and the row and the tokenizer are asked anew. A tokenizer that
folds capitals and accents cannot say a text to the letter, so texts are compared as its own normalizer shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Asked, Choices, Conversation, Judged, Labelled, Preference, Row, Tagged
from luthier.data.forest import Ints
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.rendering.renderer import Renderer
from luthier.data.rendering.seq2seq import Seq2SeqRenderer
from luthier.data.rendering.spans import alike

Invariant = Literal["trained", "stop", "bos", "text", "prompt", "class"]
Finding = tuple[Invariant, str, str] | None
"""A broken promise: which, what was found, what to do."""
_DEFECT = "report this as a defect"
_TEMPLATE, _ASSISTANT, _WRONG, _PAIR = (TOKEN_ROLES.index(name) for name in ("template", "assistant", "wrong", "pair"))


def class_findings(view: Rendered, renderer: Renderer, row: Row) -> Iterator[Finding]:
    """The broken promises of a row of texts or words with classes."""
    yield _whole(view)
    content = row.content
    if view.labels is None or not isinstance(content, Labelled | Tagged):
        yield "class", "the row has no class", _DEFECT
        return
    marked = view.labels >= 0
    if not np.array_equal(marked, view.weights > 0):
        yield "class", "a token with a class has no weight, or one without has some", _DEFECT
    names = renderer.classes.names
    if view.labels.min() < -1 or view.labels.max() >= len(names):
        yield "class", f"a class is none of the {len(names)} that are known", _DEFECT
        return
    places = np.flatnonzero(marked)
    found = [names[label] for label in view.labels[places].tolist()]
    if isinstance(content, Labelled):
        first = 0 if renderer.kind == "encoder" else len(view.tokens) - 1
        if places.tolist() != [first] or found != [content.label]:
            yield "class", f"the row says {found} where its class is {content.label!r}", _DEFECT
    else:
        yield _tags(view, content, places, found)
    yield _types(view)


def encoder_findings(view: Rendered, renderer: Renderer) -> Iterator[Finding]:
    """The broken promises of a window of a text."""
    yield _whole(view)
    special = np.isin(view.tokens, list(renderer.tokenizer.special_ids))
    if not view.weights.any():
        yield "trained", "no token carries weight", "give the row words that the tokenizer knows, or take it out"
    if (view.weights[special] > 0).any() or (view.weights[~special] == 0).any():
        yield "trained", "a control token has weight, or a word has none", _DEFECT
    yield _types(view)


def seq2seq_findings(view: Rendered, renderer: Seq2SeqRenderer, row: Row) -> Iterator[Finding]:
    """The broken promises of a source and its targets."""
    yield _whole(view)
    said = (view.roles == _ASSISTANT) | (view.roles == _WRONG)
    if (view.weights[~said] > 0).any():
        yield "trained", "a token of the source has weight", _DEFECT
    if not view.weights.any():
        yield "trained", "no token is trained", "give the row an answer, or take it out"
    turns = list(runs(said))
    wanted = len(row.content.answers) if isinstance(row.content, Choices) else 1
    right = [start for start, _ in turns if view.roles[start] == _ASSISTANT]
    if len(turns) != wanted or len(right) != 1:
        yield "trained", f"the row has {len(turns)} answers, {len(right)} of them right", _DEFECT
        return
    for start, stop in turns:
        if start == 0 or int(view.tokens[start - 1]) != renderer.start_id:
            yield "prompt", "an answer does not begin behind the token that a decoder starts with", _DEFECT
        ends = np.flatnonzero(np.isin(view.tokens[start:stop], list(renderer.stop_ids)))
        if ends.tolist() != [stop - start - 1]:
            yield "stop", "an answer does not end in one stop token", "use a tokenizer that ends texts, as </s> does"
    yield _source(view, renderer, row, turns[0][0] - 1)


def compared_findings(view: Rendered, renderer: Renderer, row: Row) -> Iterator[Finding]:
    """The broken promises of a prompt with its answers."""
    yield _whole(view)
    content, numbers = row.content, view.answers
    if numbers is None or not isinstance(content, Preference | Judged):
        yield "trained", "the row has no answers that are told apart", _DEFECT
        return
    count = len(content.answers) if isinstance(content, Preference) else 1
    if (np.diff(numbers) < 0).any() or np.unique(numbers).tolist() != list(range(count + 1)):
        yield "trained", f"the row has not its {count} answers in order behind a prompt", _DEFECT
        return
    if view.weights[numbers == 0].any():
        yield "trained", "a token of the prompt has weight", _DEFECT
    stops = list(renderer.stop_ids)
    for number in range(1, count + 1):
        of_it = numbers == number
        good = number == 1 if isinstance(content, Preference) else content.good
        if (view.roles[of_it] == (_WRONG if good else _ASSISTANT)).any():
            yield "trained", f"answer {number} is taken for a {'bad' if good else 'good'} one", _DEFECT
        trained = view.weights[of_it] > 0
        if not trained[-1] or int(view.tokens[of_it][-1]) not in stops:
            yield "stop", f"answer {number} does not end in a trained stop token", "choose another data.template"
        for start, stop in runs(trained):
            ends = np.flatnonzero(np.isin(view.tokens[of_it][start:stop], stops))
            if ends.tolist() != [stop - start - 1]:
                yield "stop", f"answer {number} has not one stop token at its end", "choose another data.template"
    fed = renderer.prompt_ids(content.asked.messages, content.asked.tools)
    yield _fed(view.tokens[numbers == 0], fed, renderer)


def asked_findings(view: Rendered, renderer: Renderer, row: Row) -> Iterator[Finding]:
    """The broken promises of a prompt alone."""
    yield _whole(view)
    if view.weights.any():
        yield "trained", "a token of the prompt has weight", _DEFECT
    if isinstance(row.content, Asked):
        fed = renderer.prompt_ids(row.content.asked.messages, row.content.asked.tools)
        yield _fed(view.tokens, fed, renderer)


def _fed(prompt: Ints, fed: Ints, renderer: Renderer) -> Finding:
    """A prompt is what inference feeds, token for token, or the end of it where the beginning was cut away."""
    head = 1 if renderer.tokenizer.adds_bos and len(prompt) and int(prompt[0]) == renderer.tokenizer.bos_id else 0
    cut = renderer.over_length == "truncate" and len(prompt) < len(fed)
    kept = prompt[head:]
    same = alike(fed[len(fed) - len(kept) :], kept) if cut else alike(fed, prompt)
    return None if same else ("prompt", "inference would feed other tokens than the row has", _DEFECT)


def text_finding(view: Rendered, renderer: Renderer) -> Finding:
    """The tokens of each unbroken run of words of one role, read back, say the text that their spans name."""
    words = ~np.isin(view.tokens, list(renderer.tokenizer.special_ids)) & (view.roles != _TEMPLATE)
    for start, stop in (run for role in np.unique(view.roles) for run in runs(words & (view.roles == role))):
        text = view.text[int(view.spans[start, 0]) : int(view.spans[start:stop, 1].max())]
        if not renderer.tokenizer.reads_alike(view.tokens[start:stop], text):
            read = renderer.tokenizer.decode(view.tokens[start:stop])
            return (
                "text",
                f"the tokens read as {read[:40]!r} where the text says {text[:40]!r}",
                "the tokenizer cannot say this text; use another tokenizer or change the text",
            )
    return None


def runs(mask: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """The [start, stop) of each unbroken run of True."""
    # Bytes are searched faster than an array is taken apart.
    raw = mask.astype(np.bool_).tobytes()
    stop = 0
    while (start := raw.find(1, stop)) >= 0:
        stop = raw.find(0, start)
        stop = len(raw) if stop < 0 else stop
        yield start, stop


def _whole(view: Rendered) -> Finding:
    optional = [values for values in (view.labels, view.types) if values is not None]
    if any(len(values) != len(view.tokens) for values in (view.weights, view.roles, view.spans, *optional)):
        return "trained", "tokens and what is said of them have different lengths", _DEFECT
    if not np.isfinite(view.weights).all() or (view.weights < 0).any():
        return "trained", "a loss weight is negative or not finite", "give weights of 0 or more"
    return None


def _tags(view: Rendered, content: Tagged, places: NDArray[np.int64], found: list[str]) -> Finding:
    """Each word has its own tag, at one token of it."""
    ends = np.cumsum([len(word) + 1 for word in content.words])
    words = np.searchsorted(ends, np.maximum(view.spans[places, 1] - 1, 0), side="right")
    if len(set(words.tolist())) != len(words):
        return "class", "a word has two classes", _DEFECT
    for word, name in zip(words.tolist(), found, strict=True):
        if content.tags[word] != name:
            return "class", f"the word {content.words[word]!r} says {name!r}, not {content.tags[word]!r}", _DEFECT
    return None


def _types(view: Rendered) -> Finding:
    if view.types is not None and (view.types[(view.roles != _PAIR) & (view.roles != _TEMPLATE)] != 0).any():
        return "text", "a token of the first text has another type than 0", _DEFECT
    return None


def _source(view: Rendered, renderer: Seq2SeqRenderer, row: Row, stop: int) -> Finding:
    """What inference feeds the encoder is what the row has, token for token, unless its end was cut away."""
    if not isinstance(row.content, Conversation):
        return None
    answers = [index for index, message in enumerate(row.content.messages) if message.role == "assistant"]
    fed = renderer.prompt_ids(row.content.messages[: answers[-1]], row.content.tools)
    if len(fed) > stop == renderer.max_tokens and renderer.over_length == "truncate":
        return None
    if not np.array_equal(fed, view.tokens[:stop]):
        return "prompt", "inference would feed the encoder other tokens than the row has", _DEFECT
    return None
