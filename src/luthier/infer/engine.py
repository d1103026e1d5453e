"""The engine: the one place where text is made, for a test sample as for a thousand clients.

Idea: requests come and go at any time; a step is one pass of the model over whatever there is to read, and a token for
each continuation whose reading is done. The engine knows requests, choices and their ends. What lets a model read is a
reader's (reader.py, cohorts.py), how a token is chosen the sampler's.
Use when: text is wanted. One thread owns an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

import numpy as np
import torch

from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.beams import Search
from luthier.infer.cache import Widths, widths_of
from luthier.infer.cohorts import CohortReader
from luthier.infer.continuation import Continuation
from luthier.infer.reader import Counts, PagedReader, Reader, Reading, default_room
from luthier.infer.request import Ended, News, Request, Said
from luthier.infer.sampler import choose
from luthier.infer.scheduler import Room
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Spoken

Decode = Callable[[Ints], str]
SPOKEN_ROWS = 64
"""Prompts of a list that are answered at once."""


class Pool(ABC):
    """Adapters that come onto the model when they are asked for."""

    @abstractmethod
    def acquire(self, name: str) -> str:
        """Bring an adapter onto the model, and keep it there; what rows are to name is returned."""

    @abstractmethod
    def release(self, route: str) -> None:
        """What `acquire` returned is not needed any more by one who asked for it."""

    @abstractmethod
    def key(self, name: str) -> Hashable:
        """What tells this adapter from another that had its name before."""


@dataclass
class _Asked:
    """A request on its way: its choices, those that wait for the first to have read the prompt, what is held back."""

    request: Request
    choices: list[Continuation]
    followers: list[Continuation] = field(default_factory=list)
    search: Search | None = None
    open: set[int] = field(default_factory=set)
    told: bool = False
    held: dict[int, list[News]] = field(default_factory=dict)


@final
class Engine:
    """Continues prompts with the model as it is now: attachments on or off, training going on or not.

    With a `pool`, requests name adapters of it, and "" is the base alone; without one, "" is all that is switched on.
    `room` is found by the memory there is when it is left out. `decode` is needed for stop strings.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        room: Room | None = None,
        decode: Decode | None = None,
        pool: Pool | None = None,
    ) -> None:
        if not model.task.speaks:
            raise RecipeError(
                f"{model.source} was loaded to classify or to fill in, and says no text",
                do="ask it for classes: luthier classify RUN TEXT",
            )
        self.model = model
        self.decode = decode
        self.pool = pool
        self.room = room
        self._paged = model.executor.kind == "segments" and model.task.name == "causal_lm"
        self._widths: Widths | None = None
        self._reader: Reader | None = None
        self._asked: dict[int, _Asked] = {}
        self._news: list[News] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._asked or self._news)

    @property
    def counts(self) -> Counts:
        """What is held and what waits."""
        return Counts(0, 0) if self._reader is None else self._reader.counts

    def add(self, request: Request) -> int:
        """Take a request, whose number is returned. Raises DataError or RecipeError for one that can never run."""
        return self._add(request, draw=0)

    @torch.no_grad()
    def step(self) -> list[News]:
        """One pass of the model, and what came of it."""
        reading = None if self._reader is None else self._reader.read()
        if reading is not None and reading.continuations:
            # Twins begin where the first of them is, before it says anything.
            continuations, rows = self._with_twins(reading.continuations)
            drawn = [place for place, each in enumerate(continuations) if not self._searches(each, reading, rows[place])]
            said = choose([continuations[i].chooser for i in drawn], reading.logits[[rows[i] for i in drawn]])
            for place, token in zip(drawn, said, strict=True):
                self._tell(continuations[place], token)
            self._search_on()
        news, self._news = self._news, []
        return news

    def cancel(self, request: int) -> bool:
        """End a request now; False where it is over already. Its open choices are told as cancelled."""
        asked = self._asked.get(request)
        if asked is None:
            return False
        for each in () if asked.search is None or self._reader is None else asked.search.beams:
            self._reader.remove(each)
        for each in asked.choices:
            if each.choice in asked.open:
                self._end(each, News(request, each.choice, ended="cancelled"))
        return True

    def forget(self) -> None:
        """The weights have changed: what was read with the old ones begins no new text."""
        if self._reader is not None:
            self._reader.forget()

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in the order of the prompts; each draws by its place in the list.

        The cache is let go at the end: whoever trains needs the memory, and with other weights it is of no use.
        """
        requests = [Request(prompt=prompt, sampling=sampling) for prompt in prompts]
        for index, request in enumerate(requests):
            self._check(request, f"prompt {index}")
        was_training, room, reader = self.model.module.training, self.room, self._reader
        self.model.train(False)
        self._reader = self._new_reader(room or self._room_for(requests)) if requests else None
        try:
            return self._spoken([self._add(request, draw=index) for index, request in enumerate(requests)])
        finally:
            self._asked.clear()
            self._reader = reader
            self.model.train(was_training)

    def _spoken(self, numbers: list[int]) -> list[Spoken]:
        said: dict[int, list[Said]] = {number: [] for number in numbers}
        ended: dict[int, Ended] = {}
        while self.busy:
            for news in self.step():
                said[news.request].extend(news.said)
                ended[news.request] = news.ended
        return [
            Spoken(
                np.array([each.token for each in said[number]], dtype=np.int32),
                [each.log_prob for each in said[number]],
                ended[number],
                tuple(each.likeliest for each in said[number] if each.likeliest),
            )
            for number in numbers
        ]

    def _add(self, request: Request, *, draw: int) -> int:
        if self.pool is None or not request.adapter:
            return self._begin(request, draw=draw)
        # Rows name what stands under the name now: later that may be another adapter.
        route = self.pool.acquire(request.adapter)
        try:
            return self._begin(replace(request, adapter=route), draw=draw)
        except BaseException:
            self.pool.release(route)
            raise

    def _begin(self, request: Request, *, draw: int) -> int:
        self._check(request, "the prompt")
        if self._reader is None:
            self._reader = self._new_reader(self.room or default_room(self.model, self._own_widths()))
        number, self._next = self._next, self._next + 1
        asked = _Asked(request, [])
        count = 1 if request.beams > 1 else max(request.choices, request.best_of)
        for choice in range(count):
            asked.choices.append(self._continuation(number, choice, request, draw=draw + choice))
        asked.open = set(range(count))
        asked.followers = asked.choices[1:]
        if request.beams > 1:
            make = partial(self._continuation, number, 0, request, draw=draw)
            asked.search = Search(asked.choices[0], make)
        self._asked[number] = asked
        self._reader.add(asked.choices[0])
        return number

    def _continuation(self, number: int, choice: int, request: Request, *, draw: int) -> Continuation:
        name = request.adapter
        key: Hashable = self.pool.key(name) if self.pool is not None and name else name
        root_tokens = self._root_tokens(name)
        left = self._left(request)
        limit = request.sampling.max_new_tokens if left is None else min(request.sampling.max_new_tokens, left)
        return Continuation(
            number, choice, request, draw=draw, limit=limit, adapter=key, root_tokens=root_tokens if self._paged else 0
        )

    def _with_twins(self, continuations: Sequence[Continuation]) -> tuple[list[Continuation], list[int]]:
        """Those that speak now, twins of them that begin here included, and the row of the logits of each."""
        found: list[Continuation] = []
        rows: list[int] = []
        for row, each in enumerate(continuations):
            asked = self._asked[each.number]
            twins, asked.followers = asked.followers, []
            if not asked.told and asked.request.sampling.prompt_log_probs:
                self._news.append(News(each.number, each.choice, prompt=tuple(each.prompt_said)))
                asked.told = True
            running = [twin for twin in twins if self._reader is not None and self._reader.fork(each, twin)]
            found += [each, *running]
            rows += [row] * (1 + len(running))
        return found, rows

    def _searches(self, each: Continuation, reading: Reading, row: int) -> bool:
        """Whether it is a beam, which then knows what it may say."""
        search = self._asked[each.number].search
        if search is not None:
            search.take(each, reading.logits[row])
        return search is not None

    def _search_on(self) -> None:
        """Every search whose beams all know what they may say goes on by a token, or is over."""
        for number, asked in list(self._asked.items()):
            search = asked.search
            if search is None or not search.ready or self._reader is None:
                continue
            search.move(self._reader)
            if not search.lines.over:
                continue
            for each in search.beams:
                self._reader.remove(each)
            for choice, (line, ended) in enumerate(search.lines.best[: asked.request.choices]):
                self._news.append(News(number, choice, line.said, "stop" if ended else "length"))
            self._close(number, asked)

    def _tell(self, each: Continuation, said: Said) -> None:
        sampling = each.request.sampling
        ended: Ended = ""
        over = len(each.said) > sampling.min_new_tokens or not sampling.min_new_tokens
        if (over and said.token in sampling.stop_ids) or self._met_stop_string(each):
            ended = "stop"
        elif len(each.said) >= each.limit:
            ended = "length"
        news = News(each.number, each.choice, (said,), ended)
        if ended:
            self._end(each, news)
        else:
            self._send(news)

    def _end(self, each: Continuation, news: News) -> None:
        asked = self._asked[each.number]
        if self._reader is not None:
            self._reader.remove(each)
        asked.open.discard(each.choice)
        if each in asked.followers:
            asked.followers.remove(each)
        self._send(news)
        if asked.open:
            return
        if asked.request.best_of:
            self._send_best(each.number, asked)
        self._close(each.number, asked)

    def _close(self, number: int, asked: _Asked) -> None:
        del self._asked[number]
        if self.pool is not None and asked.request.adapter:
            self.pool.release(asked.request.adapter)

    def _send(self, news: News) -> None:
        asked = self._asked[news.request]
        if asked.request.best_of:
            asked.held.setdefault(news.choice, []).append(news)
        else:
            self._news.append(news)

    def _send_best(self, number: int, asked: _Asked) -> None:
        """Of all that were made the likeliest, by the mean log-probability of a token, as choices 0, 1 and so on."""
        def mean(choice: int) -> float:
            log_probs = asked.choices[choice].chooser.log_probs
            return sum(log_probs) / max(1, len(log_probs))

        best = sorted(asked.held, key=lambda choice: (-mean(choice), choice))[: asked.request.choices]
        for place, choice in enumerate(best):
            held = asked.held[choice]
            said = tuple(one for news in held for one in news.said)
            self._news.append(News(number, place, said, held[-1].ended))

    def _met_stop_string(self, each: Continuation) -> bool:
        stops = each.request.sampling.stop
        if not stops or self.decode is None:
            return False
        longest = max(len(text) for text in stops)
        # A token stands for at least a byte, so a stop string cannot span more tokens than it has bytes.
        text = self.decode(np.array(each.said[-4 * longest :], dtype=np.int32))
        return any(stop in text for stop in stops)

    # ------------------------------------------------------------------------------------------ what is asked, and room

    def _check(self, request: Request, what: str) -> None:
        sampling, prompt = request.sampling, request.prompt
        if sampling.stop and self.decode is None:
            raise DataError("stop strings were given, but no tokenizer to read the text with", do="use stop_ids")
        if len(prompt) == 0:
            raise DataError(f"{what} has no token", allowed="at least one token")
        if request.beams > 1 and (sampling.stop or request.guide is not None or request.best_of or sampling.temperature):
            raise RecipeError(
                "a beam search was asked for with stop strings, a guide, best_of or a temperature",
                allowed="beams with stop_ids and max_new_tokens",
            )
        self.model.require_rows(prompt)
        left = self._left(request)
        if left is not None and left <= 0:
            raise DataError(f"{what} has {len(prompt)} tokens", allowed=f"fewer than {len(prompt) + left}")
        if request.adapter and (self.pool is None or not self._paged):
            why = "one adapter at a time" if self.pool is not None else "what is switched on, having no pool of adapters"
            raise RecipeError(
                f"a request names the adapter {request.adapter!r}, and {self.model.source} runs {why}",
                allowed="requests without an adapter's name",
                do="switch on the adapter that is wanted",
            )
        needed = self._root_tokens(request.adapter) + len(prompt) + sampling.max_new_tokens
        if self.room is not None and self._paged and needed > self.room.pages * self.room.page:
            raise DataError(
                f"{what} and its answer may take {needed} tokens, and the cache holds {self.room.tokens}",
                allowed=f"{self.room.tokens} together",
                do="ask for fewer new tokens, or start with more room",
            )

    def _left(self, request: Request) -> int | None:
        """How many tokens may follow a prompt, when the context is limited: its own room, whatever runs beside it."""
        limit = self.model.context_tokens
        return None if limit is None else limit - len(request.prompt) - self._root_tokens(request.adapter)

    def _root_tokens(self, name: str) -> int:
        root = self.model.root_with(name) if name or self.pool is not None else self.model.active_root
        return 0 if root is None else root.token_count

    def _own_widths(self) -> Widths:
        if self._widths is None:
            with torch.no_grad():
                self._widths = widths_of(self.model.module)
        return self._widths

    def _new_reader(self, room: Room) -> Reader:
        if not self._paged:
            return CohortReader(self.model, rows=room.rows)
        return PagedReader(self.model, room, self._own_widths(), mixed=self.pool is not None)

    def _room_for(self, requests: Sequence[Request]) -> Room:
        """Room for the longest of some requests side by side, as far as memory allows."""
        if not self._paged:
            return Room(tokens=1, rows=SPOKEN_ROWS)
        page = 16
        needs = sorted(
            (self._root_tokens("") + len(each.prompt) + each.sampling.max_new_tokens for each in requests), reverse=True
        )
        wanted = sum(-(-need // page) * page for need in needs[:SPOKEN_ROWS])
        most = default_room(self.model, self._own_widths()).tokens
        return Room(tokens=max(needs[0], min(wanted, most)), page=page, rows=SPOKEN_ROWS)
