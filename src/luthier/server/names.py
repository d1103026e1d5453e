"""The names under which models are served: the base, adapters, mixes of them, and what a request may call them.

`base` and `base:adapter` are both understood; a mix is `first@0.5+second`. A request for the base takes the adapters
that POST /lora-adapters has given a weight (llama.cpp's way), and one that brings its own `lora` list takes that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, final

from luthier.core.errors import RecipeError, RefusedError
from luthier.core.nearest import did_you_mean
from luthier.server.bodies import Scaled
from luthier.server.errors import NotServedError


class Pool(Protocol):
    """What the names need of the adapters' pool. Only the engine's thread calls what changes it."""

    def register(self, name: str, folder: Path, *, anew: bool = False) -> None:
        """Let a name stand for the adapter in a folder, also one that stands for another if `anew`."""

    def unregister(self, name: str) -> None:
        """Let a name stand for nothing."""


@final
@dataclass
class Adapter:
    """An adapter that is served: the name the engine knows, its weight in requests for the base, and since when."""

    name: str
    engine: str
    folder: str = ""
    scale: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))


@final
class Names:
    """What is served. `base` is the model's own name."""

    def __init__(self, base: str, *, pool: Pool | None = None, folder: Path | None = None) -> None:
        self.base = base
        self.pool = pool
        self.folder = folder
        self.created = int(time.time())
        self.adapters: dict[str, Adapter] = {}

    @property
    def all(self) -> list[str]:
        """Every name that a request may use, mixes aside."""
        return [self.base, *self.adapters]

    def add(self, name: str, engine: str, *, folder: str = "") -> None:
        """Serve an adapter that the engine knows."""
        self.adapters[name] = Adapter(name, engine, folder)

    def require_free(self, name: str, *, inplace: bool) -> None:
        """Raise RecipeError for a name that no adapter can be given; `inplace` takes one that an adapter has."""
        own = self.adapters.get(name)
        if name == self.base or (own is not None and (not inplace or own.engine != name)):
            raise RecipeError(f"a model is called {name!r:.80} already", do="unload it first, or set load_inplace")
        if name.startswith(self.base + ":"):
            raise RecipeError(f"{name!r:.80} begins with the base's name, as every adapter may be asked for",
                              do=f"call it {name.removeprefix(self.base + ':')!r:.80}")  # fmt: skip

    def engine_name(self, model: str, lora: Sequence[Scaled] | None = None) -> str:
        """What the engine calls what a request asks for. Raises NotServedError for a name that nobody has."""
        wanted = model.removeprefix(self.base + ":") if model.startswith(self.base + ":") else model
        if lora is not None or model == self.base:
            if model != self.base:
                raise RecipeError(f"lora was given beside {model!r:.80}", allowed="lora with the base alone")
            scales = self._scales(lora) if lora is not None else {one.name: one.scale for one in self.adapters.values()}
            return self._mix(scales)
        if wanted in self.adapters:
            return self.adapters[wanted].engine
        parts = [part.partition("@") for part in wanted.split("+")]
        if self.pool is not None and all(name in self.adapters for name, _, _ in parts):
            _require_once([name for name, _, _ in parts], f"the mix {wanted!r:.80}")
            return self._mix({name: _weight(wanted, weight, at) for name, at, weight in parts})
        raise NotServedError(f"no model is called {model!r:.80}", do=did_you_mean(model[:200], self.all[:200]))

    def rescale(self, scales: Sequence[Scaled]) -> None:
        """Set the weights of adapters in requests for the base; those that are not named get none."""
        given = self._scales(scales)
        for one in self.adapters.values():
            one.scale = given.get(one.name, 0.0)

    def place(self, path: str) -> Path:
        """The folder that a request names: below the one that was declared, no symbolic link out of it."""
        if self.folder is None:
            raise RefusedError(f"the folder {path!r:.80}, and none was declared",
                               do="start the server with --adapters DIR")  # fmt: skip
        if not path or "\0" in path or re.search(r"(^|/)\.\.?(/|$)", path):
            raise RefusedError(f"the path {path!r:.80}", allowed="a folder below the one of --adapters")
        root = self.folder.resolve()
        found = (root / path).resolve()
        if root not in found.parents or not found.is_dir():
            raise RefusedError(f"{path!r:.80} is no folder below the one of --adapters",
                               allowed="folders there, by their names")  # fmt: skip
        return found

    def _scales(self, scales: Sequence[Scaled]) -> dict[str, float]:
        known = list(self.adapters)
        for each in scales:
            if each.id >= len(known):
                raise NotServedError(f"no adapter has the id {each.id}", do="GET /lora-adapters lists them")
        _require_once([known[each.id] for each in scales], "the list of weights")
        return {known[each.id]: each.scale for each in scales}

    def _mix(self, scales: Mapping[str, float]) -> str:
        wanted = {name: scale for name, scale in scales.items() if scale}
        if not wanted:
            return ""
        if self.pool is None:
            raise RecipeError(f"adapters with weights were asked for: {', '.join(wanted)}",
                              allowed="one adapter at a time with this model")  # fmt: skip
        if list(wanted.values()) == [1.0]:
            return self.adapters[next(iter(wanted))].engine
        return "+".join(f"{self.adapters[name].engine}@{scale!r}" for name, scale in wanted.items())


def _require_once(names: Sequence[str], what: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{what} has {twice!r:.80} twice", do="add its weights up")


def _weight(mix: str, text: str, at: str) -> float:
    try:
        weight = float(text) if at else 1.0
    except ValueError:
        weight = float("nan")
    if not -100 <= weight <= 100:
        raise RecipeError(f"the mix {mix!r:.80} has the weight {text!r:.40}", allowed="a number from -100 to 100")
    return weight
