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
from luthier.data import typed_json
from luthier.data.cases import shown
from luthier.data.conversation import ROLES, Message, Role
from luthier.data.grader_texts import NoAnswerError, computed, filled, formula, require_columns, template
from luthier.data.programs import parsed
from luthier.data.sample import Sample
from luthier.data.similarity import SIMILARITIES
from luthier.data.strict_json import Place, parse
from luthier.data.typed_json import Reader
from luthier.model.scorer import Begun, Likely, NoRoom, Said
from luthier.rewards import Reward, RewardError, Score, Tools, Verdict
from luthier.sandbox.program import Call, Limits, Outcome, Program, Returned, Status

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
            low, high = grader.get("range") or (0, 1)
            return (float(low), float(high))
        return (-math.inf, math.inf) if grader["type"] in ("multi", "python") else (0.0, 1.0)

    def check(self, facts: Mapping[str, Any]) -> None:
        for part in _parts(self._known()):
            for text in _texts(part):
                require_columns(text, facts)

    def score(self, samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
        return _grade(self._known(), samples, tools)

    def _known(self) -> dict[str, Any]:
        return self.grader or _read(self.file)


def _check(value: object, where: str) -> None:
    """Raise RecipeError for what is no grader, or one that would not be followed to the letter."""
    grader = typed_json.named(typed_json.anything)(value, where)
    kind = typed_json.one_of(_TYPES)(grader.get("type"), f"{where}.type")
    needed = _TYPES[kind]
    if missing := [key for key in needed if key not in grader]:
        raise RecipeError(f"{where} ({kind}) has no {missing[0]}", allowed=", ".join(needed))
    readers = {**_MAY, **needed}
    if unknown := [key for key in grader if key not in ("type", *readers)]:
        raise RecipeError(f"{where} ({kind}) has {unknown[0]!r}", allowed=", ".join(("type", *readers)))
    for key, read in readers.items():
        if key in needed or key in _without_nulls(grader):
            read(grader[key], f"{where}.{key}")
    if kind == "label_model" and not set(grader["passing_labels"]) <= set(grader["labels"]):
        raise typed_json.refused(grader["passing_labels"], f"{where}.passing_labels", f"of {grader['labels']}")
    if kind == "multi":
        formula(grader["calculate_output"], f"{where}.calculate_output", grader["graders"])
        for name, part in grader["graders"].items():
            _check(part, f"{where}.graders.{name}")


def _sampling(value: object, where: str) -> None:
    """How a model is sampled, as far as it is heard."""
    how = _without_nulls(typed_json.named(typed_json.anything)(value, where))
    # How much another model reasons, and a top_p of all there is, change nothing here.
    if unheard := [key for key, each in how.items() if key not in _SAMPLING and (key, each) != ("top_p", 1)]:
        told = f"{', '.join(_SAMPLING)}, and a top_p of 1"
        raise RecipeError(f"{where} has {', '.join(sorted(unheard))}", allowed=told)
    for key in (key for key in _SAMPLING if key in how):
        _SAMPLING[key](how[key], f"{where}.{key}")


def _without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """Graders that a program has written say null for what they leave out."""
    return {key: value for key, value in given.items() if value is not None}


def _program(value: object, where: str) -> None:
    """A Python program; whether it has `grade` shows when it runs."""
    tree = parsed(typed_json.filled_text(value, where))
    if isinstance(tree, str):
        raise RecipeError(f"{where} is no Python: {tree}", allowed="a program that defines grade(sample, item)")


def _role(value: object, where: str) -> Role:
    named = typed_json.one_of((*ROLES, "developer"))(value, where)
    return next((role for role in ROLES if role == named), "system")


def _said(value: object, where: str) -> tuple[Role, str]:
    """A message: its role, and the template of its text, which may come in pieces."""
    message = typed_json.named(typed_json.anything)(value, where)
    content = message.get("content")
    pieces = content if isinstance(content, list) else [content]
    texts = [
        template(each.get("text") if isinstance(each, Mapping) else each, f"{where}.content") for each in pieces
    ]
    return _role(message.get("role"), f"{where}.role"), "\n".join(texts)


_ROOM: Final = ("max_completions_tokens", "max_completion_tokens", "max_tokens")
_MAY: Final[Mapping[str, Reader[Any]]] = {
    **dict.fromkeys(("name", "model", "image_tag"), typed_json.text), "sampling_params": _sampling,
    "range": typed_json.bounds, "pass_threshold": typed_json.number,
}  # fmt: skip
"""Keys that a grader of any type may have, and what reads them."""
_SAMPLING: Final[Mapping[str, Reader[Any]]] = {
    "temperature": typed_json.amount, "seed": typed_json.count, "reasoning_effort": typed_json.text,
    **dict.fromkeys(_ROOM, typed_json.size),
}  # fmt: skip
_TYPES: Final[Mapping[str, Mapping[str, Reader[Any]]]] = {
    "string_check": {"operation": typed_json.one_of(_OPERATIONS), "input": template, "reference": template},
    "text_similarity": {"evaluation_metric": typed_json.one_of((*SIMILARITIES, "bleu")), "input": template,
                        "reference": template},
    "score_model": {"input": typed_json.listed(_said)},
    "label_model": {"labels": typed_json.listed(typed_json.filled_text),
                    "passing_labels": typed_json.listed(typed_json.text), "input": typed_json.listed(_said)},
    "python": {"source": _program},
    "multi": {"graders": typed_json.named(typed_json.anything, least=1), "calculate_output": typed_json.text},
}  # fmt: skip
"""The keys that a grader of each type has, and what reads them."""


_MOST: Final = 1e300


def _grade(grader: Mapping[str, Any], samples: Sequence[Sample], tools: Tools) -> list[Verdict]:
    kind = grader["type"]
    if kind == "multi":
        parts = {name: _grade(part, samples, tools) for name, part in grader["graders"].items()}
        tree = formula(grader["calculate_output"], "calculate_output", parts)
        return [_computed(tree, {name: verdicts[at] for name, verdicts in parts.items()}, sample)
                for at, sample in enumerate(samples)]  # fmt: skip
    if kind == "python":
        return _in_sandbox(grader, samples, tools)
    if kind in ("score_model", "label_model"):
        return _by_model(grader, samples, tools)
    return [_by_text(grader, sample) for sample in samples]


def _by_text(grader: Mapping[str, Any], sample: Sample) -> Verdict:
    names = _names(sample)
    try:
        text, known = (filled(grader[key], names) for key in ("input", "reference"))
    except NoAnswerError as failure:
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
    how = _without_nulls(grader.get("sampling_params") or {})
    room = next((int(how[name]) for name in _ROOM if name in how), 1024)
    answers = tools.judge.go_on(
        asked, most_tokens=room, temperature=float(how.get("temperature", 0)), seed=int(how.get("seed", tools.seed))
    )
    low, high = grader.get("range") or (0, 1)
    return [_scored(said, low, high, sample) for said, sample in zip(answers, samples, strict=True)]


def _labelled(odds: Sequence[Likely] | NoRoom, labels: list[str], passing: set[str], sample: Sample) -> Verdict:
    """Whether the likeliest label is one that passes."""
    if isinstance(odds, NoRoom):
        return _unasked(odds, sample)
    said = max(zip(odds, labels, strict=True), key=lambda pair: pair[0].log_prob)[1]
    parts = {f"label/{each}": float(each == said) for each in labels}
    return Score(float(said in passing), parts, f"labelled {said}")


def _unasked(lack: NoRoom, sample: Sample) -> RewardError:
    return RewardError(f"the judge {lack.received}", allowed=lack.told, do=lack.do).of(sample, again=False)


def _scored(said: Said | NoRoom, low: float, high: float, sample: Sample) -> Verdict:
    """The number that a model gives: {"result": 0.5}, or the one that its last line ends in."""
    if isinstance(said, NoRoom):
        return _unasked(said, sample)
    text = said.text
    found = re.search(r'"result"\s*:\s*(-?\d{1,12}(?:\.\d{1,12})?)', text)
    found = found or re.search(r"(-?\d{1,12}(?:\.\d{1,12})?)\W*$", text)
    if found is None or not low <= float(found[1]) <= high:
        told = f"the model that scores said {text[-200:]!r}"
        return RewardError(told, allowed=f'{{"result": NUMBER}} with a number from {low} to {high}').of(sample)
    return Score(float(found[1]), reason=text[:2000])


def _message(given: object, names: Mapping[str, Any]) -> Message:
    role, content = _said(given, "a message of the grader")
    return Message(role, filled(content, names))


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
    nodes = list(ast.walk(ast.parse(source)))
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


# ------------------------------------------------------------------------------------------------- what they are told


def _names(sample: Sample) -> dict[str, Any]:
    told: dict[str, Any] = {"output_text": sample.said, "output_tools": [],
                            "choices": [{"message": {"role": "assistant", "content": sample.said}}]}  # fmt: skip
    with suppress(DataError):  # a template that asks for what is not there says so
        told["output_json"] = parse(sample.said, Place("answer"))
    asked = sample.prompt if isinstance(sample.prompt, str) else "\n\n".join(each.content for each in sample.prompt)
    return {"item": {"prompt": asked, **sample.facts}, "sample": told}


def _computed(tree: ast.expr, verdicts: Mapping[str, Verdict], sample: Sample) -> Verdict:
    if failed := [verdict for verdict in verdicts.values() if isinstance(verdict, RewardError)]:
        return failed[0]
    scores = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, Score)}
    parts = {name: score.value for name, score in scores.items()}
    try:
        value = computed(tree, parts)
    except (ArithmeticError, ValueError) as failure:
        return RewardError(f"{ast.unparse(tree)} of {parts}: {failure}").of(sample, again=False)
    return Score(value, parts, "; ".join(f"{name}: {score.reason}" for name, score in scores.items() if score.reason))


def _texts(grader: Mapping[str, Any]) -> list[str]:
    """The templates of a grader."""
    given = grader.get("input", "")
    return [given if isinstance(given, str) else "\n".join(_said(each, "input")[1] for each in given),
            grader.get("reference", "")]  # fmt: skip


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
