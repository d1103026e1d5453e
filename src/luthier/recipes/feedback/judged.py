"""What a judge is asked about and what it has decided, as rows of files: pairs, verdicts, preferences.

| file | holds |
|---|---|
| `answers.jsonl` | for each pair its prompt and both answers, as they were sampled |
| `verdicts.jsonl` | of each pair what the judge said in both orders, or why it said nothing |
| `preferences.jsonl` | data to train on, which a person may read, change and use again; made once, then left alone |
| `feedback.json` | how many of each there were, and how much the place of an answer weighs with the judge |

Answers and verdicts are made in groups of fixed rows, each durable before the next begins. What was killed goes on with
the group it was in, and comes to the same rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from luthier.core.errors import DataError
from luthier.core.events import Event, Recorder
from luthier.core.units import percent_text
from luthier.data import conversation
from luthier.data.conversation import Message
from luthier.data.intake import Intake, Kept
from luthier.data.prepare import Reading, sources_of
from luthier.rewards import RewardError
from luthier.rewards.judge import Comparison
from luthier.store.files import write_json, write_text
from luthier.store.lines import JsonLines

ANSWERS: Final = "answers.jsonl"
VERDICTS: Final = "verdicts.jsonl"
PREFERENCES: Final = "preferences.jsonl"
FIGURES: Final = "feedback.json"
_MUCH: Final = 0.3
"""A share of pairs from which on it is said that they were lost."""

_MOST_LISTED: Final = 20
"""Prompts that are listed where many are too long."""

Row = dict[str, Any]
Make = Callable[[int, int], Sequence[Mapping[str, Any]]]


@final
class Teller:
    """Says in words how far it is."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(self, *sentences: str) -> None:
        for sentence in sentences:
            self._recorder.record(Event("feedback", {"message": sentence}))

    def counter(self, what: str, total: int) -> Callable[[int], None]:
        """Says how many of `total` pairs are done."""
        return lambda done: self(f"{what} {done:,} of {total:,} pairs")


def prompts_of(paths: str | Sequence[str], reading: Reading) -> list[conversation.Row]:
    """The rows of the data, each a prompt. Raises DataError for rows that are none, unless they are to be skipped."""
    rows = []
    for item in Intake(sources_of(paths, reading), None):
        if isinstance(item, Kept):
            rows.append(item.row)
        elif reading.on_bad_row == "raise":
            raise item.errors[0]
    if not rows:
        raise DataError(f"there are no prompts in {paths}", allowed="rows with a prompt")
    return rows


def with_room(
    rows: Sequence[conversation.Row], tokens: Callable[[conversation.Row], int], room: int | None, *, drop: bool
) -> list[conversation.Row]:
    """The rows whose prompts, so many `tokens` each, leave room for an answer in a context of `room` tokens.

    Raises DataError for others, unless they are to be dropped, and where none is left.
    """
    if room is None:
        return list(rows)
    sized = [(row, tokens(row)) for row in rows]
    kept, long = [row for row, size in sized if size < room], [each for each in sized if each[1] >= room]
    if not long or (drop and kept):
        return kept
    listed = [f"{row.where}: {size:,} tokens" for row, size in long[:_MOST_LISTED]]
    listed += [f"and {len(long) - len(listed):,} more"] if len(long) > len(listed) else []
    told = f"{len(long):,} of {len(rows):,} prompts leave no room for an answer"
    raise DataError(
        "\n  ".join([told, *listed]),
        allowed=f"fewer than {room:,} tokens each: what the model that answers sees at once",
        do="take them out" if drop else "take them out, or set data.over_length to drop",
    )


