"""Trainable tokens: the rows of a few tokens, and nothing else.

Idea: a control token that the base has never learned (its row is noise, zero or the mean of the others) cannot be read
and will not be said, whatever a low-rank update does elsewhere. Its rows in the embedding and in the output head are
trained, all other weights stay as they are.
Equation: W'_t = R_t for each chosen token t, W' = W elsewhere; R starts as W.
Source: PEFT's trainable tokens (peft/tuners/trainable_tokens), which trains the embedding's rows; the rows of a head
    that does not share the embedding's weight are trained here too, because a stop token is said by them.
Cost: k d trained parameters for k tokens, 2 k d with a head of its own; no gradient of a whole matrix.
Use when: the plan says that a control token looks untrained and the model is otherwise as it should be.
Not when: the task is new as well: lora has the same rows under `trainable_tokens`, beside its own update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, final

from pydantic import Field

from luthier.adapters import Adapter
from luthier.core.errors import RecipeError
from luthier.model.editing.edits import Edit
from luthier.model.editing.sites import Sites
from luthier.model.editing.token_rows import EVERYWHERE, checked_ids, row_count, row_sites, token_rows

Tokens = Annotated[tuple[int | str, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


@final
class TrainableTokens(Adapter):
    """The rows of single tokens."""

    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    tokens_knob: ClassVar[str] = "tokens"
    provides: ClassVar[frozenset[str]] = frozenset({"mergeable"})

    tokens: Tokens = Field((), description="tokens to train, as texts or ids; empty means those that end an answer")
    targets: Names = Field(
        EVERYWHERE, description="where their rows are trained: embed, head, or module names; a tied head always follows"
    )

    def attach(self, sites: Sites) -> list[Edit]:
        # PEFT writes the rows of a tied head once more under the head's name.
        return token_rows(
            sites, self._tokens(sites), self.targets, file_key="trainable_tokens_delta", repeat_tied=True
        )

    def parameter_count(self, sites: Sites) -> int:
        return row_count(sites, self._tokens(sites), self.targets)

    def peft_config(self, sites: Sites) -> dict[str, Any]:
        chosen = row_sites(sites, self.targets)
        names = [site.name for site in (chosen[:1] if sites.tied else chosen)]
        return {
            "token_indices": list(checked_ids(sites, self._tokens(sites))),
            "target_modules": names if len(names) > 1 else names[0],
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        targets = config.get("target_modules") or ("embed",)
        return cls(
            tokens=tuple(int(token) for token in config["token_indices"]),
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        )

    def with_token_ids(
        self, token_id: Callable[[str], int], stop_ids: tuple[int, ...], encode: Callable[[str], Sequence[int]]
    ) -> Self:
        named = super().with_token_ids(token_id, stop_ids, encode)
        return named if named.tokens else named.model_copy(update={"tokens": stop_ids})

    def _tokens(self, sites: Sites) -> tuple[int | str, ...]:
        if not (self.tokens or sites.stop_ids):
            raise RecipeError(
                "no token is named, and the model's config names none that ends a text",
                allowed="texts or ids of tokens",
                do="""name them: --set 'adapter.tokens=["<|im_end|>"]'""",
            )
        return self.tokens or sites.stop_ids
