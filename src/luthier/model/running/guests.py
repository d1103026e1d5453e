"""Guests: the adapters of one batch, each with what only its own trees see: its learned root and its output head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
import torch
from torch import Tensor

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.data.forest import Forest, Ints
from luthier.kernels.head import Head
from luthier.model.attending.attention import Root
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import LearnedRoot
from luthier.model.editing.value_head import ValueHead
from luthier.model.routes import Mixes, Parts, parts_of
from luthier.model.running.head import EditedHead
from luthier.model.running.zoo_head import FeatureHead

Found = TypeVar("Found")
Kind = TypeVar("Kind")


@final
@dataclass(frozen=True)
class Guest:
    """An adapter, or a mix, in a batch of several; `head` is None when only the zoo's own layer computes the logits."""

    root: LearnedRoot | None
    head: Head | EditedHead | FeatureHead | None
    parts: Parts
    values: ValueHead | None = None


def require_guests(names: Iterable[str], attachments: Mapping[str, Attachment], mixes: Mixes) -> None:
    """Raise RecipeError unless each name is that of adapters that are switched on, and none of several trains the base.

    "" is the base alone.
    """
    for name in names:
        if name and name not in attachments and name not in mixes:
            raise RecipeError(
                f"a tree names the adapter {name!r}, and no attachment is called so",
                allowed=", ".join((*attachments, *mixes)) or "names of attachments; there are none",
                do=did_you_mean(name, (*attachments, *mixes)),
            )
        for part, _ in parts_of(name, mixes):
            if not attachments[part].enabled:
                raise RecipeError(f"a tree names the adapter {name!r}, and {part!r} is switched off", do="switch it on")
    refuse_trained_base({name: each for name, each in attachments.items() if each.enabled})


def mixes_of(guests: Mapping[str, Guest]) -> Mixes:
    """What the names of guests stand for."""
    return {name: guest.parts for name, guest in guests.items()}


def refuse_trained_base(attachments: Mapping[str, Attachment]) -> None:
    """Raise RecipeError when one of several adapters changes the weights that all of them compute with."""
    trains = [name for name, attachment in attachments.items() if attachment.trains_base]
    if trains and len(attachments) > 1:
        raise RecipeError(
            f"the adapter {trains[0]!r} trains the model's own weights, which the other adapters compute with",
            allowed="adapters beside the weights, such as lora, ia3 and prefix_tuning, in one batch",
            do=f"train {trains[0]!r} in a run of its own",
        )


def side_by_side(roots: Mapping[Kind, Root], kinds: Sequence[Kind]) -> Root | None:
    """Roots of several kinds as one, of which each span sees that of its own kind; None when there is none."""
    if not roots:
        return None
    ends = np.cumsum([root.token_count for root in roots.values()]).tolist()
    sized = zip(roots.items(), ends, strict=True)
    places = {kind: (end - root.token_count, root.token_count) for (kind, root), end in sized}

    def keys_values(layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        pairs = [root.keys_values(layer, dtype) for root in roots.values()]
        return torch.cat([key for key, _ in pairs], 2), torch.cat([value for _, value in pairs], 2)

    return Root(ends[-1], keys_values, tuple(places.get(kind, (0, 0)) for kind in kinds))


def first_positions(forest: Forest, roots: Mapping[str, LearnedRoot | None]) -> Ints:
    """For each token of a forest the position at which its tree starts: after the root of its adapter."""
    own = [roots[tree.adapter] for tree in forest.trees]
    counts = [0 if root is None else root.token_count for root in own]
    return np.repeat(np.array(counts, dtype=np.int32), [tree.token_count for tree in forest.trees])


def sole(found: Iterable[Found | None], kind: str) -> Found | None:
    """The one there is, if any. Raises RecipeError where there are several."""
    there = [each for each in found if each is not None]
    if len(there) > 1:
        raise RecipeError(f"{len(there)} adapters with a {kind} are switched on", allowed="one at a time")
    return there[0] if there else None