def rows_of(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file."""
    return list(JsonLines(path).read())


def is_whole(path: Path, total: int) -> bool:
    """Whether a file has all of its rows."""
    return len(rows_of(path)) >= total


def in_groups(path: Path, total: int, at_once: int, make: Make, told: Callable[[int], None]) -> list[Row]:
    """All rows of a file: those that are there, and the others made group by group by `make(first, last)`."""
    lines = JsonLines(path)
    rows = list(lines.read())[:total]
    if len(rows) < total:
        rows = rows[: len(rows) - len(rows) % at_once]
    content = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines.truncate(sum(map(len, content[: len(rows)])))
    try:
        while len(rows) < total:
            group = [dict(row) for row in make(len(rows), min(len(rows) + at_once, total))]
            for row in group:
                lines.append(row)
            lines.sync()
            rows += group
            told(len(rows))
    finally:
        lines.close()
    return rows


def as_row(messages: Sequence[Message]) -> str | list[dict[str, str]]:
    """A prompt as data files have it."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return [{"role": message.role, "content": message.content} for message in messages]


def as_messages(prompt: str | Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    """The messages of a prompt in a data file."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    return tuple(Message(each["role"], each["content"]) for each in prompt)  # type: ignore[arg-type]


def verdict_row(found: Comparison | RewardError) -> Row:
    """What a judge said of a pair."""
    if isinstance(found, RewardError):
        return {"failed": found.received, "allowed": found.allowed, "do": found.do}
    return {
        "probability": found.preference, "shown_first": found.shown_first, "shown_second": found.shown_second,
        "mass": found.mass, "rationale": found.rationales[0], "rationale_swapped": found.rationales[1],
    }  # fmt: skip


@dataclass(frozen=True)
class Feedback:
    """Answers with the verdicts on them. `tie` is how near to one half a probability decides nothing."""

    answers: Sequence[Row]
    verdicts: Sequence[Row]
    tie: float

    def write(self, folder: Path) -> Row:
        """Write preferences and figures, where they are not there yet; the figures."""
        figures = self.figures()
        if not (folder / PREFERENCES).exists():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.preferences())
            write_text(folder / PREFERENCES, text)
        write_json(folder / FIGURES, figures)
        return figures

    def preferences(self) -> list[Row]:
        """The rows to train on: the better answer, the worse one, and how sure that is."""
        return [_preference(answer, verdict) for answer, verdict in self._pairs() if self._decided(answer, verdict)]

    def figures(self) -> Row:
        """How many pairs became what, how far places were preferred, and how sure the judge was."""
        judged = [verdict for answer, verdict in self._pairs() if not alike(answer) and "probability" in verdict]
        decided = [verdict for answer, verdict in self._pairs() if self._decided(answer, verdict)]
        failures = Counter(verdict["failed"] for verdict in self.verdicts if "failed" in verdict)
        # Runs that were begun by an earlier version have no advice in their files.
        advice = Counter(verdict["do"] for verdict in self.verdicts if verdict.get("do"))
        biases = [(one["shown_first"] - one["shown_second"]) / 2 for one in judged]
        by_place = [one for one in judged if (one["shown_first"] - 0.5) * (one["shown_second"] - 0.5) < 0]
        return {
            "pairs": len(self.answers),
            "preferences": len(decided),
            "same_answer": sum(alike(answer) for answer in self.answers),
            "ties": len(judged) - len(decided),
            "failed": sum(failures.values()),
            "failures": dict(failures.most_common(5)),
            "advice": next((do for do, _ in advice.most_common(1)), ""),
            "cut_off": sum(ended == "length" for answer in self.answers for ended in answer["ended"]),
            "position_bias": _mean(biases),
            "decided_by_place": len(by_place) / len(judged) if judged else 0.0,
            "certainty": _mean([abs(one["probability"] - 0.5) + 0.5 for one in decided]),
            "mass": _mean([one["mass"] for one in judged]),
        }

    def _pairs(self) -> list[tuple[Row, Row]]:
        return list(zip(self.answers, self.verdicts, strict=True))

    def _decided(self, answer: Row, verdict: Row) -> bool:
        return not alike(answer) and "probability" in verdict and abs(verdict["probability"] - 0.5) > self.tie


def alike(answer: Row) -> bool:
    """Whether a pair is no pair: both answers are one, or one of them says nothing."""
    one, two = (said.strip() for said in answer["answers"])
    return one == two or not one or not two


def _preference(answer: Row, verdict: Row) -> Row:
    first = verdict["probability"] > 0.5
    chosen, rejected = answer["answers"] if first else answer["answers"][::-1]
    told = {"shown_first": verdict["shown_first"], "shown_second": verdict["shown_second"]}
    if not first:
        # Seen from the chosen answer, as all of the row is.
        told = {"shown_first": 1 - verdict["shown_second"], "shown_second": 1 - verdict["shown_first"]}
    rationales = {"rationale": verdict["rationale"], "rationale_swapped": verdict["rationale_swapped"]}
    sure = max(verdict["probability"], 1 - verdict["probability"])
    return {"prompt": answer["prompt"], "chosen": chosen, "rejected": rejected, "probability": sure, **told,
            **{name: text for name, text in rationales.items() if text}, "row": answer["row"]}  # fmt: skip


def lessons(figures: Mapping[str, Any]) -> list[str]:
    """What figures say in plain words, where something is lost."""
    pairs, said = max(1, figures["pairs"]), []
    if figures["same_answer"] / pairs > _MUCH:
        said.append(
            f"{percent_text(figures['same_answer'] / pairs)} of pairs had one and the same answer twice, or none: "
            "raise answers.temperature"
        )
    if figures["failed"]:
        most = "; ".join(f"{count} x {reason}" for reason, count in figures["failures"].items())
        said.append(
            f"the judge gave no verdict on {figures['failed']:,} of {pairs:,} pairs: {most}; "
            + (figures["advice"] or "take a model that was tuned to judge, or see what verdict asks of it")
        )
    if figures["decided_by_place"] > _MUCH:
        said.append(
            f"in {percent_text(figures['decided_by_place'])} of the pairs the place has decided and not the answer: "
            "take a judge that knows the task, or say more in verdict.preamble and verdict.criteria"
        )
    if figures["ties"] / pairs > _MUCH:
        said.append(f"{percent_text(figures['ties'] / pairs)} of pairs were ties to the judge, and are not trained on")
    return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
