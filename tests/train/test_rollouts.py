"""Rollouts as a source: what is sampled is what is trained, what fails is left out, and a replay survives a kill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import RecipeError, StorageError
from luthier.core.events import Event
from luthier.data.forest import Ints
from luthier.data.rollout_learner import RolloutLearner
from luthier.data.rollouts import (
    as_arrays,
    from_arrays,
    groups_as_arrays,
    groups_from_arrays,
    leaf_notes,
    noting,
)
from luthier.data.sample import Sample
from luthier.model.speaker import PolicySampling, Sampling, Spoken
from luthier.objectives import Objective
from luthier.objectives.distillation import Distillation
from luthier.objectives.grpo import GRPO
from luthier.objectives.language_model import LanguageModelling
from luthier.objectives.mixture import Mixture
from luthier.objectives.ppo import PPO
from luthier.rewards import RewardError
from luthier.schedules.constant import Constant
from luthier.train.loop import Cadence, Loop
from luthier.train.rollouts import RolloutSource
from luthier.train.scoring import Scored
from luthier.train.signals import StopRequest
from luthier.train.source import Cursor, DataSource
from luthier.train.state import LoopState, load_state, take_snapshot
from luthier.train.stepper import Stepper
from tests import forests, rollouts

METHODS: dict[str, RolloutLearner] = {
    "grpo, once": GRPO(preset="grpo"),
    "grpo, twice in halves": GRPO(preset="dapo", passes=2, minibatches=2, temperature=0.7),
    "ppo": PPO(passes=3, target_kl=2.0, temperature=1.3),
}
each_method = pytest.mark.parametrize("name", METHODS)


def even(sample: Sample) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in sample.tokens) / len(sample.tokens)


@each_method
def test_ratios_begin_at_one_and_nothing_is_clipped(name: str) -> None:
    """Breaks when what is trained is not what was sampled, or at another temperature, or with dropout between."""
    stepper = rollouts.stepper_for(METHODS[name])
    source = rollouts.source_for(stepper, even)
    report = stepper.forward_backward(source.next_step())
    assert report.figures["ratio"] == pytest.approx(1.0, abs=1e-5) and report.figures["clipped"] == 0.0
    # The sampler is the zoo's own forward pass of whole rows, the trainer ours over a shared prompt.
    assert report.figures["mismatch_most"] < 1e-4
    stepper.optim_step()
    again = stepper.forward_backward(source.next_step())
    if METHODS[name].passes > 1:
        assert abs(again.figures["ratio"] - 1) > 1e-6


def test_the_very_tokens_that_were_sampled_are_trained() -> None:
    """Breaks when answers go through text, lose their stop token, or their rewards go to others."""
    stepper = rollouts.stepper_for(GRPO())
    source = rollouts.source_for(stepper, lambda sample: float(sample.tokens[0]))
    trees = source.next_step()
    [asked] = source.speaker.asked  # type: ignore[attr-defined]
    prompts = [np.asarray(tree.segments[0].tokens) for tree in trees]
    spoken = rollouts.FakeSpeaker(stepper.model).speak([each for each in prompts for _ in range(4)], asked)
    leaves = [leaf for tree in trees for leaf in tree.segments[1:]]
    for said, leaf in zip(spoken, leaves, strict=True):
        assert said.tokens.tolist() == leaf.tokens.tolist() and (leaf.weights > 0).all()
    for tree in trees:
        first = np.array([float(leaf.tokens[0]) for leaf in tree.segments[1:]])
        assert np.allclose([own[0] for own in leaf_notes(tree, "advantage")], first - first.mean(), atol=1e-4)


def test_what_could_not_be_scored_is_in_no_group() -> None:
    """Breaks when a failed reward counts as 0: it would lower the baseline, and teach that the answer was bad."""
    stepper = rollouts.stepper_for(GRPO())
    source = rollouts.source_for(stepper, lambda sample: None if sample.tokens[0] % 3 == 0 else 1.0 + even(sample))
    trees = source.next_step()
    assert all(leaf.tokens[0] % 3 for tree in trees for leaf in tree.segments[1:])
    assert source.report is not None
    values = source.report.values()
    assert values["answers"] == 8 and sum(len(tree.segments) - 1 for tree in trees) < 8
    assert values["reward"] >= 1.0 and min(np.concatenate(leaf_notes(trees[0], "advantage"))) > -0.9


def test_a_rollout_without_any_score_ends_the_run() -> None:
    """Breaks when a sandbox that is down trains on nothing, in silence."""
    stepper = rollouts.stepper_for(GRPO())
    source = rollouts.source_for(stepper, even)
    source.roller.score = lambda samples: Scored(
        (None,) * len(samples), tuple(RewardError("the sandbox is down").of(one) for one in samples)
    )
    with pytest.raises(RecipeError, match=r"8 could not be scored \(8 x the sandbox is down\)"):
        source.next_step()
    source.roller.score = lambda samples: Scored(
        (None,) * len(samples), tuple(RewardError("no room", do="name another judge").of(one) for one in samples)
    )
    with pytest.raises(RecipeError, match="8 x no room.*; name another judge, or mend the reward"):
        source.next_step()


def test_groups_that_teach_nothing_are_drawn_again() -> None:
    """Breaks when redrawing has no end, or takes prompts that were asked already."""
    stepper = rollouts.stepper_for(GRPO())
    useless = {0, 3}
    source = rollouts.source_for(
        stepper, lambda sample: 1.0 if sample.facts["row"] in useless else even(sample), plan={"redraws": 3}
    )
    source.roller.prompts = [replace(prompt, facts={"row": prompt.row}) for prompt in source.roller.prompts]
    rows = {tree.row for tree in source.next_step()}
    assert not rows & useless and len(rows) == 2
    source.roller.score = rollouts.scorer(lambda sample: 1.0)
    before = source.cursor
    trees = source.next_step()
    assert source.report is not None
    values = source.report.values()
    assert len(trees) == 2 and values["redrawn"] == 6 and values["alike"] == 8
    assert values["redraws"] == 3
    assert (source.cursor.epoch - before.epoch) * 5 + source.cursor.used - before.used == 8
    assert all((np.concatenate(leaf_notes(tree, "advantage")) == 0).all() for tree in trees)


@pytest.mark.parametrize("cut", ["keep", "mask"])
def test_answers_that_were_cut_off_are_kept_or_masked(cut: str) -> None:
    """Breaks when a masked answer is trained, or its worth is forgotten in the baseline of the others."""
    stepper = rollouts.stepper_for(GRPO())
    source = rollouts.source_for(
        stepper, lambda sample: float(sample.ended == "stop"), plan={"cut": cut, "stop_ids": tuple(range(1, 128, 4))}
    )
    trees = source.next_step()
    leaves = [leaf for tree in trees for leaf in tree.segments[1:]]
    stopped = [int(leaf.tokens[-1]) % 4 == 1 for leaf in leaves]
    assert all(stopped) if cut == "mask" else not all(stopped)
    if cut == "mask":
        # Where all of a group have stopped, none is better.
        own = np.concatenate([each for tree in trees for each in leaf_notes(tree, "advantage")])
        assert own.min() >= 0 and own.max() > 0


def test_nothing_that_is_cut_off_or_steered_is_trained_on() -> None:
    """Breaks when answers of another policy are trained as if they were the model's own."""
    steered: list[Any] = [
        {"top_p": 0.9}, {"top_k": 5}, {"repetition_penalty": 1.2}, {"min_new_tokens": 2}, {"temperature": 0.0}
    ]  # fmt: skip
    for more in steered:
        with pytest.raises(RecipeError, match="is to be trained on|are to be trained on"):
            PolicySampling(**more)


