"""POST /v1/completions: texts or tokens that are continued as they are; echo and logprobs score given texts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, final

from fastapi import APIRouter, Request, Response

from luthier.infer.request import News, Said
from luthier.infer.request import Request as Asked
from luthier.server.answers import ERRORS, CompletionAnswer
from luthier.server.asking import completion_requests
from luthier.server.bodies import CompletionBody
from luthier.server.metrics import Clock
from luthier.server.serving import Serving
from luthier.server.stream import EventStream, Frame, Grow, whole
from luthier.server.telling import merged, text_log_probs, usage, voices_of
from luthier.server.ticket import Ticket

Part = Mapping[str, Any]


def routes(serving: Serving) -> APIRouter:
    """The route of plain texts."""
    router = APIRouter(tags=["text"])

    @router.post("/v1/completions", response_model=CompletionAnswer, responses=ERRORS)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue one text or several."""
        asked = await completion_requests(serving, body)
        answer = _Answer(serving, body, asked)
        tickets = await serving.worker.submit(asked, whole=not body.stream)
        if body.stream:
            return EventStream(answer.chunks(tickets), tickets, answer.grow)
        return await whole(request, tickets, partial(answer.whole, tickets))

    return router


@final
class _Prompt:
    """One prompt and its choices; choice j of prompt i is number i * n + j of the answer."""

    def __init__(self, serving: Serving, body: CompletionBody, asked: Asked, first: int) -> None:
        self.serving = serving
        self.body = body
        self.asked = asked
        self.first = first
        # Who scores a prompt counts from its end too, as evaluation harnesses do: a silent stop is told there as well.
        every = bool(body.return_tokens_as_token_ids or body.echo)
        self.voices = voices_of(serving, asked, every=every, told=body.logprobs is not None)
        # The mark that begins a text is ours where the prompt came as text: neither it nor its place is told.
        ours = _is_text(body) and serving.tokenizer.adds_bos
        self.scores: list[Said | int] = [] if ours else [int(token) for token in asked.prompt[:1]]
        self.lengths = [0] * len(self.voices)
        self.clock = Clock(serving.metrics)
        self.echo = serving.tokenizer.decode(asked.prompt[int(ours) :]) if body.echo else ""
        self.begun = [False] * len(self.voices)
        self.ids: list[list[int]] = [[] for _ in self.voices]

    @property
    def said(self) -> int:
        """Tokens of all choices."""
        return sum(voice.tokens for voice in self.voices)

    def heard(self, news: News) -> str:
        """The text that news make certain."""
        if news.prompt is not None:
            self.scores += news.prompt
        if self.body.return_token_ids and self.body.max_tokens != 0:
            self.ids[news.choice] += [each.token for each in news.said]
        text = self.voices[news.choice].push(news)
        return "" if self.body.max_tokens == 0 else text

    def plain(self, index: int) -> bool:
        """Whether the next piece of a choice is its text and nothing else, if it is not the last."""
        body = self.body
        return body.logprobs is None and not body.return_token_ids and (self.begun[index] or not body.echo)

    def choice(self, index: int, text: str, *, ended: bool) -> Part:
        """A choice, or a piece of one, with the tokens since the last."""
        voice, known, first = self.voices[index], self.body.logprobs, not self.begun[index]
        said: list[Said | int] = [] if self.body.max_tokens == 0 else list(voice.taken())
        if first and self.body.echo:
            text, said = self.echo + text, [*self.scores, *said]
        self.begun[index] = True
        at, self.lengths[index] = self.lengths[index], self.lengths[index] + len(text)
        told = None if known is None else text_log_probs(
            self.serving.tokenizer, said, at=at, top=known > 0, as_ids=bool(self.body.return_tokens_as_token_ids)
        )  # fmt: skip
        reason = "length" if self.body.max_tokens == 0 else voice.ended
        made = _piece(self.first + index, text, told, reason if ended else None)
        return {**made, **self._ids(index, first=first)} if self.body.return_token_ids else made

    def _ids(self, index: int, *, first: bool) -> Part:
        """The ids since the last piece, and before the first one those of the prompt."""
        found, self.ids[index] = self.ids[index], []
        return {"prompt_token_ids": self.asked.prompt.tolist() if first else None, "token_ids": found}


