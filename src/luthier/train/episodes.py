"""Episodes: answers that are part of a longer exchange, with an environment that replies to what the model says.

Idea: all tokens of an exchange are one answer. What the model said is trained, what the environment said in between is
context; neither is made tokens again. The tokens of a reply are what a chat template writes between the end of one turn
of the assistant and the beginning of the next, and they follow the very ids that were sampled. An exchange ends when
the environment says so, when an answer is cut off, when the context is full, or after so many turns.
An environment that raises a RewardError, or gives a score that is no number, has not said that an exchange was bad: a
new one is begun with the same seed, told the same things, and asked once more. One that fails again, or goes another
way than before, leaves its exchange without a score.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import numpy as np

from luthier.core.errors import DataError
from luthier.data.conversation import Message
from luthier.data.forest import Ints
from luthier.data.rollouts import Answer, Ended, Prompt
from luthier.data.sample import Sample
from luthier.model.speaker import Sampling, Speaker
from luthier.rewards import Environment, Episode, RewardError, Score, Turn, Verdict
from luthier.train.scoring import Scored

Tools = Sequence[Mapping[str, Any]]
PromptIds = Callable[[Sequence[Message], Tools], Ints]
"""What inference feeds to get the answer that follows messages, with these tools on offer."""


class Played(NamedTuple):
    """An exchange: its prompt as it began, all that was said as one answer, what it was worth or is to be scored by,
    and how often an environment was asked again. One that never began has no tokens."""

    prompt: Prompt
    answer: Answer
    verdict: Sample | Verdict
    retried: int = 0


@dataclass
class _Play:
    """One exchange on its way."""

    asked: Prompt
    """Its tokens are those of what the episode begins with, once there is one."""
    seed: int
    episode: Episode | None = None
    turns: list[tuple[Message, tuple[Message, ...]]] = field(default_factory=list)
    """What was said so far, each with the reply to it."""
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    ended: Ended = "length"
    last: tuple[tuple[Message, ...], str] = ((), "")
    """The messages before the last answer, and that answer."""
    verdict: Verdict = None
    over: bool = False
    retried: int = 0

    @property
    def history(self) -> list[Message]:
        """All messages so far."""
        begun = [] if self.episode is None else list(self.episode.messages)
        return begun + [each for said, reply in self.turns for each in (said, *reply)]

    @property
    def tools(self) -> Tools:
        """What is on offer in it."""
        return () if self.episode is None else self.episode.tools

    def add(self, tokens: Sequence[int], sampled: Sequence[float] | None) -> None:
        """Tokens of the model, with their log-probabilities, or of the environment."""
        self.tokens += tokens
        self.own += [sampled is not None] * len(tokens)
        self.sampled += sampled if sampled is not None else [0.0] * len(tokens)

    @property
    def seen(self) -> Ints:
        """What the model is to go on with."""
        return np.concatenate([self.asked.tokens, np.array(self.tokens, np.int32)])


def as_said(text: str) -> Message:
    """What a model has said, as a message without calls of tools."""
    return Message("assistant", text)


@final
@dataclass(frozen=True)
class Episodes:
    """Plays episodes of an environment, `turns` answers at most in each; `heard` makes a message of what was said.

    An exchange of `context` tokens has no room for more. What fails is asked again `retries` times. An environment is
    asked by one thread at a time, the one with the `lock`.
    """

    environment: Environment
    prompt_ids: PromptIds
    decode: Callable[[Ints], str]
    turns: int = 8
    heard: Callable[[str], Message] = as_said
    context: int | None = None
    retries: int = 2
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)  # type: ignore[valid-type]

    def play(
        self, prompts: Sequence[Prompt], speaker: Speaker, sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Played]:
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
            Played(_asked(play), self._answer(play), play.verdict or _sample(play), play.retried) for play in plays
        ]

    def _begun(self, prompt: Prompt, seed: int) -> _Play:
        play = _Play(prompt, seed)
        for attempt in range(1 + self.retries):
            play.retried += bool(attempt)
            try:
                play.episode = self._reset(play)
            except RewardError as failure:
                play.over, play.verdict = True, failure
                if failure.again:
                    continue
                break
            play.asked = replace(prompt, tokens=self.prompt_ids(play.episode.messages, play.episode.tools))
            # One without room for a word is refused by whoever speaks, as other prompts are.
            play.over, play.verdict = False, None
            break
        return play

    def _reset(self, play: _Play) -> Episode:
        with self.lock:
            return self.environment.reset(play.asked.messages, play.asked.facts, seed=play.seed)

    def _reply(self, play: _Play, tokens: Ints, *, cut: bool) -> None:
        text = self.decode(tokens)
        said = self.heard(text)
        play.last = tuple(play.history), text
        if cut or play.episode is None:
            # Whoever is interrupted gets no reply, and the environment may not know how the sentence would have ended.
            play.over = True
            return
        try:
            turn = self._stepped(play, play.episode, said)
        except RewardError as failure:
            play.over, play.verdict = True, failure
            return
        play.verdict = turn.score
        if turn.done:
            play.over, play.ended = True, "stop"
            return
        reply = self._between(play, int(tokens[-1]), turn.messages)
        if self.context is not None and len(play.seen) + len(reply) >= self.context:
            # Nobody can answer that any more: cut off, as an answer is that runs out of room.
            play.over = True
            return
        play.add([int(token) for token in reply], None)
        play.turns.append((said, turn.messages))

    def _stepped(self, play: _Play, episode: Episode, said: Message) -> Turn:
        """What the environment says to that. Raises RewardError where it cannot, however often it is asked."""
        for attempt in range(1 + self.retries):
            try:
                if attempt:
                    play.retried += 1
                    # What has failed may be anything now.
                    episode = self._begun_again(play)
                with self.lock:
                    turn = _sure(episode.step(said))
            except RewardError as failure:
                if not failure.again or attempt == self.retries:
                    raise
                continue
            play.episode = episode
            return turn
        raise RewardError(f"an environment was asked {self.retries} times again")

    def _begun_again(self, play: _Play) -> Episode:
        """The exchange as it was, with a new episode. Raises RewardError for one that goes another way."""
        episode = self._reset(play)
        with self.lock:
            replies = [(said, episode.step(said).messages) for said, _ in play.turns]
        if replies != play.turns or (play.episode is not None and episode.messages != play.episode.messages):
            error = RewardError(
                "an environment that had failed went another way when it was begun again",
                allowed="the same one for the same seed",
            )
            raise error.of(_sample(play), again=False)
        return episode

    def _between(self, play: _Play, stop: int, reply: Sequence[Message]) -> Ints:
        """What stands between the stop token of an answer and the next answer: the reply, as the template writes it."""
        history, tools = play.history, play.tools
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
        last = int(np.flatnonzero(own)[-1]) + 1 if own.any() else 0
        tokens = np.array(play.tokens[:last], dtype=np.int32)
        told = np.array(play.sampled[:last], dtype=np.float32)
        return Answer(tokens, own[:last], told, reward=float("nan"), ended=play.ended, text=self.decode(tokens))


def settled(
    verdicts: Sequence[Sample | Verdict], score: Callable[[Sequence[Sample]], Scored], *, retried: int = 0
) -> Scored:
    """The scores of episodes: those that are known, and those of samples that are to be scored."""
    pending = {place: sample for place, sample in enumerate(verdicts) if isinstance(sample, Sample)}
    later = score(list(pending.values()))
    scores: dict[int, Score | None] = dict(zip(pending, later.scores, strict=True))
    scores |= {place: known for place, known in enumerate(verdicts) if isinstance(known, Score)}
    failures = [verdict for verdict in verdicts if isinstance(verdict, RewardError)]
    every = tuple(scores.get(place) for place in range(len(verdicts)))
    return Scored(every, (*failures, *later.failures), later.unasked, retried + later.retried)


def _sure(turn: Turn) -> Turn:
    """A turn whose score, if it has one, is a number. Raises RewardError."""
    if isinstance(turn.score, RewardError):
        raise turn.score
    if isinstance(turn.score, Score) and not turn.score.finite:
        raise RewardError(f"the reward is {turn.score.value} of {dict(turn.score.parts)}", allowed="finite")
    return turn


def _asked(play: _Play) -> Prompt:
    """The prompt as the episode has it."""
    return play.asked if play.episode is None else replace(play.asked, messages=tuple(play.episode.messages))


def _sample(play: _Play) -> Sample:
    """The last answer, as a reward sees it."""
    before, said = play.last
    return Sample(
        prompt=before, answer=said, tokens=tuple(play.tokens), ended=play.ended, facts=play.asked.facts
    )  # fmt: skip
