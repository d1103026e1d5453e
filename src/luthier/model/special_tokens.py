"""Special tokens: has the base ever learned the control tokens that the data uses?

Idea: a row that was never trained is still what it was made as, and that shows. It is zero or far too short; it is the
mean of the others (a resized vocabulary); it is the row of another control token; it lies where the rows of unused
tokens lie; or it is noise, with its energy spread evenly over all directions while the rows of words share some. All of
it is measured against the base's own rows of words, so no threshold is tied to a model. Where the words' rows are noise
themselves, the base is untrained and nothing can be said.
Equation: of an isotropic row the energy share in q of d directions is Beta(q/2, (d-q)/2): mean q/d, variance
    2 q (d-q) / (d^2 (d+2)). The directions are the leading ones of half of the words; the other half is measured.
Source: never-trained tokens cluster, or keep small norms: Land and Bartolo, arXiv 2405.05417, section 2. Their
    indicator needs known unused tokens; the test against noise needs none.
Cost: a sample of at most 8192 rows; about a second for the largest models, nothing that grows with the vocabulary.
    What was found is remembered under a digest of all rows that were looked at, so the same ones cost their reading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from luthier.core.paths import cache_folder
from luthier.data.forest import Ints
from luthier.model.editing.edits import TrainedParameters
from luthier.model.editing.sites import Site
from luthier.model.editing.token_rows import TokenRows
from luthier.model.language_model import LanguageModel
from luthier.store.environment import processor
from luthier.store.remembered import code_of, recalled, remember

FOLDER: Final = "control_tokens"
_CODE: Final = ("model/special_tokens.py",)
"""Whose files decide what is found."""
SAMPLE_ROWS: Final = 8192
SAMPLE_ELEMENTS: Final = 2**25
DIRECTIONS: Final = 64
FEWEST_ROWS, SMALLEST_WIDTH = 64, 16
"""A population of fewer rows, or of shorter ones, says nothing."""


@dataclass(frozen=True)
class Use:
    """A control token that the data uses: whether the model has to `read` it, to say it, or to stop by it."""

    id: int
    text: str
    read: bool
    said: bool
    stops: bool


@dataclass(frozen=True)
class Finding:
    """A token whose row at `place` looks untrained, and why. `median` is the norm of the words' rows there."""

    id: int
    text: str
    place: str
    why: str
    norm: float
    median: float
    stops: bool
    in_training: bool
    """Whether the adapter trains this row, so that the run itself mends it."""


@dataclass(frozen=True)
class Examination:
    """What was tested, what was found, and why which matrices could not be tested."""

    tested: tuple[Use, ...]
    findings: tuple[Finding, ...]
    skipped: dict[str, list[str]]


@torch.no_grad()
def examine(model: LanguageModel, uses: Sequence[Use], *, words: Ints, unused: Ints) -> Examination:
    """Look for rows that were never trained. `words` are ordinary tokens, `unused` control tokens the data has not."""
    findings: list[Finding] = []
    skipped: dict[str, list[str]] = {}
    sigma = float(getattr(model.module.config.get_text_config(), "initializer_range", 0.0) or 0.0)
    for site, place, concerned in _places(model, uses):
        # `weight_parameter` would be what an adapter trains; the base may have been swapped out for it.
        looked = _Looked(site.weight(), words, unused, tuple(concerned), tuple(uses), sigma)
        said = looked.known()
        if isinstance(said, str):
            skipped.setdefault(said, []).append(place)
            continue
        for use in concerned:
            if (odd := said.rows.get(use.id)) is not None:
                trained = use.id in trained_rows(model, site)
                findings.append(
                    Finding(use.id, use.text, place, odd.why, odd.norm, said.median, use.stops, trained)
                )
    return Examination(tuple(uses), tuple(findings), skipped)


