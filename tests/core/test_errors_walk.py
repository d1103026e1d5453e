"""All error classes, found by walking: stable code, documented exit code, cause, offending value, next step.

And, from the source, every place that makes one: it shows what came (or where, or what is allowed instead).
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Iterator

import pytest

import luthier
from luthier.core import errors
from luthier.core.errors import MOST_LINES, DataError, LuthierError, StorageError
from tests.architecture.source import REPOSITORY, Module, modules

CODES = {
    "unexpected": 1,
    "recipe": 2,
    "attention": 2,
    "data": 65,
    "template": 65,
    "missing": 69,
    "unavailable": 69,
    "out-of-memory": 71,
    "storage": 74,
    "corrupt": 74,
    "disk-full": 74,
    "stopped": 75,
    "numeric": 76,
    "refused": 77,
    "unsafe-artifact": 77,
    "run-locked": 77,
    "drift": 77,
    "no-sandbox": 77,
    "gate": 78,
    "not-served": 2,
    "busy": 69,
    "engine": 1,
    "reward": 1,
    "draining": 75,
    "remote": 69,
}
"""The interface: a code may be added, never changed or taken away."""

SHARE_A_CODE = {"KnobsError": "recipe", "FieldError": "data", "TooLongError": "data"}
"""Classes that only carry more for our own code, and are what they derive from to everybody else."""

NOTHING_CAME = {
    "all weights were trained, and PEFT has no file for that",
    "PEFT has no adapter file for full fine-tuning",
    "the model has no attention, so no keys and values to learn",
    "no prompt was given",
    "a segment has no token",
    "the conversation has no message",
    "stop strings were given, but no tokenizer to read the text with",
    "this model's attention cannot be driven by luthier, and learned roots need it",
    "there is no row to train on",
    "optim_step was called without a gradient",
}
"""Sentences about something that is absent: there is no value to show. They say what to do instead."""


def kinds() -> list[type[LuthierError]]:
    """Every error class of the package, wherever it is defined."""
    for found in pkgutil.walk_packages(luthier.__path__, "luthier."):
        importlib.import_module(found.name)

    def below(kind: type[LuthierError]) -> Iterator[type[LuthierError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    unique = {kind.__qualname__: kind for kind in below(LuthierError) if kind.__module__.startswith("luthier.")}
    return list(unique.values())


KINDS = kinds()
each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_the_walk_finds_the_classes_of_other_files_too() -> None:
    """Guards the tests below: a walk that sees core/errors.py alone would pass over what others define."""
    assert {"KnobsError", "FieldError", "DataError"} <= {kind.__name__ for kind in KINDS}
    assert len({kind.__name__ for kind in KINDS}) == len(KINDS)


def test_codes_are_stable_and_each_belongs_to_one_class() -> None:
    """Breaks when a code changes its exit code, is taken twice, or is new and not listed here."""
    own = [kind for kind in KINDS if "code" in vars(kind)]
    codes = [kind.code for kind in own]
    assert sorted(codes) == sorted(set(codes))
    assert {kind.code: kind.exit_code for kind in own} == CODES
    assert {kind.__name__: kind.code for kind in KINDS if kind not in own} == SHARE_A_CODE


@each
def test_a_class_has_a_cause_and_a_next_step(kind: type[LuthierError]) -> None:
    """Breaks when a new class leaves its docstring or its advice to the one above it."""
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", kind.code)
    cause = (vars(kind).get("__doc__") or "").partition("\n")[0]
    assert cause.endswith(".") and len(cause) > 20
    assert kind.__name__ in SHARE_A_CODE or "advice" in vars(kind)
    assert 10 < len(kind.advice) < 120 and not kind.advice.endswith(".")


@each
def test_the_exit_code_is_documented(kind: type[LuthierError]) -> None:
    """Breaks when the table in core/errors.py or the pages do not know a class."""
    table = {int(number) for number in re.findall(r"^\| (\d+) \| \w+ \|", errors.__doc__ or "", re.MULTILINE)}
    assert kind.exit_code in table
    assert f"| `{kind.code}` | {kind.exit_code} |" in (REPOSITORY / "docs" / "errors.md").read_text("utf-8")
    assert f"`{kind.code}`" in (REPOSITORY / "docs" / "run-directory.md").read_text("utf-8")


@each
@pytest.mark.parametrize("more", [{}, {"allowed": "b", "do": "c", "where": "d:1:2"}], ids=["bare", "whole"])
def test_an_error_survives_the_way_home_and_says_all_it_knows(
    kind: type[LuthierError], more: dict[str, str]
) -> None:
    """Breaks when a worker's error comes back without its parts, or --json lacks one."""
    error = kind("a 'value'", **more)
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is kind and back.as_dict() == error.as_dict() and str(back) == str(error)
        assert back.__dict__ == error.__dict__
    told = {"code": kind.code, "exit_code": kind.exit_code, "received": "a 'value'", "allowed": "", "where": ""}
    assert error.as_dict() == {**told, "do": kind.advice, **more}
    assert error.told() == ("d:1:2: a 'value'; b; c" if more else f"a 'value'; {kind.advice}")
    assert getattr(error, "__notes__", []) == ([] if more else [f"next: {kind.advice}"])


