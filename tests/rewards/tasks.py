"""Small programming tasks with hidden cases, and honest solutions of them in many styles.

A task is a name, parameters and a body that is right; arguments are drawn. Styles wrap the body as people and models
do, so that thirty tasks make three hundred solutions that none may refuse.
"""

from __future__ import annotations

import inspect
import random
import string
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.rewards import solutions


@dataclass(frozen=True)
class Task:
    """A function to write; `draw` gives arguments for it."""

    name: str
    params: str
    body: str
    draw: Callable[[random.Random], tuple[Any, ...]]

    @property
    def source(self) -> str:
        """The function, right."""
        return f"def {self.name}({self.params}):\n{textwrap.indent(self.body, '    ')}\n"

    def cases(self, seed: int, count: int = 6) -> list[dict[str, Any]]:
        """Cases with different arguments; they are made by our own solution, here."""
        rng, space, found = random.Random(f"{self.name} {seed}"), dict[str, Any](), list[dict[str, Any]]()
        exec(self.source, space)
        while len(found) < count:
            arguments = list(self.draw(rng))
            if all(arguments != case["arguments"] for case in found):
                expected = space[self.name](*_copied(arguments))
                found.append({"function": self.name, "arguments": arguments, "expected": expected})
        return found


def _copied(arguments: list[Any]) -> list[Any]:
    return [_copied(each) if isinstance(each, list) else each for each in arguments]


def _numbers(rng: random.Random, least: int = 2, most: int = 12, low: int = -50, high: int = 50) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(least, most))]


def _word(rng: random.Random, letters: str = string.ascii_lowercase, least: int = 2, most: int = 9) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(least, most)))


def _words(rng: random.Random) -> str:
    return " ".join(_word(rng) for _ in range(rng.randint(3, 7)))


def _rows(rng: random.Random, high: int = 5) -> list[list[int]]:
    count, size = rng.randint(2, high), rng.randint(2, high)
    return [[rng.randint(-9, 9) for _ in range(size)] for _ in range(count)]


def _square(rng: random.Random) -> list[list[int]]:
    size = rng.randint(2, 6)
    return [[rng.randint(-9, 9) for _ in range(size)] for _ in range(size)]


def _two(rng: random.Random) -> tuple[list[int], list[int]]:
    size = rng.randint(2, 8)
    return ([rng.randint(-9, 9) for _ in range(size)], [rng.randint(-9, 9) for _ in range(size)])


DRAWS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    "add_all": lambda r: (_numbers(r),),
    "largest_gap": lambda r: (_numbers(r),),
    "count_vowels": lambda r: (_words(r),),
    "reverse_words": lambda r: (_words(r),),
    "gcd_of": lambda r: (r.randint(1, 999) * 6, r.randint(1, 999) * 6),
    "next_prime": lambda r: (r.randint(10, 5000),),
    "fib": lambda r: (r.randint(5, 60),),
    "flatten": lambda r: (_rows(r),),
    "rotate": lambda r: (_numbers(r), r.randint(1, 30)),
    "dedupe": lambda r: (_numbers(r, 5, 15, 0, 9),),
    "running_max": lambda r: (_numbers(r),),
    "deepest": lambda r: (_word(r, "(()", 4, 14),),
    "to_roman": lambda r: (r.randint(1, 399),),
    "digit_sum": lambda r: (r.randint(10, 10**9),),
    "merge_sorted": lambda r: (sorted(_numbers(r)), sorted(_numbers(r))),
    "shared_letters": lambda r: (_word(r, "abcdefg"), _word(r, "abcdefg")),
    "transpose": lambda r: (_rows(r),),
    "dot": _two,
    "insert_at": lambda r: (sorted(_numbers(r, 5, 20)), r.randint(-50, 50)),
    "caesar": lambda r: (_words(r), r.randint(1, 25)),
    "histogram": lambda r: (_word(r, "abcd", 3, 12),),
    "longest_word": lambda r: (_words(r),),
    "collatz": lambda r: (r.randint(2, 9999),),
    "power_mod": lambda r: (r.randint(2, 50), r.randint(2, 200), r.randint(3, 997)),
    "chunk": lambda r: (_numbers(r, 5, 14), r.randint(2, 4)),
    "second_largest": lambda r: ([*_numbers(r, 4, 9), 90, 91],),
    "run_length": lambda r: (_word(r, "ab", 4, 14),),
    "trace": lambda r: (_square(r),),
    "mean_of": lambda r: (_numbers(r),),
    "edit_distance": lambda r: (_word(r, "abc", 3, 8), _word(r, "abc", 3, 8)),
    "cover": lambda r: ([[a, a + r.randint(1, 9)] for a in _numbers(r, 2, 6, 0, 30)],),
    "titles": lambda r: (_words(r),),
}


