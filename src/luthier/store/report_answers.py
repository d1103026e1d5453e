"""Answers side by side: what base and tuned model said to the same prompt, and which words differ.

Idea: words are compared, not characters, so that a mark is something a reader can name; spaces are not compared. Base
and tuned answer are marked against the reference, the reference against the tuned answer.

Use when: a report shows `samples.jsonl`. Source: the longest-matching-blocks comparison of Python's difflib.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Final

from luthier.store.report_files import step_of, text_of

LONGEST_TEXT: Final = 6000
_MOST_WORDS: Final = 800
"""Comparing word by word takes quadratic time; longer answers are shown without marks."""
_LONGEST_LINE: Final = 240
_ALIKE: Final = 0.4
"""Below this share of common words, marks would cover everything and say nothing."""
_WORD: Final = re.compile(r"\d+(?:[.,]\d+)*|[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


def compare_answers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt the base's answer, the last tuned one and the reference, and how the tuned answer came about."""
    prompts: dict[str, dict[str, Any]] = {}
    for line in lines:
        entry = prompts.setdefault(text_of(line.get("index")), {"tuned": {}})
        for key in ("prompt", "reference", "base"):
            if line.get(key) not in (None, ""):
                entry[key] = text_of(line[key])
        if step_of(line) > 0 and line.get("tuned") is not None:
            entry["tuned"][step_of(line)] = text_of(line["tuned"])
    samples = [_sample(entry) for entry in prompts.values()]
    # Short answers are compared line above line, long ones in columns; one page does not mix the two.
    columns = any(sample["longest"] > _LONGEST_LINE for sample in samples)
    return [{**sample, "columns": columns} for sample in samples]


def _sample(entry: Mapping[str, Any]) -> dict[str, Any]:
    reference, base = entry.get("reference"), entry.get("base")
    tuned: dict[int, str] = entry["tuned"]
    steps = sorted(tuned)
    last = tuned[steps[-1]] if steps else None
    answers = []
    if base is not None:
        answers.append(_answer("base", base, reference))
    if last is not None:
        answers.append(_answer("tuned", last, base if reference is None else reference))
    if reference is not None:
        answers.append(_answer("reference", reference, last))
    history: list[dict[str, Any]] = []
    for step in steps:
        if history and history[-1]["text"] == tuned[step]:
            history[-1]["until"] = step
        else:
            shown = _answer("tuned", tuned[step], reference)
            history.append({**shown, "text": tuned[step], "from": step, "until": step})
    longest = max((len(answer) for answer in (base, last, reference) if answer), default=0)
    return {
        "prompt": clip(entry.get("prompt", "")),
        "answers": answers,
        "reference": bool(reference),
        "match": last is not None and last == reference,
        "history": history if len(history) > 1 else [],
        "longest": longest,
        # JSON and code have few spaces: broken at spaces only, half of each line would stay empty.
        "dense": any(len(word) > 40 for answer in (last, reference) for word in (answer or "").split()),
    }


def _answer(who: str, text: str, other: str | None) -> dict[str, Any]:
    pieces, alike = marked(clip(text), other)
    return {"who": who, "pieces": pieces, "alike": alike, "empty": not text.strip()}


def marked(text: str, other: str | None) -> tuple[list[tuple[str, bool]], bool]:
    """`text` in pieces, each with whether its words differ from `other`; False at the end: too different to mark."""
    ours, theirs = list(_WORD.finditer(text)), _WORD.findall(other or "")
    if other is None or not ours or max(len(ours), len(theirs)) > _MOST_WORDS:
        return [(text, False)], True
    matcher = SequenceMatcher(None, [word.group() for word in ours], theirs, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return [(text, False)], False
    pieces, end = [], 0
    for tag, first, last, _, _ in matcher.get_opcodes():
        if tag in ("replace", "delete"):
            begin, stop = ours[first].start(), ours[last - 1].end()
            pieces += [(text[end:begin], False), (text[begin:stop], True)]
            end = stop
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]], True


def clip(text: str) -> str:
    """`text`, or its beginning and how much is left out."""
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … and {rest:,} more characters"