@each
def test_a_standard_except_clause_catches_it(kind: type[LuthierError]) -> None:
    """Breaks when library callers would have to know luthier's classes."""
    standard = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert standard[-3:] == [Exception, BaseException, object]
    assert len(standard) > 3 or kind.code in ("unexpected", "stopped", "gate")


@pytest.mark.parametrize("part", ["received", "allowed", "do", "where"])
def test_a_long_value_is_clipped_and_what_is_left_out_is_counted(part: str) -> None:
    """Breaks when a row of a megabyte becomes an error of a megabyte."""
    whole = {"received": "x", part: "0123456789" * 10_000}
    error = DataError(**whole)
    assert len(str(error)) < 2000 and len(error.told()) < 2000
    kept, count = re.fullmatch(r"(.*?)\(?([\d,]+) (?:more )?characters\)(.*)", getattr(error, part)).group(1, 2)  # type: ignore[union-attr]
    shown = len(re.sub(r"[^0-9]", "", getattr(error, part).replace(count, "")))
    assert shown + int(count.replace(",", "")) == 100_000 and shown > 200, kept


def test_a_message_of_one_line_never_exceeds_two_thousand_characters() -> None:
    """Breaks when the parts are clipped one by one to more than a screen together."""
    long = "é" * 5000
    assert len(StorageError(long, allowed=long, do=long, where=long).told()) < 2000


def test_the_end_of_an_address_stays() -> None:
    """Breaks when a deep folder hides the line and the column."""
    error = DataError("x", where="/deep" * 200 + "/rows.jsonl:17:3")
    assert error.where.endswith("/rows.jsonl:17:3") and error.where.startswith("(")


def test_a_list_of_rows_keeps_its_lines_and_a_flood_of_lines_does_not() -> None:
    """Breaks when the twentieth bad row is cut off, or a value of a million lines is told whole."""
    rows = "".join(f"\n  rows.jsonl:{n}:1: {'bad ' * 40}" for n in range(20))
    assert DataError(f"20 rows{rows}").received == f"20 rows{rows}"
    flood = DataError("a\n" * 1_000_000)
    assert flood.received.count("\n") == MOST_LINES and flood.received.endswith("more lines)")
    assert str(1_000_000 - MOST_LINES + 1) in flood.received.replace(",", "")


# ------------------------------------------------------------------------------------------------ where they are made


def made(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call that makes one of our errors, with the class it names."""
    names = {kind.__name__ for kind in KINDS}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node, node.func.id


def complaint(call: ast.Call) -> str:
    """What an error that is made here does not say; empty when it says enough."""
    first = call.args[0] if call.args else None
    given = {keyword.arg for keyword in call.keywords}
    if first is None:
        return "says nothing"
    constant = first.value if isinstance(first, ast.Constant) else None
    if isinstance(first, ast.JoinedStr):
        constant = None if any(isinstance(part, ast.FormattedValue) for part in first.values) else "f"
    if constant is None or given & {"allowed", "where"} or constant in NOTHING_CAME:
        return ""
    return f"shows no value, no place and nothing that is allowed: {constant!r}"


def test_every_error_that_is_made_shows_what_came_or_where_or_what_is_allowed() -> None:
    """Breaks when an error is a sentence that fits every case; a class without advice would break another test."""
    found = [(module, call, name) for module in modules() for call, name in made(module)]
    poor = [(module, call, name, said) for module, call, name in found if (said := complaint(call))]
    wrong = [f"{module.shown}:{call.lineno}: {name} {said}" for module, call, name, said in poor]
    assert not wrong, "\n" + "\n".join(wrong)
    assert len(found) > 100
    said = {call.args[0].value for _, call, _ in found if call.args and isinstance(call.args[0], ast.Constant)}
    assert said >= NOTHING_CAME, f"no longer said, take it out: {NOTHING_CAME - said}"


def test_a_poor_error_would_be_seen() -> None:
    """Guards the test above."""
    poor = ['DataError("bad")', 'DataError(f"bad")', "DataError()", 'DataError("bad", do="x")']
    fine = ['DataError(f"bad {x}")', "DataError(text)", 'DataError("bad", where=x)', 'DataError("a" + b)']
    for texts, seen in ((poor, True), (fine, False)):
        for text in texts:
            call = ast.parse(text).body[0].value  # type: ignore[attr-defined]
            assert bool(complaint(call)) == seen, text


def test_no_error_is_raised_that_is_not_ours_where_a_user_could_meet_it() -> None:
    """Breaks when a bare Exception or RuntimeError leaves; ValueError and the like are for callers in our own code."""
    plain = {"Exception", "BaseException", "RuntimeError", "OSError", "IOError", "SystemError"}
    wrong = [
        f"{module.shown}:{node.lineno}"
        for module in modules()
        # A guest's side has nothing of luthier: there system calls fail as they do in Python.
        if not module.name.startswith("luthier.sandbox.guest.")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in plain
    ]
    assert not wrong


def test_every_class_can_be_made_from_the_four_parts_alone() -> None:
    """Breaks when a subclass asks for more than the way home can bring."""
    for kind in KINDS:
        required = [
            name
            for name, parameter in inspect.signature(kind).parameters.items()
            if parameter.default is inspect.Parameter.empty
        ]
        assert required == ["received"], kind
