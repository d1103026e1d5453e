"""The thread that owns the engine.

Idea: one thread adds requests, runs steps while there is something to do, and lays what came of each where the event
loop finds it. A request is a ticket (ticket.py), from which its reader hears of it; generation never pauses for one
client. A ticket that is closed early cancels its request before the next step.
The loop is called for what nobody may wait for: the first news of a request, its end, its failure. It then looks again
each `gather` seconds, for all readers together, as long as it finds something: a call costs as much as some tokens. To
write for all of them may take a fortieth of the time: with more readers it looks less often.
When a step raises, every request under way is told so and cancelled, and the thread goes on; after three such steps in
a row, or when cancelling raises too, it ends, and says so to whoever asks from then on. Nothing waits for ever.
Use when: async code wants text. What else touches the model goes through `do`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar, final

from luthier.core.errors import DataError, LuthierError, RecipeError
from luthier.infer.reader import Counts
from luthier.infer.request import News, Request
from luthier.server.errors import BusyError, DrainingError, EngineFailedError
from luthier.server.ticket import BREAKS, Ticket, due

T = TypeVar("T")
Found = dict[Ticket, list[News]]
"""What came of a step, for whom."""
MOST_FAILURES: Final = 3
"""Steps in a row that may fail."""
_MOST_STEPS: Final = 16
"""Steps whose news may wait for the next look: of quicker ones the loop is told earlier."""
_REST: Final = 40.0
"""Seconds to the next look, for each second of the processor that the last one took ..."""
_LONGEST: Final = 0.1
"""... but no more than these: who reads along is to see a text grow."""
_LOG = logging.getLogger("luthier.server")


class Steps(Protocol):
    """What the thread needs of an engine."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    @property
    def counts(self) -> Counts:
        """What is held and what waits."""

    def add(self, request: Request) -> int:
        """Take a request; its number."""

    def step(self) -> list[News]:
        """One pass, and what came of it."""

    def cancel(self, request: int) -> bool:
        """End a request now."""


