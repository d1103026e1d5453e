"""Mixes: names for several attachments at once, each with a weight.

Idea: rows of a batch name an adapter; such a name may stand for a weighted sum of adapters, or for one of them scaled.
Nothing is made for it: the edits of the parts compute on the same rows, each change multiplied by its weight.
Equation: a low-rank term adds w s B A x, so several add up to a term of all their ranks; factors of two adapters are
    never multiplied with each other. Any other edit with weight w is x + w (before(x) - x) and y + w (after(x, y) - y).
    That is the scaled vector of IA3, 1 + w (l - 1), and the scaled addition of a bottleneck. Of DoRA it is the straight
    line from the base's output to its own: W + w (W' - W), whose rows between are not of the learned lengths.
    Edits nest in the order of the parts, the first one inside, as attachments do that are switched on together.
Source: LoRAHub, arXiv 2307.13269, has sums of factors, with products across adapters; this is the sum of the updates.
Use when: styles or tasks shall be blended, or one be turned down. Not when: a part has a learned root: keys and values
    cannot be scaled, so such a part takes weight 1, and there can be only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from luthier.core.errors import RecipeError
from luthier.core.nearest import did_you_mean
from luthier.model.editing.attachment import Attachment
from luthier.model.editing.edits import LearnedRoot
from luthier.model.routes import Mixes, Parts


def checked_mix(
    name: str, parts: Sequence[tuple[str, float]], attachments: Mapping[str, Attachment], mixes: Mixes
) -> Parts:
    """The parts of a new mix, those of weight 0 left out. Raises RecipeError for what cannot be one."""
    if not name or name in attachments or name in mixes:
        raise RecipeError(f"{name!r} cannot name a mix", allowed="a name that no attachment and no mix has")
    names = [part for part, _ in parts]
    for part, weight in parts:
        if part not in attachments:
            raise RecipeError(
                f"the mix {name!r} has the part {part!r}, and no attachment is called so",
                allowed=", ".join(attachments) or "names of attachments; there are none",
                do=did_you_mean(part, attachments),
            )
        if names.count(part) > 1:
            raise RecipeError(f"the mix {name!r} has {part!r} {names.count(part)} times", do="add its weights up")
        if not math.isfinite(weight):
            raise RecipeError(f"the mix {name!r} has {part!r} with weight {weight}", allowed="finite numbers")
        if attachments[part].trains_base:
            raise RecipeError(
                f"the mix {name!r} has {part!r}, which trains the model's own weights",
                allowed="adapters beside the weights, such as lora, ia3 and bottleneck",
                do="merge models instead of mixing adapters",
            )
    kept = tuple((part, float(weight)) for part, weight in parts if weight != 0)
    _require_whole_root(name, kept, attachments)
    return kept


def root_of(parts: Parts, attachments: Mapping[str, Attachment]) -> LearnedRoot | None:
    """The learned root among the parts, if there is one."""
    return next((root for part, _ in parts if (root := attachments[part].root) is not None), None)


def _require_whole_root(name: str, parts: Parts, attachments: Mapping[str, Attachment]) -> None:
    rooted = [(part, weight) for part, weight in parts if attachments[part].root is not None]
    if scaled := [(part, weight) for part, weight in rooted if weight != 1]:
        part, weight = scaled[0]
        raise RecipeError(
            f"the mix {name!r} has {part!r} with weight {weight:g}, and it has a learned root",
            allowed="1 for adapters with a learned root, or 0, which leaves it out",
            do="scale the other parts, or train a root for the blend",
        )
    if len(rooted) > 1:
        raise RecipeError(
            f"the mix {name!r} has {len(rooted)} parts with a learned root: {', '.join(part for part, _ in rooted)}",
            allowed="one: a text descends from one root",
            do="leave the others out",
        )
