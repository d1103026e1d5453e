"""A request under way, as the async side sees it: its news wait here until they are read.

Idea: the reader of a ticket is woken for the first news and for the end at once, and for what comes between them when
the worker looks, for to wake it and to write what it makes costs as much as several tokens; one that wants the `whole`
answer is woken at its end. A task that waits for news may name a `listener`, which takes those between the first and
the last where it can, and the task sleeps on: to let it run once costs more than to write what it would. What waits is
bounded: a reader that does not keep up loses its request when `buffer` news wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, Protocol, final

from luthier.core.errors import LuthierError
from luthier.infer.request import News, Request
from luthier.server.errors import BusyError

Listener = Callable[[list[News]], bool]
"""Takes news, and says whether it did."""
KEPT: Final = 256
"""News that are kept at most before they are read."""
BREAKS: Final = (
    LuthierError, RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError,
    OSError,
)  # fmt: skip
"""What an engine, a model or a file may raise, and what writes down their news."""


class Desk(Protocol):
    """Who gave a ticket out, and is told when its reader goes."""

    loop: asyncio.AbstractEventLoop

    def leave(self, ticket: Ticket) -> None:
        """Nobody reads the ticket any more."""


@final
class Ticket:
    """One request under way. One reader asks for `news` until it is over, and closes the ticket in any case.

    `first` is when its first news came. `kept` is the engine's thread's own. What `listener` raises, `news` raises.
    """

    def __init__(self, desk: Desk, request: Request, *, whole: bool = False) -> None:
        self.request = request
        self.whole = whole
        self.first: float | None = None
        self.kept: list[News] = []
        self.listener: Listener | None = None
        self.weight = max(request.choices, request.best_of, request.beams)
        self.number: int | None = None
        self.closed = False
        self.accepted: asyncio.Future[None] = desk.loop.create_future()
        self._desk = desk
        self._news: list[News] = []
        self._left = self.unended = request.choices
        self._error: LuthierError | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._begun = False

    async def news(self) -> list[News]:
        """All that came since the last call, at least one; nothing when it is over or closed. Raises its error."""
        while not self._news:
            if self._error is not None:
                raise type(self._error)(self._error.received, allowed=self._error.allowed, do=self._error.do)
            if self._left <= 0 or self.closed:
                return []
            self._waiting = self._desk.loop.create_future()
            await self._waiting
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Nobody reads any more: what is still under way is cancelled."""
        if not self.closed:
            self.closed = True
            self._desk.leave(self)
            self._news = []
            self._let_read()

    def take(self, news: Sequence[News], buffer: int) -> bool:
        """Keep news for the reader, and say whether they may not wait; on the event loop."""
        if self._error is not None or self.closed:
            return False
        for each in news:
            if each.failure is not None:
                self._left = 0
                self.fail(each.failure)
                return True
            self._left -= bool(each.ended)
        self._news.extend(news)
        # A whole answer is read by us, and no client keeps that waiting.
        if len(self._news) > buffer and not self.whole:
            self._news.clear()
            self.fail(BusyError(
                f"{buffer:,} pieces of the answer waited to be read; the request was cancelled",
                do="read faster, or ask without stream",
            ))  # fmt: skip
            self._desk.leave(self)
            return True
        first, self._begun = not self._begun, True
        return first or self._left <= 0 or len(self._news) >= KEPT

    def wake(self) -> None:
        """Let the reader see what there is; on the event loop."""
        if self._waiting is None or self._waiting.done():
            # It is at work on earlier news, which have to be written before these.
            return
        try:
            heard = self._heard()
        except BREAKS as failure:
            self._waiting.set_exception(failure)
            return
        if not heard:
            self._let_read()

    def _let_read(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _heard(self) -> bool:
        """Whether the listener has taken what there is, and that is neither the end nor an error."""
        if self.listener is None or self.over or self._error is not None or not self._news:
            return False
        if not self.listener(self._news):
            return False
        self._news = []
        return True

    def fail(self, error: LuthierError) -> None:
        """The request is over, and why; on the event loop."""
        self._error = self._error or error
        if not self.accepted.done():
            self.accepted.set_exception(self._error)
            self.accepted.exception()
        self.wake()

    @property
    def over(self) -> bool:
        """Whether everything was said."""
        return self._left <= 0

    @property
    def read(self) -> bool:
        """Whether everything was said, and heard."""
        return self.over and not self._news


def due(ticket: Ticket, news: list[News]) -> list[News]:
    """What is to be told now: of a whole answer, all at its end, or when much is kept."""
    if not ticket.whole:
        return news
    ticket.kept += news
    if ticket.unended and len(ticket.kept) < KEPT and not any(each.failure for each in news):
        return []
    found, ticket.kept = ticket.kept, []
    return found
