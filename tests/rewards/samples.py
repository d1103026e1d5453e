"""Samples for tests of rewards."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

import pytest

from luthier.core.chosen import choose
from luthier.core.errors import LuthierError
from luthier.data.conversation import Message
from luthier.data.sample import Sample
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Limits
from luthier.train.scoring import Sandboxes

QUESTION = (Message("user", "What is asked?"),)


def sample(said: str, /, *, ended: str = "stop", tokens: int | None = None, **facts: Any) -> Sample:
    """An answer to a question, with columns of its row; as many tokens as letters unless told."""
    count = len(said) if tokens is None else tokens
    return Sample(prompt=QUESTION, answer=said, tokens=tuple(range(count)), ended=ended, facts=facts)


TRIES = 4
"""On a machine that other work disturbs, what measures time may have no verdict at first."""


def score(reward: Reward | dict[str, Any] | str, one: Sample, tools: Tools | None = None) -> Score:
    """The score of one sample, which has to have one."""
    [verdict] = asked_again(choose("rewards", Reward, reward), [one], tools or Tools())
    assert isinstance(verdict, Score), verdict
    return verdict


def asked_again(reward: Reward, samples: list[Sample], tools: Tools) -> list[Verdict]:
    """Verdicts, as a run has them: where there was none because of a disturbance all are asked about once more."""
    for left in range(TRIES, 0, -1):
        verdicts = reward.score(samples, tools)
        if left == 1 or not any(isinstance(each, RewardError) and _disturbed(each) for each in verdicts):
            return verdicts
    raise AssertionError("unreachable")


def _disturbed(error: RewardError) -> bool:
    return error.again and any(words in str(error) for words in ("went elsewhere", "times of the reference differ"))


def failure(reward: Reward | dict[str, Any] | str, one: Sample, tools: Tools | None = None) -> RewardError:
    """The error of one sample, which has to fail."""
    [verdict] = choose("rewards", Reward, reward).score([one], tools or Tools())
    assert isinstance(verdict, RewardError), verdict
    assert verdict.sample is one
    return verdict


def sandbox_tools() -> Tools:
    """Tools with a sandbox that serves all tests of a process; where none stands the test is skipped."""
    if isinstance(why := _sandboxes(), str):
        pytest.skip(f"no sandbox stands here: {why}")
    return Tools(sandbox=why)


@cache
def _sandboxes() -> Sandboxes | str:
    made = Sandboxes()
    try:
        made(Limits())
    except LuthierError as failure:
        return str(failure)[:200]
    atexit.register(made.close)
    return made