def _task(name: str) -> Task:
    source = inspect.getsource(getattr(solutions, name))
    head, _, body = source.partition("\n")
    return Task(name, head.partition("(")[2].rpartition(")")[0], textwrap.dedent(body).rstrip(), DRAWS[name])


TASKS = tuple(map(_task, DRAWS))


def honest(task: Task) -> Iterator[tuple[str, str]]:
    """The task solved in every style: (style, answer)."""
    first = task.params.split(",")[0]
    inner = task.source.replace(f"def {task.name}(", "def solve(")
    nested = textwrap.indent(inner, "    ")
    plain = task.source
    yield "bare", plain
    yield "fenced", f"Here is my solution:\n\n```python\n{plain}```\n\nIt runs in linear time."
    typed = "(" + ", ".join(f"{name.strip()}: Any" for name in task.params.split(",")) + ") -> Any:"
    yield "typed", _fence("from typing import Any\n\n\n" + plain.replace(f"({task.params}):", typed, 1))
    words = '    """Return the result.\n\n    The judge of style may like this.\n    """\n'
    title = f'"""Solves {task.name}: 3 of 3 cases of mine are right."""\n\n'
    yield "documented", _fence(title + plain.replace("):\n", f"):\n{words}", 1))
    yield "delegating", _fence(f"{inner}\n\ndef {task.name}({task.params}):\n    return solve({task.params})")
    yield "static method", _fence(
        f"class Solution:\n    @staticmethod\n{nested}\n\n"
        f"def {task.name}({task.params}):\n    return Solution.solve({task.params})"
    )
    yield "nested", _fence(f"def {task.name}({task.params}):\n{nested}\n    return solve({task.params})")
    yield "script", _fence(
        f"import sys\n\n\n{plain}\n\ndef main():\n    print('ready', {task.name}.__name__)\n    sys.exit(0)\n\n\n"
        "if __name__ == '__main__':\n    main()"
    )
    yield "guarded", _fence(
        f"def {task.name}({task.params}):\n    if {first} is None:\n        raise ValueError('nothing was given')\n"
        f"    try:\n{textwrap.indent(task.body, ' ' * 8)}\n    except IndexError as failure:\n"
        "        raise ValueError('too short') from failure"
    )
    yield "imports", _fence(
        "import collections\nimport functools\nimport itertools\nimport math\nimport random\nimport re\nimport time\n\n"
        f"LIMIT = math.inf\nrandom.seed(0)\nbegan = time.perf_counter()\n\n\n{plain}"
    )
    yield "class with eq", _fence(
        "from dataclasses import dataclass\n\n\n@dataclass(order=True)\nclass Box:\n    value: object\n\n\n"
        "class Key:\n    def __init__(self, value):\n        self.value = value\n\n    def __eq__(self, other):\n"
        "        return isinstance(other, Key) and self.value == other.value\n\n    def __hash__(self):\n"
        f"        return hash(self.value)\n\n\n{inner}\n\n"
        f"def {task.name}({task.params}):\n    return Box(solve({task.params})).value"
    )
    yield "thought", f"<think>First I try {task.name}...\n```python\nwrong(\n```\n</think>\n{_fence(plain)}"


def _fence(program: str) -> str:
    return f"```python\n{program}\n```"
