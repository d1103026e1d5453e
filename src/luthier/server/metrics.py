"""Numbers of the server in Prometheus' text form: requests, what waits and runs, tokens, pages, and times.

Written on the event loop alone.
Source: Prometheus' text exposition format, version 0.0.4.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final, final

from luthier.infer.reader import Counts

_FIRST: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_NEXT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@final
class Histogram:
    """How often a time was at most so long."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count a time."""
        self.total += seconds
        self.counts[bisect_left(self.bounds, seconds)] += 1

    def lines(self, name: str) -> list[str]:
        """The histogram as Prometheus reads it."""
        made, sum_so_far = [], 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            sum_so_far += count
            made.append(f'{name}_bucket{{le="{"+Inf" if bound is None else f"{bound:g}"}"}} {sum_so_far}')
        return [*made, f"{name}_sum {self.total:.6f}", f"{name}_count {sum_so_far}"]


@final
class Clock:
    """The times of one answer: to its first token, and from each piece to the next."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = time.monotonic()
        self._first = True

    def began(self, at: float | None) -> None:
        """A whole answer had its first token then."""
        if at is not None:
            self._metrics.first.add(at - self._last)

    def heard(self) -> None:
        """Something came."""
        now = time.monotonic()
        (self._metrics.first if self._first else self._metrics.between).add(now - self._last)
        self._last, self._first = now, False


@final
class Metrics:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first = Histogram(_FIRST)
        self.between = Histogram(_NEXT)
        self.said = 0
        self.started = time.time()

    def text(self, counts: Counts, *, open_now: int) -> str:
        """All of it."""
        lines = ["# HELP luthier_requests_total Requests by route and status.", "# TYPE luthier_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'luthier_requests_total{{route="{route}",status="{status}"}} {count}')
        for name, kind, words, value in self._plain(counts, open_now):
            lines += [f"# HELP luthier_{name} {words}", f"# TYPE luthier_{name} {kind}", f"luthier_{name} {value}"]
        for name, words, times in (
            ("time_to_first_token_seconds", "From a request to the first token of its answer.", self.first),
            ("time_between_tokens_seconds", "From a piece of an answer to the next.", self.between),
        ):
            lines += [f"# HELP luthier_{name} {words}", f"# TYPE luthier_{name} histogram"]
            lines += times.lines(f"luthier_{name}")
        return "\n".join(lines) + "\n"

    def _plain(self, counts: Counts, open_now: int) -> list[tuple[str, str, str, float]]:
        return [
            ("open", "gauge", "Continuations that were taken and are not over.", open_now),
            ("waiting", "gauge", "Continuations that wait for pages.", counts.waiting),
            ("running", "gauge", "Continuations that run.", counts.running),
            ("pages", "gauge", "Pages of keys there are.", counts.pages),
            ("pages_held", "gauge", "Pages that continuations hold.", counts.held),
            ("pages_kept", "gauge", "Pages that nobody holds and that may be found again.", counts.kept),
            ("cache_bytes", "gauge", "Bytes of the pages there are.", counts.bytes),
            ("cache_bytes_held", "gauge", "Bytes of pages that continuations hold.", counts.bytes_held),
            ("cache_bytes_kept", "gauge", "Bytes of pages that may be found again.", counts.bytes_kept),
            ("tokens_read_total", "counter", "Tokens that went through the model.", counts.read),
            ("tokens_reused_total", "counter", "Tokens of prompts that were found read already.", counts.reused),
            ("tokens_drafted_total", "counter", "Tokens of drafts that the model looked at.", counts.drafted),
            ("tokens_accepted_total", "counter", "Tokens of drafts that were right.", counts.agreed),
            ("tokens_said_total", "counter", "Tokens of answers.", self.said),
            ("start_time_seconds", "gauge", "When the server began, in Unix time.", round(self.started, 3)),
        ]
