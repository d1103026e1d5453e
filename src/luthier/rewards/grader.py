"""Grader: OpenAI's grader JSON, as it is.

Idea: the graders of OpenAI's fine-tuning and evaluation APIs: string_check compares texts, text_similarity measures how
near they are, score_model and label_model ask a model (the judge), python runs `grade(sample, item)` in the sandbox,
multi computes with the results of others. `{{item.x}}` is a column of the row, `{{sample.output_text}}` the answer.
Templates are filled in strictly: a name that is not there is an error, and what is filled in is never read again.
Of text_similarity, fuzzy_match, gleu, rouge_1 to rouge_5 and rouge_l are computed here and bleu by sacrebleu; meteor
needs a thesaurus and cosine a model of embeddings: these are refused.
Equation: the grader's own; multi: calculate_output, with + - * / ^ and abs, ceil, exp, floor, log, max, min, sqrt
Source: OpenAI API reference, graders (platform.openai.com/docs/api-reference/graders)
Cost: texts: linear, but for fuzzy_match and rouge_l, whose time is the product of both lengths over 64.
Use when: a grader exists already, or the same one is to be used there and here.
Not when: you write a new one: the rewards of luthier say more of what they check.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, final

from pydantic import Field, model_validator

from luthier.core.errors import DataError, RecipeError
from luthier.core.optional import require
from luthier.data.cases import shown
from luthier.data.conversation import ROLES, Message
from luthier.data.sample import Sample
from luthier.data.similarity import SIMILARITIES
from luthier.data.strict_json import Place, parse
from luthier.model.scorer import Begun, Likely, NoRoom, Said
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Returned, Status

_TYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "string_check": ("input", "reference", "operation"),
    "text_similarity": ("input", "reference", "evaluation_metric"),
    "score_model": ("input",),
    "label_model": ("input", "labels", "passing_labels"),
    "python": ("source",),
    "multi": ("graders", "calculate_output"),
}
_MAY: Final = ("type", "name", "model", "sampling_params", "range", "image_tag", "pass_threshold")
_OPERATIONS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "eq": lambda text, known: text == known,
    "ne": lambda text, known: text != known,
    "like": lambda text, known: known in text,
    "ilike": lambda text, known: known.casefold() in text.casefold(),
}
_PACKAGES: Final = (
    "numpy", "scipy", "sympy", "pandas", "rapidfuzz", "sklearn", "rouge_score", "deepdiff", "jsonschema", "pydantic",
    "yaml", "nltk", "sqlparse",
)  # fmt: skip
"""What programs of OpenAI's python grader may import."""
_NEEDS: Final = {"score_model": "judge", "label_model": "judge", "python": "sandbox"}


@final
class Grader(Reward):
    """A grader of OpenAI's API."""

    grader: dict[str, Any] = Field(default_factory=dict, description="the grader, as its JSON")
    file: str = Field("", description="a file with the JSON of the grader, instead")

    @model_validator(mode="after")
    def _checked(self) -> Grader:
        if bool(self.grader) == bool(self.file):
            raise RecipeError("a grader needs one of grader and file", allowed="its JSON, or a file with it")
        _check(self.grader or _read(self.file), "grader")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(_NEEDS[part["type"]] for part in _parts(self._known()) if part["type"] in _NEEDS)

    @property
    def columns(self) -> tuple[str, ...]:
        found = re.findall(r"\{\{\s*item\.(\w+)", json.dumps(self._known()))
        # What was asked is no column of its own any more; it is told under its usual name.
        return tuple(name for name in dict.fromkeys(found) if name != "prompt")

    @property
    def bounds(self) -> tuple[float, float]:
        grader = self._known()
        if grader["type"] == "score_model":
            low, high = grader.get("range", (0, 1))
            return (float(low), float(high))
        return (-math.inf, math.inf) if grader["type"] in ("multi", "python") else (0.0, 1.0)

    def check(self, facts: Mapping[str, Any]) -> None:
        names = {"item": {"prompt": "", **facts}}
        for text in (text for part in _parts(self._known()) for text in _texts(part)):
            paths = [path for field in _FIELD.findall(text) if (path := _PATH.fullmatch(field)) and path[1] == "item"]
            for path in paths:
                _looked_up("item", re.findall(r"\w+", path[2]), names)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return _grade(self._known(), samples, tools)

    def _known(self) -> dict[str, Any]:
        return self.grader or _read(self.file)


