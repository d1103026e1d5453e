"""Answers that are compared: trees that share a prompt among them, and what came out, answer by answer, pair by pair.

Idea: a prompt is a segment without weight, each answer a leaf; so the prompt is computed once, however many answers it
has. A row weighs 1: its weight is spread evenly over its answers and within each over what is predicted of it, so that
a step is divided by its number of rows. The first answer is the best; of K answers each of the C(K, 2) pairs counts
1 / C(K, 2). Scores travel with the answers, as the note "return": answers that have the same are no pair.
Source: Ouyang et al., arXiv 2203.02155, section 3.5: all pairs of a prompt in one element of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from luthier.core.errors import DataError
from luthier.data.forest import Floats, Forest, Note, Segment, Tree
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.data.training_rows import TrainingRows
from luthier.model.running.outputs import TokenOutputs

ScoreUse = Literal["unused", "margin", "probability"]
"""What the difference of the scores of two answers is taken for: nothing, a margin, or the log odds of their order."""
_WRONG = TOKEN_ROLES.index("wrong")


def compared_tree(view: Rendered, *, at_end: bool = False) -> Tree:
    """A prompt with its answers, or, `at_end`, with something to be said at the last token of each.

    Raises DataError for rows that are no answers to a prompt.
    """
    if view.answers is None or not view.answers.any() or not view.weights.any():
        raise DataError(
            f"row {view.row} has no answers to compare",
            allowed="a prompt with a chosen and a rejected answer, or a ranking",
            do="look at the columns with: luthier data check",
        )
    count = int(view.answers.max())
    prompt = view.answers == 0
    nothing = np.zeros(int(prompt.sum()), dtype=np.float32)
    leaves = [_leaf(view, number, 1 / count, at_end) for number in range(1, count + 1)]
    return Tree((Segment(view.tokens[prompt], nothing), *leaves), row=view.row)


def require_scores(rows: TrainingRows, use: ScoreUse) -> list[str]:
    """What to say of rows without the scores that are used. Raises DataError where there are none at all."""
    if use == "unused":
        return []
    lacking = ~rows.scored
    if not (count := int(lacking.sum())):
        return []
    columns = "margin, probability, or score_chosen and score_rejected"
    if count == len(rows):
        raise DataError(
            f"scores is {use} in the objective, and none of {count:,} training rows has scores",
            allowed=f"rows with {columns}",
            do="add one of these columns, or set scores to unused",
        )
    taken = "their answers have no margin to keep" if use == "margin" else "their order is taken for certain"
    return [
        f"{count:,} of {len(rows):,} training rows have no scores, and scores is {use} in the objective (first: "
        f"{rows.first(lacking)}): {taken}; give them {columns}, or take them out"
    ]


def is_good(view: Rendered) -> bool:
    """Whether the only answer of a judged row is a good one."""
    return not bool((view.roles[view.weights > 0] == _WRONG).any())


def _leaf(view: Rendered, number: int, share: float, at_end: bool) -> Segment:
    of_it = view.answers == number
    tokens, trained = view.tokens[of_it], view.weights[of_it] > 0
    weights: Floats = trained.astype(np.float32)
    if at_end:
        weights = np.zeros(len(tokens), dtype=np.float32)
        weights[-1] = 1
    if not weights.any():
        raise DataError(f"answer {number} of row {view.row} has no trained token", allowed="an answer with weight")
    notes: dict[Note, Floats] | None = None if view.scores is None else {"return": view.scores[of_it]}
    labels = np.zeros(len(tokens), dtype=np.int32) if at_end else None
    return Segment(tokens, weights * np.float32(share / weights.sum()), 0, labels=labels, notes=notes)


@dataclass(frozen=True)
class Answers:
    """What came out for the answers of a forest: `owner` says which of A answers each predicted token is of, `tree`
    which tree an answer is of, `sizes` how many tokens of it are predicted."""

    owner: Int[Tensor, " N"]
    tree: Int[Tensor, " A"]
    sizes: Float[Tensor, " A"]
    trees: int

    @classmethod
    def of(cls, outputs: TokenOutputs, forest: Forest) -> Answers:
        """The answers of a forest, in the order of its leaves."""
        counts, trees = [], []
        for place, tree in enumerate(forest.trees):
            for leaf in tree.segments[1:]:
                counts.append(int(np.count_nonzero(leaf.weighted)))
                trees.append(place)
        device = outputs.weights.device
        sizes = torch.tensor(counts, device=device)
        owner = torch.repeat_interleave(torch.arange(len(counts), device=device), sizes)
        return cls(owner, torch.tensor(trees, device=device), sizes.float(), len(forest.trees))

    def sums(self, values: Float[Tensor, " N"]) -> Float[Tensor, " A"]:
        """The sum over the tokens of each answer."""
        return torch.zeros_like(self.sizes).index_add(0, self.owner, values)

    def means(self, values: Float[Tensor, " N"]) -> Float[Tensor, " A"]:
        """The mean over the tokens of each answer."""
        return self.sums(values) / self.sizes

    @property
    def best(self) -> Int[Tensor, " trees"]:
        """The first answer of each tree."""
        return torch.searchsorted(self.tree, torch.arange(self.trees, device=self.tree.device))

    def by_tree(self, values: Float[Tensor, " n"], tree: Int[Tensor, " n"]) -> Float[Tensor, " trees"]:
        """The sum over what is of each tree."""
        return torch.zeros(self.trees, device=values.device).index_add(0, tree, values)


@dataclass(frozen=True)
class Pairs:
    """The pairs of answers of a forest: `better` and `worse` are places among its answers, `share` what a pair counts,
    `gap` by how much the scores of a row say one is better, and NaN where they say nothing."""

    better: Int[Tensor, " P"]
    worse: Int[Tensor, " P"]
    share: Float[Tensor, " P"]
    gap: Float[Tensor, " P"]
    answers: Answers

    @classmethod
    def of(cls, outputs: TokenOutputs, forest: Forest) -> Pairs:
        """All pairs of answers to one prompt of which one is better."""
        answers = Answers.of(outputs, forest)
        tree = answers.tree.cpu().numpy()
        ends = np.cumsum(np.bincount(tree, minlength=answers.trees))
        of_each = [np.triu_indices(stop - start, 1) for start, stop in pairwise([0, *ends.tolist()])]
        firsts = np.repeat(ends - np.diff(ends, prepend=0), [len(better) for better, _ in of_each])
        better, worse = (np.concatenate([pair[side] for pair in of_each]) + firsts for side in (0, 1))
        scores = _scores(answers, outputs)
        if scores is not None:
            # NaN stands for a row without scores: its answers are in order.
            kept = scores[better] != scores[worse]
            better, worse = better[kept], worse[kept]
        of_tree = np.bincount(tree[better], minlength=answers.trees)
        share = 1 / of_tree[tree[better]]
        gap = np.full(len(better), np.nan) if scores is None else scores[better] - scores[worse]
        device = answers.tree.device
        return cls(
            torch.from_numpy(better).to(device),
            torch.from_numpy(worse).to(device),
            torch.from_numpy(share.astype(np.float32)).to(device),
            torch.from_numpy(gap.astype(np.float32)).to(device),
            answers,
        )

    def difference(self, values: Float[Tensor, " A"]) -> Float[Tensor, " P"]:
        """By how much the better answer has more."""
        return values[self.better] - values[self.worse]

    def margin(self, use: ScoreUse) -> Float[Tensor, " P"] | float:
        """By how much the better answer has to be ahead."""
        return self.gap.nan_to_num(0.0) if use == "margin" else 0.0

    def flipped(self, use: ScoreUse, smoothing: float) -> Float[Tensor, " P"] | float:
        """How likely each pair is the wrong way round: as its scores say, and by a share of all pairs."""
        if use != "probability":
            return smoothing
        told = torch.where(self.gap.isnan(), 0.0, torch.sigmoid(-self.gap.nan_to_num(0.0)))
        return smoothing + (1 - 2 * smoothing) * told

    def by_tree(self, losses: Float[Tensor, " P"]) -> Float[Tensor, " trees"]:
        """The mean loss of the pairs of each tree."""
        return self.answers.by_tree(self.share * losses, self.answers.tree[self.better])

    def metrics(
        self, rewards: Float[Tensor, " A"], log_probs: Float[Tensor, " A"] | None = None
    ) -> dict[str, tuple[float, float]]:
        """How often the better answer has more, by how much, and what both have; and how likely both are, a token."""
        total = float(self.answers.trees)
        said = rewards.detach()
        found = {
            # Half of a draw is right: of two answers that are told the same one is guessed.
            "accuracy": (self.difference(said).sign() + 1) / 2,
            "margin": self.difference(said),
            "chosen_reward": said[self.better],
            "rejected_reward": said[self.worse],
        }
        if log_probs is not None:
            found["chosen_log_prob"] = log_probs.detach()[self.better]
            found["rejected_log_prob"] = log_probs.detach()[self.worse]
        return {name: (float((self.share * each).sum()), total) for name, each in found.items()}


def _scores(answers: Answers, outputs: TokenOutputs) -> np.ndarray[tuple[int], np.dtype[np.float64]] | None:
    """The score of each answer, NaN in rows without."""
    if "return" not in outputs.notes:
        return None
    firsts = answers.sizes.cumsum(0) - answers.sizes
    found: np.ndarray[tuple[int], np.dtype[np.float64]]
    found = outputs.notes["return"][firsts.long()].double().cpu().numpy()
    return found
