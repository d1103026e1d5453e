"""Episodes: answers that are part of a longer exchange, with an environment that replies to what the model says.

Idea: all tokens of an exchange are one answer. What the model said is trained, what the environment said in between is
context; neither is made tokens again. The tokens of a reply are what a chat template writes between the end of one turn
of the assistant and the beginning of the next, and they follow the very ids that were sampled. An exchange ends when
the environment says so, when an answer is cut off, or after so many turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np

from luthier.core.errors import DataError
from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.rollouts import Answer, Ended, Prompt
from luthier.data.sample import Sample
from luthier.model.speaker import Sampling, Speaker
from luthier.rewards import Environment, Episode, RewardError, Score, Verdict
from luthier.train.scoring import Scored

Tools = Sequence[Mapping[str, Any]]
PromptIds = Callable[[Sequence[Message], Tools], Ints]
"""What inference feeds to get the answer that follows messages, with these tools on offer."""


@dataclass
class _Play:
    """One exchange on its way."""

    episode: Episode
    history: list[Message]
    prompt: Ints
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    ended: Ended = "length"
    last: tuple[tuple[Message, ...], str] = ((), "")
    """The messages before the last answer, and that answer."""
    verdict: Verdict = None
    over: bool = False

    def add(self, tokens: Sequence[int], sampled: Sequence[float] | None) -> None:
        """Tokens of the model, with their log-probabilities, or of the environment."""
        self.tokens += tokens
        self.own += [sampled is not None] * len(tokens)
        self.sampled += sampled if sampled is not None else [0.0] * len(tokens)

    @property
    def seen(self) -> Ints:
        """What the model is to go on with."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int32)])


def as_said(text: str) -> Message:
    """What a model has said, as a message without calls of tools."""
    return Message("assistant", text)


@final
@dataclass(frozen=True)
class Episodes:
    """Plays episodes of an environment, `turns` answers at most in each; `heard` makes a message of what was said."""

    environment: Environment
    prompt_ids: PromptIds
    decode: Callable[[Ints], str]
    turns: int = 8
    heard: Callable[[str], Message] = as_said

    def play(
        self, prompts: Sequence[Prompt], speaker: Speaker, sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[tuple[Prompt, Answer, Sample | Verdict]]:
        """An exchange for each prompt; those of one seed begin alike. What is asked is what the episode begins with.

        Where the environment gives no score the last answer is to be scored, after all that was said before it.
        """
        plays = [self._begun(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for turn in range(self.turns):
            going = [play for play in plays if not play.over]
            if not going:
                break
            # Another seed for each turn: the numbers of the last one are used up.
            own = replace(sampling, seed=sampling.seed + turn)
            for play, spoken in zip(going, speaker.speak([play.seen for play in going], own), strict=True):
                play.add([int(token) for token in spoken.tokens], spoken.log_probs)
                self._reply(play, spoken.tokens, cut=spoken.ended == "length")
        return [
            (_asked(prompt, play), self._answer(play), play.verdict or _sample(prompt, play))
            for prompt, play in zip(prompts, plays, strict=True)
        ]

    def _begun(self, prompt: Prompt, seed: int) -> _Play:
        episode = self.environment.reset(prompt.messages, prompt.facts, seed=seed)
        return _Play(episode, list(episode.messages), self.prompt_ids(episode.messages, episode.tools))

    def _reply(self, play: _Play, tokens: Ints, *, cut: bool) -> None:
        text = self.decode(tokens)
        said = self.heard(text)
        play.last = tuple(play.history), text
        if cut:
            # Whoever is interrupted gets no reply, and the environment may not know how the sentence would have ended.
            play.over = True
            return
        turn = play.episode.step(said)
        play.verdict = turn.score
        if turn.done:
            play.over, play.ended = True, "stop"
            return
        play.add([int(token) for token in self._between(play, int(tokens[-1]), turn.messages)], None)
        play.history += [said, *turn.messages]

    def _between(self, play: _Play, stop: int, reply: Sequence[Message]) -> Ints:
        """What stands between the stop token of an answer and the next answer: the reply, as the template writes it."""
        history, tools = play.history, play.episode.tools
        before = self.prompt_ids(history, tools)
        whole = self.prompt_ids([*history, Message("assistant", "x"), *reply], tools)
        rest = whole[len(before) :]
        ends = np.flatnonzero(rest == stop)
        if not np.array_equal(whole[: len(before)], before) or not len(ends):
            raise DataError(
                f"the chat template does not end an answer with token {stop}, or writes earlier turns otherwise later",
                allowed="a template that only ever appends, for an exchange of several turns",
            )
        return rest[int(ends[0]) + 1 :]

    def _answer(self, play: _Play) -> Answer:
        own = np.array(play.own, dtype=np.bool_)
        # What ends with a reply that nobody answers is not learned from beyond the last own token.
        last = int(np.flatnonzero(own)[-1]) + 1
        tokens = np.array(play.tokens[:last], dtype=np.int32)
        told = np.array(play.sampled[:last], dtype=np.float32)
        return Answer(tokens, own[:last], told, reward=float("nan"), ended=play.ended, text=self.decode(tokens))


def settled(verdicts: Sequence[Sample | Verdict], score: Callable[[Sequence[Sample]], Scored]) -> Scored:
    """The scores of episodes: those that are known, and those of samples that are to be scored."""
    pending = {place: sample for place, sample in enumerate(verdicts) if isinstance(sample, Sample)}
    later = score(list(pending.values()))
    scores: dict[int, Score | None] = dict(zip(pending, later.scores, strict=True))
    scores |= {place: known for place, known in enumerate(verdicts) if isinstance(known, Score)}
    failures = [verdict for verdict in verdicts if isinstance(verdict, RewardError)]
    every = tuple(scores.get(place) for place in range(len(verdicts)))
    return Scored(every, (*failures, *later.failures), later.unasked, later.retried)


def _asked(prompt: Prompt, play: _Play) -> Prompt:
    """The prompt as the episode has it."""
    return replace(prompt, tokens=play.prompt, messages=tuple(play.episode.messages))


def _sample(prompt: Prompt, play: _Play) -> Sample:
    """The last answer, as a reward sees it."""
    before, said = play.last
    return Sample(
        prompt=before, answer=said, tokens=tuple(play.tokens), ended=play.ended, facts=prompt.facts
    )
