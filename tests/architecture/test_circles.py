"""The rooms of a folder form no circle, so that each can be read before those that use it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from tests.architecture.source import modules
from tests.architecture.test_floors import imported

Needs = dict[str, set[str]]


def test_no_folder_has_rooms_in_a_circle() -> None:
    found = {folder: circle for folder, rooms in needs_by_folder().items() if (circle := circle_of(rooms))}
    told = [f"{folder}: {' -> '.join(circle)}" for folder, circle in sorted(found.items())]
    assert not told, "\n" + "\n".join([*told, "each imports the next; move the piece they share below both"])


def test_a_circle_is_found() -> None:
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert sorted(set(circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}))) == ["a", "b", "c"]
    assert needs_by_folder()["luthier.model"]["luthier.model.load"] >= {"luthier.model.language_model"}


def needs_by_folder() -> dict[str, Needs]:
    """For each folder, which of its files and folders import which others of them; type-only imports too."""
    found: dict[str, Needs] = defaultdict(lambda: defaultdict(set))
    names = {module.name for module in modules()}
    for module in modules():
        for target, _ in imported(module):
            if target in names and target != module.name:
                shared = _shared(module.name, target)
                here, there = (".".join(name.split(".")[: shared + 1]) for name in (module.name, target))
                if here != there and shared and ".".join(module.name.split(".")[:shared]) not in (here, there):
                    found[".".join(module.name.split(".")[:shared])][here].add(there)
    return found


def circle_of(needs: Mapping[str, set[str]]) -> list[str]:
    """The rooms of one circle in order, the first again at the end; empty where there is none."""
    try:
        list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _shared(one: str, other: str) -> int:
    """How many leading parts two dotted names have in common."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)
