"""Adapters: what of a model is trained, as edits on sites.

The contract: an adapter sees sites (role, layer, sizes, weight) and returns edits. It never sees a model class, a
quantizer or an optimizer. It also says how its knobs are written in PEFT's `adapter_config.json`, and how many
parameters it trains, which is tested against what it makes. One that has to know the data's gradient asks for a first
look at some rows. Saving, loading, disabling, undoing, merging and counting are in `model/`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from luthier.core import catalog
from luthier.core.errors import CorruptError, LuthierError, RecipeError
from luthier.core.knobs import Method
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.files.adapter_config import read_config, tensor_sizes

SPARE_PARAMETERS = 1_000_000
"""What a config may ask for beyond twice its tensor file: too little to matter, so that `fill` can name the tensors."""


class Adapter(Method):
    """A way to adapt a model."""

    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method, or None when PEFT has no such file; the result is then a whole model."""
    tokens_knob: ClassVar[str] = ""
    """The knob that names tokens whose rows are trained, where the method has one."""

    @abstractmethod
    def attach(self, sites: Sites) -> list[Edit]:
        """The edits, with fresh parameters drawn from torch's default generator. Raises RecipeError for no match."""

    @abstractmethod
    def parameter_count(self, sites: Sites) -> int:
        """Trained parameters in closed form, without making them."""

    @abstractmethod
    def peft_config(self, sites: Sites) -> dict[str, Any]:
        """The method's own keys of `adapter_config.json`."""

    def with_token_ids(
        self, token_id: Callable[[str], int], stop_ids: tuple[int, ...], encode: Callable[[str], Sequence[int]]
    ) -> Self:
        """The adapter with ids for the texts it names; it is asked with the tokenizer of the model.

        `token_id` is for a text that is one token, `encode` for any; the run's answers stop at `stop_ids`.
        """
        if not self.tokens_knob:
            return self
        named = getattr(self, self.tokens_knob)
        ids = tuple(token_id(token) if isinstance(token, str) else token for token in named)
        return self.model_copy(update={self.tokens_knob: ids})

    def remarks(self, sites: Sites) -> list[str]:
        """What a user should know of its knobs on this model, before the first step."""
        return []

    @property
    def first_look(self) -> int:
        """How many rows of the training data its edits have to see before the first step; 0 for most."""
        return 0

    def settle(self, edits: Sequence[Edit], look: Callable[[], Iterator[None]]) -> None:
        """Let fresh edits, which are on the model, find what only the gradient of the data can tell.

        `look()` runs the rows of the first look forward and backward and yields after each; it may be asked more than
        once. A run settles once, before its first step: what is found belongs into persistent buffers, which
        checkpoints and files hold.
        """

    @classmethod
    def describes(cls, config: Mapping[str, Any]) -> bool:
        """Whether an `adapter_config.json` is of this method."""
        return cls.peft_type is not None and cls.peft_type == config.get("peft_type")

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        """The adapter an `adapter_config.json` describes. Raises RecipeError for settings it does not have."""


def adapter_of(config: Mapping[str, Any]) -> Adapter:
    """The adapter that an `adapter_config.json` describes, whichever method wrote it."""
    kinds = {name: catalog.load("adapters", name) for name in catalog.names("adapters")}
    known = [kind for kind in kinds.values() if issubclass(kind, Adapter) and kind.peft_type is not None]
    for kind in known:
        if kind.describes(config):
            try:
                return kind.from_peft(config)
            except LuthierError:
                raise
            except (KeyError, TypeError, ValueError, OverflowError) as failure:
                # Whatever a file may hold in the place of a number or a list.
                words = f"it lacks {failure}" if isinstance(failure, KeyError) else " ".join(str(failure).split())
                raise RecipeError(f"adapter_config.json describes no {kind.peft_type} adapter: {words[:200]}",
                                  allowed="what PEFT writes") from None  # fmt: skip
    raise RecipeError(
        f"adapter_config.json has peft_type {config.get('peft_type')!r:.80}",
        allowed=", ".join(sorted({str(kind.peft_type) for kind in known})),
    )


def saved_adapter(folder: Path, sites: Sites) -> Adapter:
    """The adapter in `folder` (PEFT's format), if it has a place on `sites`; nothing is made yet.

    Raises CorruptError when the config describes far more parameters than the tensor file holds: making them would take
    memory. A tensor or two that are missing are for `fill` to name.
    """
    config = read_config(folder)
    # PEFT names every head that it knows, whether the model has one or not.
    named = {part for site in sites for part in site.name.split(".")} & {*(config.get("modules_to_save") or ())}
    known = {site.name.rpartition(".")[2] for site in sites.role("apart")}
    if unknown := ", ".join(sorted(named - known)):
        raise RecipeError(f"{folder} trains {unknown} as a whole", allowed=", ".join(known) or "no modules_to_save")
    # Whoever attaches it trains the head with it; the method itself has nothing to do with that.
    adapter = adapter_of({**config, "modules_to_save": None})
    described, held = adapter.parameter_count(sites), sum(tensor_sizes(folder).values())
    if described > 2 * held + SPARE_PARAMETERS:
        raise CorruptError(
            f"{folder}: the config describes {described:,} parameters, the tensor file holds {held:,}",
            do="the two files do not belong together; fetch or save the adapter again",
        )
    return adapter
