"""The batcher: trees cut into micro-batches, and each of these forward and backward through the model, once for all.

Several learners, each an adapter with an objective of its own, may share one batcher: their trees go through the base
together, each tree by its own adapter, and each learner gets its own sum of losses and its own weight. Losses are sums,
so whose trees lie in which micro-batch changes no gradient.
When memory runs out the step is done again, from its beginning, in micro-batches of half the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Protocol, final

import torch

from luthier.core.errors import RecipeError
from luthier.data.forest import Forest, Tree, pack
from luthier.model.language_model import LanguageModel
from luthier.model.running.guests import refuse_trained_base
from luthier.model.running.outputs import TokenOutputs, of_trees
from luthier.model.running.parts import Part, can_split
from luthier.objectives import Objective
from luthier.train.in_backward import InBackward
from luthier.train.pass_report import PassReport, add_up, report_of
from luthier.train.random_state import RandomState
from luthier.train.reference import ITSELF, Reference, looked_at, mean_log_ratio, noted
from luthier.train.shortage import Split, exhausted, release, shortage

Group = tuple[Tree, ...]
"""The trees of one call: they are cut into micro-batches together."""
Reports = dict[str, PassReport]
"""What a pass has found for each learner."""


class Learner(Protocol):
    """Who learns from trees that name it."""

    objective: Objective
    pending_weight: float
    in_backward: InBackward | None

    def clear_gradients(self) -> None:
        """Forget all gradients."""

    def step_or_gather(self, trees: Sequence[Tree], *, begun: bool) -> AbstractContextManager[None]:
        """What a pass over these trees is done within: the step itself, where the optimizer steps in it."""


@final
class Batcher:
    """Runs trees through a model for its learners. A single learner may have no name, and neither have its trees.

    `micro_tokens` only ever becomes smaller. `planned_bytes` is what a plan expects each part to need, for the error
    when memory is exhausted, `reference` whose word objectives ask for, and `began` the random numbers that the step at
    hand began with.
    """

    def __init__(self, model: LanguageModel, *, micro_tokens: int = 4096) -> None:
        self.model = model
        self.micro_tokens = micro_tokens
        self.planned_bytes: Mapping[str, int] = {}
        self.reference: Reference = ITSELF
        self.learners: dict[str, Learner] = {}
        self.began = RandomState.now(model.device)
        self._groups: list[Group] = []
        self._running: Tree | None = None

    def join(self, name: str, learner: Learner) -> None:
        """Take in a learner. Raises RecipeError for a name that is taken, and for learners that cannot be together."""
        if name in self.learners or (self.learners and "" in {name, *self.learners}):
            raise RecipeError(f"{name!r} cannot name another learner", allowed="several learners with a name each")
        self.learners[name] = learner
        if len(self.learners) > 1:
            if any(each.in_backward is not None for each in self.learners.values()):
                raise RecipeError(
                    f"the optimizer of {name!r}, or of another adapter beside it, steps in the backward pass",
                    allowed="one adapter in a batch with such an optimizer",
                    do="set optimizer.per_layer to false",
                )
            refuse_trained_base({each: self.model.attachments[each] for each in self.learners})

    def forward_backward(self, trees: Mapping[str, Sequence[Tree]]) -> Reports:
        """Add the gradient of the summed loss over the trees of each learner; nothing is stepped.

        When memory runs out, everything since the last optimizer step is done again in smaller micro-batches. Raises
        MemoryExhaustedError when there are no smaller ones.
        """
        self.model.train()
        if not self._groups:
            self.began = RandomState.now(self.model.device)
        group = tuple(tree for name, own in trees.items() for tree in self.named(name, own))
        todo, splits = [group], list[Split]()
        with ExitStack() as around:
            for name, own in trees.items():
                around.enter_context(self.learners[name].step_or_gather(own, begun=bool(self._groups)))
            while (found := self._attempt(self._add_gradients, todo, splits, in_parts=True)) is None:
                # A backward pass that failed midway has left part of its gradient behind: all of it is made again, with
                # the random numbers of the first attempt.
                for learner in self.learners.values():
                    learner.clear_gradients()
                self.began.restore()
                todo = [*self._groups, group]
        self._groups.append(group)
        for name, report in found[-1].items():
            self.learners[name].pending_weight += report.weight
        return _told(trees, found[-1], splits)

    @torch.no_grad()
    def evaluate(self, trees: Mapping[str, Sequence[Tree]]) -> Reports:
        """The loss over the trees of each, without dropout and without gradients. Memory may run out as in a step."""
        self.model.train(False)
        group = tuple(tree for name, own in trees.items() for tree in self.named(name, own))
        splits: list[Split] = []
        while (found := self._attempt(self._losses, [group], splits, in_parts=False)) is None:
            pass
        return _told(trees, found[-1], splits)

    def named(self, name: str, trees: Iterable[Tree]) -> list[Tree]:
        """Trees with the name of their learner on them."""
        return [replace(tree, adapter=name) if tree.adapter != name else tree for tree in trees]

    def forget(self, name: str) -> None:
        """A learner has stepped, or given up its gradients: its trees need not be done again."""
        kept = (tuple(tree for tree in group if tree.adapter != name) for group in self._groups)
        self._groups = [group for group in kept if group]

    def micro_batches(self, trees: Iterable[Tree], *, micro_tokens: int | None = None) -> list[Forest]:
        """Trees in micro-batches. Longest first: equal ones then share an attention call, and memory peaks at once.

        Within one, the trees of a learner follow each other, so that its rows are one range.
        """
        ordered = sorted(trees, key=lambda tree: tree.token_count, reverse=True)
        forests = pack(ordered, max_tokens=self.micro_tokens if micro_tokens is None else micro_tokens)
        if len(self.learners) < 2:
            return forests
        place = {name: index for index, name in enumerate(self.learners)}
        return [Forest(tuple(sorted(each.trees, key=lambda tree: place[tree.adapter]))) for each in forests]

    def run(self, forest: Forest) -> Iterator[tuple[str, Part]]:
        """Run one micro-batch forward and backward, in parts when it is one tree that is too large."""
        first = forest.trees[0].adapter
        in_parts = self._can_run_in_parts(forest) and forest.token_count > self.micro_tokens
        forest, temperature = self._prepared(forest)
        if in_parts:
            loss, room = self.learners[first].objective.loss, self.micro_tokens
            tree = forest.trees[0]
            for part in self.model.backward_in_parts(tree, loss, max_tokens=room, temperature=temperature):
                yield first, part
            return
        parts = [
            (name, (own, outputs, self.learners[name].objective.loss(outputs, own)))
            for name, own, outputs in _by_learner(forest, self._outputs(forest, temperature))
        ]
        total = parts[0][1][2].sum
        for _, (_, _, report) in parts[1:]:
            total = total + report.sum
        # Only a learner that is alone may step in the backward pass.
        steps, weight = self.learners[first].in_backward, parts[0][1][2].weight
        with nullcontext() if steps is None else steps.divided(float(total.detach()), weight):
            total.backward()  # type: ignore[no-untyped-call]
        yield from parts

    def _attempt(
        self,
        run: Callable[[Sequence[Tree]], Reports],
        groups: Sequence[Group],
        splits: list[Split],
        *,
        in_parts: bool,
    ) -> list[Reports] | None:
        """What `run` finds for each group; None when memory ran out, after choosing a smaller micro-batch."""
        try:
            return [run(trees) for trees in groups]
        except (MemoryError, RuntimeError) as failure:
            reason = shortage(failure)
            if reason is None:
                raise
        # Only here, where the exception is gone, is the memory that its frames held free again.
        release(self.model.device)
        splits.append(self._halve(groups, reason, in_parts=in_parts))
        return None

    def _add_gradients(self, trees: Sequence[Tree]) -> Reports:
        found: dict[str, list[PassReport]] = {}
        for forest in self._one_by_one(self._informed(trees)):
            for name, (_, outputs, loss) in self.run(forest):
                own = report_of(loss, 0, outputs)
                found.setdefault(name, []).append(own)
            for name, count in _token_counts(forest).items():
                found[name].append(PassReport(0.0, 0.0, count, 0, {}))
        return {name: add_up(reports) for name, reports in found.items()}

    def _losses(self, trees: Sequence[Tree]) -> Reports:
        found: dict[str, list[PassReport]] = {}
        for bare in self._one_by_one(self._informed(trees)):
            forest, temperature = self._prepared(bare)
            for name, own, outputs in _by_learner(forest, self._outputs(forest, temperature)):
                report = self.learners[name].objective.loss(outputs, own)
                made = report_of(report, own.token_count, outputs)
                found.setdefault(name, []).append(made)
        return {name: add_up(reports) for name, reports in found.items()}

    def _informed(self, trees: Sequence[Tree]) -> list[Tree]:
        """The trees of a step, with what their learners' objectives want to know of all of them together."""
        told: list[Tree] = []
        for name in dict.fromkeys(tree.adapter for tree in trees):
            own = [tree for tree in trees if tree.adapter == name]
            objective = self.learners[name].objective
            if probes := objective.probes(own):
                forests = self._one_by_one(probes)
                heat = objective.policy_temperature
                ratio = mean_log_ratio(self.model, forests, temperature=heat, reference=self.reference)
                own = objective.informed(own, ratio)
            told += own
        return told

    def _prepared(self, forest: Forest) -> tuple[Forest, float]:
        """A micro-batch with what its learners' objectives want noted of it, and the temperature of their policy."""
        own = {tree.adapter: self.learners[tree.adapter].objective for tree in forest.trees}
        temperatures = {objective.policy_temperature for objective in own.values()}
        if len(temperatures) > 1:
            raise RecipeError(
                f"policies at the temperatures {', '.join(map(str, sorted(temperatures)))} in one batch",
                allowed="one temperature for all adapters that are trained together",
            )
        [temperature] = temperatures
        return noted(
            self.model, forest, lambda tree: own[tree.adapter].refers(tree), temperature=temperature,
            reference=self.reference,
        ), temperature  # fmt: skip

    def _outputs(self, forest: Forest, temperature: float) -> TokenOutputs:
        """What a prepared micro-batch gives; one learner alone may have its policy compared with the reference's."""
        comparison = self.learners[forest.trees[0].adapter].objective.comparison
        return looked_at(self.model, forest, comparison, temperature=temperature, reference=self.reference)

    def _one_by_one(self, trees: Sequence[Tree]) -> Iterator[Forest]:
        for forest in self.micro_batches(trees):
            # Should it be the one that does not fit, an error can name it.
            self._running = forest.trees[0]
            yield forest

    def _halve(self, groups: Sequence[Group], reason: str, *, in_parts: bool) -> Split:
        """Halve `micro_tokens`, until some micro-batch becomes smaller. Raises MemoryExhaustedError when none can."""
        now = self._cut(groups, self.micro_tokens, in_parts)
        for learner in self.learners.values():
            if in_parts and learner.in_backward is not None:
                raise exhausted(self._running, learner.in_backward.why(reason), self.planned_bytes)
        if now == self._cut(groups, 1, in_parts):
            self._give_up()
            raise exhausted(self._running, reason, self.planned_bytes)
        smaller = self.micro_tokens // 2
        while self._cut(groups, smaller, in_parts) == now:
            smaller //= 2
        split = Split(self.micro_tokens, smaller, reason)
        self.micro_tokens = smaller
        return split

    def _cut(self, groups: Sequence[Group], micro_tokens: int, in_parts: bool) -> list[tuple[int, int]]:
        """How groups are cut at a size: for each micro-batch its trees, and its tokens or those of its parts."""
        found = []
        for trees in groups:
            for forest in self.micro_batches(trees, micro_tokens=micro_tokens):
                tokens = forest.token_count
                parts = in_parts and self._can_run_in_parts(forest)
                found.append((len(forest.trees), min(micro_tokens, tokens) if parts else tokens))
        return found

    def _can_run_in_parts(self, forest: Forest) -> bool:
        """Whether this micro-batch is one tree that may be cut at its root."""
        separable = self.learners[forest.trees[0].adapter].objective.separable
        possible = self.model.splits_trees and separable
        return possible and len(forest.trees) == 1 and can_split(forest.trees[0])

    def _give_up(self) -> None:
        self._groups = []
        for learner in self.learners.values():
            learner.clear_gradients()
            learner.pending_weight = 0.0


def _by_learner(forest: Forest, outputs: TokenOutputs) -> list[tuple[str, Forest, TokenOutputs]]:
    """The trees of each learner and what came out for them, as if no others had been there."""
    names = list(dict.fromkeys(tree.adapter for tree in forest.trees))
    if len(names) == 1:
        return [(names[0], forest, outputs)]
    found = []
    for name in names:
        places = [index for index, tree in enumerate(forest.trees) if tree.adapter == name]
        found.append((name, *of_trees(forest, outputs, places)))
    return found


def _token_counts(forest: Forest) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tree in forest.trees:
        counts[tree.adapter] = counts.get(tree.adapter, 0) + tree.token_count
    return counts


def _told(names: Iterable[str], reports: Reports, splits: Sequence[Split]) -> Reports:
    """A report for each learner, of nothing where it had no trees."""
    return {name: replace(reports.get(name, add_up([])), splits=tuple(splits)) for name in names}
