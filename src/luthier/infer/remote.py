"""A speaker that is an engine somewhere else: tokens go out, tokens and their log-probabilities come back.

Idea: whoever trains on what was said has to know that the model that said it is the one that is trained. So a remote
speaker is made of a probe that found it so, and of nothing else; other weights need another probe (`renewed`).
Cost: a request for each prompt, `at_once` of them under way at a time, each at most as long as the wire lets it be,
and asked again for as long as there is `patience`.
Use when: rollouts come from vLLM, SGLang or llama.cpp. Not when: the model fits beside the trainer; `infer/engine.py`
shares its weights and needs no probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Ints
from luthier.infer.dialects import Dialect
from luthier.infer.patience import Patience
from luthier.infer.sync import Score, Sync, probe
from luthier.model.speaker import Sampling, Spoken


@final
@dataclass(frozen=True)
class RemoteSpeaker:
    """Speaks as the model of a probe. Raises GateError for a probe that failed.

    With a `context` an answer that would run out of it is cut off there, as in this process.
    """

    engine: Dialect
    sync: Sync
    at_once: int = 16
    patience: Patience = field(default_factory=Patience)
    context: int | None = None

    def __post_init__(self) -> None:
        self.sync.require()
        if self.at_once < 1:
            raise RecipeError(f"{self.at_once} requests at a time", allowed="at least 1")

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in the order of the prompts; each draws with a seed of its own."""
        if not prompts:
            return []
        drawn = [
            replace(
                sampling, seed=(sampling.seed * 1_000_003 + place) % 2**31,
                max_new_tokens=self._room(prompt, sampling.max_new_tokens),
            )
            for place, prompt in enumerate(prompts)
        ]  # fmt: skip
        with ThreadPoolExecutor(min(self.at_once, len(prompts))) as pool:
            asked = [
                pool.submit(self.patience.get, partial(self.engine.speak, prompt, each, self.sync.model))
                for prompt, each in zip(prompts, drawn, strict=True)
            ]
            try:
                with self.patience.waits():
                    return [self._awaited(each) for each in asked]
            finally:
                for each in asked:
                    each.cancel()

    def _room(self, prompt: Ints, wanted: int) -> int:
        """How many tokens may follow a prompt. Raises DataError where there is room for none."""
        if self.context is None:
            return wanted
        if len(prompt) >= self.context:
            raise DataError(
                f"a prompt for {self.engine.wire.shown} has {len(prompt)} tokens",
                allowed=f"fewer than {self.context}: that is its context or ours",
                do="set data.max_tokens, or start the engine with a longer context",
            )
        return min(wanted, self.context - len(prompt))

    def _awaited(self, asked: Future[Spoken]) -> Spoken:
        self.patience.waits.until(lambda seconds: bool(wait([asked], seconds).done))
        return asked.result()

    def renewed(
        self,
        name: str,
        path: str,
        texts: Sequence[Ints],
        *,
        ours: Score,
        base: Score | None,
        before: Score | None = None,
        proved: bool = False,
    ) -> RemoteSpeaker:
        """The speaker with the weights that lie at `path` now, as the engine sees it, under a name of their own; those
        it had are let go. Raises GateError when the engine does not compute the new ones: it may go on with those from
        `before`, or with their cache. For `before` and `proved` see `probe` and `Sync`."""
        sync = loaded(self.engine, name, path, texts, ours=ours, base=base, before=before, proved=proved,
                      tolerance=self.sync.tolerance)  # fmt: skip
        if self.sync.model and self.sync.model in self.engine.models():
            self.engine.unload(self.sync.model)
        return replace(self, sync=sync)


def loaded(
    engine: Dialect,
    name: str,
    path: str,
    texts: Sequence[Ints],
    *,
    ours: Score,
    base: Score | None,
    tolerance: float,
    before: Score | None = None,
    proved: bool = False,
) -> Sync:
    """What a probe finds of an adapter that the engine loads for it. Raises GateError for one that it does not compute,
    and then does not leave it there: nobody shall find a wrong model under a good name."""
    if name in engine.models():
        engine.unload(name)
    engine.load(name, path)
    fine = False
    try:
        sync = probe(engine, name, texts, ours=ours, base=base, before=before, proved=proved, tolerance=tolerance)
        sync.require()
        fine = True
    finally:
        if not fine:
            engine.unload(name)
    return sync