def test_a_sampler_that_says_something_else_is_told_once() -> None:
    """Breaks when answers of other weights, or of another precision, are trained on without a word."""
    stepper = rollouts.stepper_for(GRPO())
    source = rollouts.source_for(stepper, even, off=-0.3)
    warned = []
    for _ in range(3):
        report = stepper.forward_backward(source.next_step())
        assert report.figures["mismatch"] == pytest.approx(0.3, abs=1e-4)
        warned += rollouts.of_kind(source.told(report), "warning")
        stepper.optim_step()
    [warning] = warned
    assert "differ by 0.300" in warning.values["message"]


def test_the_same_seed_rolls_out_the_same_and_another_does_not() -> None:
    """Breaks when a draw depends on what else runs, or answers of a group are copies."""
    found = []
    for seed in (7, 7, 8):
        source = rollouts.source_for(rollouts.stepper_for(GRPO()), even)
        source.roller.seed = seed
        found.append([leaf.tokens.tolist() for tree in source.next_step() for leaf in tree.segments[1:]])
    assert found[0] == found[1] != found[2]
    assert len({tuple(each) for each in found[0][:4]}) > 1


@pytest.mark.parametrize("objective", [GRPO(preset="grpo", passes=2), PPO()], ids=["grpo", "ppo"])
def test_trees_come_back_from_arrays_to_the_bit(objective: RolloutLearner) -> None:
    """Breaks when a note, a row or a token is lost on the way to a checkpoint."""
    made = rollouts.random_trees(objective)
    for tree, back in zip(made, from_arrays(as_arrays(made)), strict=True):
        assert back.row == tree.row and len(back.segments) == len(tree.segments)
        for one, two in zip(tree.segments, back.segments, strict=True):
            assert one.tokens.tobytes() == two.tokens.tobytes() and one.weights.tobytes() == two.weights.tobytes()
            assert one.parent == two.parent and set(one.notes or {}) == set(two.notes or {})
            for name, note in (one.notes or {}).items():
                assert note.tobytes() == (two.notes or {})[name].tobytes()
    assert from_arrays(as_arrays([])) == []


