"""The engine's thread: order, cancelling, slow readers, admission, failures, the end. Nothing waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.infer.request import News, Request
from luthier.server.errors import BusyError, DrainingError, EngineFailedError
from luthier.server.ticket import Ticket
from luthier.server.worker import Worker
from tests.server.fakes import FakeEngine


def asked(*tokens: int, **more: Any) -> Request:
    return Request(prompt=np.array(tokens or (1,), np.int32), **more)


def within(worker: Worker, work: Callable[[Worker], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        async with worker:
            return await asyncio.wait_for(work(worker), 20)

    return asyncio.run(whole())


async def all_of(ticket: Ticket) -> list[News]:
    found: list[News] = []
    while news := await ticket.news():
        found += news
    return found


def test_news_come_in_order_and_each_to_its_own_ticket() -> None:
    engine = FakeEngine(lambda request: [int(request.prompt[0]) * 10 + place for place in range(5)])

    async def work(worker: Worker) -> None:
        tickets = await worker.submit([asked(each, choices=2) for each in range(1, 9)])
        for ticket, news in zip(tickets, await asyncio.gather(*map(all_of, tickets)), strict=True):
            first = int(ticket.request.prompt[0]) * 10
            for choice in (0, 1):
                said = [one.token for each in news if each.choice == choice for one in each.said]
                assert said == [first + place for place in range(5)]
        assert worker.open == 0

    within(Worker(engine), work)


def test_a_reader_is_woken_at_once_and_then_now_and_then() -> None:
    """Breaks when each token of each answer wakes somebody again, or when the first one or the last waits."""
    engine = FakeEngine(lambda _: range(100), pause=0.002)

    async def work(worker: Worker) -> None:
        [ticket] = await worker.submit([asked()])
        begun, heard = worker.loop.time(), [len(await ticket.news())]
        assert heard[0] < 50 and ticket.first is not None
        while news := await ticket.news():
            heard.append(len(news))
            assert worker.open == (0 if ticket.over else 1)
        seconds = worker.loop.time() - begun
        assert sum(heard) == 100 and len(heard) <= 3 + 2 * seconds / 0.02 and ticket.over and ticket.read

    within(Worker(engine, gather=0.02), work)


def test_a_whole_answer_wakes_its_reader_at_its_end() -> None:
    engine = FakeEngine(lambda request: range(int(request.prompt[0])))

    async def work(worker: Worker) -> None:
        short, long = await worker.submit([asked(40, choices=2), asked(5000)], whole=True)
        assert [len(await short.news()), len(await short.news())] == [80, 0]
        heard = []
        while news := await long.news():
            heard.append(len(news))
        # What is kept is bounded, and a whole answer is never too long for its reader.
        assert sum(heard) == 5000 and all(each % 256 == 0 for each in heard[:-1])

    within(Worker(engine, buffer=50), work)


def test_a_whole_answer_that_fails_says_so() -> None:
    engine = FakeEngine(lambda _: range(40), fail=lambda: RuntimeError("x") if engine.steps == 20 else None)

    async def work(worker: Worker) -> None:
        [ticket] = await worker.submit([asked()], whole=True)
        with pytest.raises(EngineFailedError):
            await ticket.news()

    within(Worker(engine), work)


def test_a_listener_hears_what_its_reader_would_while_that_waits() -> None:
    """Breaks when news are told twice, or not, or when the end does not come to the reader."""
    engine = FakeEngine(lambda _: range(200), pause=0.001)
    heard: list[int] = []

    def listener(news: list[News]) -> bool:
        assert not any(each.ended for each in news)
        if len(heard) % 3 == 0:
            heard.extend(one.token for each in news for one in each.said)
            return True
        return False

    async def work(worker: Worker) -> None:
        [ticket] = await worker.submit([asked()])
        ticket.listener = listener
        ended = ""
        while news := await ticket.news():
            heard.extend(one.token for each in news for one in each.said)
            ended = news[-1].ended
        assert heard == list(range(200)) and ended == "stop" and ticket.read

    within(Worker(engine, gather=0.002), work)


def test_readers_that_cost_much_are_written_to_less_often() -> None:
    """Breaks when many streams take as much of the processor as their number asks for."""
    engine = FakeEngine(lambda _: range(300), pause=0.002)
    looks: list[float] = []

    def listener(news: list[News]) -> bool:
        looks.append(time.monotonic())
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        return True

    async def work(worker: Worker) -> None:
        [ticket] = await worker.submit([asked()])
        ticket.listener = listener
        while await ticket.news():
            pass
        # The first is heard at once, and what comes with it then; each look after that has its rest before it.
        assert len(looks) <= 3 + (looks[-1] - looks[0]) / 0.075

    within(Worker(engine, gather=0.001), work)


def test_a_listener_that_fails_fails_its_own_reader() -> None:
    engine = FakeEngine(lambda request: range(50_000 if request.prompt[0] == 1 else 50), pause=0.001)

    def failing(news: list[News]) -> bool:
        raise ValueError("cannot be written")

    async def work(worker: Worker) -> None:
        bad, good = await worker.submit([asked(1), asked(2)])
        bad.listener = failing
        with pytest.raises(ValueError, match="cannot be written"):
            await all_of(bad)
        bad.close()
        assert len(await all_of(good)) == 50 and worker.open == 0

    within(Worker(engine), work)


def test_who_waits_on_a_ticket_that_is_closed_waits_no_longer() -> None:
    """Breaks when the task of a stream goes on for ever after its client has left."""
    left: list[Ticket] = []

    class Nobody:
        loop: asyncio.AbstractEventLoop

        def leave(self, ticket: Ticket) -> None:
            left.append(ticket)

    async def work() -> None:
        desk = Nobody()
        desk.loop = asyncio.get_running_loop()
        ticket = Ticket(desk, asked())
        reader = asyncio.ensure_future(ticket.news())
        await asyncio.sleep(0)
        ticket.close()
        assert await asyncio.wait_for(reader, 20) == [] == await ticket.news() and left == [ticket]

    asyncio.run(work())


def test_a_closed_ticket_is_cancelled_before_the_next_step_but_one() -> None:
    engine = FakeEngine(lambda _: range(10_000), pause=0.005)

    async def work(worker: Worker) -> None:
        [ticket] = await worker.submit([asked()])
        await ticket.news()
        before = engine.steps
        ticket.close()
        while engine.running:
            await asyncio.sleep(0.001)
        assert engine.steps <= before + 2 and engine.cancelled == [0] and worker.open == 0

    within(Worker(engine), work)


def test_a_reader_that_does_not_keep_up_is_cancelled_and_told() -> None:
    engine = FakeEngine(lambda request: range(int(request.prompt[0])))

    async def work(worker: Worker) -> None:
        slow, quick = await worker.submit([asked(50_000), asked(100)])
        assert len(await all_of(quick)) == 100
        while worker.open or engine.running:
            await asyncio.sleep(0.001)
        with pytest.raises(BusyError, match="waited to be read"):
            await slow.news()
        assert engine.cancelled == [0] and not engine.running

    within(Worker(engine, buffer=1000), work)


def test_more_than_it_can_hold_is_refused_and_room_comes_back() -> None:
    engine = FakeEngine(lambda _: range(50), pause=0.001)

    async def work(worker: Worker) -> None:
        tickets = await worker.submit([asked(), asked(choices=3)])
        with pytest.raises(BusyError, match="4 continuations are under way and 2 more"):
            await worker.submit([asked(choices=2)])
        [one] = await worker.submit([asked()])
        await asyncio.gather(*map(all_of, [*tickets, one]))
        [more] = await worker.submit([asked(choices=2)])
        assert len(await all_of(more)) == 100

    within(Worker(engine, rows=2, waiting=3), work)


def test_what_the_engine_refuses_is_raised_where_it_was_asked() -> None:
    class Refusing(FakeEngine):
        def add(self, request: Request) -> int:
            if request.prompt[0] == 7:
                raise DataError("a prompt of 7")
            return super().add(request)

    engine = Refusing(lambda _: range(3))

    async def work(worker: Worker) -> None:
        with pytest.raises(DataError, match="a prompt of 7"):
            await worker.submit([asked(1), asked(7), asked(2)])
        while engine.running or worker.open:
            await asyncio.sleep(0.001)
        [ticket] = await worker.submit([asked(1)])
        assert len(await all_of(ticket)) == 3

    within(Worker(engine), work)


def test_a_failed_continuation_ends_its_own_request_only() -> None:
    class Failing(FakeEngine):
        def step(self) -> list[News]:
            news = super().step()
            if 0 in self.running and self.steps == 2:
                del self.running[0]
                news = [News(0, 0, ended="failed", failure=RecipeError("no way on")), *news[1:]]
            return news

    engine = Failing(lambda _: range(5))

    async def work(worker: Worker) -> None:
        bad, good = await worker.submit([asked(1), asked(2)])
        with pytest.raises(RecipeError, match="no way on"):
            await all_of(bad)
        assert len(await all_of(good)) == 5 and worker.open == 0

    within(Worker(engine), work)


def test_after_a_failed_step_everybody_is_told_and_the_engine_goes_on() -> None:
    failures: list[Exception | None] = [None, ValueError("x"), None]
    engine = FakeEngine(lambda _: range(3), fail=lambda: failures.pop(0) if failures else None)

    async def work(worker: Worker) -> None:
        tickets = await worker.submit([asked(1), asked(2)])
        for ticket in tickets:
            with pytest.raises(EngineFailedError, match="ValueError"):
                await all_of(ticket)
        assert worker.open == 0 and sorted(engine.cancelled) == [0, 1]
        [ticket] = await worker.submit([asked(3)])
        assert len(await all_of(ticket)) == 3 and not worker.dead

    within(Worker(engine), work)


def test_after_three_failures_in_a_row_it_ends_and_nobody_waits() -> None:
    engine = FakeEngine(lambda _: range(3), fail=lambda: ValueError("always"))
    ended: list[bool] = []

    async def work(worker: Worker) -> None:
        worker.on_end = lambda: ended.append(True)
        for _ in range(3):
            [ticket] = await worker.submit([asked(1)])
            with pytest.raises(EngineFailedError):
                await all_of(ticket)
        while not ended:
            await asyncio.sleep(0.001)
        with pytest.raises(EngineFailedError, match="has ended"):
            await worker.submit([asked(1)])
        with pytest.raises(EngineFailedError, match="has ended"):
            await worker.do(lambda: 1)

    within(Worker(engine), work)


def test_work_between_steps_runs_on_the_engines_thread_and_raises_where_it_was_asked() -> None:
    import threading

    async def work(worker: Worker) -> None:
        assert await worker.do(lambda: threading.current_thread().name) == "engine"
        with pytest.raises(ZeroDivisionError):
            await worker.do(lambda: 1 / 0)

    within(Worker(FakeEngine(lambda _: [1])), work)


def test_who_still_waits_at_the_end_is_told() -> None:
    engine = FakeEngine(lambda _: range(100_000), pause=0.001)
    tickets: list[Ticket] = []

    async def work(worker: Worker) -> None:
        tickets.extend(await worker.submit([asked()]))
        worker.draining = True
        with pytest.raises(DrainingError, match="1 continuations under way"):
            await worker.submit([asked()])

    worker = Worker(engine)
    within(worker, work)

    async def after() -> None:
        with pytest.raises(DrainingError, match="has stopped"):
            await all_of(tickets[0])

    asyncio.run(after())
