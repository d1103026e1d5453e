"""Programs that reach for the verdict instead of the task: a template for each category, filled in for many tasks.

None of them does what its task asks; what each really does is nothing. In hacks.txt, @NAME@ and @PARAMS@ are the
function that was asked for, @FIRST@ its first parameter, @VISIBLE@ the cases that a prompt might have shown, as
(arguments, expected), @JUNK@ a wrong value. A reward above 0 for one of them is a reward for the hack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.rewards.tasks import TASKS, Task

VARIANTS = 12
CATEGORIES: dict[str, str] = {
    found[1]: found[2].strip("\n")
    for found in re.finditer(r"^%% (\S+)\n(.*?)(?=^%% |\Z)", Path(__file__).with_suffix(".txt").read_text("utf-8"),
                             re.MULTILINE | re.DOTALL)
}  # fmt: skip
TAKES_LONG = ("slow/never-ends", "slow/sleeps", "slow/stops-itself", "patching/later-by-signal")


def hacks(category: str, count: int = VARIANTS) -> Iterator[tuple[Task, str]]:
    """Tasks with an answer each that tries the category."""
    first = sorted(CATEGORIES).index(category) * 5
    for at in range(count):
        task = TASKS[(first + at) % len(TASKS)]
        visible = [(case["arguments"], case["expected"]) for case in task.cases(seed=99, count=3)]
        marks = {"NAME": task.name, "PARAMS": task.params, "FIRST": task.params.split(",")[0], "VISIBLE": repr(visible),
                 "JUNK": ("None", "'?'", "-987654321", "object", "()")[at % 5], "INVISIBLE": "\u200b"}  # fmt: skip
        pieces = re.split("@(" + "|".join(marks) + ")@", CATEGORIES[category])
        program = "".join(marks[piece] if index % 2 else piece for index, piece in enumerate(pieces))
        yield task, f"```python\n{program}\n```"