def trained_rows(model: LanguageModel, site: Site) -> range | frozenset[int]:
    """The tokens whose row at `site` some attachment trains."""
    edits = [edit for attachment in model.attachments.values() for edit in attachment.edits]
    size = int(site.weight().shape[0])
    for edit in edits:
        if isinstance(edit, TrainedParameters) and any(
            edit.trained(name) is site.weight_parameter for name in edit.originals
        ):
            return range(size)
    rows = [edit for edit in edits if isinstance(edit, TokenRows) and edit.site_name == site.name]
    return frozenset(token for edit in rows for token in edit.ids)


def _places(model: LanguageModel, uses: Sequence[Use]) -> list[tuple[Site, str, list[Use]]]:
    """The matrices that hold rows of tokens, and the tokens that need their row there."""
    (embed,) = model.sites.role("embed")
    heads = model.sites.role("head")
    if model.sites.tied or not heads:
        return [(embed, "embedding and output head" if heads else "embedding", list(uses))]
    # A token that is only read (a role marker, BOS) has no use for its row in the head, and the other way round.
    return [
        (embed, "embedding", [use for use in uses if use.read]),
        (heads[0], "output head", [use for use in uses if use.said or use.stops]),
    ]


@dataclass(frozen=True)
class _Odd:
    """Why a row looks untrained, and its norm."""

    why: str
    norm: float


@dataclass(frozen=True)
class _Said:
    """The rows of one matrix that look untrained, by token, and the norm of the words' rows."""

    median: float
    rows: dict[int, _Odd]


@final
@dataclass(frozen=True)
class _Looked:
    """One matrix, and the tokens whose rows are looked at: what is said of them depends on nothing else."""

    weight: Float[Tensor, "V d"]
    words: Ints
    unused: Ints
    concerned: tuple[Use, ...]
    uses: tuple[Use, ...]
    sigma: float

    def known(self) -> _Said | str:
        """What `said` says, from memory where it has said it of the same rows before."""
        generator = torch.Generator().manual_seed(0)
        sample = _sample(self.words, int(self.weight.shape[1]), generator)
        if isinstance(sample, str):
            return sample
        path = cache_folder() / FOLDER / f"{self._key(sample)}.json"
        known = _restored(recalled(path))
        if known is not None:
            return known
        said = self.said(sample, generator)
        if isinstance(said, str):
            remember(path, {"skipped": said})
        elif all(math.isfinite(number) for number in (said.median, *(odd.norm for odd in said.rows.values()))):
            rows = [[token, odd.why, odd.norm] for token, odd in said.rows.items()]
            remember(path, {"median": said.median, "rows": rows})
        return said

    def said(self, sample: Ints, generator: torch.Generator) -> _Said | str:
        """Which rows look untrained beside those of the sampled words, or why there is nothing to compare with."""
        population = _population(_rows(self.weight, sample).cpu().float(), self.sigma, generator)
        if isinstance(population, str):
            return population
        others = self._others()
        crowd = _crowd(_rows(self.weight, self.unused).float(), population)
        found: dict[int, _Odd] = {}
        for use in self.concerned:
            row = self.weight[use.id].float()
            why = _untrained(row, population, crowd) or _twin(self.weight, use, others, self.uses)
            if why:
                found[use.id] = _Odd(why, float(row.norm()))
        return _Said(population.median, found)

    def _others(self) -> list[int]:
        return [*(use.id for use in self.concerned), *(int(token) for token in self.unused)]

    def _key(self, sample: Ints) -> str:
        """A digest of every row that is looked at, whose they are, and what computes."""
        facts = [str(self.weight.dtype), tuple(self.weight.shape), self.sigma, len(sample), self.unused.tolist(),
                 [use.id for use in self.concerned], [(use.id, use.text) for use in self.uses],
                 torch.__version__, processor(), *code_of(_CODE)]  # fmt: skip
        total = hashlib.sha256(json.dumps(facts).encode())
        for ids in (sample, np.array(self._others(), dtype=np.int32)):
            total.update(_rows(self.weight, ids).contiguous().view(torch.uint8).cpu().numpy().data)
        return total.hexdigest()[:32]


