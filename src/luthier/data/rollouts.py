"""Rollouts: answers that a model has sampled, with what they were worth; as trees, and as plain arrays to be saved.

Idea: a prompt with G answers is a tree with G leaves, so the prompt is computed once. The sampled ids themselves are
trained, never a text that is made tokens again. What somebody else said within an answer (an environment) is context.
Answers whose reward could not be found out are in no group: they are neither good nor bad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from luthier.data.conversation import Message
from luthier.data.forest import Floats, Ints, Note, Segment, Tree

Ended = Literal["stop", "length"]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: its tokens, the messages they stand for, and the `facts` by which answers are checked. What the
    data row writes as a text is `text` too."""

    tokens: Ints
    messages: tuple[Message, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sampled. `own` (n,) says which `tokens` (n,) the model said, and `sampled` (n,) with what
    log-probability under the policy that drew them. One that was cut off may be left untrained."""

    tokens: Ints
    own: Bool[np.ndarray, " n"]
    sampled: Floats
    reward: float
    ended: Ended = "stop"
    parts: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    trained: bool = True

    @property
    def length(self) -> int:
        """How many tokens the model said."""
        return int(self.own.sum())


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt, all by the same policy: `version` is how many steps it had been trained."""

    prompt: Ints
    answers: tuple[Answer, ...]
    row: int = 0
    version: int = 0

    @property
    def rewards(self) -> NDArray[np.float64]:
        """What the answers were worth."""
        return np.array([answer.reward for answer in self.answers], dtype=np.float64)

    @property
    def alike(self) -> bool:
        """Whether all of them were worth the same, so that there is nothing to learn from comparing them."""
        rewards = self.rewards
        return bool((rewards == rewards[:1]).all())

    @property
    def trained(self) -> list[int]:
        """The places of the answers that are trained, which are the leaves of the tree in this order."""
        return [place for place, answer in enumerate(self.answers) if answer.trained and answer.length]


def grown(group: Group, weight: Callable[[Answer], float]) -> Tree:
    """The tree of a group that has answers to train; each token of an answer that the model said has that weight."""
    leaves = []
    for place in group.trained:
        answer = group.answers[place]
        weights = answer.own.astype(np.float32) * np.float32(weight(answer))
        version = np.full(len(answer.tokens), group.version, dtype=np.float32)
        notes: dict[Note, Floats] = {"sampled": answer.sampled.astype(np.float32), "version": version}
        leaves.append(Segment(answer.tokens, weights, 0, notes=notes))
    return Tree((Segment(group.prompt, np.zeros(len(group.prompt), np.float32)), *leaves), row=group.row)


def leaf_notes(tree: Tree, note: Note) -> list[Floats]:
    """What is noted of the tokens of each leaf that carry weight."""
    return [(leaf.notes or {})[note][leaf.weighted] for leaf in tree.segments[1:]]


def noting(tree: Tree, note: Note, values: Sequence[NDArray[Any]]) -> Tree:
    """The tree with one more note on its leaves: for each of them the numbers of its tokens with weight."""
    leaves = [
        leaf.noting(note, np.asarray(each, dtype=np.float32))
        for leaf, each in zip(tree.segments[1:], values, strict=True)
    ]
    return Tree((tree.segments[0], *leaves), row=tree.row, adapter=tree.adapter)


# -------------------------------------------------------------------------------------------------------- as arrays


def as_arrays(trees: Sequence[Tree]) -> Arrays:
    """Trees of groups as arrays that hold every bit of them."""
    segments = [segment for tree in trees for segment in tree.segments]
    if not segments:
        return {}
    found: Arrays = {
        "trees": np.array([[tree.row, len(tree.segments)] for tree in trees], dtype=np.int64),
        "segments": np.array([[len(each.tokens), each.parent] for each in segments], dtype=np.int64),
        "tokens": np.concatenate([each.tokens for each in segments]).astype(np.int32),
        "weights": np.concatenate([each.weights for each in segments]).astype(np.float32),
    }
    for note in _NOTES:
        if any(note in (each.notes or {}) for each in segments):
            empty = (np.zeros(len(each.tokens), np.float32) for each in segments)
            parts = [(each.notes or {}).get(note, nothing) for each, nothing in zip(segments, empty, strict=True)]
            found[f"note-{note}"] = np.concatenate(parts).astype(np.float32)
    return found


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Tree]:
    """The trees that `as_arrays` was given."""
    trees: list[Tree] = []
    if "trees" not in arrays:
        return trees
    start, number = 0, 0
    for row, count in arrays["trees"].tolist():
        segments = []
        for size, parent in arrays["segments"][number : number + count].tolist():
            own = slice(start, start + size)
            notes: dict[Note, Floats] = {
                note: arrays[f"note-{note}"][own] for note in _NOTES if f"note-{note}" in arrays and parent >= 0
            }
            segments.append(Segment(arrays["tokens"][own], arrays["weights"][own], parent, notes=notes or None))
            start += size
        number += count
        trees.append(Tree(tuple(segments), row=row))
    return trees


def groups_as_arrays(groups: Sequence[Group]) -> Arrays:
    """Groups as arrays that hold all that a learner reads of them; texts and parts of rewards are told by then."""
    answers = [answer for group in groups for answer in group.answers]
    if not answers:
        return {}
    rewards = np.array([each.reward for each in answers], dtype=np.float64)
    return {
        "groups": np.array([[one.row, one.version, len(one.prompt), len(one.answers)] for one in groups], np.int64),
        "prompts": np.concatenate([group.prompt for group in groups]).astype(np.int32),
        "answers": np.array([[len(each.tokens), each.ended == "stop", each.trained] for each in answers], np.int64),
        "said": np.concatenate([each.tokens for each in answers]).astype(np.int32),
        "own": np.concatenate([each.own for each in answers]).astype(np.uint8),
        "sampled": np.concatenate([each.sampled for each in answers]).astype(np.float32),
        # A state has finite numbers only; that nobody has said a worth is a mark of its own.
        "rewards": np.nan_to_num(rewards, nan=0.0),
        "unknown": np.isnan(rewards).astype(np.uint8),
    }


def groups_from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Group]:
    """The groups that `groups_as_arrays` was given."""
    groups: list[Group] = []
    if "groups" not in arrays:
        return groups
    answers, start = [], 0
    rewards = np.where(arrays["unknown"], np.nan, arrays["rewards"])
    for (size, stopped, trained), reward in zip(arrays["answers"].tolist(), rewards.tolist(), strict=True):
        own = slice(start, start + size)
        tokens, by_model = arrays["said"][own], arrays["own"][own].astype(np.bool_)
        ended: Ended = "stop" if stopped else "length"
        answers.append(Answer(tokens, by_model, arrays["sampled"][own], reward, ended, trained=bool(trained)))
        start += size
    start = first = 0
    for row, version, size, count in arrays["groups"].tolist():
        prompt = arrays["prompts"][start : start + size]
        groups.append(Group(prompt, tuple(answers[first : first + count]), row, version))
        start, first = start + size, first + count
    return groups


_NOTES: tuple[Note, ...] = get_args(Note)
