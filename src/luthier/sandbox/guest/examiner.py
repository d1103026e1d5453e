"""The examiner: runs tests against functions that are elsewhere. It runs in a process that no candidate ever enters.

Idea: where a test names a function of the candidate, it finds a stand-in (stand_ins.py). A call of it travels through
the host to the candidate's process, and what comes back is plain data built anew here, or a stand-in for an object
that stays there. So the candidate meets neither the tests nor the expected values, and `==` is that of builtin types.
A test is a statement of the tests that asserts something, at the top, in `check(candidate)`, or as a whole a function
`test_...` or a method of a `unittest.TestCase`. After one that fails the next is run.
"""

from __future__ import annotations

import ast
import builtins
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Final

from luthier.sandbox.guest.candidate import description
from luthier.sandbox.guest.frames import receive, send
from luthier.sandbox.guest.stand_ins import GoneError, Name, Questions

CHECK: Final = "check"
_HELD, _FAILED, _WHY = "__test_held__", "__test_failed__", "__test_failure__"
_SHOWN: Final = 200


def serve(channel: int) -> None:
    """Run one set of tests, tell the host each result; ends when the tests do."""
    asked = receive(channel)
    try:
        examiner = _Examiner(channel, asked["tests"], asked["entry"])
    except SyntaxError as failure:
        send(channel, {"is": "unusable", "why": f"the tests are no Python: {failure}"})
        return
    examiner.run()


class _Examiner:
    def __init__(self, channel: int, tests: str, entry: str) -> None:
        self._channel = channel
        self._questions = Questions(channel)
        self._entry = entry
        self._tree = ast.parse(tests)
        self._plan: list[str] = []
        self._failed: set[int] = set()
        self._module = types.ModuleType("__main__")
        names = self._module.__dict__
        names.update({name: Name(self._questions, name) for name in _foreign(self._tree)})
        if entry and "candidate" not in _bound(self._tree):
            names["candidate"] = Name(self._questions, entry)
        names.update({_HELD: self._held, _FAILED: self._failure})
        self._marked()

    def run(self) -> None:
        """Announce the tests, run them, say that they ended."""
        functions, methods = self._found_by_name()
        self._plan += [f"{name}()" for name in functions]
        send(self._channel, {"is": "plan", "tests": self._plan})
        sys.modules["__main__"] = self._module
        why = ""
        try:
            exec(compile(ast.fix_missing_locations(self._tree), "tests.py", "exec"), self._module.__dict__)
            if self._entry and self._has(CHECK) and CHECK not in _called(self._tree):
                self._module.__dict__[CHECK](Name(self._questions, self._entry))
            for number, name in enumerate(functions, len(self._plan) - len(functions)):
                self._one(number, self._module.__dict__[name])
            for name in methods:
                self._unittest(self._module.__dict__[name])
        except GoneError as failure:
            why = str(failure)
        except BaseException as failure:
            why = f"the tests ended early: {description(failure)['error']}"
        send(self._channel, {"is": "over", "why": why})

    def _has(self, name: str) -> bool:
        return any(isinstance(node, ast.FunctionDef) and node.name == name for node in self._tree.body)

    def _found_by_name(self) -> tuple[list[str], list[str]]:
        """Functions that are tests by their name, where nobody calls them, and classes of tests."""
        called = _called(self._tree)
        functions = [node.name for node in self._tree.body if isinstance(node, ast.FunctionDef)
                     and node.name.startswith("test") and node.name not in called and not node.args.args]  # fmt: skip
        classes = [node.name for node in self._tree.body if isinstance(node, ast.ClassDef)
                   and any(ast.unparse(base).endswith("TestCase") for base in node.bases)]  # fmt: skip
        return functions, classes

    # ------------------------------------------------------------------------------------------- marking the tests
    def _marked(self) -> None:
        """Wrap each statement that tests something, so that the others are run after one that fails."""
        asserting = {
            node.name
            for node in ast.walk(self._tree)
            if isinstance(node, ast.FunctionDef)
            and node.name != CHECK
            and any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
        }
        for node in self._tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == CHECK and self._is_run():
                node.body = [self._wrapped(inner, asserting) for inner in node.body]
        self._tree.body = [self._wrapped(node, asserting) for node in self._tree.body]

    def _is_run(self) -> bool:
        return bool(self._entry) or CHECK in _called(self._tree)

    def _wrapped(self, node: ast.stmt, asserting: set[str]) -> ast.stmt:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or not _tests(node, asserting):
            return node
        number = len(self._plan)
        self._plan.append(ast.unparse(node)[:_SHOWN])
        return ast.Try(
            body=[node],
            handlers=[
                ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=_WHY,
                                  body=[_call(_FAILED, ast.Constant(number), ast.Name(_WHY, ast.Load()))])
            ],
            orelse=[_call(_HELD, ast.Constant(number))],
            finalbody=[],
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------- running and telling
    def _one(self, number: int, test: Callable[[], object]) -> None:
        try:
            test()
        except Exception as failure:
            self._failure(number, failure)
        else:
            self._held(number)

    def _unittest(self, kind: type[unittest.TestCase]) -> None:
        for test in unittest.TestLoader().loadTestsFromTestCase(kind):
            number = len(self._plan)
            self._plan.append(str(test)[:_SHOWN])
            send(self._channel, {"is": "plan", "tests": self._plan})
            result = unittest.TestResult()
            test.run(result)
            wrong = [*result.failures, *result.errors]
            # One that is skipped, or fails as expected, has shown nothing.
            fine = result.wasSuccessful() and not result.skipped and not result.expectedFailures
            self._tell(number, fine, wrong[0][1].strip().splitlines()[-1] if wrong else "" if fine else "skipped")

    def _held(self, number: int) -> None:
        if number not in self._failed:
            self._tell(number, True, "")

    def _failure(self, number: int, failure: BaseException) -> None:
        self._failed.add(number)
        self._tell(number, False, description(failure)["error"])

    def _tell(self, number: int, passed: bool, reason: str) -> None:
        send(self._channel, {"is": "case", "number": number, "passed": passed, "why": reason[:_SHOWN]})


def _tests(node: ast.stmt, asserting: set[str]) -> bool:
    inner = list(ast.walk(node))
    return any(isinstance(one, ast.Assert) for one in inner) or any(
        isinstance(one, ast.Call) and isinstance(one.func, ast.Name) and one.func.id in asserting for one in inner
    )


def _call(name: str, *arguments: ast.expr) -> ast.stmt:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def _called(tree: ast.Module) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _foreign(tree: ast.Module) -> set[str]:
    """Names that the tests use and neither they nor Python define: those of the candidate. It cannot add to them."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return used - _bound(tree) - set(dir(builtins)) - {"__name__", "__file__"}


def _bound(tree: ast.Module) -> set[str]:
    return set(_bindings(tree))


def _bindings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
