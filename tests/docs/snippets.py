"""The pages and their snippets, and a small shell that runs them in this process.

A page is read from top to bottom in one empty folder, so later snippets see the files of earlier ones. `luthier`
commands run in this process, because importing torch anew for each would take most of a minute; everything else goes
to bash. What is only for a whole checkout or the network (make, pip, ...) is not run: its targets and files must exist.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
PAGES = (HOME / "README.md", HOME / "CONTRIBUTING.md", *sorted((HOME / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("make", "python", "pip", "git")
HUB = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")
ENCODER, BOTH = "google-bert/bert-base-uncased", "google-t5/t5-small"
"""Hub models the pages name; tiny models stand in for them: a decoder, an encoder, an encoder-decoder."""


@dataclass(frozen=True)
class Snippet:
    """A fenced block: its language, its text, and the line it begins in."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """One command of a bash snippet and the exit code the page promises (`# exit 65`)."""

    text: str
    expected: int

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def snippets(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [Snippet(found[1], found[2], text[: found.start()].count("\n") + 1) for found in FENCE.finditer(text)]


def commands(script: str) -> Iterator[Command]:
    """The commands of a bash snippet: a line each, a here-document with the line that opens it."""
    lines = iter(script.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        whole = [line]
        if here := re.search(r"<<'(\w+)'", line):
            while whole[-1] != here[1]:
                whole.append(next(lines))
        expected = re.search(r"# exit (\d+)$", line)
        yield Command("\n".join(whole), int(expected[1]) if expected else 0)


def bash(command: Command, folder: Path) -> str:
    """Run a command that is not luthier's in bash; what it printed."""
    done = subprocess.run(["bash", "-euc", command.text], cwd=folder, capture_output=True, text=True, timeout=20)
    assert done.returncode == command.expected, f"{command.text}\n{done.stderr}"
    return done.stdout


def there(command: Command) -> None:
    """The targets and files of a command that is not run exist."""
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (HOME / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"the Makefile has no {words[1:]}"
    if words[0] == "python":
        assert (HOME / words[1]).is_file(), f"there is no {words[1]}"


def with_stand_ins(text: str, models: Mapping[str, Path]) -> str:
    """`text` with hub models replaced by folders."""
    for name, folder in models.items():
        text = re.sub(re.escape(name) + r"(?![\w.-])", str(folder), text)
    return text
