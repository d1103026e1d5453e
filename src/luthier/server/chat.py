"""POST /v1/chat/completions: a conversation, and the answer to it; whole or as it grows."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, final

from fastapi import APIRouter, Request, Response

from luthier.data.tool_calls import CLOSE, OPEN, Called, CallReader
from luthier.infer.request import News
from luthier.infer.request import Request as Asked
from luthier.server.answers import ERRORS, ChatAnswer
from luthier.server.asking import chat_request, forced_tools
from luthier.server.bodies import ChatBody
from luthier.server.metrics import Clock
from luthier.server.serving import Serving
from luthier.server.stream import EventStream, Frame, whole
from luthier.server.telling import chat_log_probs, merged, usage, voices_of
from luthier.server.ticket import Ticket

Part = Mapping[str, Any]


def routes(serving: Serving) -> APIRouter:
    """The route of conversations."""
    router = APIRouter(tags=["text"])

    @router.post("/v1/chat/completions", response_model=ChatAnswer, responses=ERRORS)
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        asked = await chat_request(serving, body)
        answer = _Answer(serving, body, asked)
        [ticket] = await serving.worker.submit([asked], whole=not body.stream)
        if body.stream:
            return EventStream(answer.chunks(ticket), [ticket], [answer.grow])
        return await whole(request, [ticket], partial(answer.whole, ticket))

    return router


@final
class _Answer:
    """An answer on its way: its choices, and what the client asked to be told of them."""

    def __init__(self, serving: Serving, body: ChatBody, asked: Asked) -> None:
        self.serving = serving
        self.body = body
        self.prompt = len(asked.prompt)
        self.clock = Clock(serving.metrics)
        calls = bool(body.tools) and body.tool_choice != "none"
        marks = map(serving.tokenizer.backend.token_to_id, (OPEN, CLOSE) if calls else ())
        loud = frozenset(mark for mark in marks if mark is not None)
        self.voices = voices_of(serving, asked, loud=loud, told=bool(body.logprobs))
        forced = bool(forced_tools(body))
        single = body.parallel_tool_calls is False
        self.readers = [CallReader(forced=forced, single=single) if calls else None for _ in self.voices]
        self.told = [0] * len(self.voices)
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model,
                     "system_fingerprint": serving.fingerprint}  # fmt: skip
        self.frame = Frame({**self.head, "object": "chat.completion.chunk"}, _said)

    @property
    def said(self) -> int:
        """Tokens of all choices."""
        return sum(voice.tokens for voice in self.voices)

    async def whole(self, ticket: Ticket) -> Part:
        """The whole answer, once it is there."""
        parts: list[list[str | Called]] = [[] for _ in self.voices]
        while news := await ticket.news():
            for each in merged(news):
                parts[each.choice] += self._heard(each)
        self.clock.began(ticket.first)
        self.serving.metrics.said += self.said
        choices = [self._choice(index, found) for index, found in enumerate(parts)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(self.prompt, self.said)}

    async def chunks(self, ticket: Ticket) -> AsyncIterator[Sequence[bytes]]:
        """The answer as it grows."""
        yield [self.frame(_piece(index, {"role": "assistant", "content": ""})) for index in range(len(self.voices))]
        try:
            while news := await ticket.news():
                yield self.grow(news)
        finally:
            self.serving.metrics.said += self.said
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield [self.frame.last(usage(self.prompt, self.said))]

    def grow(self, news: Sequence[News]) -> list[bytes]:
        """The pieces that news of all choices make."""
        self.clock.heard()
        return [piece for each in merged(news) for piece in self._grown(each)]

    def _heard(self, news: News) -> list[str | Called]:
        """The pieces that news of a choice make certain."""
        text, reader = self.voices[news.choice].push(news), self.readers[news.choice]
        if reader is None:
            return [text] if text else []
        return reader.push(text) + (reader.end() if news.ended else [])

    def _grown(self, news: News) -> list[bytes]:
        """The pieces that news of a choice make."""
        voice, index = self.voices[news.choice], news.choice
        if not news.ended and not self.body.logprobs and self.readers[index] is None:
            text = voice.push(news)
            return [self.frame.text(index, text)] if text else []
        made: list[dict[str, Any]] = []
        for piece in self._heard(news):
            if isinstance(piece, Called):
                made.append(_piece(index, {"tool_calls": [piece.as_plain(self.told[index])]}))
                self.told[index] += 1
            else:
                made.append(_said(index, piece))
        said = voice.taken()
        if self.body.logprobs and said:
            made = made or [_piece(index, {})]
            made[-1]["logprobs"] = chat_log_probs(self.serving.tokenizer, said)
        if voice.ended:
            made.append(_piece(index, {}, self._reason(index)))
        return [self.frame(choice) for choice in made]

    def _choice(self, index: int, found: Sequence[str | Called]) -> Part:
        calls = [one.as_plain() for one in found if isinstance(one, Called)]
        text = "".join(one for one in found if isinstance(one, str))
        content = None if calls and not text.strip() else text
        message = {"role": "assistant", "content": content, "refusal": None}
        voice = self.voices[index]
        return {
            "index": index,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": chat_log_probs(self.serving.tokenizer, voice.taken()) if self.body.logprobs else None,
            "finish_reason": self._reason(index),
        }

    def _reason(self, index: int) -> str:
        reader, voice = self.readers[index], self.voices[index]
        return "tool_calls" if reader is not None and reader.calls and voice.ended == "stop" else voice.ended


def _said(index: int, text: str) -> dict[str, Any]:
    """A piece of a choice that is text."""
    return _piece(index, {"content": text})


def _piece(index: int, delta: Part, reason: str | None = None) -> dict[str, Any]:
    """A piece of a choice."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
