"""Token rows: single rows of the token embedding and of the output head, trained while the matrices stay frozen.

Idea: the chosen rows are parameters of their own, (rows, hidden) in float32, that start as the base's rows. What is
added to the frozen matrices is the difference to that start, so nothing of the matrices' size is ever made: neither a
gradient nor a copy. A head that shares the embedding's weight shares the trained rows too.
Equation: W' = W + S^T (R - R_0), with S selecting the rows and R_0 what they were when the adapter came on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.kernels.head import RowChange
from luthier.model.editing.edits import Edit, Kept, SiteEdit
from luthier.model.editing.sites import Site, Sites

EMBED, HEAD = "embed", "head"
EVERYWHERE = (EMBED, HEAD)
"""Where a token has rows: what it is read by, and what it is said by."""
ADD_ROWS = (
    "luthier never resizes a vocabulary: to add rows, use transformers' resize_token_embeddings, save the model with "
    "its tokenizer, name that folder, and train the new rows with adapter.trainable_tokens"
)


class TokenRows(SiteEdit):
    """The rows of some tokens at one site. `ids` are the tokens, `rows` may hold those of another site too."""

    def __init__(self, site: Site, ids: Sequence[int], rows: nn.Parameter, *, part: int, file_key: str | None) -> None:
        super().__init__(site)
        self.ids = tuple(ids)
        self.rows = rows
        self._part = slice(part * len(ids), (part + 1) * len(ids))
        self._file_key = file_key
        index = torch.tensor(self.ids, device=site.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("start", site.weight()[index].float().clone(), persistent=False)

    @property
    def trained(self) -> Float[Tensor, "k d"]:
        """The rows of this site, as they are now."""
        return self.rows[self._part]

    def before(self, x: Tensor) -> Tensor:
        return x

    def keeps(self) -> Kept:
        return Kept()

    def merged(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> tuple[Tensor, Tensor | None] | None:
        return weight.index_add(0, self.get_buffer("index"), self._change().detach()), bias

    def tensors(self) -> Mapping[str, Tensor]:
        return {} if self._file_key is None else {self._file_key: self.trained}

    def _change(self) -> Float[Tensor, "k d"]:
        return self.trained - self.get_buffer("start")


@final
class EmbeddingRows(TokenRows):
    """Rows of a table that token ids are looked up in."""

    def __init__(self, site: Site, ids: Sequence[int], rows: nn.Parameter, *, part: int, file_key: str | None) -> None:
        super().__init__(site, ids, rows, part=part, file_key=file_key)
        self.scale = lookup_scale(site)
        places = torch.full((site.in_features,), len(self.ids), device=site.device)
        places[self.get_buffer("index")] = torch.arange(len(self.ids), device=site.device)
        self.register_buffer("places", places, persistent=False)

    def after(self, x: Int[Tensor, "*batch"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        # Every other token looks up a row of zeros, which the gradient leaves out.
        table = F.pad(self._change() * self.scale, (0, 0, 0, 1))
        return y + F.embedding(self.get_buffer("places")[x], table, padding_idx=len(self.ids)).to(y.dtype)


@final
class HeadRows(TokenRows):
    """Rows of an output head. The engine's own head takes them as a `RowChange`, and never makes all logits at once."""

    def change_by(self, weight: float) -> RowChange:
        """The rows as the chunked head wants them, what they change multiplied by a weight."""
        start = self.get_buffer("start")
        rows = self.trained if weight == 1 else start + weight * (self.trained - start)
        return RowChange(self.get_buffer("index"), rows, start)

    def after(self, x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
        return y.index_add(-1, self.get_buffer("index"), F.linear(x, self._change().to(x.dtype)).to(y.dtype))


def token_rows(
    sites: Sites, ids: Sequence[int | str], targets: Sequence[str], *, file_key: str, repeat_tied: bool
) -> list[Edit]:
    """Edits that train the rows of `ids` at the embedding, the head, or both, all in one parameter.

    `targets` holds the roles `embed` and `head`, or module names. `file_key` is the tensors' name in the adapter file;
    `repeat_tied` says that the file holds shared rows under both names. Raises RecipeError for ids that have no row.
    """
    known = checked_ids(sites, ids)
    chosen = row_sites(sites, targets)
    weights = [site.weight_parameter for site in chosen]
    parts = [next(n for n, other in enumerate(weights) if other is weight) for weight in weights]
    order = sorted(set(parts))
    index = torch.tensor(known, device=chosen[0].device)
    start = torch.cat([weights[part].detach()[index].float() for part in order])
    rows = nn.Parameter(start.clone())
    made: list[Edit] = []
    for number, (site, part) in enumerate(zip(chosen, parts, strict=True)):
        key = file_key if part == number or repeat_tied else None
        kind = EmbeddingRows if EMBED in site.roles else HeadRows
        made.append(kind(site, known, rows, part=order.index(part), file_key=key))
    return made


def row_count(sites: Sites, ids: Sequence[int | str], targets: Sequence[str]) -> int:
    """The parameters that `token_rows` trains."""
    weights = {id(weight): weight for site in row_sites(sites, targets) for weight in [site.weight_parameter]}
    return len(checked_ids(sites, ids)) * sum(weight.shape[1] for weight in weights.values())


def row_sites(sites: Sites, targets: Sequence[str]) -> list[Site]:
    """The embedding and head that `targets` mean, the embedding first, with a head that shares its weight."""
    places = [*sites.role(EMBED), *sites.role(HEAD)]
    chosen: set[str] = set()
    for target in targets:
        found = [site.name for site in places if _means(target, site)]
        if target == HEAD and EMBED in targets and not sites.role(HEAD):
            # What classifies has no rows of tokens at its end.
            continue
        if not found:
            raise RecipeError(
                f"no rows of tokens at {target!r}",
                allowed=f"{EMBED}, {HEAD}, or {', '.join(site.name for site in places)}",
            )
        chosen.update(found)
    embed, head = sites.role(EMBED), sites.role(HEAD)
    if embed and head and sites.tied:
        if embed[0].name not in chosen:
            raise RecipeError(
                f"{head[0].name} shares its weight with {embed[0].name}, so its rows cannot be trained alone",
                do=f"name {EMBED}, which trains both",
            )
        chosen.add(head[0].name)
    return [site for site in places if site.name in chosen]


def checked_ids(sites: Sites, ids: Sequence[int | str]) -> tuple[int, ...]:
    """The token ids, if each is a number, has a row, and stands once."""
    (embed,) = sites.role(EMBED)
    size, seen = embed.in_features, set()
    for token in ids:
        if isinstance(token, str):
            raise RecipeError(
                f"the token {token!r} is named by its text", allowed="ids where there is no tokenizer to ask"
            )
        if not 0 <= token < size:
            raise RecipeError(
                f"token {token} has no row: the model has {size:,}",
                allowed=f"0 to {size - 1}",
                do=ADD_ROWS,
            )
        if token in seen:
            raise RecipeError(f"token {token} is named twice", allowed="each token once")
        seen.add(token)
    return tuple(int(token) for token in ids)


def _means(target: str, site: Site) -> bool:
    return target in site.roles or site.name == target or site.name.endswith(f".{target}")


@torch.no_grad()
def lookup_scale(site: Site) -> float:
    """What the embedding multiplies its rows with (Gemma: the square root of the hidden size)."""
    weight = site.weight_parameter
    if weight.is_meta:
        # It is no number there, and nothing is looked up.
        return 1.0
    # The zoo rounds the factor to the weight's precision before it multiplies.
    scale = float(torch.as_tensor(getattr(site.module, "embed_scale", 1.0)).to(weight.dtype))
    # Rows near the middle of the vocabulary are ordinary words; a padding row may be all zeros.
    ids = torch.arange(min(8, len(weight)), device=weight.device) + len(weight) // 2 - min(8, len(weight)) // 2
    found, expected = site.module(ids).float(), weight[ids].float() * scale
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-6):
        raise RecipeError(
            f"{type(site.module).__name__} does more than look rows up, so nothing can be added to its rows",
            allowed="an embedding whose rows are looked up and scaled",
            do="leave the embedding and the trained tokens out, or train all weights with adapter.method=full",
        )
    return scale
