"""Exchanges with an environment: what it says is context, what the model says is trained, and nothing is made anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.rollouts import Prompt
from luthier.data.sample import Sample
from luthier.model.speaker import PolicySampling, Sampling, Spoken
from luthier.objectives.grpo import GRPO
from luthier.rewards import Episode, RewardError, Score, Turn
from luthier.train.episodes import Episodes, settled
from luthier.train.scoring import Scored
from tests import rollouts

STOP = 9


def ids(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Ints:
    """A template: a number for who speaks, the words as numbers, a stop; 5 asks for an answer."""
    said: list[int] = []
    for each in messages:
        words = [int(word) for word in each.content.split() if word != "x"]
        said += [{"user": 1, "assistant": 5}[each.role], *words, STOP]
    return np.array([*said, 5], np.int32)


class Higher:
    """Says whether a guess is too low, until it is right."""

    def reset(self, prompt: tuple[Message, ...], facts: Mapping[str, Any], *, seed: int) -> HigherEpisode:
        return HigherEpisode(int(facts["number"]))


class HigherEpisode:
    tools = ()

    def __init__(self, number: int) -> None:
        self.number = number
        self.messages = (Message("user", "30"),)
        self.heard: list[str] = []

    def step(self, answer: Message) -> Turn:
        self.heard.append(answer.content)
        if int(answer.content.split()[0]) == self.number:
            return Turn(done=True, score=Score(1.0 / len(self.heard)))
        return Turn(messages=(Message("user", "31 32"),))


class Counter:
    """Guesses 20, 21, 22, one more each time it is asked."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        self.seen += [prompt.tolist() for prompt in prompts]
        guesses = [20 + int((prompt == 32).sum()) for prompt in prompts]
        return [
            Spoken(np.array([guess, STOP], np.int32), [-0.5, -0.25], "stop") if guess < 25 else
            Spoken(np.array([guess], np.int32), [-0.5], "length")
            for guess in guesses
        ]  # fmt: skip


def text(tokens: Ints) -> str:
    return " ".join(str(token) for token in tokens.tolist() if token != STOP)


def test_an_exchange_is_one_answer_with_replies_as_context() -> None:
    """Breaks when a reply is trained, tokens are made anew from text, or an episode goes on without the others."""
    speaker = Counter()
    prompts = [Prompt(np.zeros(1, np.int32), facts={"number": number}, row=number) for number in (20, 22, 99)]
    played = Episodes(Higher(), ids, text, turns=9).play(
        prompts, speaker, PolicySampling(seed=3, stop_ids=(STOP,)), seeds=[0, 0, 0]
    )
    first, third, lost = (each.answer for each in played)
    assert [each.verdict.value for each in played if isinstance(each.verdict, Score)] == [1.0, 1 / 3]
    left = played[2][2]
    # Cut off: its last answer is to be scored, after all that was said before it.
    assert isinstance(left, Sample) and left.answer == "25" and len(left.prompt) == 11 and left.ended == "length"
    assert first.tokens.tolist() == [20, STOP] and first.own.all() and first.ended == "stop"
    reply = [1, 31, 32, STOP, 5]
    assert third.tokens.tolist() == [20, STOP, *reply, 21, STOP, *reply, 22, STOP]
    assert third.tokens[third.own].tolist() == [20, STOP, 21, STOP, 22, STOP]
    assert third.sampled[third.own].tolist() == [-0.5, -0.25] * 3 and not third.sampled[~third.own].any()
    assert lost.ended == "length" and lost.own[-1]
    assert played[0][0].tokens.tolist() == [1, 30, STOP, 5] and speaker.seen[0] == [1, 30, STOP, 5]
    # What the model goes on with is what it was shown, with the very ids it said.
    assert speaker.seen[3] == [1, 30, STOP, 5, 20, STOP, *reply]


def test_an_exchange_ends_after_so_many_turns() -> None:
    """Breaks when two who do not come to an end go on for ever, or a reply that nobody answers is kept."""
    prompt = Prompt(np.zeros(1, np.int32), facts={"number": 99})
    [(_, answer, score, _)] = Episodes(Higher(), ids, text, turns=2).play(
        [prompt], Counter(), PolicySampling(stop_ids=(STOP,)), seeds=[0]
    )
    assert isinstance(score, Sample) and answer.length == 4 and answer.own[-1] and answer.ended == "length"


def test_exchanges_are_trained_as_groups() -> None:
    """Breaks when a source forgets who said what: each answer weighs by the tokens of the model alone."""
    stepper = rollouts.stepper_for(GRPO(preset="grpo", beta=0.0))
    prompts = [Prompt(np.zeros(1, np.int32), facts={"number": number}, row=number) for number in (20, 99)]
    source = rollouts.source_for(
        stepper, lambda sample: 0.25, prompts=prompts, plan={"answers": 2, "stop_ids": (STOP,)}, speaker=Counter()
    )
    source.roller.episodes = Episodes(Higher(), ids, text, turns=2)
    trees = {tree.row: tree for tree in source.next_step()}
    assert [leaf.weights.tolist() for leaf in trees[20].segments[1:]] == [[0.5, 0.5]] * 2
    assert trees[99].segments[1].weights.tolist() == [0.25, 0.25, 0, 0, 0, 0, 0, 0.25, 0.25]
    assert trees[20].segments[0].tokens.tolist() == [1, 30, STOP, 5]
    report = stepper.forward_backward(list(trees.values()))
    assert source.report is not None and source.report.values()["reward"] == 0.625 and report.trained_tokens == 12


