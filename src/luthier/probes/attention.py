"""Attention: how widely each head looks, where, and what tuning has changed of it.

Idea: a head's attention over earlier tokens is a distribution. Its entropy says how widely it looks; the share on the
first token, how much it rests (a sink). Heads whose distributions changed most are where tuning has changed what is
read from where. Only attention is seen here, not what is done with what was read.
Equation: H = -sum_j a_j ln a_j / ln(i + 1) for the token at position i > 0, averaged; change = mean total variation
    distance (1/2) sum_j |a_j - a'_j| between before and after.
Source: entropy of heads: Clark et al., arXiv 1906.04341, section 3; sinks: Xiao et al., arXiv 2309.17453, section 3.
Cost: two forward passes over a few short texts with attention written out, layers x heads x tokens^2 numbers each.
Use when: a tuned model has changed its mind about what it reads, or heads look broken.
Not when: an explanation of an answer is wanted: attention is not one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from luthier.data.forest import Ints
from luthier.model.comparing.pair import Pair
from luthier.model.language_model import LanguageModel
from luthier.probes import Grid, Probe, Report, Table, require_finite

SHOWN = 24
"""Tokens of the text whose pattern is drawn."""


@final
class Attention(Probe):
    """Patterns and entropies of heads, before and after."""

    needs: ClassVar[frozenset[str]] = frozenset({"samples"})
    by_name_only: ClassVar[bool] = True

    texts: int = Field(8, ge=1, description="texts that are read")
    tokens: int = Field(64, ge=8, le=1024, description="longest of them, in tokens")

    def look(self, pair: Pair) -> Report:
        samples = [sample[: self.tokens] for sample in pair.samples if len(sample) > 1][: self.texts]
        if not samples:
            return Report(verdict=("Every text has one token at most: no head looks back.",), measured=False)
        with pair.before() as model:
            if (reason := _cannot(model)) is not None:
                return Report(verdict=(reason,), measured=False)
            before = [patterns(model, sample) for sample in samples]
        with pair.after() as model:
            if (reason := _cannot(model)) is not None:
                return Report(verdict=(reason,), measured=False)
            after = [patterns(model, sample) for sample in samples]
        if any(not each for each in (*before, *after)):
            return Report(verdict=("This model does not show its attention.",), measured=False)
        entropy = [_mean([_entropies(each) for each in said]) for said in (before, after)]
        sink = [_mean([[layer[:, 1:, 0].mean(1) for layer in each] for each in said]) for said in (before, after)]
        moved = _mean([_distances(old, new) for old, new in zip(before, after, strict=True)])
        return _report(entropy, sink, moved, before[0], after[0])


def _report(
    entropy: Sequence[Float[Tensor, "L H"]],
    sink: Sequence[Float[Tensor, "L H"]],
    moved: Float[Tensor, "L H"],
    before: Sequence[Float[Tensor, "H n n"]],
    after: Sequence[Float[Tensor, "H n n"]],
) -> Report:
    most = int(moved.argmax())
    layer, head = divmod(most, moved.shape[1])
    largest = require_finite("attention", float(moved.max()))
    mean_before, mean_after = (float(each.mean()) for each in entropy)
    if largest == 0:
        said = ("Every head looks where it looked before: no attention has changed.",)
    else:
        wider = "wider" if mean_after > mean_before else "less widely"
        said = (
            f"Heads look {wider} than before (mean entropy {mean_before:.3f}, now {mean_after:.3f} of what is "
            f"possible); most changed is head {head} of layer {layer}: {100 * largest:.0f} % of its attention went "
            "elsewhere.",
        )
    rows = [f"layer {number}" for number in range(len(moved))]
    columns = [str(number) for number in range(moved.shape[1])]
    grids = [
        Grid(title="Share of attention that went elsewhere, by layer and head", rows=rows, columns=columns,
             values=moved.tolist()),
        Grid(title="Change of entropy, by layer and head", rows=rows, columns=columns,
             values=(entropy[1] - entropy[0]).tolist(), signed=True),
    ]  # fmt: skip
    for name, each in (("before", before), ("after", after)):
        shown = each[layer][head][:SHOWN, :SHOWN]
        places = [str(number) for number in range(len(shown))]
        values = [[value if column <= row else None for column, value in enumerate(line)]
                  for row, line in enumerate(shown.tolist())]  # fmt: skip
        grids.append(Grid(title=f"Head {head} of layer {layer}, {name}: each row looks at the columns", rows=places,
                          columns=places, values=values))  # fmt: skip
    table = Table(
        title="Means over heads",
        heads=("layer", "entropy before", "after", "on the first token before", "after", "went elsewhere"),
        rows=[[name, float(entropy[0][number].mean()), float(entropy[1][number].mean()),
               float(sink[0][number].mean()), float(sink[1][number].mean()), float(moved[number].mean())]
              for number, name in enumerate(rows)],
    )  # fmt: skip
    numbers = {"entropy_before": mean_before, "entropy_after": mean_after, "largest_change": largest,
               "layer": layer, "head": head}  # fmt: skip
    return Report(verdict=said, numbers=numbers, tables=(table,), grids=tuple(grids))


@torch.no_grad()
def patterns(model: LanguageModel, ids: Ints) -> list[Float[Tensor, "H n n"]]:
    """The attention of every head of every layer over one text."""
    model.train(False)
    given = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    with _written_out(model):
        found = model.module(input_ids=given, use_cache=False, output_attentions=True).attentions
    return [layer[0].float().cpu() for layer in found or () if layer is not None]


@contextmanager
def _written_out(model: LanguageModel) -> Iterator[None]:
    """The zoo's plain attention, which can show what it does, for the length of a block."""
    configs = {id(config): config for config in (model.module.config, model.module.config.get_text_config())}
    known = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = known[key]


def _cannot(model: LanguageModel) -> str | None:
    """Why a model's attention cannot be shown; None where it can."""
    if model.active_root is not None:
        return "The adapter puts a learned prefix before every text: attention over that is not shown here."
    if not model.task.speaks:
        return "This model was loaded to classify or to fill in: only attention over earlier tokens is shown here."
    if model.sites.two_stacks:
        return "This model has an encoder and a decoder: only attention of one stack is shown here."
    return None


def _entropies(layers: Sequence[Float[Tensor, "H n n"]]) -> list[Float[Tensor, " H"]]:
    """The mean entropy of each head's rows, each as a share of the largest that its row can have."""
    found = []
    for layer in layers:
        rows = layer[:, 1:]
        most = torch.log(torch.arange(2, layer.shape[-1] + 1, dtype=torch.float32))
        found.append((-(rows * rows.clamp_min(1e-20).log()).sum(-1) / most).mean(1))
    return found


def _distances(
    before: Sequence[Float[Tensor, "H n n"]], after: Sequence[Float[Tensor, "H n n"]]
) -> list[Float[Tensor, " H"]]:
    return [(old - new).abs().sum(-1).mul(0.5)[:, 1:].mean(1) for old, new in zip(before, after, strict=True)]


def _mean(each: Sequence[Sequence[Float[Tensor, " H"]]]) -> Float[Tensor, "L H"]:
    """The mean over texts of a value for every layer and head."""
    found = torch.stack([torch.stack(list(layers)) for layers in each]).mean(0)
    return torch.nan_to_num(found, nan=math.inf)
