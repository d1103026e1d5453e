"""Reinforce: prompts and a reward become a better model, by what it answers itself.

Read top to bottom: prompts with their facts, the source that answers and scores them with the live model, a stand-in of
the largest rollout (by which memory is planned and rehearsed), and the reward of held-out prompts, which takes the
place of a held-out loss: in the loop, and again in the fresh process that proves the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from luthier.core.errors import CorruptError, DataError, RecipeError
from luthier.data.conversation import Asked, Row
from luthier.data.forest import Ints, Note, Tree
from luthier.data.intake import Intake, Kept
from luthier.data.prepare import Prepared, Reading, Views, sources_of
from luthier.data.rendering.rendered import Rendered
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import Answer, Group, Prompt, noting
from luthier.data.sample import Sample
from luthier.data.tokenizer import Tokenizer
from luthier.data.tool_calls import message_said
from luthier.infer.engine import Engine
from luthier.infer.groups import GroupSpeaker
from luthier.model.editing.attachment import Attachment
from luthier.model.language_model import LanguageModel
from luthier.model.speaker import Sampling, Speaker
from luthier.recipes.measuring import measured
from luthier.recipes.reinforcing.remote_policy import Policy, RemotePolicy, room_of
from luthier.recipes.reinforcing.tools import models_here, waits_of
from luthier.recipes.schemas.finetune import Paths
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.rewards import Environment, Score
from luthier.train.episodes import Episodes, settled
from luthier.train.pass_report import PassReport
from luthier.train.recall import recall
from luthier.train.reference import Reference
from luthier.train.rolling import Plan, seed_of
from luthier.train.rollouts import RolloutSource
from luthier.train.scoring import Scored, Scoring
from luthier.train.source import DataSource
from luthier.train.stepper import Stepper

_LARGEST: Final = 32
"""Prompts, the longest, that stand in for all when the largest rollout is planned."""


@dataclass(frozen=True)
class Facts:
    """The rows of a data set as they were read, by number: what is asked, and how answers are checked."""

    rows: dict[int, Row]

    @classmethod
    def of(cls, paths: Paths, reading: Reading, evaluation: Paths | None) -> Facts:
        """Read all files once more; no token is made."""
        sources = [*sources_of(paths, reading), *(sources_of(evaluation, reading) if evaluation is not None else [])]
        return cls({item.row.number: item.row for item in Intake(sources, None) if isinstance(item, Kept)})

    def prompts(self, views: Views, *, most: int | None = None) -> list[Prompt]:
        """Prompts of rendered rows."""
        found = []
        for index in range(len(views) if most is None else min(most, len(views))):
            view = views[index]
            row = self.rows.get(view.row)
            if row is None:
                raise CorruptError(f"row {view.row} of the data is not the prompt it was", do="read the data again")
            if isinstance(row.content, Asked):
                asked = row.content
                found.append(Prompt(view.tokens, asked.asked.messages, asked.facts, view.row, asked.text))
        return found

    def check(self, scoring: Scoring | None, *kinds: Views) -> None:
        """Raise what is wrong with the rows by which answers are to be scored, in the order of the data."""
        if scoring is None:
            return
        numbers = sorted({row for views in kinds for row in views.store.rows[views.indices].tolist()} & set(self.rows))
        rows = ((row.content, row.where) for row in map(self.rows.__getitem__, numbers))
        scoring.check((content.facts, where) for content, where in rows if isinstance(content, Asked))

    def words(self, views: Views) -> list[Rendered]:
        """Rows that are imitated beside rollouts: those that ask nothing."""
        found = (views[index] for index in range(len(views)))
        return [view for view in found if view.row in self.rows and not isinstance(self.rows[view.row].content, Asked)]


def rollout_source(
    recipe: ReinforceRecipe,
    data: Prepared,
    reading: Reading,
    tokenizer: Tokenizer,
    stepper: Stepper,
    attachment: Attachment,
    *,
    scoring: Scoring | None,
) -> RolloutSource:
    """Steps from what the model answers to training prompts while it is trained."""
    facts = Facts.of(recipe.data.train, reading, recipe.data.evaluation)
    knobs = recipe.rollouts
    facts.check(scoring, data.train, data.held_out)
    prompts = facts.prompts(data.train)
    plan = Plan(
        prompts=knobs.prompts, answers=knobs.answers, max_new_tokens=knobs.max_new_tokens, cut=knobs.cut,
        redraws=knobs.redraws, lag=knobs.lag, correction=knobs.correction, stop_ids=tuple(sorted(data.store.stop_ids)),
        # Models of ours that judge would share the cores, and what is kept for passes, with the one that is trained.
        scored_beside=scoring is None or not models_here(scoring),
    )  # fmt: skip
    speaker = _speaker(recipe, data, tokenizer, stepper, attachment, prompts)
    context = speaker.context if isinstance(speaker, RemotePolicy) else room_of(stepper.model)
    return RolloutSource(
        prompts, recipe.learner, speaker,
        unrewarded if scoring is None else scoring.score,
        recall=lambda trees, wanted: recall(stepper, trees, wanted), decode=_decoder(tokenizer, data),
        plan=plan, seed=recipe.seed, episodes=_episodes(recipe, data, tokenizer, scoring, context),
        beside=_beside(recipe, facts, data), waited=[] if scoring is None else waits_of(scoring.tools.judge),
    )  # fmt: skip


def _speaker(
    recipe: ReinforceRecipe,
    data: Prepared,
    tokenizer: Tokenizer,
    stepper: Stepper,
    attachment: Attachment,
    prompts: Sequence[Prompt],
) -> Speaker:
    """Who answers: this process with its live weights, or an engine somewhere else that is given them."""
    if not recipe.rollouts.engine.url:
        return GroupSpeaker(Engine(stepper.model, decode=tokenizer.decode))
    policy = Policy(stepper.model, attachment, recipe.adapter, tuple(sorted(data.store.stop_ids)))
    # A recipe that is only looked at has no run yet, and asks for no answers.
    run = Path(recipe.run or recipe.recipe)
    speaker = RemotePolicy(policy, recipe.rollouts.engine, [prompt.tokens for prompt in prompts], run=run)
    speaker.require()
    return speaker


def _beside(recipe: ReinforceRecipe, facts: Facts, data: Prepared) -> DataSource | None:
    """Rows that each step imitates beside its rollouts; None where the objective imitates nothing."""
    if isinstance(recipe.objective, RolloutLearner):
        return None
    rows = facts.words(data.train)
    if not rows:
        raise DataError(
            f"the objective {recipe.objective.method_name()} imitates texts beside its rollouts, and of "
            f"{len(data.train):,} training rows none is a conversation with an answer, or a text",
            allowed="rows to imitate beside the prompts",
            do="add a file of them to data.train, or make objective.compared the whole objective",
        )
    lengths = np.array([len(view.tokens) for view in rows], dtype=np.int64)
    tokens = recipe.batch.tokens
    count = None if tokens else recipe.batch.rows or recipe.rollouts.prompts
    return DataSource(rows, recipe.objective, lengths=lengths, seed=recipe.seed, rows=count, tokens=tokens)


def unrewarded(samples: Sequence[Sample]) -> Scored:
    """Answers that nobody says the worth of: it is no number."""
    return Scored(tuple(Score(float("nan")) for _ in samples))


def stand_in(recipe: ReinforceRecipe, data: Prepared) -> DataSource:
    """A data set of rollouts as large as they can become: the prompts, each with answers of the greatest length."""
    knobs = recipe.rollouts

    def grown(view: Rendered) -> Tree:
        answer = _filler(view, knobs.max_new_tokens)
        group = Group(view.tokens, (answer,) * knobs.answers, view.row)
        tree = recipe.learner.grow(group)
        returned: list[Note] = ["return"] if "value" in recipe.learner.recalled else []
        lagging: list[Note] = ["old", "correction"] if knobs.lag else []
        notes: list[Note] = ["advantage", *recipe.learner.recalled, *returned, *lagging]
        for note in notes:
            tree = noting(tree, note, [np.zeros(knobs.max_new_tokens)] * knobs.answers)
        return tree

    order = np.argsort(-data.train.lengths, kind="stable").tolist()
    prompts = (view for view in map(data.train.__getitem__, order) if not view.weights.any())
    views = list(islice(prompts, _LARGEST))
    trees = {view.row: grown(view) for view in views}
    lengths = np.array([trees[view.row].token_count for view in views], dtype=np.int64)
    return DataSource(
        views, recipe.objective, lengths=lengths, seed=recipe.seed, made=trees,
        rows=min(len(views), max(1, knobs.prompts // recipe.learner.minibatches)),
    )  # fmt: skip


def _filler(view: Rendered, count: int) -> Answer:
    tokens: Ints = np.resize(view.tokens, count).astype(np.int32)
    return Answer(tokens, np.ones(count, np.bool_), np.zeros(count, np.float32), 0.0)


# ---------------------------------------------------------------------------------------------------------- held out


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, which are answered greedily: the loss of an evaluation is minus the mean reward of the answers,
    or, where nothing is rewarded, the objective's own over them."""

    model: LanguageModel
    prompts: Sequence[Prompt]
    scoring: Scoring | None
    tokenizer: Tokenizer
    data: Prepared
    recipe: ReinforceRecipe
    reference: Reference
    episodes: Episodes | None = None

    @classmethod
    def of(
        cls,
        recipe: ReinforceRecipe,
        data: Prepared,
        reading: Reading,
        tokenizer: Tokenizer,
        model: LanguageModel,
        *,
        scoring: Scoring | None,
        reference: Reference,
        views: Views | None = None,
    ) -> HeldOut:
        """Those of a recipe, or the prompts of other `views`."""
        facts = Facts.of(recipe.data.train, reading, recipe.data.evaluation)
        facts.check(scoring, views or data.held_out)
        prompts = facts.prompts(views or data.held_out, most=recipe.evaluation.max_rows)
        episodes = _episodes(recipe, data, tokenizer, scoring, room_of(model))
        return cls(model, prompts, scoring, tokenizer, data, recipe, reference, episodes)

    def by(self, model: LanguageModel) -> HeldOut:
        """The same prompts, answered by another model."""
        return replace(self, model=model)

    def measured(self) -> PassReport:
        """What the model's answers are worth now, or how far they are from the teacher's."""
        stops = tuple(sorted(self.data.store.stop_ids))
        sampling = Sampling(max_new_tokens=self.recipe.rollouts.max_new_tokens, stop_ids=stops)
        return self._taught(sampling) if self.scoring is None else self._rewarded(self.scoring, sampling)

    def _rewarded(self, scoring: Scoring, sampling: Sampling) -> PassReport:
        scored, lengths = self._answered(scoring, sampling)
        metrics: dict[str, tuple[float, float]] = {}
        rows: dict[int, tuple[float, float]] = {}
        for prompt, length, score in zip(self.prompts, lengths, scored.scores, strict=True):
            if score is None:
                continue
            rows[prompt.row] = (0.0 - score.value, 1.0)  # a reward of 0 has no sign
            for name, value in {"reward": score.value, **score.parts, "answer_tokens": length}.items():
                total, count = metrics.get(name, (0.0, 0.0))
                metrics[name] = (total + value, count + 1)
        if self.prompts and not rows:
            reasons = scored.told or "the reward gave None"
            own = f"{scored.advice}, or " if scored.advice else ""
            raise RecipeError(
                f"none of {len(self.prompts)} held-out answers could be scored: {reasons}",
                do=f"{own}mend the reward (luthier reward RECIPE FILE tries it), then luthier resume RUN",
            )
        tokens = sum(lengths)
        return PassReport(
            sum(loss for loss, _ in rows.values()), float(len(rows)), tokens, tokens, rows, metrics=metrics,
            unscored=scored.unscored,
        )  # fmt: skip

    def _taught(self, sampling: Sampling) -> PassReport:
        """The objective over answers that nobody has scored."""
        engine, objective = Engine(self.model, decode=self.tokenizer.decode), self.recipe.objective
        spoken = engine.speak([prompt.tokens for prompt in self.prompts], sampling)
        rows: dict[int, tuple[float, float]] = {}
        metrics: dict[str, tuple[float, float]] = {}
        for prompt, said in zip(self.prompts, spoken, strict=True):
            own = np.ones(len(said.tokens), np.bool_)
            answer = Answer(said.tokens, own, np.array(said.log_probs, np.float32), reward=float("nan"))
            tree = self.recipe.learner.grow(Group(prompt.tokens, (answer,), prompt.row))
            # One by one: then a row's loss is its own, and the same however memory has to be cut.
            found = measured(self.model, objective, [tree], reference=self.reference)
            rows[prompt.row] = (found.loss * found.tokens, float(found.tokens))
            for name, value in found.metrics.items():
                total, count = metrics.get(name, (0.0, 0.0))
                metrics[name] = (total + value * found.tokens, count + found.tokens)
        tokens = sum(len(said.tokens) for said in spoken)
        metrics["answer_tokens"] = (float(tokens), float(len(spoken)))
        return PassReport(
            sum(loss for loss, _ in rows.values()), float(tokens), tokens, tokens, rows, metrics=metrics
        )

    def _answered(self, scoring: Scoring, sampling: Sampling) -> tuple[Scored, list[int]]:
        """The scores of greedy answers, and their lengths."""
        engine, decode = Engine(self.model, decode=self.tokenizer.decode), _decoder(self.tokenizer, self.data)
        if self.episodes is not None:
            seeds = [seed_of(scoring.tools.seed, place) for place in range(len(self.prompts))]
            played = self.episodes.play(self.prompts, engine, sampling, seeds=seeds)
            verdicts, retried = [each.verdict for each in played], sum(each.retried for each in played)
            return settled(verdicts, scoring.score, retried=retried), [each.answer.length for each in played]
        spoken = engine.speak([prompt.tokens for prompt in self.prompts], sampling)
        samples = [
            Sample(
                prompt=prompt.messages, answer=decode(said.tokens), tokens=tuple(said.tokens.tolist()),
                ended="length" if said.ended == "length" else "stop", facts=prompt.facts, text=prompt.text,
            )
            for prompt, said in zip(self.prompts, spoken, strict=True)
        ]  # fmt: skip
        return scoring.score(samples), [len(said.tokens) for said in spoken]


def _episodes(
    recipe: ReinforceRecipe, data: Prepared, tokenizer: Tokenizer, scoring: Scoring | None, context: int | None
) -> Episodes | None:
    """Exchanges with the reward, where it is an environment."""
    if recipe.reward is None or scoring is None or not isinstance(recipe.reward, Environment):
        return None
    return Episodes(
        recipe.reward, data.renderer.prompt_ids, _decoder(tokenizer, data), heard=message_said, context=context,
        lock=scoring.lock,
    )  # fmt: skip


def _decoder(tokenizer: Tokenizer, data: Prepared) -> Any:
    """Tokens as rewards read them: without control tokens."""
    silent = tokenizer.special_ids | data.store.stop_ids

    def decode(tokens: Ints) -> str:
        return tokenizer.decode([int(token) for token in tokens if int(token) not in silent])

    return decode
