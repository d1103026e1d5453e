"""The engine: the one place where text is made, for a test sample as for a thousand clients.

Idea: requests come and go at any time; a step is one pass of the model over whatever there is to read, and a token for
each continuation whose reading is done. The engine knows requests, choices and their ends. What lets a model read is a
reader's (reader.py, cohorts.py), how a token is chosen the sampler's.
Use when: text is wanted. One thread owns an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch

from luthier.core.errors import LuthierError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.asked import Asked, Turn, as_spoken
from luthier.infer.beams import Search
from luthier.infer.continuation import Continuation
from luthier.infer.drafts import Drafting, from_the_text
from luthier.infer.gate import Gate
from luthier.infer.reader import Counts, Reader, Reading
from luthier.infer.request import Ended, News, Request, Said
from luthier.infer.sampler import choose, choose_drafted
from luthier.infer.scheduler import Room
from luthier.infer.text import Decode
from luthier.model.language_model import LanguageModel
from luthier.model.running.own_lengths import short_length
from luthier.model.speaker import Sampling, Spoken


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


@final
class Engine:
    """Continues prompts with the model as it is now: attachments on or off, training going on or not.

    With a `pool`, requests name adapters of it, and "" is the base alone; without one, "" is all that is switched on.
    `room` is found by the memory there is when it is left out. `decode` is needed for stop strings, `drafting` drafts.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        room: Room | None = None,
        decode: Decode | None = None,
        pool: Pool | None = None,
        drafting: Drafting = from_the_text,
    ) -> None:
        if not model.task.speaks:
            raise RecipeError(
                f"{model.source} was loaded to classify or to fill in, and says no text",
                do="ask it for classes: luthier classify RUN TEXT",
            )
        self.model = model
        self.decode = decode
        self.pool = pool
        self.drafting = drafting
        self._gate = Gate(model, room, reads_text=decode is not None, pooled=pool is not None)
        self._reader: Reader | None = None
        self._asked: dict[int, Asked] = {}
        self._news: list[News] = []
        self._next = self._drafted = self._agreed = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._asked or self._news)

    @property
    def counts(self) -> Counts:
        """What is held and what waits."""
        held = Counts(0, 0) if self._reader is None else self._reader.counts
        return replace(held, drafted=self._drafted, agreed=self._agreed)

    def add(self, request: Request) -> int:
        """Take a request, whose number is returned. Raises DataError or RecipeError for one that can never run."""
        return self._add(request, draw=0)

    @torch.no_grad()
    def step(self) -> list[News]:
        """One pass of the model, and what came of it.

        Where it breaks off, everything under way has failed, as the next step tells, and its room is free.
        """
        try:
            reading = None if self._reader is None else self._reader.read()
            if reading is not None and reading.continuations:
                # Twins begin where the first of them is, before it says anything.
                self._say(self._with_twins(reading))
                self._search_on()
        except BaseException as failure:
            self._fail_all(failure)
            raise
        news, self._news = self._news, []
        return news

    def cancel(self, request: int) -> bool:
        """End a request now; False where it is over already. Its open choices are told as cancelled."""
        asked = self._asked.get(request)
        if asked is None:
            return False
        self._end_all(asked, "cancelled")
        return True

    def forget(self) -> None:
        """The weights have changed: what was read with the old ones begins no new text."""
        if self._reader is not None:
            self._reader.forget()

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in the order of the prompts; each draws by its place in the list."""
        requests = [Request(prompt=prompt, sampling=sampling) for prompt in prompts]
        return [spoken for (spoken,) in self.answer(requests, draws=range(len(requests)))]

    def answer(self, requests: Sequence[Request], *, draws: Sequence[int] | None = None) -> list[list[Spoken]]:
        """All choices of each of these requests, by an engine with nothing else to do.

        Choice c of request i draws with number `draws[i]` + c, and with c without `draws`. Raises what a request has
        failed with. The cache is let go at the end: whoever trains needs the memory, and with other weights it is of no
        use.
        """
        if self.busy:
            raise RecipeError(
                f"a list of answers was asked for while {len(self._asked)} requests are on their way",
                do="add the requests to those, or use an engine of its own",
            )
        for index, request in enumerate(requests):
            self._gate.check(request, f"prompt {index}")
        was_training, reader = self.model.module.training, self._reader
        self.model.train(False)
        self._reader = self._gate.reader_for(requests) if requests else None
        try:
            pairs = zip(requests, draws or [0] * len(requests), strict=True)
            return self._spoken([self._add(request, draw=draw) for request, draw in pairs])
        finally:
            for number in list(self._asked):
                self.cancel(number)
            self._news.clear()
            self._reader = reader
            self.model.train(was_training)

    def _spoken(self, numbers: Sequence[int]) -> list[list[Spoken]]:
        """What becomes of requests, choice by choice."""
        told: dict[int, dict[int, list[News]]] = {number: {} for number in numbers}
        while self.busy:
            for news in self.step():
                if news.failure is not None:
                    raise news.failure
                told[news.request].setdefault(news.choice, []).append(news)
        return [[as_spoken(choices[choice]) for choice in sorted(choices)] for choices in told.values()]

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
        self._gate.check(request, "the prompt")
        if self._reader is None:
            self._reader = self._gate.reader()
        number, self._next = self._next, self._next + 1
        asked = Asked(request, [])
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
        # Beside a draft a row has to be what it is alone.
        drafted = request.drafts > 0 and (
            not request.batch_invariant or self.model.keeps_rows_apart(None if self.pool is None else name)
        )
        return Continuation(
            number, choice, request, draw=draw, limit=self._gate.limit(request), adapter=key,
            root_tokens=self._gate.places_ahead(name), decode=self.decode,
            drafter=self.drafting(request, draw) if drafted else None,
            short=short_length(self.model.module.base_model),
        )  # fmt: skip

    def _with_twins(self, reading: Reading) -> list[Turn]:
        """Those that speak now, twins of them that begin here included, each with what it may say."""
        turns: list[Turn] = []
        drafts = reading.drafts or [()] * len(reading.continuations)
        for each, rows, draft in zip(reading.continuations, reading.rows, drafts, strict=True):
            asked = self._asked[each.number]
            twins, asked.followers = asked.followers, []
            if not asked.told and asked.request.sampling.prompt_log_probs:
                self._news.append(News(each.number, each.choice, prompt=tuple(each.prompt_said)))
                asked.told = True
            running = [twin for twin in twins if self._reader is not None and self._reader.fork(each, twin)]
            turns.append(Turn(each, reading.logits, rows.start, draft))
            turns += [Turn(twin, reading.logits, rows.start) for twin in running]
        return turns

    def _say(self, turns: Sequence[Turn]) -> None:
        """A token for each, or several where a draft was right; beams only learn what they may say."""
        plain: list[Turn] = []
        for turn in turns:
            asked = self._asked.get(turn.continuation.number)
            if asked is not None and asked.search is not None:
                asked.search.take(turn.continuation, turn.logits[0])
            elif asked is not None and self._bounded(turn):
                plain.append(turn)
        self._choose([turn for turn in plain if not turn.draft])
        for turn in plain:
            if turn.draft:
                self._choose_drafted(turn)

    def _bounded(self, turn: Turn) -> bool:
        """Whether its guide has said what may come next; one that fails ends its own request and no other."""
        each = turn.continuation
        try:
            each.chooser.bound(turn.passed.shape[-1])
        except LuthierError as failure:
            self._fail(each, failure)
            return False
        return True

    def _choose(self, turns: Sequence[Turn]) -> None:
        # Of a request that has failed nobody says anything more.
        turns = [turn for turn in turns if turn.continuation.number in self._asked]
        if not turns:
            return
        rows, logits = [turn.row for turn in turns], turns[0].passed
        if rows != list(range(len(logits))):
            logits = logits[rows]
        try:
            said = choose([turn.continuation.chooser for turn in turns], logits, backend=self.model.executor.backend)
        except LuthierError as failure:
            if len(turns) == 1:
                self._fail(turns[0].continuation, failure)
                return
            # One of them: each alone, so that it ends no other.
            for turn in turns:
                self._choose([turn])
            return
        for turn, token in zip(turns, said, strict=True):
            self._tell(turn.continuation, token)

    def _choose_drafted(self, turn: Turn) -> None:
        each, number = turn.continuation, turn.continuation.number
        if number not in self._asked:
            return
        self._drafted += len(turn.draft)
        backend = self.model.executor.backend
        try:
            for place, said in enumerate(choose_drafted(each.chooser, turn.logits, turn.draft, backend=backend)):
                self._agreed += said.token in turn.draft[place : place + 1]
                self._tell(each, said)
                if number not in self._asked or each.choice not in self._asked[number].open:
                    return
        except LuthierError as failure:
            self._fail(each, failure)
            return
        if self._reader is not None:
            self._reader.agree(each)

    def _fail(self, each: Continuation, failure: LuthierError) -> None:
        """End all of a request that cannot go on."""
        asked = self._asked.get(each.number)
        if asked is not None:
            self._end_all(asked, "failed", failure)

    def _fail_all(self, failure: BaseException) -> None:
        """End whatever is under way: what has been read of whom is not known any more."""
        told = failure if isinstance(failure, LuthierError) else LuthierError(f"a step broke off: {failure!r}")
        for asked in list(self._asked.values()):
            self._end_all(asked, "failed", told)

    def _end_all(self, asked: Asked, ended: Ended, failure: LuthierError | None = None) -> None:
        """End all open choices of a request, and its beams."""
        if asked.search is not None and self._reader is not None:
            for beam in asked.search.beams:
                self._reader.remove(beam)
        for each in asked.choices:
            if each.choice in asked.open:
                self._end(each, News(each.number, each.choice, ended=ended, failure=failure))

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
        each.note(said.token)
        if (over and said.token in sampling.stop_ids) or each.met_stop_string:
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
            self._news += asked.best(each.number)
        self._close(each.number, asked)

    def _close(self, number: int, asked: Asked) -> None:
        del self._asked[number]
        if self.pool is not None and asked.request.adapter:
            self.pool.release(asked.request.adapter)

    def _send(self, news: News) -> None:
        if self._asked[news.request].passes(news):
            self._news.append(news)
