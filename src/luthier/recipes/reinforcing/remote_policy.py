"""The policy of a run, spoken by an engine somewhere else: it gets the weights whenever they have changed.

Read top to bottom: who is asked for answers looks whether the engine has the weights as they are now. If not, they are
written where it can read them, loaded under a name of their own, probed, and only then sampled from; those before them
go. An engine that has lost them, because it was started anew, gets them again.
Idea: an adapter that has hardly been trained changes nothing that shows, so an engine that ignores it, or halves it,
would go unnoticed just then. So before anything is sampled the engine gets a draft: the same adapter with noise that
shows. What computes that rightly may be given one that is too small to be told from rounding.
All of that asks the model, so it is done by whoever trains it, between two steps. What comes of it, a policy that is
pinned, needs the engine only, and may be asked by another thread while the weights here go on.
Cost: at each round a probe of some dozen short requests and three passes of ours over the same tokens, and a copy of
the trained weights.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.adapters import Adapter
from luthier.core.errors import CorruptError, GateError, RecipeError
from luthier.core.waiting import Waits
from luthier.data.forest import Ints
from luthier.infer.dialects import Dialect, dialect_named
from luthier.infer.patience import Patience
from luthier.infer.remote import RemoteSpeaker, loaded
from luthier.infer.sync import Distance, Score
from luthier.infer.wire import RemoteError, Wire
from luthier.model.editing.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Spoken
from luthier.recipes.lint import require_clean
from luthier.recipes.own_scores import scores_by
from luthier.recipes.reinforcing.tools import TOKEN
from luthier.recipes.schemas.reinforce import EngineKnobs
from luthier.store.runs import ADAPTER
from luthier.train.result import save_result
from luthier.train.rollouts import LOST

SHOWS: Final = 0.2
"""Mean change of a log-probability by a draft that shows, in nats: ten times what rounding to bfloat16 makes."""
_SMALLEST, _DOUBLINGS = 0.01, 14
"""Noise of the first draft that is tried, and how often it is doubled."""
PROBED, LONGEST = 4, 64
"""Prompts that a probe compares, and their tokens."""


@final
@dataclass(frozen=True)
class Policy:
    """What is trained: the weights of an attachment, and how they are written."""

    model: LanguageModel
    attachment: Attachment
    adapter: Adapter
    stop_ids: tuple[int, ...]

    def scores(self, *, bare: bool = False, temperature: float = 1.0) -> Score:
        """Log-probabilities by the policy as it is when it is asked, or by its base."""
        return scores_by(self.model, bare=bare, temperature=temperature)

    def write(self, folder: Path) -> None:
        """The adapter in PEFT's format."""
        save_result(folder, self.model, self.attachment, self.adapter, {"stop_ids": list(self.stop_ids)})

    def copied(self) -> dict[str, Tensor]:
        """The trained weights as they are now."""
        return {name: each.detach().clone() for name, each in self.attachment.named_parameters().items()}

    @contextmanager
    @torch.no_grad()
    def having(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The policy with other weights, for the length of a `with` block; then its own come back, bit for bit."""
        own = self.copied()
        try:
            self._set(weights)
            yield
        finally:
            self._set(own)

    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.attachment.named_parameters().items():
            parameter.copy_(weights[name])


@final
@dataclass
class PinnedPolicy:
    """What the engine says with the weights of one hand-over. `lost` once it was found to have them no more."""

    speaker: RemoteSpeaker
    given: Mapping[str, Tensor] = field(repr=False)
    lost: bool = False

    @property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The weights as bytes: numpy knows no bfloat16."""
        return {name: each.cpu().reshape(-1).view(torch.uint8).numpy() for name, each in self.given.items()}

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt."""
        try:
            return self.speaker.speak(prompts, sampling)
        except RemoteError as failure:
            if self.speaker.sync.model not in self.speaker.patience.get(self.speaker.engine.models):
                # It was started anew, and has lost what it was given.
                self.lost = True
                raise RemoteError(
                    f"{self.speaker.engine.wire.shown} has lost the adapter while it answered",
                    do="look why it is started anew, or who unloads its adapters",
                ) from failure
            raise


@final
class RemotePolicy:
    """A Speaker that says what the policy would say now. Raises RecipeError for one that no engine can be given."""

    def __init__(self, policy: Policy, knobs: EngineKnobs, texts: Sequence[Ints], *, run: Path) -> None:
        if policy.attachment.trains_base:
            raise RecipeError(
                f"the adapter {policy.adapter.method_name()!r} trains the base's own weights, and rollouts.engine is "
                f"{knobs.url!r:.200}: an engine that runs takes adapters, and keeps its base",
                do="choose an adapter such as lora, or leave rollouts.engine out",
            )
        wire = Wire(knobs.url, token=os.environ.get(TOKEN, ""), seconds=knobs.seconds, insecure=knobs.insecure_http)
        self.policy = policy
        self.knobs = knobs
        self.engine: Dialect = dialect_named(knobs.dialect, wire)
        self.waits = Waits(f"the engine at {wire.shown}")
        self.patience = Patience(knobs.patience, waits=self.waits)
        self.context = room_of(policy.model)
        """How many tokens a prompt and its answer may have together, here and there."""
        self.texts = [text[:LONGEST] for text in texts if len(text) > 1][:PROBED]
        self.folder = Path(knobs.adapters).resolve()
        # Runs of one name, here or on other machines, may share an engine.
        place = hashlib.sha256(f"{platform.node()} {run.resolve()}".encode()).hexdigest()[:6]
        self._prefix = f"{run.name}-{place}-"
        self._speaker: RemoteSpeaker | None = None
        self._pinned: PinnedPolicy | None = None
        self._given: dict[str, Tensor] = {}
        self._heat = 1.0
        self._figures: dict[str, Any] = {}

    def require(self) -> None:
        """Raise what is wrong with the engine that can be told at once, without giving it anything."""
        self.engine.models()
        lengths = [each for each in (self.engine.context(), self.context) if each is not None]
        self.context = min(lengths, default=None)
        if not self.folder.is_dir():
            raise RecipeError(f"rollouts.engine.adapters is {self.folder}, which is no folder",
                              do="make it where both this process and the engine can see it")  # fmt: skip

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt by the weights as they are now."""
        for left in reversed(range(LOST)):
            pinned = self.pinned(sampling)
            try:
                return pinned.speak(prompts, sampling)
            except RemoteError:
                if not pinned.lost or not left:
                    raise
        return []

    def pinned(self, sampling: Sampling, weights: Mapping[str, NDArray[Any]] | None = None) -> PinnedPolicy:
        """The weights as they are now, or those of a pinned policy, handed over; told is at the heat of `sampling`."""
        with self.waits(), nullcontext() if weights is None else self.policy.having(self._from(weights)):
            if self._pinned is not None and self._pinned.lost:
                self._speaker = None
            speaker = self.patience.get(self._current)
            self._require_heat(speaker, sampling)
        self._pinned = PinnedPolicy(speaker, self._given)
        return self._pinned

    def _from(self, weights: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The weights that a pinned policy has told."""
        found = {}
        for name, own in self.policy.attachment.named_parameters().items():
            kept = weights.get(name)
            if kept is None or kept.nbytes != own.nbytes:
                raise CorruptError(f"the checkpoint has {0 if kept is None else kept.nbytes} bytes of {name} as they "
                                   "were sampled from", allowed=f"{own.nbytes}")  # fmt: skip
            found[name] = torch.from_numpy(kept.copy()).view(own.dtype).reshape(own.shape).to(own.device)
        return found

    def told(self) -> Mapping[str, Any]:
        """What the newest probes have found, since this was last asked."""
        found, self._figures = self._figures, {}
        return found

    def end(self) -> None:
        """Have whoever waits for it, in whatever thread, wait no longer, and break off what is asked."""
        self.waits.end()
        self.engine.wire.calls.cut()

    def close(self) -> None:
        """Take what is left of the run off the engine and its folder."""
        if self._speaker is not None:
            # The engine may be the reason why a run ends.
            with suppress(RemoteError):
                self.engine.unload(self._speaker.sync.model)
            self._speaker = None
        self._sweep()

    # ------------------------------------------------------------------------------------------------- hand-over

    def _current(self) -> RemoteSpeaker:
        """The engine with the weights as they are now."""
        name = self._prefix + self.policy.attachment.trained_digest()[:12]
        if self._speaker is not None and self._speaker.sync.model == name:
            return self._speaker
        began = time.perf_counter()
        if self._speaker is None:
            self._forget()
            self._prove()
        path = self._written(name)
        self._speaker = self._renewed(name, path)
        self._given = self.policy.copied()
        self._sweep(name)
        sync = self._speaker.sync
        self._figures = {"engine": sync.model, "apart": sync.apart.mean, "share": sync.share,
                         "hand_over_seconds": time.perf_counter() - began}  # fmt: skip
        return self._speaker

    def _renewed(self, name: str, path: str) -> RemoteSpeaker:
        ours, base = self.policy.scores(), self.policy.scores(bare=True)
        if self._speaker is None:
            sync = loaded(self.engine, name, path, self.texts, ours=ours, base=base, proved=True,
                          tolerance=self.knobs.tolerance)  # fmt: skip
            return RemoteSpeaker(self.engine, sync, self.knobs.at_once, self.patience, self.context)
        return self._speaker.renewed(name, path, self.texts, ours=ours, base=base, before=self._before, proved=True)

    def _before(self, texts: Sequence[Ints]) -> list[list[float]]:
        """Log-probabilities by the weights that the engine was given last."""
        with self.policy.having(self._given):
            return self.policy.scores()(texts)

    def _prove(self) -> None:
        """Let the engine show that it computes adapters of this kind, by one that shows. Raises GateError."""
        name = self._prefix + "draft"
        with self.policy.having(self._draft()):
            path = self._written(name)
            require_clean(self.folder / name / ADAPTER, self.engine.name, max_rank=self.knobs.max_rank)
            loaded(self.engine, name, path, self.texts, ours=self.policy.scores(), base=self.policy.scores(bare=True),
                   tolerance=self.knobs.tolerance)  # fmt: skip
            self.engine.unload(name)

    def _draft(self) -> dict[str, Tensor]:
        """The trained weights with the least noise that shows."""
        draws = torch.Generator().manual_seed(0)
        own = self.policy.copied()
        noise = {name: torch.randn(each.shape, generator=draws).to(each) for name, each in own.items()}
        base = _flat(self.policy.scores(bare=True)(self.texts))
        for doubling in range(_DOUBLINGS):
            size = _SMALLEST * 2**doubling
            tried = {name: each + size * noise[name] for name, each in own.items()}
            with self.policy.having(tried):
                if Distance.of(_flat(self.policy.scores()(self.texts)), base).mean >= SHOWS:
                    return tried
        raise GateError(
            f"noise of {size:g} in the weights of the adapter changes log-probabilities by less than {SHOWS}, so "
            "nobody can tell whether the engine computes it",
            do="look at adapter.targets, or leave rollouts.engine out",
        )

    def _written(self, name: str) -> str:
        """Where the engine finds the weights as they are now."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self.policy.write(self.folder / name)
        return f"{self.knobs.seen_as.rstrip('/') or self.folder}/{name}/{ADAPTER}"

    def _forget(self) -> None:
        """Take from the engine what a process of this run that was killed has left there."""
        for name in self.engine.models():
            if name.startswith(self._prefix):
                self.engine.unload(name)

    def _sweep(self, kept: str = "") -> None:
        """Remove what was written, but for one."""
        for each in self.folder.glob(escape(self._prefix) + "*"):
            if each.name != kept:
                shutil.rmtree(each, ignore_errors=True)

    def _require_heat(self, speaker: RemoteSpeaker, sampling: Sampling) -> None:
        """Raise GateError for an engine that tells log-probabilities at another temperature than that of the policy."""
        if sampling.told_at == self._heat:
            return
        score = self.policy.scores(temperature=sampling.told_at)
        said = speaker.speak(self.texts, sampling)
        whole = [np.concatenate([text, each.tokens]) for text, each in zip(self.texts, said, strict=True)]
        wanted = [one[-len(each.tokens) :] for one, each in zip(score(whole), said, strict=True)]
        apart = Distance.of(_flat([each.log_probs for each in said]), _flat(wanted))
        if not apart.within(self.knobs.tolerance):
            raise GateError(
                f"log-probabilities of what {self.engine.wire.shown} says at temperature {sampling.told_at:g} differ "
                f"from ours by {apart}: it tells them before temperature, or draws otherwise",
                allowed=f"a mean difference of {self.knobs.tolerance}",
                do="start vLLM with --logprobs-mode processed_logprobs, or set objective.temperature to 1",
            )
        self._heat = sampling.told_at


def room_of(model: LanguageModel) -> int | None:
    """How many tokens a prompt and its answer may have together: the context, less what a learned root takes."""
    limit, root = model.context_tokens, model.active_root
    return None if limit is None else limit - (0 if root is None else root.token_count)


def _flat(lists: Sequence[Sequence[float]]) -> list[float]:
    return [each for one in lists for each in one]
