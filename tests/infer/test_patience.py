"""Who is away is asked again after pauses that grow; what is wrong stays wrong and is asked once."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest

from luthier.core.errors import RecipeError
from luthier.infer.patience import Patience
from luthier.infer.wire import RemoteError, UnavailableError, _seconds


def failing(times: int, error: RemoteError) -> tuple[Callable[[], int], list[float]]:
    """Something that fails so often, and when it was asked."""
    asked: list[float] = []

    def ask() -> int:
        asked.append(time.monotonic())
        if len(asked) <= times:
            raise error
        return 7

    return ask, asked


def test_it_asks_again_after_pauses_that_grow() -> None:
    ask, asked = failing(3, UnavailableError("away"))
    assert Patience(60.0, pause=0.02).get(ask) == 7 and len(asked) == 4
    pauses = [after - before for before, after in pairwise(asked)]
    assert all(pause >= least for pause, least in zip(pauses, (0.02, 0.04, 0.08), strict=True))


def test_it_ends_and_says_how_long_it_waited() -> None:
    ask, asked = failing(99, UnavailableError("away"))
    with pytest.raises(UnavailableError, match="away, and again and again for 0.05 seconds"):
        Patience(0.05, pause=0.01).get(ask)
    assert 2 <= len(asked) <= 5
    ask, asked = failing(1, UnavailableError("away"))
    with pytest.raises(UnavailableError) as caught:
        Patience().get(ask)
    assert str(caught.value) == "away" and len(asked) == 1


def test_what_is_wrong_is_not_waited_for() -> None:
    ask, asked = failing(1, RemoteError("no such model"))
    with pytest.raises(RemoteError, match="no such model"):
        Patience(60.0).get(ask)
    assert len(asked) == 1
    with pytest.raises(RecipeError, match="a pause above 0"):
        Patience(1.0, pause=0.0)


def test_who_wants_to_be_left_alone_is_left_alone() -> None:
    """Breaks when Retry-After is not heard, or is waited for although there is no time for it."""
    busy = UnavailableError("busy")
    busy.pause = 0.3
    ask, asked = failing(1, busy)
    assert Patience(60.0, pause=0.01).get(ask) == 7 and asked[1] - asked[0] >= 0.3
    ask, asked = failing(1, busy)
    with pytest.raises(UnavailableError, match="not to be asked for 0.3 seconds, more than the 0.2 there are"):
        Patience(0.2, pause=0.01).get(ask)
    assert len(asked) == 1


@pytest.mark.parametrize(("said", "seconds"), [
    ("", 0), ("7", 7), ("soon", 0), ("-1", 0), ("1e9", 0), ("99999999999", 1e6), ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
])  # fmt: skip
def test_retry_after_is_seconds_or_a_date(said: str, seconds: float) -> None:
    assert _seconds(said) == seconds


def test_retry_after_may_be_a_date_to_come() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
    assert _seconds(date) == pytest.approx(3600, abs=30)