class Moody:
    """An environment that fails so often in `reset` and in its second `step`, with an error or with a score that is no
    number; `other` makes an episode that is begun again say something else."""

    def __init__(self, *, resets: int = 0, steps: int = 0, nan: bool = False, other: bool = False) -> None:
        self.resets, self.steps, self.nan, self.other = resets, steps, nan, other
        self.begun = 0

    def reset(self, prompt: tuple[Message, ...], facts: Mapping[str, Any], *, seed: int) -> Episode:
        # The first of a group is the one that has trouble.
        self.begun += 1
        if facts.get("fine") is None and self.resets:
            self.resets -= 1
            raise RewardError("no room for an episode")
        return MoodyEpisode(self, fine=facts.get("fine") is not None, heard=[])


@dataclass
class MoodyEpisode:
    mood: Moody
    fine: bool
    heard: list[str]
    tools = ()
    messages = (Message("user", "30"),)

    def step(self, answer: Message) -> Turn:
        self.heard.append(answer.content)
        if len(self.heard) == 1:
            other = self.mood.other and not self.fine and self.mood.begun > 2
            return Turn(messages=(Message("user", "33" if other else "31 32"),))
        assert self.heard == ["20", "21"], "nobody is told anything twice"
        if not self.fine and self.mood.steps:
            self.mood.steps -= 1
            if self.mood.nan:
                return Turn(done=True, score=Score(1.0, {"part": float("nan")}))
            raise RewardError("the judge is away")
        return Turn(done=True, score=Score(0.5))


@pytest.mark.parametrize(("mood", "score", "retried", "failed"), [
    (Moody(resets=2), 0.5, 2, ""),
    (Moody(resets=3), None, 2, "no room for an episode"),
    (Moody(steps=2), 0.5, 2, ""),
    (Moody(steps=3), None, 2, "the judge is away"),
    (Moody(steps=2, nan=True), 0.5, 2, ""),
    (Moody(steps=3, nan=True), None, 2, "the reward is 1.0 of {'part': nan}"),
    (Moody(steps=1, other=True), None, 1, "went another way"),
])  # fmt: skip
def test_an_environment_that_fails_is_asked_again_then_left_out_and_counted(
    mood: Moody, score: float | None, retried: int, failed: str
) -> None:
    """Breaks when an exchange whose environment failed is worth 0, ends the run, or is scored with a NaN; or when an
    episode that has failed half-way is gone on with."""
    prompts = [Prompt(np.full(3, 7, np.int32), facts=facts) for facts in ({}, {"fine": 1})]
    played = Episodes(mood, ids, text, turns=9).play(
        prompts, Counter(), PolicySampling(stop_ids=(STOP,)), seeds=[0, 0]
    )
    never: Callable[[Sequence[Sample]], Scored] = lambda samples: Scored(())  # noqa: E731
    scored = settled([each.verdict for each in played], never, retried=sum(each.retried for each in played))
    assert scored.scores == (None if score is None else Score(score), Score(0.5))
    assert scored.retried == retried and scored.counts["failed"] == bool(failed) and failed in scored.told
    assert played[1].answer.length == 4 and played[1].answer.ended == "stop"
    assert played[0].answer.length == (0 if failed.startswith("no room") else 4)


def test_a_group_whose_first_exchange_never_began_has_the_others() -> None:
    """Breaks when answers are trained behind a prompt that they were never given."""
    stepper = rollouts.stepper_for(GRPO(preset="grpo", beta=0.0))
    mood = Moody(resets=3)
    source = rollouts.source_for(
        stepper, lambda sample: 0.25, prompts=[Prompt(np.full(3, 7, np.int32))],
        plan={"prompts": 1, "answers": 3, "stop_ids": (STOP,)}, speaker=Counter(),
    )  # fmt: skip
    source.roller.episodes = Episodes(mood, ids, text)
    [tree] = source.next_step()
    assert tree.segments[0].tokens.tolist() == [1, 30, STOP, 5] and len(tree.segments) == 3
    assert source.report is not None
    told = source.report.values()
    assert (told["failed"], told["retried"], told["answers"], told["reward"]) == (1, 2, 3, 0.5)


def test_an_exchange_ends_where_the_context_does() -> None:
    """Breaks when a reply that nobody can answer any more ends the run, or is trained on."""
    prompt = Prompt(np.zeros(1, np.int32), facts={"number": 99})
    whole = Episodes(Higher(), ids, text, turns=4)
    [long] = whole.play([prompt], Counter(), PolicySampling(stop_ids=(STOP,)), seeds=[0])
    assert long.answer.length == 8
    # Four tokens of the prompt, two of an answer, five of a reply, two of an answer; five more would be 18.
    for context, said in ((18, 4), (19, 6)):
        [cut] = replace(whole, context=context).play([prompt], Counter(), PolicySampling(stop_ids=(STOP,)), seeds=[0])
        assert cut.answer.length == said and cut.answer.ended == "length" and isinstance(cut.verdict, Sample)
        assert cut.answer.tokens.tolist() == long.answer.tokens[: len(cut.answer.tokens)].tolist()
