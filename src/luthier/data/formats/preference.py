"""Preference: a prompt, an answer that was chosen and one that was rejected.

Each is a string, a message or a list of messages. Without a prompt, the two are whole conversations, and what they
share is the prompt; so it is when the answers repeat it. `score_chosen` and `score_rejected`, or `margin`, say by how
much one is better; `probability` how sure that is, from 0.5 to 1, and is read as its log odds.
Source: the preference shape of TRL; UltraFeedback's binarised rows; `instruction`, `input` as LLaMA-Factory reads them.
Use when: of two answers to one prompt somebody, or something, preferred one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from luthier.data.conversation import Meaning, Message, Preference
from luthier.data.formats import Format, Values
from luthier.data.formats._chat import MESSAGE_ROLES, read_tools, read_turns, system_message, turns_or_text
from luthier.data.formats._compared import (
    answer,
    conversation_so_far,
    is_turns,
    parted,
    preference,
    score_columns,
    scores_of_pair,
)
from luthier.data.formats._fields import FieldError, column, filled, is_preference, pick, text_at

PROMPTS = ("prompt", "question", "instruction", "query", "messages")


@final
class Pairs(Format):
    """`{"prompt", "chosen", "rejected"}`, with `system`, `tools` and scores."""

    meaning: ClassVar[Meaning] = "preference"
    title: ClassVar[str] = "preference pairs"
    specificity: ClassVar[int] = 61
    example: ClassVar[str] = '{"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}'
    known: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected", "system", "margin", "probability")

    def looks_like(self, record_values: Values) -> bool:
        if not is_preference(record_values) or "conversations" in record_values:
            return False
        return pick(record_values, PROMPTS) is not None or is_turns(record_values["chosen"])

    def columns(self, values: Values) -> tuple[str, ...]:
        prompt = pick(values, PROMPTS)
        more = [name for name in ("system", "tools", "input") if name in values and (name != "input" or prompt)]
        return (*([prompt] if prompt else []), "chosen", "rejected", *more, *score_columns(values))

    def read(self, values: Values, where: str) -> Preference:
        prompt = pick(values, PROMPTS)
        return pair(values, (prompt, "chosen", "rejected"), where, scores=scores_of_pair(values, where))


def pair(
    values: Values, names: tuple[str | None, str, str], where: str, *, scores: tuple[float, float] | None
) -> Preference:
    """The pair in the columns of the prompt, which there may be none of, the chosen and the rejected answer."""
    prompt, one, two = names
    tools = read_tools(values.get("tools"), ("tools",), where)
    chosen, rejected = column(values, one, where), column(values, two, where)
    before = system_message(values.get("system"), ("system",), where)
    if is_turns(chosen) and is_turns(rejected):
        sides = ((chosen, one), (rejected, two))
        turns = [read_turns(value, (name,), where, expected=MESSAGE_ROLES) for value, name in sides]
        if turns[0][0].role != "assistant" or prompt is None:
            asked, better, worse = parted([*before, *turns[0]], [*before, *turns[1]], where, tools=tools)
            _repeats(asked.messages, None if prompt is None else values[prompt], prompt, where)
            return preference(asked, (better, worse), (two,), where, scores=scores)
    if prompt is None:
        raise FieldError(
            f"there is no prompt, and {one} is no list of messages",
            path=(one,),
            allowed="expected a prompt beside strings, or conversations that share one",
            where=where,
        )
    asked = conversation_so_far([*before, *_prompt(values, prompt, where)], (prompt,), where, tools=tools)
    answers = answer(chosen, (one,), where), answer(rejected, (two,), where)
    return preference(asked, answers, (two,), where, scores=scores)


def _prompt(values: Values, name: str, where: str) -> list[Message]:
    """The prompt; an instruction may have an input that it is about."""
    value = column(values, name, where)
    if name == "instruction" and values.get("input") is not None:
        parts = [text_at(value, (name,), where), text_at(values["input"], ("input",), where)]
        value = filled("\n\n".join(part for part in parts if part.strip()), (name,), where, what="the prompt")
    return turns_or_text(value, (name,), where, role="user", what="the prompt")


def _repeats(messages: Sequence[Message], prompt: object, name: str | None, where: str) -> None:
    """Refuse a prompt that is said beside whole conversations and is not in them."""
    if isinstance(prompt, str) and name and all(prompt.strip() not in message.content for message in messages):
        raise FieldError(
            f"chosen and rejected are whole conversations, and {name} is not in them",
            path=(name,),
            allowed="expected the prompt that they share, or answers alone",
            where=where,
        )
