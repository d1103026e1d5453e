"""A base that an engine somewhere else speaks for: nothing is handed over, but that it is our base is probed.

Use when: answers are wanted of a model that nobody has trained yet, such as the pairs of `ai_feedback`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from luthier.core.waiting import Waits
from luthier.data.forest import Ints
from luthier.infer.dialects import BASE, Dialect, dialect_named
from luthier.infer.patience import Patience
from luthier.infer.remote import RemoteSpeaker
from luthier.infer.sync import probe
from luthier.infer.wire import Wire
from luthier.model.language_model import LanguageModel
from luthier.recipes.own_scores import scores_by
from luthier.recipes.reinforcing.remote_policy import LONGEST, PROBED, room_of
from luthier.recipes.reinforcing.tools import TOKEN
from luthier.recipes.schemas.reinforce import EngineKnobs


def base_elsewhere(model: LanguageModel, knobs: EngineKnobs, texts: Sequence[Ints], waits: Waits) -> RemoteSpeaker:
    """The engine, as a speaker of our base. Raises GateError where it has another one."""
    engine, patience = _engine(knobs), Patience(knobs.patience, waits=waits)
    some = [text[:LONGEST] for text in texts if len(text) > 1][:PROBED]
    with waits():
        lengths = [each for each in (patience.get(engine.context), room_of(model)) if each is not None]
        sync = patience.get(
            lambda: probe(engine, BASE, some, ours=scores_by(model), base=None, tolerance=knobs.tolerance)
        )
    return RemoteSpeaker(engine, sync, knobs.at_once, patience, min(lengths, default=None))


def require_engine(knobs: EngineKnobs) -> None:
    """Raise RemoteError where it cannot be asked."""
    _engine(knobs).models()


def _engine(knobs: EngineKnobs) -> Dialect:
    wire = Wire(knobs.url, token=os.environ.get(TOKEN, ""), seconds=knobs.seconds, insecure=knobs.insecure_http)
    return dialect_named(knobs.dialect, wire)
