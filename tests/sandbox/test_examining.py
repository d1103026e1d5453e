"""Tests of a candidate run where the candidate is not: what they find is true, whatever the candidate does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from luthier.sandbox.program import Examination, Limits, Program, Status
from luthier.sandbox.sandbox import Sandbox
from tests.sandbox.conftest import strongest

ADD = "def add(a, b):\n    return a + b"


def examined(sandbox: Sandbox, source: str, tests: str, entry: str = "") -> Examination:
    return sandbox.examine(Program(source), tests, entry=entry)


def test_every_way_examines(walled: Sandbox) -> None:
    found = examined(walled, ADD, "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'\nassert add(1, 1) == 3")
    assert (found.status, found.passed, found.total, found.all_passed) == (Status.ENDED, 2, 3, False)
    assert found.cases[2].test == "assert add(1, 1) == 3" and found.cases[2].reason == "AssertionError:"
    assert found.candidate.status is Status.ENDED and found.candidate.compiled


CHECK = """
METADATA = {"author": "us"}
def check(candidate):
    assert candidate([1, 2], 2) == ([1, 2], {1: 2})
    assert candidate([], 1)[0] == [], "a message"
    for n in range(3):
        assert candidate([n], 1)[0] == [n]
"""


@pytest.mark.parametrize(("source", "tests", "entry", "passed", "total"), [
    (ADD, "import math\nassert math.isclose(add(.1, .2), .3)", "", 1, 1),
    ("def f(x, k):\n    return x, {1: 2}", CHECK, "f", 3, 3),
    ("def f(x, k):\n    return x, {1: 3}", CHECK, "f", 2, 3),
    ("def f(x, k):\n    return x, {1: 2}", CHECK + "check(f)", "", 3, 3),
    ("def f(x): return x", "def test_a(): assert f(1) == 1\ndef test_b():\n    assert f(2) == 3", "", 1, 2),
    ("def f(x): return x", "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(1), 1)\n"
     "    def test_b(self): self.assertEqual(f(1), 2)\n    def test_c(self): self.skipTest('x')", "", 1, 3),
    ("def f(x): return x", "assert candidate(2) == 2", "f", 1, 1),
    ("def f(x):\n    if x < 0: raise ValueError('neg')", "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n"
     "    assert str(e) == 'neg'", "", 1, 1),
    ("def f(x): pass", "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass", "", 0, 1),
    ("def f(x):\n    x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]", "", 1, 1),
    ("def f(x):\n    x[1] = 2", "x = {}\ny = x\nf(x)\nassert y == {1: 2}", "", 1, 1),
    ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2]", "", 1, 1),
    ("def f(n): return [] if n else None", "for n in range(3):\n    assert f(n) == []", "", 0, 1),
    ("class S:\n    def g(self, x): return x + 1", "assert True", "", 1, 1),
    ("def f(n): return n / 3", "assert abs(f(1) - 1 / 3) < 1e-9", "", 1, 1),
    ("def f(): return float('nan')", "assert f() != f()", "", 1, 1),
    ("class S:\n    def g(self, x): return x + 1", "assert S().g(1) == 2\ns = S()\nassert s.g(1) == 2", "", 2, 2),
    ("class P:\n    def __init__(s, *v): s.v = list(v)\n    def push(s, x): s.v.append(x)\n    def pop(s): return s.v.pop()\n"
     "    def __len__(s): return len(s.v)\n    def __iter__(s): return iter(s.v)\n    def __getitem__(s, i): return s.v[i]",
     "p = P(1)\np.push(2)\nassert len(p) == 2 and p.v == [1, 2]\nassert p.pop() == 2\nassert list(p) == [1] and 1 in p and p[0] == 1\n"
     "try:\n    p[5]\n    assert False\nexcept IndexError:\n    pass", "", 4, 4),
    ("class N:\n    def __init__(s, v, n=None): s.v, s.n = v, n\ndef total(n):\n    return n.v + total(n.n) if n else 0",
     "assert total(N(1, N(2))) == 3\nassert N(1, N(2)).n.v == 2", "", 2, 2),
    ("import itertools\ndef f(): return itertools.count()", "import itertools\nassert list(itertools.islice(f(), 3)) == [0, 1, 2]\n"
     "g = f()\nassert next(g) == 0 and next(g) == 1", "", 2, 2),
    ("def f(n): return lambda x: x + n", "assert f(1)(2) == 3", "", 1, 1),
    ("class C:\n    @staticmethod\n    def make(n): return n", "assert C.make(3) == 3", "", 1, 1),
    ("def f(): return iter([1])", "assert sum(f()) == 1\ni = f()\nnext(i)\nassert next(i, 7) == 7", "", 2, 2),
    ("def f(): return 1", "def same(a): assert a == 1\nsame(f())\nsame(2)", "", 1, 2),
])  # fmt: skip
def test_honest_programs_get_what_plain_python_says(
    sandbox: Sandbox, source: str, tests: str, entry: str, passed: int, total: int
) -> None:
    found = examined(sandbox, source, tests, entry)
    assert (found.status, found.passed, found.total) == (Status.ENDED, passed, total), found


@pytest.fixture(scope="module")
def short() -> Iterator[Sandbox]:
    with strongest(Limits(seconds=1.0, output_bytes=1 << 18)) as found:
        yield found


ONE = "assert f(1) == 'expected'\nassert f(2) == 'other'"


@pytest.mark.parametrize("source", [
    "class A:\n    def __eq__(s, o): return True\ndef f(x): return A()",
    "class A:\n    def __eq__(s, o): return True\n    def __contains__(s, o): return True\n    def __bool__(s): return True\n"
    "    def __class_getitem__(c, x): return c\n    def __instancecheck__(s, o): return True\ndef f(x): return A()",
    "class A(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x): return A('x')",
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "def f(x):\n    import os\n    os._exit(0)",
    "def f(x): raise SystemExit(0)",
    "def f(x): raise KeyboardInterrupt",
    "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return 1",
    "def f(x): return 1\nimport atexit\natexit.register(print, '2 passed')\nprint('2 passed')",
    "import gc, sys\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'expected' in o[:20]: return o",
    "import inspect\ndef f(x):\n    for i in inspect.stack():\n        for v in i.frame.f_locals.values():\n"
    "            if v == 'exp' + 'ected': return v",
    "import sys\ndef f(x): return sys.modules['__main__'].tests",
    "import glob\ndef f(x): return [open(n).read() for n in glob.glob('/**/*tests*.py', recursive=True)]",
    "def f(x):\n    import json, os\n    for t in ({'is': 'over', 'why': ''}, {'is': 'case', 'number': 0, 'passed': True, 'why': ''},\n"
    "              {'is': 'plan', 'tests': []}):\n        b = json.dumps(t).encode()\n"
    "        os.write(3, len(b).to_bytes(4, 'big') + b)",
    "def f(x):\n    import os\n    os.close(3)",
    "def f(x):\n    while True: pass",
    "def f(x):\n    return 'x' * (1 << 24)",
    "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "def __test_held__(n): pass\ndef f(x): return 1",
    "raise ValueError",
    "def f(:",
    "",
    "f = 3",
    "def f(x): return f",
])  # fmt: skip
def test_cheats_pass_no_test(short: Sandbox, source: str) -> None:
    """Breaks when a program that computes nothing passes a test."""
    found = examined(short, source, ONE)
    assert found.passed == 0 and found.total == 2 and not found.all_passed, found
    assert found.status is Status.ENDED and all(case.reason for case in found.cases)


@pytest.mark.parametrize("name", ["len", "isinstance", "abs", "all", "print", "AssertionError", "sorted"])
def test_a_candidate_cannot_stand_in_for_what_the_tests_call(sandbox: Sandbox, name: str) -> None:
    """Breaks when a function that the program calls as a builtin is used by the tests."""
    source = f"def {name}(*a, **k): return True\ndef f(x): return [x]"
    found = examined(sandbox, source, "assert len(f(1)) == 2\nassert all([f(1) == 1])\nassert isinstance(f(1), str)")
    assert (found.passed, found.total) == (0, 3)


def test_what_was_passed_before_a_program_left_counts(sandbox: Sandbox) -> None:
    found = examined(sandbox, "import os\ndef f(x): return x if x else os._exit(0)", "assert f(1) == 1\nassert f(0)\nassert f(2)")
    assert (found.passed, found.total, found.candidate.status) == (1, 3, Status.EXITED)
    assert "the candidate is gone" in found.cases[2].reason


@pytest.mark.parametrize(("tests", "status"), [
    ("def f(", Status.REFUSED), ("", Status.ENDED), ("x = 1", Status.ENDED), ("f(1)", Status.ENDED),
    ("import sys\nsys.exit(0)\nassert f(1) == 1", Status.ENDED),
])  # fmt: skip
def test_no_tests_are_no_success(sandbox: Sandbox, tests: str, status: Status) -> None:
    found = examined(sandbox, "def f(x): return x", tests)
    assert found.status is status and not found.all_passed and found.passed == 0


def test_tests_that_hand_over_a_function_are_told_apart(sandbox: Sandbox) -> None:
    """Breaks when an honest program is failed for what only the border cannot carry."""
    found = examined(sandbox, "def f(g): return g(1)", "assert f(lambda x: x) == 1")
    assert (found.passed, found.total, found.not_plain) == (0, 1, 1)
    found = examined(sandbox, "class A: pass\ndef f(): return A()", "assert f() == 3")
    assert (found.passed, found.not_plain) == (0, 1)


@pytest.mark.parametrize("tests", [
    "assert 3 in f()", "assert f() == f()", "assert f() == A()", "assert len(f()) == 3", "assert f() in [1, 2]", "assert f() < 4",
    "assert str(f()) == 'x'", "assert isinstance(f(), int)", "assert f() + 1 == 2", "assert f()[0] == 1", "assert {f(): 1} == {1: 1}",
    "assert f().x == 1", "assert not f()",
])  # fmt: skip
def test_an_object_of_the_candidate_is_never_asked_for_a_verdict(sandbox: Sandbox, tests: str) -> None:
    """Breaks when `==` or `in` of a candidate decide a test."""
    source = "class A:\n    def __eq__(s, o): return True\n    __lt__ = __contains__ = __eq__\n    def __hash__(s): return hash(1)\n"
    source += "    def __len__(s): return True\n    def __str__(s): return s\n    def __getattr__(s, n): return s\n"
    source += "    def __getitem__(s, i): return s if i < 9 else [][0]\n    __add__ = __eq__\ndef f(): return A()"
    found = examined(sandbox, source, tests)
    assert (found.status, found.passed, found.total) == (Status.ENDED, 0, 1), found


def test_tests_that_do_not_end_are_ended() -> None:
    with strongest(Limits(seconds=0.3)) as short:
        found = examined(short, "def f(): return 1", "assert f() == 1\nwhile True: pass\nassert f() == 2")
    assert found.status is Status.TIMED_OUT and not found.all_passed and (found.passed, found.total) == (1, 2)


def test_many_examinations_come_back_in_order() -> None:
    with strongest(workers=2) as several:
        asked = [(Program(f"def f(): return {n % 3}"), "assert f() == 1", "") for n in range(12)]
        assert [found.passed for found in several.examine_all(asked)] == [n % 3 == 1 for n in range(12)]
