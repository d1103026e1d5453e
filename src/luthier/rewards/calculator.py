"""Calculator: an environment in which sums may be left to a tool; what counts is the final number.

Idea: each problem begins an episode in which the tool `calculate` is on offer. As long as the model calls it, the
environment answers with results; the first message without a call is the final answer, which another reward judges.
A wrong expression is answered with what is wrong with it, and costs a turn.
Equation: the reward's on the final answer; 0 where the turns ran out before there was one
Source: Schick et al., arXiv 2302.04761 (Toolformer: the calculator); an environment is a reward with a reset
Cost: no model; an expression takes microseconds and has bounds on its numbers.
Use when: a model shall learn when to call a tool; as an example of an environment to write your own by.
Not when: the sums are to be done in the head.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Final, final

from pydantic import Field, model_validator

from luthier.core.chosen import Chosen
from luthier.core.errors import RecipeError
from luthier.data.conversation import Message, ToolCall
from luthier.data.sample import Sample
from luthier.rewards import Environment, Episode, Reward, Score, Tools, Turn, Verdict

TOOL: Final[Mapping[str, Any]] = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "The value of an expression with + - * / // % ** and brackets.",
        "parameters": {
            "type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"],
        },
    },
}  # fmt: skip
_OPERATORS: Final[Mapping[type, Callable[[Fraction, Fraction], Any]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_LONGEST: Final = 500
"""Characters of an expression."""
_BITS: Final = 512
"""Bits of a number's two parts together; a higher power is refused before it is computed."""


@final
class Calculator(Reward):
    """Problems with a calculator at hand."""

    reward: Annotated[Reward, Chosen("rewards")] = Field(description="what judges the final answer")
    most_turns: int = Field(6, ge=1, description="how often the model may speak")
    system: str = Field("", description="what the model is told first")

    @model_validator(mode="before")
    @classmethod
    def _judged(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "reward" not in value:
            told = "calculator does not say what judges the final answer"
            raise RecipeError(told, allowed="a reward of its own", do="write {method: calculator, reward: numeric}")
        return value

    @model_validator(mode="after")
    def _alone(self) -> Calculator:
        if isinstance(self.reward, Environment):
            told = f"the reward of calculator is {self.reward.method_name()}, an environment, and nobody would play it"
            raise RecipeError(told, allowed="rewards that open no episode", do="write its own reward in its place")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = self.reward.bounds
        return (min(low, 0.0), high)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.reward.columns

    @property
    def needs(self) -> frozenset[str]:
        return self.reward.needs

    def check(self, facts: Mapping[str, Any]) -> None:
        self.reward.check(facts)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        asked = self.reward.score(samples, tools)
        return [self._with_calls(sample, verdict) for sample, verdict in zip(samples, asked, strict=True)]

    def reset(self, prompt: tuple[Message, ...], facts: Mapping[str, Any], *, seed: int) -> Episode:
        """An episode about one problem. Nothing in it is drawn, so the seed changes nothing."""
        return _Episode((*[Message("system", self.system)] * bool(self.system), *prompt), self.most_turns)

    def _with_calls(self, sample: Sample, verdict: Verdict) -> Verdict:
        if not isinstance(verdict, Score):
            return verdict
        before = () if isinstance(sample.prompt, str) else sample.prompt
        parts = {**verdict.parts, "calls": float(sum(message.role == "tool" for message in before))}
        return Score(verdict.value, parts, verdict.reason, verdict.feedback)


class _Episode:
    """The exchange about one problem."""

    tools: tuple[Mapping[str, Any], ...] = (TOOL,)

    def __init__(self, messages: tuple[Message, ...], turns: int) -> None:
        self.messages = messages
        self._turns = turns

    def step(self, answer: Message) -> Turn:
        """Results of what was called; the end, to be judged, where nothing was."""
        self._turns -= 1
        if not answer.tool_calls:
            return Turn(done=True)
        if self._turns == 0:
            told = "the turns ran out before there was an answer"
            return Turn(done=True, score=Score(0.0, {"calls": float(len(answer.tool_calls))}, told, told))
        return Turn(tuple(Message("tool", _answered(call), name=call.name) for call in answer.tool_calls))


def _answered(call: ToolCall) -> str:
    expression = call.arguments.get("expression") if call.name == "calculate" else None
    if not isinstance(expression, str):
        return f"error: {call.name} is not known; calculate takes an expression"
    try:
        value = calculated(expression)
    except (ArithmeticError, ValueError) as failure:
        return f"error: {failure}"
    return str(value) if value.denominator == 1 else f"{float(value):.12g}"


def calculated(expression: str) -> Fraction:
    """The value of an expression. Raises ValueError or ArithmeticError in words that a model can use."""
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression has at most {_LONGEST} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression[:60]!r} is no expression") from None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _value(node.left), _value(node.right)
        if power.denominator != 1 or abs(power) * max(_bits(base), 1) > _BITS:
            raise ValueError(f"{base} ** {power} is too large, or its power is no whole number")
        return _bounded(Fraction(base ** int(power)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if not right and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            raise ZeroDivisionError("division by zero")
        return _bounded(Fraction(_OPERATORS[type(node.op)](left, right)))
    raise ValueError("only numbers, + - * / // % ** and brackets are known")


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > 4 * _BITS:
        raise OverflowError("a number is too large")
    return value