class Life:
    """A run of a few steps that may be cut short: recorder and keeper in one."""

    def __init__(self, objective: RolloutLearner, folder: Path | None, *, at: int = 0, lag: int = 0) -> None:
        torch.manual_seed(3)
        self.stepper: Stepper = rollouts.stepper_for(objective)
        self.source: RolloutSource = rollouts.source_for(self.stepper, even, plan={"redraws": 1, "lag": lag})
        self.folder, self.at = folder, at
        self.row_excess: dict[int, float] = {}
        self.logged: list[tuple[int | None, str, str]] = []

    def go(self, state: LoopState) -> dict[str, bytes]:
        Loop(
            source=self.source, stepper=self.stepper, schedule=Constant(), cadence=Cadence(save_every=1),
            recorder=self, keeper=self, stop=StopRequest(),
        ).run(state)  # fmt: skip
        return {name: master.detach().numpy().tobytes() for name, master in self.stepper.masters.items()}

    def record(self, event: Event) -> None:
        values = {key: each for key, each in event.values.items() if "seconds" not in key}
        self.logged.append((event.step, event.kind, repr(sorted(values.items()))))

    def save(self, state: LoopState, *, best: bool) -> bool:
        if self.folder is not None and state.step == self.at:
            self.folder.mkdir()
            take_snapshot(state, self.stepper, self.row_excess, held=self.source.held()).write(self.folder)
        return True

    def poll(self) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []

    def abandon(self, *, at_once: bool) -> None:
        """Nothing is in flight."""

    def pin(self) -> str:
        return ""


@each_method
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4))])
def test_killed_in_the_middle_of_a_replay_it_goes_on_to_the_bit(name: str, at: int, lag: int, tmp_path: Path) -> None:
    """Breaks when a note of the replay, the order of minibatches, the leash, the next prompts or a rollout that waits
    are forgotten."""
    objective = METHODS[name]
    whole = Life(objective, tmp_path / "state", at=at, lag=lag)
    expected = whole.go(LoopState(total_steps=7))
    torch.manual_seed(99)
    life = Life(objective, None, lag=lag)
    state, life.row_excess = load_state(tmp_path / "state", life.stepper, life.source)
    assert state.step == at
    assert life.go(state) == expected
    assert life.logged == [event for event in whole.logged if (event[0] or 0) > at]


def test_a_replay_that_is_not_taken_back_is_noticed(tmp_path: Path) -> None:
    """Breaks when the test above would pass without what the source holds."""
    whole = Life(METHODS["ppo"], tmp_path / "state", at=2)
    expected = whole.go(LoopState(total_steps=5))
    life = Life(METHODS["ppo"], None)
    state, _ = load_state(tmp_path / "state", life.stepper, life.source)
    life.source.hold({**life.source.held(), "numbers": np.array([0, 2, 0, 0])})
    life.source.seek(Cursor())
    assert life.go(state) != expected


