"""Readers: what lets a model read on, for many continuations at once, and says what may come next.

The paged one is for every model whose attention we drive: all parts of a step are one flat batch, whatever their
lengths and adapters. Cohorts (cohorts.py) are for the others.

Where a part is of a batch-invariant request, a step is several passes. A product may add up in another order when it
has more rows, so a piece of such a prompt is a pass of its own; single tokens, and pieces that are as short, go side by
side in passes of so few rows that a row is the same in any company, where the model's operations and the adapter's
promise it: then whoever is not invariant loses little, as the weights are read once more. Elsewhere each token is a
pass of its own; of these a step has a few in turns, so that others wait for few of them.
Source: He et al., Defeating nondeterminism in LLM inference (Thinking Machines, 2025), of the reason; kernels there
    keep one order for any number of rows, passes here keep the number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.data.forest import Ints, Span
from luthier.infer.cache import Cache, Layers, PassKeys, paged, rows_of
from luthier.infer.continuation import Continuation
from luthier.infer.sampler import log_probs_of
from luthier.infer.scheduler import Part, Room, Scheduler
from luthier.kernels.head import Head
from luthier.kernels.thin_pass import ThinPass
from luthier.model.attending.attention import ForestPlan, Root
from luthier.model.language_model import LanguageModel
from luthier.model.routes import Routes, routes_over
from luthier.model.running.executor import flat_hidden
from luthier.model.running.own_lengths import short_length
from luthier.model.running.scoring import logits_of

PROMPT_ROWS: Final = 32
"""Rows of a prompt whose logits are looked at together: beside 150,000 words they are memory."""
ALONE: Final = 2
"""Tokens of a step at most that are each a pass of their own, where others wait for them and these are no more."""
SHARE: Final = 0.3
"""How much of the free memory keys may take where nobody says it."""
LONGEST: Final = 8192
"""The context of a model that has no limit of its own."""


@final
@dataclass(frozen=True)
class Counts:
    """What a reader holds: continuations that wait and that run; pages there are, that are held, and that nobody holds
    but may be found again, in all stores together; tokens that were read, and that were found read already; tokens of
    drafts that were looked at, and that were right; bytes of these pages, which differ from store to store."""

    waiting: int
    running: int
    pages: int = 0
    held: int = 0
    kept: int = 0
    read: int = 0
    reused: int = 0
    drafted: int = 0
    agreed: int = 0
    bytes: int = 0
    bytes_held: int = 0
    bytes_kept: int = 0


@final
@dataclass(frozen=True)
class Reading:
    """What a pass ends with: for each continuation a row of logits that says what may come next, and behind it one for
    each token of its draft, if it had one."""

    continuations: Sequence[Continuation]
    logits: Float[Tensor, "n V"]
    drafts: Sequence[tuple[int, ...]] = ()

    @property
    def rows(self) -> list[slice]:
        """The rows of each continuation."""
        counts = [1 + len(draft) for draft in self.drafts] if self.drafts else [1] * len(self.continuations)
        stops = np.cumsum(counts).tolist()
        return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def default_room(model: LanguageModel, layers: Layers) -> Room:
    """Room for as many full contexts as run at once, as far as a share of the memory that is free now goes."""
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = psutil.virtual_memory().available
    plain = Room(tokens=1)
    most = plain.rows * plain.held(model.context_tokens or LONGEST, layers.window) // plain.page

    def taken(pages: int) -> int:
        room = replace(plain, tokens=pages * plain.page)
        sizes = layers.page_bytes(room.page, model.dtype)
        return sum(room.pages_of(window) * own for window, own in zip(layers.groups, sizes, strict=True))

    pages = bisect_right(range(1, most + 1), int(SHARE * free), key=taken)
    return replace(plain, tokens=max(1, pages) * plain.page)


class Reader(ABC):
    """Holds continuations from their beginning to their end."""

    @abstractmethod
    def add(self, each: Continuation) -> None:
        """One more, which waits until there is room for it."""

    @abstractmethod
    def remove(self, each: Continuation) -> None:
        """It is over; what it held is free."""

    @abstractmethod
    def read(self) -> Reading | None:
        """One pass; None when nobody is there."""

    @abstractmethod
    def fork(self, source: Continuation, twin: Continuation) -> bool:
        """Let `twin` run on from where `source` is; False where it begins anew instead."""

    @abstractmethod
    def agree(self, each: Continuation) -> None:
        """It has said what its draft was, as far as it went: what was read of it counts."""

    @abstractmethod
    def forget(self) -> None:
        """The weights are others now: what was read before is of no use to those who begin after this."""

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """What it holds now."""


@final
class PagedReader(Reader):
    """One flat pass a step, keys in pages. `mixed` batches name the adapter of each row, "" being the base alone."""

    def __init__(self, model: LanguageModel, room: Room, layers: Layers, *, mixed: bool) -> None:
        self.model = model
        self.scheduler = Scheduler(room, windows=layers.groups)
        self.mixed = mixed
        pages = [each.count for each in self.scheduler.stores.pages]
        self.cache = Cache(layers, pages=pages, size=room.page, dtype=model.dtype, device=model.device)
        self._roots: dict[tuple[str, int], Root | None] = {}
        self._short = short_length(model.module.base_model)
        self._read = 0

    def add(self, each: Continuation) -> None:
        self.scheduler.waiting.append(each)

    def remove(self, each: Continuation) -> None:
        self.scheduler.remove(each)

    def fork(self, source: Continuation, twin: Continuation) -> bool:
        for group, (page, to) in enumerate(self.scheduler.fork(source, twin)):
            self.cache.copy_page(group, page, to)
        return twin.done > 0

    def agree(self, each: Continuation) -> None:
        self.scheduler.agree(each)

    def forget(self) -> None:
        self.scheduler.stores.forget()
        self._roots.clear()

    @property
    def counts(self) -> Counts:
        one, stores = self.scheduler, self.scheduler.stores.pages
        pages = np.array([(each.count, each.held, each.kept) for each in stores])
        of_bytes = pages.T @ np.array(self.cache.page_bytes)
        count, held, kept = pages.sum(0).tolist()
        total, total_held, total_kept = of_bytes.tolist()
        return Counts(
            len(one.waiting), len(one.running), count, held, kept, self._read, one.reused,
            bytes=total, bytes_held=total_held, bytes_kept=total_kept,
        )  # fmt: skip

    def root(self, adapter: str, places: int = 0) -> Root | None:
        """The learned root of an adapter as attention sees it, or of what is switched on, with so many `places` of a
        text where that matters."""
        if (adapter, places) not in self._roots:
            known = {"", *self.model.attachments, *self.model.mixes}
            # Of adapters that have left the model nothing is kept.
            self._roots = {key: root for key, root in self._roots.items() if key[0] in known}
            model = self.model
            made = model.seen_root_of(adapter, places) if self.mixed else model.seen_root(places)
            self._roots[adapter, places] = made
        return self._roots[adapter, places]

    def read(self) -> Reading | None:
        parts = self.scheduler.plan()
        if not parts:
            return None
        parts = [part for part in (self._behind_its_root(part) for part in parts) if part.start < part.stop]
        if not parts:
            return Reading([], torch.empty(0, self.model.vocabulary_size))
        if not any(part.continuation.request.batch_invariant for part in parts):
            return self._pass(parts)
        readings = [self._pass(own) for own in self._passes(parts)]
        return Reading(
            [each for own in readings for each in own.continuations],
            # In float32 alone too: beside a head that gives floats all of them are floats.
            torch.cat([own.logits.float() for own in readings]),
            [draft for own in readings for draft in own.drafts],
        )

    def _passes(self, parts: list[Part]) -> list[list[Part]]:
        """The parts of a step by the passes that compute them, where some are batch-invariant."""
        few = self.model.executor.backend.few
        apart: dict[str, bool] = {}

        def fits(part: Part) -> bool:
            name = part.continuation.request.adapter
            if name not in apart:
                apart[name] = self.model.keeps_rows_apart(name if self.mixed else None)
            return apart[name] and part.count <= few

        passes: list[list[Part]] = []
        alone: list[Part] = []
        others: list[Part] = []
        for part in parts:
            if not part.continuation.request.batch_invariant:
                others.append(part)
            elif not fits(part):
                # Beside a draft a row would be another.
                alone.append(Part(part.continuation, part.start, part.stop - len(part.draft)))
            elif passes and sum(each.count for each in passes[-1]) + part.count <= few:
                passes[-1].append(part)
            else:
                passes.append([part])
        together = len(parts) - len(alone)
        # The weights are read anyway: others that speak come along as far as there is room.
        room = few - sum(each.count for each in passes[-1]) if passes else 0
        guests: list[Part] = []
        for part in others:
            if len(guests) < room and part.count == 1 and fits(part):
                guests.append(part)
        if guests:
            passes[-1] += guests
            others = [part for part in others if part not in guests]
        return [*passes, *([part] for part in _in_turn(alone, beside=together)), *([others] if others else [])]

    def _pass(self, parts: list[Part]) -> Reading:
        """One pass over these parts."""
        # Rows of one adapter side by side are one range.
        parts.sort(key=lambda part: part.continuation.request.adapter)
        hidden, rows = self._hidden(parts)
        self._read += sum(part.count for part in parts)
        for part in parts:
            self.scheduler.read(part)
        speaking = [part for part in parts if part.speaks]
        self._tell_prompts([part for part in parts if part.continuation.wants_prompt], hidden, rows)
        drafts = [part.draft for part in speaking]
        chosen: list[int] = []
        adapters: list[str] = []
        for part, draft in zip(speaking, drafts, strict=True):
            stop = rows[id(part)].stop
            chosen += range(stop - 1 - len(draft), stop)
            adapters += [part.continuation.request.adapter] * (1 + len(draft))
        return Reading([part.continuation for part in speaking], self._logits(hidden[chosen], adapters), drafts)

    def _behind_its_root(self, part: Part) -> Part:
        """A part without the places of a learned root, whose keys are written as they are."""
        each, root_tokens = part.continuation, part.continuation.root_tokens
        if part.start >= root_tokens:
            return part
        root = self.root(each.request.adapter, self._short + 1 if self._short is not None and each.is_long else 0)
        stop = min(part.stop, root_tokens)
        if root is not None:
            self.cache.put(rows_of([each.tables], [(part.start, stop)], self.cache), root, part.start)
        behind = Part(each, stop, part.stop)
        if behind.start == behind.stop:
            self.scheduler.read(Part(each, part.start, stop))
        return behind

    def _hidden(self, parts: Sequence[Part]) -> tuple[Float[Tensor, "m d"], dict[int, slice]]:
        """The final states that somebody looks at, and which of them are whose, by the part's identity.

        Of a part these are its last place, or all of its places where something is told of the prompt.
        """
        model = self.model
        tokens, positions, wanted = [], [], []
        rows: dict[int, slice] = {}
        start = looked = 0
        for part in parts:
            count = part.count
            tokens.append(part.tokens)
            positions.append(np.arange(part.start, part.stop))
            whole = part.continuation.shows_prompt
            first = 0 if whole else count - 1 - len(part.draft)
            kept = count - first if part.speaks or whole else 0
            wanted.append(np.arange(start + count - kept, start + count))
            rows[id(part)] = slice(looked, looked + kept)
            start, looked = start + count, looked + kept
        tables = [part.continuation.tables for part in parts]
        counts, looked_at = [part.count for part in parts], [len(each) for each in wanted]
        texts = paged(tables, [part.stop for part in parts], counts, self.cache)
        where = rows_of(tables, [(part.start, part.stop) for part in parts], self.cache)
        adapters = [part.continuation.request.adapter for part in parts]
        routes = self._routes(adapters, counts)
        plan = ForestPlan(
            spans=(Span(0, start, ()),),
            kept=PassKeys(self.cache, where, texts, model.executor.backend, None if self.mixed else self._thin(start)),
            routes=routes,
            row_routes=routes if looked_at == counts else self._routes(adapters, looked_at),
        )
        hidden = flat_hidden(
            model.module,
            self._there(np.concatenate(tokens)),
            self._there(np.concatenate(positions) + model.executor.entry.first_position),
            plan,
            blocks=model.executor.blocks,
            rows=self._there(np.concatenate(wanted)),
            lengths=None if self._short is None else _lengths(parts),
        )
        return hidden, rows

    def _there(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.model.device)

    def _routes(self, adapters: Sequence[str], counts: Sequence[int]) -> Routes | None:
        return self.model.routes(zip(adapters, counts, strict=True)) if self.mixed else None

    def _thin(self, rows: int) -> ThinPass | None:
        """The terms of the adapter that is switched on, where it is one and nothing but an adapter."""
        on = [each for each in self.model.attachments.values() if each.active.always]
        if len(on) != 1 or on[0].trains_base:
            return None
        routes = self.model.routes(((on[0].name, rows),))
        return routes.thin

    def _logits(self, hidden: Float[Tensor, "n d"], adapters: Sequence[str]) -> Float[Tensor, "n V"]:
        routes, module = routes_over((adapter, 1) for adapter in adapters), self.model.module
        if not self.mixed or not routes.runs or not self.model.head_is_edited:
            return logits_of(module, hidden, self.model.head)
        heads = [self.model.head_with(run.adapter) for run in routes.runs]
        if all(head is None or (isinstance(head, Head) and not head.changes) for head in heads):
            # Nobody has changed it.
            return logits_of(module, hidden, heads[0])
        split = hidden.split(routes.sizes)
        return torch.cat([logits_of(module, states, head) for states, head in zip(split, heads, strict=True)])

    def _tell_prompts(self, parts: Sequence[Part], hidden: Float[Tensor, "m d"], rows: dict[int, slice]) -> None:
        """Note what is told of the tokens of prompts that were read just now."""
        for part in parts:
            each = part.continuation
            told = each.root_tokens + 1 + len(each.prompt_said)
            last = min(part.stop, each.root_tokens + len(each.request.prompt) - 1)
            # Place p predicts the token at p + 1.
            states = hidden[rows[id(part)]][told - 1 - part.start : last - part.start]
            labels = self._there(each.tokens(told, last + 1))
            for some, own in zip(states.split(PROMPT_ROWS), labels.split(PROMPT_ROWS), strict=True):
                logits = self._logits(some, [each.request.adapter] * len(some))
                each.prompt_said += log_probs_of(
                    logits, own, each.request.sampling.likeliest, backend=self.model.executor.backend
                )


def _in_turn(alone: Sequence[Part], *, beside: int) -> list[Part]:
    """Which of the parts that are passes of their own have their turn, with so many parts `beside` them in a step.

    Pieces of prompts all have it, as the scheduler gives a step few of them. Of tokens so many that each text has its
    share of the time, or a few more: those that have waited longest.
    """
    pieces = [part for part in alone if part.count > 1]
    tokens = [part for part in alone if part.count == 1]
    most = max(ALONE, -(-len(tokens) // beside)) if beside else len(tokens)
    # Sorting keeps the order of those that have waited as long.
    tokens.sort(key=lambda part: -part.continuation.passed_over)
    for part in tokens[:most]:
        part.continuation.passed_over = 0
    for part in tokens[most:]:
        part.continuation.passed_over += 1
    return [*pieces, *tokens[:most]]


def _lengths(parts: Sequence[Part]) -> Ints:
    """How many places the text of each token of a pass has, (T,)."""
    return np.repeat(np.array([part.continuation.length for part in parts], np.int32), [part.count for part in parts])
