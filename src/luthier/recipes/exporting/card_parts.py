"""What all model cards are made of: what is known of a base, front matter, a recipe without paths, figures of a gate.

Light: a card is also written where no model was opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import yaml

from luthier.core.errors import LuthierError
from luthier.core.units import percent_text
from luthier.data.hub import ModelFiles
from luthier.model.files.sources import SEEDLING, resolve_source

CARD: Final = "README.md"
PARITY: Final = "parity.json"
INHERITED: Final = (
    "Whatever the base model gets wrong, invents or repeats, this one may too; nothing here has tested its safety."
)
UNKNOWN: Final = "not known: its card does not say"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE: Final = re.compile(r"^license:\s*[\"']?([\w.+-]{1,60})[\"']?\s*$", re.MULTILINE)
_READ: Final = 65_536


@final
@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base: its `license` (empty where its own card does not say), and whether the hub has it."""

    license: str
    on_hub: bool

    def shown(self, base: str) -> str:
        """What a card calls it: of a folder of this machine the name alone."""
        return base if base == SEEDLING or self.on_hub else Path(base).name


def told_of_base(base: str) -> BaseFacts:
    """What a base's own card says of its license."""
    on_hub = base != SEEDLING and not Path(base).exists() and _HUB_ID.fullmatch(base) is not None
    try:
        path = ModelFiles.of(resolve_source(base)).find("README.md")
        text = "" if path is None else _beginning(path)
    except LuthierError:
        # A card that cannot be had (no network) is a card that does not say.
        text = ""
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = _LICENSE.search(front)
    return BaseFacts(found[1] if found else "", on_hub)


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_READ).decode("utf-8", "replace")


def headed(title: str, front: Mapping[str, Any]) -> str:
    """The front matter that the hub reads, and the title."""
    return f"---\n{yaml_block(front)}---\n\n# {title}\n"


def yaml_block(values: Mapping[str, Any]) -> str:
    """Values as a reader types them."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def nameless(value: Any) -> Any:
    """A recipe without the folders of this machine: of an absolute path the name is kept."""
    if isinstance(value, Mapping):
        return {key: nameless(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [nameless(each) for each in value]
    absolute = isinstance(value, str) and "\n" not in value and Path(value).is_absolute()
    return (Path(value).name or value) if absolute else value


def limits(lines: Sequence[str]) -> str:
    """What is not known, or not to be expected."""
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def parity_section(report: Mapping[str, Any]) -> str:
    """The numbers of the gate, as its report tells them; or why there are none."""
    if report.get("not_compared"):
        return f"## Parity\n\nLogits were not compared: {report['not_compared']}.\n"
    lines = [f"| prompts, tokens | {report['prompts']}, {report['tokens']} |",
             f"| max \\|logit difference\\| | {report['max_difference']:.3g} (spread of the logits "
             f"{report['spread']:.3g}) |"]  # fmt: skip
    if report["mean_kl"] is not None and report["agreement"] is not None:
        sure = f", {percent_text(report['decided_agreement'])} of the {report['decided']} that are no near ties"
        same = f"{percent_text(report['agreement'])} of the tokens{sure if report['agreement'] < 1 else ''}"
        lines += [f"| mean KL | {report['mean_kl']:.3g} nats |", f"| greedy agreement | {same} |"]
    if report["rows"]:
        lines.append(f"| training rows that render to the same ids | {report['rows_equal']} of {report['rows']} |")
    return ("## Parity\n\nThe files were read back and compared with what they were made from, before they were "
            f"given a name. Let pass for {report['let_pass']}.\n\n| measured | |\n"
            "|---|---|\n" + "\n".join(lines) + "\n")  # fmt: skip
