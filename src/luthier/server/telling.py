"""From the engine's news to what clients read: text, log-probabilities, why it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from luthier.data.tokenizer import Tokenizer
from luthier.infer.request import News, Request, Said
from luthier.infer.text import TextStream
from luthier.server.serving import Serving

LOWEST: Final = -9999.0
"""JSON has no minus infinity."""


@final
@dataclass
class Voice:
    """One choice as it grows: `push` takes its news and gives the text that is certain with them.

    Where tokens are told beside the text, `said` keeps those that can be heard, or `every` one.
    """

    stream: TextStream
    silent: frozenset[int]
    every: bool = False
    told: bool = False
    said: list[Said] = field(default_factory=list)
    tokens: int = 0
    ended: str = ""

    def push(self, news: News) -> str:
        """The new text; `said` then holds the new tokens that are part of it, if they are `told`."""
        self.tokens += len(news.said)
        if self.told and self.stream.stopped is None:
            self.said += [each for each in news.said if self.every or each.token not in self.silent]
        text = self.stream.push_all([each.token for each in news.said])
        if news.ended:
            text += self.stream.end()
            self.ended = "stop" if self.stream.stopped is not None else news.ended
        return text

    def taken(self) -> list[Said]:
        """The tokens since the last call."""
        said, self.said = self.said, []
        return said


def voices_of(
    serving: Serving, request: Request, *, loud: frozenset[int] = frozenset(), every: bool = False, told: bool = False
) -> list[Voice]:
    """A voice for each choice of a request. Control tokens are not heard, but for those of `loud`."""
    silent = (serving.tokenizer.special_ids | set(request.sampling.stop_ids)) - loud
    stop, tokenizer = request.sampling.stop, serving.tokenizer
    skip, spellings = frozenset(silent), tokenizer.spellings
    decode = tokenizer.decode if spellings is None else spellings.text
    spelled = spellings is not None
    return [
        Voice(TextStream(decode, stop, skip=skip, after=request.prompt, spelled=spelled), skip, every, told)
        for _ in range(request.choices)
    ]


def merged(news: Sequence[News]) -> Sequence[News]:
    """One piece of news for each choice: what came while nobody looked is told at once."""
    if len(news) == 1:
        return news
    by_choice: dict[int, list[News]] = {}
    for each in news:
        by_choice.setdefault(each.choice, []).append(each)
    return [_joined(found) for found in by_choice.values()]


def _joined(news: Sequence[News]) -> News:
    """The news of one choice as one."""
    prompt = next((each.prompt for each in news if each.prompt is not None), None)
    said, last = tuple([said for each in news for said in each.said]), news[-1]
    return News(last.request, last.choice, said, last.ended, prompt, last.failure)


def chat_log_probs(tokenizer: Tokenizer, said: Sequence[Said]) -> dict[str, Any]:
    """Log-probabilities as chat completions tell them."""
    def one(token: int, log_prob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token)
        return {"token": text, "logprob": finite(log_prob), "bytes": list(text.encode())}

    content = [
        {**one(each.token, each.log_prob), "top_logprobs": [one(token, log_prob) for token, log_prob in each.likeliest]}
        for each in said
    ]
    return {"content": content, "refusal": None}


def text_log_probs(
    tokenizer: Tokenizer, said: Sequence[Said | int], *, at: int = 0, top: bool, as_ids: bool = False
) -> dict[str, Any]:
    """Log-probabilities as completions tell them; a bare number is a token of which none is known, the first one.

    Tokens are texts, or `token_id:ID`, which no two of them share.
    """
    texts = [tokenizer.token_text(each if isinstance(each, int) else each.token) for each in said]
    offsets = []
    for text in texts:
        offsets.append(at)
        at += len(text)
    tops: list[dict[str, float] | None] | None = None
    if top:
        tops = [None if isinstance(each, int) else _top(tokenizer, each, as_ids=as_ids) for each in said]
    return {
        "tokens": [_id(each) for each in said] if as_ids else texts,
        "token_logprobs": [None if isinstance(each, int) else finite(each.log_prob) for each in said],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def finite(log_prob: float) -> float:
    """A log-probability that JSON can hold."""
    return log_prob if math.isfinite(log_prob) else LOWEST


def usage(prompt: int, said: int) -> dict[str, int]:
    """How many tokens were read and said."""
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}


def _top(tokenizer: Tokenizer, said: Said, *, as_ids: bool) -> dict[str, float]:
    if as_ids:
        return {_id(token): finite(log_prob) for token, log_prob in (*said.likeliest, (said.token, said.log_prob))}
    # Two tokens may read alike; the likelier one stays. The token that was said is always among them.
    found = {tokenizer.token_text(token): finite(log_prob) for token, log_prob in reversed(said.likeliest)}
    found.setdefault(tokenizer.token_text(said.token), finite(said.log_prob))
    return found


def _id(token: Said | int) -> str:
    return f"token_id:{token if isinstance(token, int) else token.token}"