@final
class _Answer:
    """An answer on its way."""

    def __init__(self, serving: Serving, body: CompletionBody, asked: Sequence[Asked]) -> None:
        self.serving = serving
        self.body = body
        count = body.n or 1
        self.prompts = [_Prompt(serving, body, one, index * count) for index, one in enumerate(asked)]
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                     "model": body.model, "system_fingerprint": serving.fingerprint}  # fmt: skip
        self.frame = Frame(self.head, _piece)

    def usage(self) -> Part:
        """The tokens of all prompts and answers."""
        said = 0 if self.body.max_tokens == 0 else sum(one.said for one in self.prompts)
        return usage(sum(len(one.asked.prompt) for one in self.prompts), said)

    async def whole(self, tickets: Sequence[Ticket]) -> Part:
        """The whole answer, once it is there."""
        # All at once: what waits to be read is bounded.
        pairs = zip(self.prompts, tickets, strict=True)
        texts = await asyncio.gather(*(self._read(prompt, ticket) for prompt, ticket in pairs))
        choices = [
            prompt.choice(index, text, ended=True)
            for prompt, found in zip(self.prompts, texts, strict=True)
            for index, text in enumerate(found)
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def _read(self, prompt: _Prompt, ticket: Ticket) -> list[str]:
        texts = [""] * len(prompt.voices)
        while news := await ticket.news():
            for each in merged(news):
                texts[each.choice] += prompt.heard(each)
        prompt.clock.began(ticket.first)
        self.serving.metrics.said += prompt.said
        return texts

    @property
    def grow(self) -> list[Grow]:
        """What news of each prompt make."""
        return [partial(self._grown, prompt) for prompt in self.prompts]

    async def chunks(self, tickets: Sequence[Ticket]) -> AsyncIterator[Sequence[bytes]]:
        """The answers as they grow, those of several prompts side by side."""
        try:
            if len(tickets) == 1:
                while news := await tickets[0].news():
                    yield self._grown(self.prompts[0], news)
            else:
                async with aclosing(self._several(tickets)) as several:
                    async for prompt, found in several:
                        yield self._grown(prompt, found)
        finally:
            self.serving.metrics.said += sum(prompt.said for prompt in self.prompts)
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield [self.frame.last(self.usage())]

    async def _several(self, tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[_Prompt, Sequence[News]], None]:
        waiting = {
            asyncio.ensure_future(ticket.news()): (prompt, ticket)
            for prompt, ticket in zip(self.prompts, tickets, strict=True)
        }
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    prompt, ticket = waiting.pop(task)
                    if news := task.result():
                        yield prompt, news
                        waiting[asyncio.ensure_future(ticket.news())] = (prompt, ticket)
        finally:
            for task in waiting:
                task.cancel()

    def _grown(self, prompt: _Prompt, news: Sequence[News]) -> list[bytes]:
        """The pieces that news of a prompt's choices make."""
        prompt.clock.heard()
        made = []
        for each in merged(news):
            text = prompt.heard(each)
            if each.ended or not prompt.plain(each.choice):
                if text or each.ended or (self.body.logprobs is not None and each.said):
                    made.append(self.frame(prompt.choice(each.choice, text, ended=bool(each.ended))))
            elif text:
                made.append(self.frame.text(prompt.first + each.choice, text))
        return made


def _piece(index: int, text: str, told: Part | None = None, reason: str | None = None) -> dict[str, Any]:
    """A choice, or a piece of one."""
    return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def _is_text(body: CompletionBody) -> bool:
    """Whether the prompts came as texts."""
    return isinstance(body.prompt, str) or isinstance(body.prompt[0], str)