def _check(grader: object, where: str) -> None:
    """Raise RecipeError for what is no grader, or one that would not be followed to the letter."""
    if not isinstance(grader, Mapping) or grader.get("type") not in _TYPES:
        shown = grader.get("type") if isinstance(grader, Mapping) else grader
        raise RecipeError(f"{where}.type is {shown!r}", allowed=", ".join(_TYPES))
    kind = grader["type"]
    if missing := [key for key in _TYPES[kind] if key not in grader]:
        raise RecipeError(f"{where} ({kind}) has no {missing[0]}", allowed=", ".join(_TYPES[kind]))
    if unknown := [key for key in grader if key not in (*_TYPES[kind], *_MAY)]:
        raise RecipeError(f"{where} ({kind}) has {unknown[0]!r}", allowed=", ".join((*_TYPES[kind], *_MAY)))
    if kind == "string_check" and grader["operation"] not in _OPERATIONS:
        raise RecipeError(f"{where}.operation is {grader['operation']!r}", allowed=", ".join(_OPERATIONS))
    if kind == "text_similarity" and grader["evaluation_metric"] not in (*SIMILARITIES, "bleu"):
        raise RecipeError(
            f"{where}.evaluation_metric is {grader['evaluation_metric']!r}, which is not computed here",
            allowed=", ".join((*SIMILARITIES, "bleu")),
        )
    how = grader.get("sampling_params") or {}
    # How much another model reasons, and a top_p of all there is, change nothing here.
    heard = {"temperature", "seed", "reasoning_effort", *_ROOM}
    if unheard := {key for key, value in how.items() if key not in heard and (key, value) != ("top_p", 1)}:
        raise RecipeError(
            f"{where}.sampling_params has {sorted(unheard)}",
            allowed=f"temperature, seed, {_ROOM[0]}, reasoning_effort, and a top_p of 1",
        )
    if kind == "label_model" and not set(grader["passing_labels"]) <= set(grader["labels"]):
        raise RecipeError(f"{where}.passing_labels is {grader['passing_labels']}", allowed=f"of {grader['labels']}")
    if kind == "multi":
        _formula(grader["calculate_output"], dict.fromkeys(grader["graders"], 1.0), check=True)
        for name, part in grader["graders"].items():
            _check(part, f"{where}.graders.{name}")
    for text in _texts(grader):
        _filled(text, {}, check=True)


_MOST: Final = 1e300
_ROOM: Final = ("max_completions_tokens", "max_completion_tokens", "max_tokens")


