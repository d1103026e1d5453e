"""A model behind HTTP that texts are asked of: a judge that somebody else serves.

Idea: what a judge is asked is messages and the beginning of an answer, which engines take as a last message of the
assistant that is gone on with (`continue_final_message` of vLLM and SGLang; llama.cpp's server does it unasked). How
likely a continuation is, is read from the likeliest next tokens that the engine tells. So a continuation has to be one
token, as the digits of a verdict on a pair are; for longer ones nothing is guessed.
Cost: a request for each text, `at_once` of them under way at a time, each asked again while there is `patience`.
Use when: the judge is larger than this machine. Not when: a rating from 1 to 10 is asked for, of which 10 may be two
tokens; or the engine cannot go on with an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar, final

from luthier.core.errors import RecipeError
from luthier.infer.patience import Patience
from luthier.infer.wire import RemoteError, Wire
from luthier.model.scorer import Begun, Likely, NoRoom, Said

_LIKELIEST: Final = 20
"""How many next tokens engines tell at most."""
_NOT_TOLD: Final = -30.0
"""The log-probability of what is not among them: no more than this small part of what is told is lost."""
_REFUSED: Final = (400, 413, 422)
_TOO_LONG: Final = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)
"""How vLLM, SGLang and llama.cpp's server say that a question is too long for them; their codes say only that it is
refused."""
_PATH: Final = "/v1/chat/completions"
T = TypeVar("T")


@final
@dataclass(frozen=True)
class RemoteTextModel:
    """A TextModel of the engine at the other end of a wire; `model` is its name there, empty where it has one only."""

    wire: Wire
    model: str = ""
    at_once: int = 8
    patience: Patience = field(default_factory=Patience)

    def require(self) -> None:
        """Raise RecipeError where the engine has no such model, RemoteError where it cannot be asked."""
        self._name()

    def go_on(
        self, asked: Sequence[Begun], *, most_tokens: int, temperature: float, seed: int
    ) -> list[Said | NoRoom]:
        """One continuation of each."""
        name = self._name()
        return self._all(asked, lambda one: self._said(one, name, most_tokens, temperature, seed))

    def likely(self, asked: Sequence[Begun], continuations: Sequence[str]) -> list[list[Likely] | NoRoom]:
        """How likely each continuation is as the next token. Raises RecipeError for one that cannot be a token."""
        if long := [text for text in continuations if len(text.strip()) > 1]:
            raise RecipeError(
                f"how likely {long[0]!r} is cannot be read from an engine's next tokens",
                allowed="continuations of one character, such as the verdicts 1 and 2 on a pair",
                do="name a judge that is loaded here: a run, a folder or a hub id",
            )
        name = self._name()
        return self._all(asked, lambda one: self._likely(one, name, continuations))

    def _name(self) -> str:
        answer = self.patience.get(lambda: self.wire.get("/v1/models"))
        listed = answer.body.get("data") if answer.fine and isinstance(answer.body, Mapping) else None
        names = [str(one["id"]) for one in listed or () if isinstance(one, Mapping) and "id" in one]
        if not names:
            raise RemoteError(f"{self.wire.shown}/v1/models answered {answer.status}: {answer.words}")
        if self.model not in names and (self.model or len(names) > 1):
            raise RecipeError(
                f"{self.wire.shown} has no model {self.model!r}", allowed=", ".join(names),
                do=f"name one: {self.wire.shown}#{names[0]}",
            )  # fmt: skip
        return self.model or names[0]

    def _all(self, asked: Sequence[Begun], ask: Callable[[Begun], T]) -> list[T]:
        if not asked:
            return []
        waits = self.patience.waits
        with ThreadPoolExecutor(min(self.at_once, len(asked))) as pool:
            found = [pool.submit(self.patience.get, partial(ask, one)) for one in asked]
            try:
                with waits():
                    for each in found:
                        waits.until(partial(_is_over, each))
                        # The first that has failed ends it for all.
                        each.result()
                return [each.result() for each in found]
            finally:
                for each in found:
                    each.cancel()

    def _said(self, asked: Begun, name: str, most_tokens: int, temperature: float, seed: int) -> Said | NoRoom:
        choice = self._choice(asked, name, max_tokens=most_tokens, temperature=temperature, seed=seed)
        if isinstance(choice, NoRoom):
            return choice
        message = choice.get("message")
        text = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(text, str):
            raise RemoteError(f"{self.wire.shown}{_PATH} answered {choice!r:.200}", allowed="a choice with a message")
        return Said(text, "length" if choice.get("finish_reason") == "length" else "stop")

    def _likely(self, asked: Begun, name: str, continuations: Sequence[str]) -> list[Likely] | NoRoom:
        choice = self._choice(asked, name, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=_LIKELIEST)
        if isinstance(choice, NoRoom):
            return choice
        told = choice.get("logprobs")
        content = told.get("content") if isinstance(told, Mapping) else None
        if not content:
            raise RemoteError(f"{self.wire.shown}{_PATH} told no log-probabilities", allowed="an engine that has them")
        found = {str(one.get("token")): float(one.get("logprob", _NOT_TOLD)) for one in content[0]["top_logprobs"]}
        return [Likely(max(found.get(text, _NOT_TOLD), _NOT_TOLD)) for text in continuations]

    def _choice(self, asked: Begun, name: str, **more: Any) -> Mapping[str, Any] | NoRoom:
        messages = [{"role": message.role, "content": message.content} for message in asked.messages]
        begun: dict[str, Any] = {}
        if asked.begun:
            messages.append({"role": "assistant", "content": asked.begun})
            begun = {"continue_final_message": True, "add_generation_prompt": False}
        answer = self.wire.post(_PATH, {"model": name, "messages": messages, **begun, **more})
        if answer.status in _REFUSED and _TOO_LONG.search(answer.words):
            return NoRoom(self.wire.shown, f"a question that fits; it answered {answer.status}: {answer.words}")
        choices = answer.body.get("choices") if answer.fine and isinstance(answer.body, Mapping) else None
        if not isinstance(choices, Sequence) or not choices or not isinstance(choices[0], Mapping):
            raise RemoteError(f"{self.wire.shown}{_PATH} answered {answer.status}: {answer.words}")
        return choices[0]


def _is_over(asked: Future[Any], seconds: float) -> bool:
    return bool(wait([asked], seconds).done)