def test_a_rollout_that_runs_ahead_is_that_of_the_weights_before_the_steps(tmp_path: Path) -> None:
    """Breaks when what waits was sampled by weights that steps had changed, so that a sampler beside the trainer would
    say something else; or a version is that of another policy."""
    stepper = rollouts.stepper_for(METHODS["grpo, twice in halves"], rate=0.1)
    source = rollouts.source_for(stepper, even, plan={"lag": 1, "correction": 1.2})
    beside = rollouts.stepper_for(METHODS["grpo, twice in halves"])
    seen: list[set[float]] = []
    for step in range(12):
        if step % 4 == 0:
            # What a sampler would have been given when this rollout's steps began.
            for name, master in stepper.masters.items():
                beside.masters[name].data.copy_(master)
            early, place = source.held(), source.cursor
        trees = source.next_step()
        if step % 4 == 0:
            ahead = groups_from_arrays({k[6:]: v for k, v in source.held().items() if k.startswith("ahead-")})
            if step:
                speaker = rollouts.source_for(beside, even, plan={"lag": 1})
                speaker.hold(early)
                speaker.seek(place)
                for one, other in zip(speaker._sampled(), ahead, strict=True):
                    assert one.version == other.version == step and np.array_equal(one.rewards, other.rewards)
                    for mine, theirs in zip(one.answers, other.answers, strict=True):
                        assert np.array_equal(mine.tokens, theirs.tokens)
                        assert np.array_equal(mine.sampled, theirs.sampled)
        notes = [leaf.notes or {} for tree in trees for leaf in tree.segments[1:]]
        seen.append({float(version) for each in notes for version in each["version"]})
        for each, leaf in zip(notes, [leaf for tree in trees for leaf in tree.segments[1:]], strict=True):
            ratio = np.minimum(np.exp(each["old"] - each["sampled"]), 1.2)[leaf.weighted]
            np.testing.assert_allclose(each["correction"][leaf.weighted], ratio, rtol=1e-6)
        report = stepper.forward_backward(trees)
        assert 0 < report.figures["correction"] <= 1.2 and report.figures["mismatch"] >= 0
        assert not any(event.kind == "warning" for event in source.told(report))
        stepper.optim_step()
    # The first two rollouts are both of the policy that nothing was learned by; then each is four steps behind.
    assert seen == [{0.0}] * 8 + [{4.0}] * 4


def test_groups_that_wait_come_back_from_arrays() -> None:
    """Breaks when an answer, what was said by whom, or a reward is lost while a rollout waits."""
    rng = np.random.default_rng(0)
    groups = [replace(rollouts.random_group(rng, answers=2 + row, row=row), version=3 + row) for row in range(3)]
    unknown = replace(groups[0].answers[0], reward=float("nan"))
    groups[0] = replace(groups[0], answers=(unknown, *groups[0].answers[1:]))
    assert all(np.isfinite(each).all() for each in groups_as_arrays(groups).values())
    for one, other in zip(groups, groups_from_arrays(groups_as_arrays(groups)), strict=True):
        assert np.array_equal(one.prompt, other.prompt) and (one.row, one.version) == (other.row, other.version)
        for mine, theirs in zip(one.answers, other.answers, strict=True):
            for name in ("tokens", "own", "sampled"):
                assert getattr(mine, name).tobytes() == getattr(theirs, name).tobytes()
            assert (mine.ended, mine.trained) == (theirs.ended, theirs.trained)
            assert mine.reward == theirs.reward or (np.isnan(mine.reward) and np.isnan(theirs.reward))
    assert groups_from_arrays(groups_as_arrays([])) == []


