"""The adapter pool: thousands of adapters known by name, those in memory that are asked for.

Idea: an adapter is a few files beside one base. To register it is to note where they are; it comes onto the model when
somebody asks for it, and stays until more than `most` are there and nobody holds it; the one that was asked for longest
ago goes first. A name may be spelled as a mix, such as `formal@0.5+french`: parts with weights, brought like any other.
What a request holds stays what it was: an adapter that is unregistered, or registered anew under its name, goes on
computing for those who hold it, and is another one from then on, with keys and texts of its own.
Source: Sheng et al., arXiv 2311.03285 (S-LoRA): adapters in main memory, brought in by need.
Cost: the files of an adapter are read once each time it comes; nothing is read of those that nobody asks for.
Use when: many tasks share one served base. One thread owns a pool, as it owns its engine.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.infer.engine import Pool
from luthier.model.files.adapter_config import CONFIG, TENSORS
from luthier.model.language_model import LanguageModel

Load = Callable[[Path, str], None]
"""Puts the adapter of a folder onto the model, under a name, for rows that name it."""
Signature = tuple[tuple[int, int], ...]
_NAME = re.compile(r"[\w.][\w./:-]*")


@final
@dataclass(frozen=True)
class Registered:
    """An adapter that can be asked for: where its files are, and the how many-th registration it is."""

    name: str
    folder: Path
    number: int


@dataclass
class _There:
    """An adapter on the model, how many hold it, and what its files were when it came."""

    adapter: Registered
    signature: Signature
    holders: int = 0


@dataclass
class _Mixed:
    """A mix that somebody holds: what its parts go by, and how many hold it."""

    parts: tuple[tuple[str, float], ...]
    holders: int = 0


@final
class AdapterPool(Pool):
    """Adapters of one model. At most `most` are in memory, more only while all of them are held.

    `acquire` gives what rows of a pass are to name, `release` takes that. `load` knows how an adapter is opened.
    """

    def __init__(self, model: LanguageModel, load: Load, *, most: int = 64) -> None:
        if most < 1:
            raise RecipeError(f"a pool of at most {most} adapters", allowed="at least 1")
        self.model = model
        self.most = most
        self._load = load
        self._registered: dict[str, Registered] = {}
        self._there: OrderedDict[str, _There] = OrderedDict()
        self._mixed: dict[str, _Mixed] = {}
        self._count = self._loads = 0

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for: what was registered, and what else is on the model and switched on."""
        return (*self._registered, *self._standing())

    @property
    def in_memory(self) -> tuple[str, ...]:
        """The names of the adapters that were brought, those that go first first."""
        return tuple(there.adapter.name for there in self._there.values())

    def folder_of(self, name: str) -> Path:
        """Where the files of a registered adapter are."""
        return self._known(name).folder

    def register(self, name: str, folder: Path, *, anew: bool = False) -> None:
        """Let a name stand for the adapter in `folder`; nothing is read. `anew` takes it from a registered adapter.

        Raises RecipeError for a name that is taken or cannot be one, and for a folder without an adapter; what was
        registered then still is.
        """
        if not _NAME.fullmatch(name):
            raise RecipeError(
                f"{name!r:.80} cannot name an adapter",
                allowed="letters, digits and . _ - / : (+ and @ spell a mix)",
            )
        again = anew and name in self._registered
        if not again and (name in self._registered or name in self._standing() or name in self.model.mixes):
            raise RecipeError(f"an adapter is called {name!r} already", do=f"unregister {name!r} first")
        if missing := [file for file in (CONFIG, TENSORS) if not (folder / file).is_file()]:
            raise RecipeError(
                f"{folder} holds no {missing[0]}",
                allowed=f"folders with {CONFIG} and {TENSORS}",
                do="name a folder in PEFT's format, such as the adapter folder of a run",
            )
        if again:
            self.unregister(name)
        self._count += 1
        self._registered[name] = Registered(name, folder, self._count)

    def unregister(self, name: str) -> None:
        """Let a name stand for nothing from now on. Who holds the adapter keeps it; then it leaves memory."""
        known = self._known(name)
        del self._registered[name]
        for route, there in list(self._there.items()):
            if there.adapter is known and not there.holders:
                self._leave(route)

    def acquire(self, name: str) -> str:
        """Bring an adapter, or the parts of a mix, onto the model, and keep it there until it is released.

        Returns what rows are to name; "" is the base, for which nothing is needed. Raises RecipeError for names that
        are unknown, and whatever is wrong with files.
        """
        if not name or not (parts := self._parts(name)):
            return name
        held: list[str] = []
        try:
            for part, _ in parts:
                held.append(self._bring(part))
            return self._mix(name, tuple(zip(held, (weight for _, weight in parts), strict=True)))
        except BaseException:
            for route in held:
                self._let_go(route)
            raise

    def release(self, route: str) -> None:
        """One who has acquired something needs it no longer; `route` is what `acquire` gave."""
        mixed = self._mixed.get(route)
        if mixed is None:
            self._let_go(route)
            return
        mixed.holders -= 1
        if not mixed.holders:
            del self._mixed[route]
            self.model.unmix(route)
        for part, _ in mixed.parts:
            self._let_go(part)

    def key(self, name: str) -> Hashable:
        """What tells an adapter, or a mix, from all that had its name before and computed something else.

        `name` is one that can be acquired, or what `acquire` gave. It is the same again when the same files come back.
        """
        if name in self._there:
            there = self._there[name]
            return (there.adapter.name, there.adapter.number, there.signature)
        if name in self._mixed:
            return tuple((self.key(part), weight) for part, weight in self._mixed[name].parts)
        if not (parts := self._parts(name)):
            return name
        keys = tuple((self._key_of(part), weight) for part, weight in parts)
        return keys[0][0] if len(keys) == 1 and keys[0][1] == 1 else keys

    def _key_of(self, name: str) -> Hashable:
        if name not in self._registered:
            return name
        known = self._known(name)
        there = next((each for each in self._there.values() if each.adapter is known), None)
        return (name, known.number, _signature(known.folder) if there is None else there.signature)

    def _standing(self) -> list[str]:
        """Attachments that are on the model without the pool, for whoever names them."""
        others = [name for name, each in self.model.attachments.items() if each.enabled and name not in self._there]
        return [name for name in others if name not in self._registered]

    def _parts(self, name: str) -> tuple[tuple[str, float], ...]:
        """The names and weights that a name is spelled with; none where it is a mix that the model knows itself."""
        if name in self._registered or name in self._standing():
            return ((name, 1.0),)
        if name in self.model.mixes and name not in self._mixed:
            return ()
        return tuple(self._part(name, text) for text in name.split("+"))

    def _part(self, name: str, text: str) -> tuple[str, float]:
        part, at, weight = text.partition("@")
        if part not in self._registered and part not in self._standing():
            raise RecipeError(
                f"no adapter is called {part!r:.80}",
                allowed="registered names, or a mix of them such as first@0.5+second",
                do=did_you_mean(part, self.names[:200]),
            )
        try:
            return part, float(weight) if at else 1.0
        except ValueError:
            raise RecipeError(
                f"the mix {name!r:.200} has {part!r} with the weight {weight!r:.40}", allowed="numbers, such as 0.5"
            ) from None

    def _mix(self, name: str, parts: tuple[tuple[str, float], ...]) -> str:
        """What rows name for parts that are on the model."""
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        route = "+".join(f"{part}@{weight!r}" for part, weight in parts)
        if route not in self._mixed:
            self.model.mix(route, parts)
            self._mixed[route] = _Mixed(parts)
        self._mixed[route].holders += 1
        return route

    def _bring(self, name: str) -> str:
        """One more holder of an adapter, which is then on the model; what rows name."""
        if name not in self._registered:
            return name
        known = self._known(name)
        route = next((route for route, there in self._there.items() if there.adapter is known), None)
        if route is None:
            self._make_room()
            signature = _signature(known.folder)
            self._loads += 1
            # No dots: attachments have none. A number: who holds an older one of that name keeps that.
            route = f"{known.name.replace('.', '-')}#{self._loads}"
            self._load(known.folder, route)
            self._there[route] = _There(known, signature)
        self._there.move_to_end(route)
        self._there[route].holders += 1
        return route

    def _make_room(self) -> None:
        """Let adapters go that nobody holds until one more may come."""
        for route in [route for route, there in self._there.items() if not there.holders]:
            if len(self._there) < self.most:
                break
            self._leave(route)

    def _let_go(self, route: str) -> None:
        there = self._there.get(route)
        if there is None and (not route or route in self.model.attachments or route in self.model.mixes):
            # What is there without the pool stays there.
            return
        if there is None or not there.holders:
            raise RecipeError(f"{route!r} is released, and nobody holds it", allowed="one release for each acquire")
        there.holders -= 1
        self._there.move_to_end(route)
        gone = self._registered.get(there.adapter.name) is not there.adapter
        if not there.holders and (gone or len(self._there) > self.most):
            self._leave(route)

    def _leave(self, route: str) -> None:
        self.model.detach(route)
        del self._there[route]

    def _known(self, name: str) -> Registered:
        if name not in self._registered:
            raise RecipeError(
                f"no adapter is registered as {name!r:.80}", do=did_you_mean(name, list(self._registered)[:200])
            )
        return self._registered[name]


def _signature(folder: Path) -> Signature:
    """What changes when the files of an adapter do, without reading them."""
    files = [path.stat() for path in (folder / CONFIG, folder / TENSORS) if path.is_file()]
    return tuple((each.st_mtime_ns, each.st_size) for each in files)