def _grade(grader: Mapping[str, Any], samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
    kind = grader["type"]
    if kind == "multi":
        parts = {name: _grade(part, samples, tools) for name, part in grader["graders"].items()}
        return [_computed(grader, {name: verdicts[at] for name, verdicts in parts.items()}, sample)
                for at, sample in enumerate(samples)]  # fmt: skip
    if kind == "python":
        return _in_sandbox(grader, samples, tools)
    if kind in ("score_model", "label_model"):
        return _by_model(grader, samples, tools)
    return [_by_text(grader, sample) for sample in samples]


def _by_text(grader: Mapping[str, Any], sample: Sample) -> Verdict:
    names = _names(sample)
    try:
        text, known = (_filled(grader[key], names) for key in ("input", "reference"))
    except _NoAnswerError as failure:
        return Score(0.0, reason=str(failure), feedback=str(failure))
    if grader["type"] == "string_check":
        value = float(_OPERATIONS[grader["operation"]](text, known))
    elif grader["evaluation_metric"] == "bleu":
        made = require("sacrebleu", extra="metrics", purpose="BLEU").sentence_bleu(text, [known])
        value = min(float(made.score) / 100, 1.0)
    else:
        value = SIMILARITIES[grader["evaluation_metric"]](text, known)
    threshold = grader.get("pass_threshold")
    parts = {} if threshold is None else {"passed": float(value >= threshold)}
    return Score(value, parts, "" if value == 1 else f"{text[:80]!r} beside {known[:80]!r}")


# ------------------------------------------------------------------------------------------------- graders that ask


def _by_model(grader: Mapping[str, Any], samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
    if tools.judge is None:
        raise RecipeError(f"the grader {grader['type']} needs a model to ask", allowed="a recipe with a judge")
    asked = [Begun(tuple(_message(one, _names(sample)) for one in grader["input"])) for sample in samples]
    if grader["type"] == "label_model":
        labels, passing = list(grader["labels"]), set(grader["passing_labels"])
        found = tools.judge.likely(asked, labels)
        return [_labelled(row, labels, passing, sample) for row, sample in zip(found, samples, strict=True)]
    how = grader.get("sampling_params") or {}
    room = next((int(how[name]) for name in _ROOM if name in how), 1024)
    answers = tools.judge.go_on(
        asked, most_tokens=room, temperature=float(how.get("temperature", 0)), seed=int(how.get("seed", tools.seed))
    )
    low, high = grader.get("range", (0, 1))
    return [_scored(said, low, high, sample) for said, sample in zip(answers, samples, strict=True)]


def _labelled(odds: Sequence[Likely] | NoRoom, labels: list[str], passing: set[str], sample: Sample) -> Verdict:
    """Whether the likeliest label is one that passes."""
    if isinstance(odds, NoRoom):
        return RewardError(odds.received, allowed=odds.told, do=odds.do).of(sample, again=False)
    said = max(zip(odds, labels, strict=True), key=lambda pair: pair[0].log_prob)[1]
    parts = {f"label/{each}": float(each == said) for each in labels}
    return Score(float(said in passing), parts, f"labelled {said}")


def _scored(said: Said | NoRoom, low: float, high: float, sample: Sample) -> Verdict:
    """The number that a model gives: {"result": 0.5}, or the one that its last line ends in."""
    if isinstance(said, NoRoom):
        return RewardError(said.received, allowed=said.told, do=said.do).of(sample, again=False)
    text = said.text
    found = re.search(r'"result"\s*:\s*(-?\d{1,12}(?:\.\d{1,12})?)', text)
    found = found or re.search(r"(-?\d{1,12}(?:\.\d{1,12})?)\W*$", text)
    if found is None or not low <= float(found[1]) <= high:
        told = f"the model that scores said {text[-200:]!r}"
        return RewardError(told, allowed=f'{{"result": NUMBER}} with a number from {low} to {high}').of(sample)
    return Score(float(found[1]), reason=text[:2000])


def _message(given: Mapping[str, Any], names: Mapping[str, Any]) -> Message:
    content = given.get("content", "")
    pieces = content if isinstance(content, list) else [content]
    texts = [each.get("text", "") if isinstance(each, Mapping) else each for each in pieces]
    text = "\n".join(texts) if all(isinstance(each, str) for each in texts) else None
    role = "system" if given.get("role") == "developer" else given.get("role")
    if role not in ROLES or not isinstance(text, str):
        raise RecipeError(f"a message of the grader is {given!r}", allowed="a role and a text")
    return Message(role, _filled(text, names))


def _in_sandbox(grader: Mapping[str, Any], samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
    """What `grade(sample, item)` gives; a grader that fails has not graded."""
    if tools.sandbox is None:
        raise RecipeError(f"the grader {grader['type']} needs the sandbox", allowed="a machine that has one")
    names = [_names(sample) for sample in samples]
    programs = [Program(grader["source"], (Call("grade", (each["sample"], each["item"])),)) for each in names]
    sandbox = tools.sandbox(Limits(), preload=_imported(grader["source"]))
    outcomes = sandbox.run_all(programs) if programs else []
    return [_graded(outcome, sample) for outcome, sample in zip(outcomes, samples, strict=True)]


def _imported(source: str) -> tuple[str, ...]:
    """The packages of OpenAI's image that a program imports and that are installed here."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:
        return ()  # it is told when it is run
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    found = {name.partition(".")[0] for name in names} & set(_PACKAGES)
    return tuple(sorted(name for name in found if importlib.util.find_spec(name) is not None))


def _graded(outcome: Outcome, sample: Sample) -> Verdict:
    if outcome.status is Status.BROKEN:
        return RewardError(f"the sandbox broke: {outcome.reason}").of(sample)
    said = outcome.returned[0] if outcome.returned else Returned(error=f"{outcome.status}: {outcome.reason}")
    value = said.value
    if said.error is not None or isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MOST:
        told = f"the grader's program gave {said.error or shown(value)}"
        return RewardError(told, allowed="a number from grade(sample, item)").of(sample, again=False)
    return Score(float(value))


# ----------------------------------------------------------------------------------------------- templates, formulas


class _NoAnswerError(Exception):
    """The answer does not have what a template asks of it."""


_FIELD: Final = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH: Final = re.compile(r"\s*(item|sample)((?:\.\w+|\[\d+\])+)\s*")


def _filled(template: str, names: Mapping[str, Any], *, check: bool = False) -> str:
    def value(found: re.Match[str]) -> str:
        path = _PATH.fullmatch(found[1])
        if path is None:
            raise RecipeError(f"the template says {found[0]}", allowed="{{item.COLUMN}} or {{sample.output_text}}")
        return "" if check else _looked_up(path[1], re.findall(r"\w+", path[2]), names)

    return _FIELD.sub(value, template)


def _looked_up(start: str, keys: list[str], names: Mapping[str, Any]) -> str:
    found = names[start]
    for at, key in enumerate(keys):
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        elif start == "sample" and keys[0] != "output_text":
            raise _NoAnswerError(f"the answer has no {'.'.join(keys)}")
        else:
            raise DataError(f"the row has no {'.'.join(keys[: at + 1])!r}", allowed=f"one of {', '.join(names[start])}")
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _names(sample: Sample) -> dict[str, Any]:
    told: dict[str, Any] = {"output_text": sample.said, "output_tools": [],
                            "choices": [{"message": {"role": "assistant", "content": sample.said}}]}  # fmt: skip
    with suppress(DataError):  # a template that asks for what is not there says so
        told["output_json"] = parse(sample.said, Place("answer"))
    asked = sample.prompt if isinstance(sample.prompt, str) else "\n\n".join(each.content for each in sample.prompt)
    return {"item": {"prompt": asked, **sample.facts}, "sample": told}


def _computed(grader: Mapping[str, Any], verdicts: Mapping[str, Verdict], sample: Sample) -> Verdict:
    if failed := [verdict for verdict in verdicts.values() if isinstance(verdict, RewardError)]:
        return failed[0]
    scores = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, Score)}
    parts = {name: score.value for name, score in scores.items()}
    try:
        value = _formula(grader["calculate_output"], parts)
    except (ArithmeticError, ValueError) as failure:
        return RewardError(f"{grader['calculate_output']} of {parts}: {failure}").of(sample, again=False)
    return Score(value, parts, "; ".join(f"{name}: {score.reason}" for name, score in scores.items() if score.reason))


_FUNCTIONS: Final[Mapping[str, Callable[..., float]]] = {
    "abs": abs, "ceil": math.ceil, "exp": math.exp, "floor": math.floor, "log": math.log, "max": max, "min": min,
    "sqrt": math.sqrt,
}  # fmt: skip
_OPERATORS: Final[Mapping[type, Callable[[float, float], float]]] = {
    ast.Add: lambda one, two: one + two, ast.Sub: lambda one, two: one - two, ast.Mult: lambda one, two: one * two,
    ast.Div: lambda one, two: one / two, ast.Pow: math.pow,
}  # fmt: skip


def _formula(text: str, names: Mapping[str, float], *, check: bool = False) -> float:
    def of(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
            return float(_FUNCTIONS[node.func.id](*map(of, node.args)))
        raise RecipeError(
            f"calculate_output is {text!r}: {ast.unparse(node)!r} is not known",
            allowed=f"numbers, + - * / ^, {', '.join(_FUNCTIONS)} and the graders {', '.join(names)}",
        )

    try:
        return of(ast.parse(text.replace("^", "**"), mode="eval").body)
    except SyntaxError as failure:
        raise RecipeError(f"calculate_output is {text!r}: {failure.msg}", allowed="a formula of graders") from failure
    except RecipeError:
        raise
    except (ArithmeticError, ValueError):
        if check:  # whether it can be computed depends on the results
            return 0.0
        raise


def _texts(grader: Mapping[str, Any]) -> list[str]:
    given = grader.get("input", "")
    contents = [given] if isinstance(given, str) else [one.get("content", "") for one in given]
    pieces = [piece for each in contents for piece in (each if isinstance(each, list) else [each])]
    texts = [each.get("text", "") if isinstance(each, Mapping) else each for each in pieces]
    return [*texts, grader.get("reference", "")]


def _parts(grader: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = grader["graders"].values() if grader["type"] == "multi" else ()
    return [grader, *(part for each in inner for part in _parts(each))]


@cache
def _read(file: str) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"there is no file {file}", do="a path is looked for where the command is started")
    value = parse(path.read_text("utf-8"), Place(file))
    if not isinstance(value, dict):
        raise DataError(f"a {type(value).__name__}", allowed="the JSON object of a grader", where=f"{file}:1:1")
    return value