@pytest.mark.parametrize("method", [GRPO(), PPO(), Distillation()], ids=["grpo", "ppo", "distillation"])
def test_what_is_corrected_for_is_multiplied_with_the_advantage(method: RolloutLearner) -> None:
    """Breaks when an objective does not look at what a token of a lagging rollout counts for."""
    [tree] = rollouts.random_trees(method, 1, foreign=False)
    sizes = [int(leaf.weighted.sum()) for leaf in tree.segments[1:]]
    grads = []
    for factor in (1.0, 2.0):
        made = noting(tree, "correction", [np.full(size, factor) for size in sizes])
        made = noting(made, "old", [np.full(size, -1.0) for size in sizes])
        more = {"values": torch.zeros(sum(sizes))} if isinstance(method, PPO) else {}
        outputs, forest = rollouts.outputs_of(made, [-1.0] * sum(sizes), **more)
        assert isinstance(method, Objective)
        method.loss(outputs, forest).sum.backward()
        assert outputs.log_probs.grad is not None
        grads.append(outputs.log_probs.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def with_texts(stepper: Stepper) -> RolloutSource:
    """Rollouts with rows to imitate beside them."""
    source, views = rollouts.source_for(stepper, even), forests.views(5, seed=2)
    lengths = forests.lengths(views)
    source.beside = DataSource(views, stepper.objective, lengths=lengths, seed=3, rows=2)
    return source


def test_texts_beside_rollouts_weigh_their_share() -> None:
    """Breaks when how much is imitated depends on how many answers, tokens or texts a step has."""
    mixture = Mixture(said=LanguageModelling(), compared=PPO(), share=3.0)
    assert mixture.learner == PPO() and mixture.needs == {"rollouts"}
    stepper = rollouts.stepper_for(PPO())
    stepper.objective = mixture
    source = with_texts(stepper)
    trees = source.next_step()
    texts = [tree for tree in trees if len(tree.segments) == 1]
    answers = [tree for tree in trees if len(tree.segments) > 1]
    assert len(texts) == 2 and sum(tree.weight for tree in texts) == pytest.approx(
        3 * sum(tree.weight for tree in answers)
    )
    assert texts[0].weight == pytest.approx(texts[1].weight)
    both = stepper.evaluate(trees)
    stepper.objective = PPO()
    alone = stepper.evaluate(answers).loss
    stepper.objective = LanguageModelling()
    imitated = np.mean([stepper.evaluate([tree]).loss for tree in texts])
    assert both.loss == pytest.approx((alone + 3 * imitated) / 4, rel=1e-5)
    assert {"mismatch_most", "value_error", "said_loss"} <= set(both.figures)


def test_texts_beside_rollouts_go_on_where_they_were() -> None:
    """Breaks when a run that goes on imitates the texts of its beginning again."""
    mixture = Mixture(said=LanguageModelling(), compared=PPO(passes=2))
    stepper = rollouts.stepper_for(PPO(passes=2))
    stepper.objective = mixture
    source, other = with_texts(stepper), with_texts(stepper)
    source.next_step()
    other.hold(source.held())
    other.seek(source.cursor)
    for one, two in zip(source.next_step(), other.next_step(), strict=True):
        assert one.row == two.row and one.weight == two.weight
        assert np.array_equal(one.segments[-1].tokens, two.segments[-1].tokens)


def test_the_engine_tells_log_probabilities_at_its_temperature() -> None:
    """Breaks when a policy at another temperature is trained on the log-probabilities of the model itself."""
    from luthier.infer.engine import Engine

    model = forests.language_model("llama")
    prompt = forests.tokens(np.random.default_rng(0), 5)
    plain: Any = {"max_new_tokens": 6, "temperature": 0.5, "seed": 4}
    [itself] = Engine(model).speak([prompt], Sampling(**plain))
    [drawn] = Engine(model).speak([prompt], PolicySampling(**plain))
    assert itself.tokens.tolist() == drawn.tokens.tolist()
    row = torch.from_numpy(np.concatenate([prompt, drawn.tokens]).astype(np.int64))
    with torch.no_grad():
        logits = model.module(row[None]).logits[0, 4:-1]
    for said, heat in ((itself, 1.0), (drawn, 0.5)):
        told = torch.log_softmax(logits / heat, -1).gather(1, row[5:, None])[:, 0]
        assert np.allclose(said.log_probs, told, atol=1e-4)


class Mortal(rollouts.FakeSpeaker):
    """A speaker that may be away."""

    away = False

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """Nothing, while it is away."""
        if self.away:
            raise StorageError("nobody answers")
        return super().speak(prompts, sampling)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_rollout_that_fails_half_way_leaves_the_source_as_it_was(lag: int) -> None:
    """Breaks when prompts of a rollout that came to nothing are used up, or one that was sampled ahead is lost."""
    sources = []
    for _ in range(2):
        stepper = rollouts.stepper_for(GRPO())
        sources.append(rollouts.source_for(stepper, even, plan={"lag": lag}, speaker=Mortal(stepper.model)))
    plain, broken = sources
    for step in range(3):
        assert isinstance(broken.speaker, Mortal)
        before, broken.speaker.away = (broken.cursor, broken.held()), True
        for _ in range(2):
            with pytest.raises(StorageError, match="nobody answers"):
                broken.next_step()
        assert broken.cursor == before[0]
        for name, array in broken.held().items():
            np.testing.assert_array_equal(array, before[1][name], err_msg=f"{name} after step {step}")
        broken.speaker.away = False
        for one, other in zip(plain.next_step(), broken.next_step(), strict=True):
            for mine, theirs in zip(one.segments, other.segments, strict=True):
                np.testing.assert_array_equal(mine.tokens, theirs.tokens)