def _restored(known: dict[str, Any]) -> _Said | str | None:
    """What a file tells; None where it tells nothing that can be."""
    match known:
        case {"skipped": str(why)}:
            return why
        case {"median": float(median), "rows": list(rows)}:
            found: dict[int, _Odd] = {}
            for row in rows:
                match row:
                    case [int(token), str(why), float(norm)]:
                        found[token] = _Odd(why, norm)
                    case _:
                        return None
            return _Said(median, found)
    return None


def _sample(words: Ints, width: int, generator: torch.Generator) -> Ints | str:
    """Words to compare with, the same ones each time, or why there are none."""
    count = min(len(words), SAMPLE_ROWS, max(SAMPLE_ELEMENTS // width, FEWEST_ROWS))
    if count < FEWEST_ROWS or width < SMALLEST_WIDTH:
        return f"{len(words)} words with rows of {width} numbers are too few to compare with"
    sampled: Ints = words[torch.randperm(len(words), generator=generator)[:count].numpy()]
    return sampled


@final
@dataclass(frozen=True)
class _Population:
    """The rows of words in one matrix: how long they are, where, and in which directions."""

    median: float
    short: float
    mean: Float[Tensor, " d"]
    spread: float
    basis: Float[Tensor, "d q"]
    noise_share: float
    noise_share_std: float
    low_share: float
    sample: Float[Tensor, "n d"]
    initial_norm: float

    def share(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """How much of the energy of rows lies in the leading directions of words."""
        return (rows @ self.basis).square().sum(-1) / rows.square().sum(-1).clamp(min=1e-30)


def _population(rows: Float[Tensor, "n d"], sigma: float, generator: torch.Generator) -> _Population | str:
    """The population of words with these rows, or why there is none to compare with."""
    width = int(rows.shape[1])
    norms = rows.norm(dim=1)
    rows = rows[torch.isfinite(norms) & (norms > 0)]
    fit, held = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if len(fit) < FEWEST_ROWS // 2:
        return "the rows of words are zero or not finite"
    q = min(DIRECTIONS, width // 4)
    basis = _leading(fit, q, generator)
    noise, std = q / width, math.sqrt(2 * q * (width - q) / (width**2 * (width + 2)))
    shares = (held @ basis).square().sum(-1) / held.square().sum(-1)
    if float(shares.median()) < noise + 2 * std:
        return "the base looks untrained, its rows of words are noise"
    norms, mean = rows.norm(dim=1), rows.mean(0)
    return _Population(
        median=float(norms.median()),
        short=float(norms.quantile(0.05)),
        mean=mean,
        spread=float((rows - mean).norm(dim=1).median()),
        basis=basis,
        noise_share=noise,
        noise_share_std=std,
        low_share=float(shares.quantile(0.02)),
        sample=F.normalize(rows, dim=1),
        initial_norm=sigma * math.sqrt(width),
    )


def _untrained(row: Float[Tensor, " d"], population: _Population, crowd: _Crowd | None) -> str:
    """Why one row looks untrained; empty when it does not."""
    row = row.cpu()
    norm = float(row.norm())
    if not math.isfinite(norm):
        return "it is not finite"
    if norm <= 1e-6 * population.median:
        return "it is zero"
    away = float((row - population.mean).norm())
    # Where the mean is short, every short row is near it; then shortness is the better name.
    if away < 0.1 * population.spread and away < 0.5 * norm:
        return "it is the mean of the other rows, as a resized vocabulary leaves it"
    if crowd is not None and crowd.holds(row):
        return f"it lies among the rows of {crowd.size} control tokens that nothing uses"
    if norm < population.short / 3:
        return f"it is {population.median / norm:.0f} times shorter than the rows of words"
    return _noise(row, norm, population)


def _noise(row: Float[Tensor, " d"], norm: float, population: _Population) -> str:
    """Why a row looks like a draw from a symmetric distribution; empty when it has learned a direction."""
    width = len(row)
    share = float(population.share(row))
    excess = (share - population.noise_share) / population.noise_share_std
    if share >= population.low_share:
        return ""
    said = f"it is noise: {100 * share:.0f} % of it lies in the leading directions of words, as of any random row"
    # The norm of a random row varies by 1/sqrt(2 d) only, so one that fits to four times that is strong evidence.
    if population.initial_norm and abs(norm / population.initial_norm - 1) < 4 / math.sqrt(2 * width) and excess < 3:
        return f"{said}, and it has the norm of a fresh row"
    nearest = float((population.sample @ (row / norm)).max())
    if excess < 1.5 and nearest < 1.15 * math.sqrt(2 * math.log(len(population.sample)) / width):
        return f"{said}, and it is like no other row"
    return ""


@final
@dataclass(frozen=True)
class _Crowd:
    """Rows of control tokens that nothing uses, when they lie close together and words do not lie there."""

    centre: Float[Tensor, " d"]
    closeness: float
    norms: tuple[float, float]
    size: int

    def holds(self, row: Float[Tensor, " d"]) -> bool:
        norm = float(row.norm())
        near = float(F.normalize(row, dim=0) @ self.centre) >= self.closeness
        return near and self.norms[0] <= norm <= self.norms[1]


def _crowd(rows: Float[Tensor, "n d"], population: _Population) -> _Crowd | None:
    """What the rows of unused tokens have in common; None when it is nothing, or when it is common among words."""
    rows = rows.cpu()
    norms = rows.norm(dim=1)
    rows = rows[torch.isfinite(norms) & (norms > 0)]
    if len(rows) < 4:
        return None
    norms, directions = rows.norm(dim=1), F.normalize(rows, dim=1)
    core = directions @ F.normalize(directions.median(0).values, dim=0) > 0.5
    if int(core.sum()) < 4:
        return None
    norms, directions = norms[core], directions[core]
    total = directions.sum(0)
    centre = F.normalize(total, dim=0)
    # Each against the others alone: a row is always close to a centre that it is part of.
    own = (directions * F.normalize(total - directions, dim=1)).sum(1)
    closeness = float(own.median() - 5 * (own - own.median()).abs().median())
    # Some words are never met either: where there are many control tokens that few words may lie among them.
    if closeness < 0.6 or closeness <= float((population.sample @ centre).quantile(0.95)):
        return None
    middle = float(norms.median())
    room = 5 * float((norms - middle).abs().median()) + 0.02 * middle
    return _Crowd(centre, closeness, (middle - room, middle + room), len(norms))


def _twin(weight: Float[Tensor, "V d"], use: Use, others: Sequence[int], uses: Sequence[Use]) -> str:
    """Whether the row of a token is, nearly, the row of another control token: then one of them was never learned."""
    ids = torch.tensor([token for token in dict.fromkeys(others) if token != use.id], device=weight.device)
    if len(ids) == 0:
        return ""
    row = weight[use.id].float()
    distances = (weight[ids].float() - row).norm(dim=1)
    best = int(distances.argmin())
    if float(distances[best]) >= 0.1 * float(row.norm()):
        return ""
    other = int(ids[best])
    name = next((repr(known.text) for known in uses if known.id == other), f"token {other}")
    same = "exactly" if float(distances[best]) == 0 else "nearly"
    return f"it is {same} the row of {name}, so one of the two was never learned by itself"


def _rows(weight: Float[Tensor, "V d"], ids: Ints) -> Float[Tensor, "n d"]:
    """Rows as they are stored; those of tokens that have none are left out."""
    known = torch.from_numpy(ids.astype("int64"))
    return weight[known[known < len(weight)].to(weight.device)]


def _leading(rows: Float[Tensor, "n d"], q: int, generator: torch.Generator) -> Float[Tensor, "d q"]:
    """An orthonormal basis of about the q directions that hold most of the energy of `rows`."""
    basis = torch.linalg.qr(torch.randn(rows.shape[1], q, generator=generator))[0]
    for _ in range(8):
        basis = torch.linalg.qr(rows.t() @ (rows @ basis))[0]
    return basis