@final
class Worker:
    """One engine in a thread of its own. At most `waiting` continuations beyond what runs at once are taken."""

    def __init__(
        self, engine: Steps, *, rows: int = 64, waiting: int = 256, buffer: int = 1024, gather: float = 0.02
    ) -> None:
        self.engine = engine
        self.gather = gather
        self.most = rows + waiting
        self.buffer = buffer
        self.counts = engine.counts
        self.dead = False
        self.draining = False
        self.loop: asyncio.AbstractEventLoop
        self.on_end: Callable[[], None] = lambda: None
        self._tickets: dict[int, Ticket] = {}
        self._held: dict[Ticket, int] = {}
        self._waiting: set[asyncio.Future[Any]] = set()
        self._fresh: deque[Found] = deque()
        self._looking = False
        self._unread: set[Ticket] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ending = False
        self._failures = 0

    async def __aenter__(self) -> Worker:
        self.loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._actions.put(self._end)
        await asyncio.to_thread(self._thread.join)
        self._leave_nobody(DrainingError(f"the server has stopped, with {self.open} continuations under way"))

    @property
    def open(self) -> int:
        """Continuations that are under way or wait."""
        return sum(self._held.values())

    async def submit(self, requests: Sequence[Request], *, whole: bool = False) -> list[Ticket]:
        """Tickets for requests that are taken together or not at all; `whole` answers are not heard while they grow.

        Raises BusyError when too many wait, and whatever the engine says of requests that can never run.
        """
        self.require_open()
        tickets = [Ticket(self, request, whole=whole) for request in requests]
        wanted = sum(ticket.weight for ticket in tickets)
        if self._held and self.open + wanted > self.most:
            raise BusyError(f"{self.open} continuations are under way and {wanted} more were asked for",
                            allowed=f"{self.most} at once")  # fmt: skip
        for ticket in tickets:
            self._held[ticket] = ticket.weight
            self._actions.put(partial(self._add, ticket))
        try:
            for ticket in tickets:
                await ticket.accepted
        except BaseException:
            for ticket in tickets:
                ticket.close()
            raise
        return tickets

    async def do(self, work: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        self.require_open()
        done: asyncio.Future[T] = self.loop.create_future()

        def action() -> None:
            try:
                made = work()
            except BREAKS as failure:
                self._tell(partial(_settle, done, None, failure))
            else:
                self._tell(partial(_settle, done, made, None))

        self._waiting.add(done)
        self._actions.put(action)
        try:
            return await done
        finally:
            self._waiting.discard(done)

    def require_open(self) -> None:
        """Raise when no request is taken any more."""
        if self.dead:
            raise EngineFailedError(f"the engine has ended after {self._failures} failures")
        if self.draining:
            raise DrainingError(f"the server is stopping, with {self.open} continuations under way")

    def leave(self, ticket: Ticket) -> None:
        """A ticket that nobody reads any more; on the event loop."""
        self._held.pop(ticket, None)
        if not ticket.over:
            self._actions.put(partial(self._cancel, ticket))

    # ------------------------------------------------------------------------------------------- on the engine's thread

    def _run(self) -> None:
        try:
            self._work()
        finally:
            if not self._ending:
                self.dead = True
                self._tell(self._give_up)

    def _work(self) -> None:
        while not self._ending:
            self._act()
            if self._ending or not self.engine.busy:
                self._publish()
                continue
            try:
                news = self.engine.step()
            except BREAKS as failure:
                self._fail(failure)
                continue
            self._failures = 0
            self._deliver(news)

    def _act(self) -> None:
        """Do what was asked since the last step; wait for something where there is nothing to step."""
        if not self.engine.busy:
            self._actions.get()()
        while not self._ending:
            try:
                action = self._actions.get_nowait()
            except queue.Empty:
                return
            action()

    def _add(self, ticket: Ticket) -> None:
        if ticket.closed:
            return
        try:
            ticket.number = self.engine.add(ticket.request)
        except LuthierError as error:
            self._tell(partial(ticket.fail, error))
        except BREAKS as failure:
            _LOG.exception("a request could not be added")
            self._tell(partial(ticket.fail, EngineFailedError(f"the request was not taken: {type(failure).__name__}")))
        else:
            self._tickets[ticket.number] = ticket
            self._tell(partial(_settle, ticket.accepted, None, None))

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.number is not None and self._tickets.pop(ticket.number, None) is not None:
            self.engine.cancel(ticket.number)

    def _deliver(self, news: Sequence[News]) -> None:
        by_ticket: Found = {}
        now, urgent = time.monotonic(), False
        for each in news:
            ticket = self._tickets.get(each.request)
            if ticket is None:
                continue
            urgent = urgent or ticket.first is None or each.failure is not None
            ticket.first = ticket.first or now
            by_ticket.setdefault(ticket, []).append(each)
            ticket.unended -= bool(each.ended)
            if not ticket.unended:
                urgent = True
                del self._tickets[each.request]
        self.counts = self.engine.counts
        told = {ticket: found for ticket, news in by_ticket.items() if (found := due(ticket, news))}
        if told:
            self._fresh.append(told)
            # First the news, then the question whether somebody will look: `_look` asks the other way round.
            if urgent or not self._looking or len(self._fresh) >= _MOST_STEPS:
                self._looking = True
                self._tell(self._hand_out)

    def _publish(self) -> None:
        self.counts = self.engine.counts

    def _fail(self, failure: Exception) -> None:
        """A step broke off: whoever waits is told, and the engine goes on without these requests."""
        _LOG.error("a step of the engine failed", exc_info=failure)
        self._failures += 1
        known = isinstance(failure, (DataError, RecipeError))
        words = str(failure) if known else type(failure).__name__
        tickets, self._tickets = self._tickets, {}
        # The engine first: who is told "failed" may ask again at once, and finds the places of the failed free.
        try:
            for number in tickets:
                self.engine.cancel(number)
        except BREAKS as second:
            _LOG.error("cancelling failed too", exc_info=second)
            self._failures = MOST_FAILURES
        self._tell(partial(self._all_failed, list(tickets.values()),
                           EngineFailedError(f"the engine broke off: {words}")))  # fmt: skip
        if self._failures >= MOST_FAILURES:
            self.dead = self._ending = True
            self._tell(self._give_up)

    def _end(self) -> None:
        self._ending = True

    def _tell(self, call: Callable[[], None]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(call)

    # ------------------------------------------------------------------------------------------------ on the event loop

    def _hand_out(self) -> None:
        """Somebody may not wait; the others are looked after in `gather` seconds, or now if nobody was just before."""
        self._take()
        if self._timer is None:
            self._wake_all()

    def _look(self) -> None:
        self._timer = None
        self._looking = False
        self._take()
        if self._unread:
            self._wake_all()

    def _wake_all(self) -> None:
        """Wake all readers that have something to read, and look again later."""
        unread, self._unread = self._unread, set()
        begun = time.thread_time()
        for ticket in unread:
            ticket.wake()
        rest = min(_LONGEST, _REST * (time.thread_time() - begun))
        self._looking = True
        self._timer = self.loop.call_later(max(self.gather, rest), self._look)

    def _take(self) -> None:
        """Give all tickets their news. Who may not wait is woken at once."""
        found: Found = {}
        while self._fresh:
            for ticket, news in self._fresh.popleft().items():
                found.setdefault(ticket, []).extend(news)
        for ticket, news in found.items():
            if ticket.take(news, self.buffer):
                self._unread.discard(ticket)
                ticket.wake()
            else:
                self._unread.add(ticket)
            if ticket.over:
                self._held.pop(ticket, None)

    def _all_failed(self, tickets: Sequence[Ticket], error: LuthierError) -> None:
        # What was said before is heard before.
        self._take()
        for ticket in tickets:
            ticket.fail(error)
            self._held.pop(ticket, None)

    def _give_up(self) -> None:
        self._leave_nobody(EngineFailedError(f"the engine has ended after {self._failures} failures"))
        self.on_end()

    def _leave_nobody(self, error: LuthierError) -> None:
        """Nobody waits for a thread that has ended."""
        self._all_failed(list(self._held), error)
        for future in self._waiting:
            _settle(future, None, error)


def _settle(future: asyncio.Future[T], value: T | None, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(value)  # type: ignore[arg-type]  # None only where T is None
