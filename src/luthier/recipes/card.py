"""The model card: what a stranger has to know of an artefact, from the files of its run and nothing else.

Idea: whoever finds the folder later asks what it was made from, with what, by which command, whether it got better and
at what, what is not known of it, and whether this copy is the model that was trained. All of it stands in the run's
manifest, recipe and summary. Equal runs have equal cards: no date, no path of this machine's folders, no figure that
was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, final

import yaml

from luthier.core.errors import LuthierError
from luthier.core.units import count_text
from luthier.data.hub import ModelFiles
from luthier.exporters import Exporter, Subject
from luthier.model.load import resolve_source
from luthier.model.parity import ParityReport
from luthier.model.sources import SEEDLING
from luthier.recipes.opened import result_of
from luthier.store.runs import RunDirectory

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE: Final = re.compile(r"^license:\s*[\"']?([\w.+-]{1,60})[\"']?\s*$", re.MULTILINE)
_TAGS: Final = {"causal_lm": "text-generation", "seq2seq_lm": "text2text-generation", "masked_lm": "fill-mask",
                "sequence_classes": "text-classification", "token_classes": "token-classification",
                "scores": "text-classification"}  # fmt: skip
_READ: Final = 65_536
_LIMITS: Final = (
    "The losses are of rows like those it was trained on, and say nothing of other tasks.",
    "Whatever the base model gets wrong, invents or repeats, this one may too; nothing here has tested its safety.",
)


@final
@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base: its `license` (empty where its own card does not say), and whether the hub has it."""

    license: str
    on_hub: bool


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


def card_text(
    subject: Subject,
    exporter: Exporter,
    report: ParityReport,
    run: RunDirectory | None,
    base: BaseFacts,
    notices: Sequence[str],
) -> str:
    """The card in Markdown, with the front matter that the hub reads."""
    title = Path(subject.name).name or subject.name
    use = exporter.usage(subject).replace("FOLDER", ".").replace(subject.base, _base_name(subject, base))
    parts = [
        f"---\n{yaml.safe_dump(_front(subject, exporter, base), sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        _what(subject, exporter, run, base),
        f"## Use\n\nIn this folder:\n\n{use}",
    ]
    if run is not None:
        parts += _of_run(run)
    parts += ["## Limits\n\n" + "".join(f"- {line}\n" for line in [*_LIMITS, *notices]), _parity(report)]
    return "\n".join(parts)


def _front(subject: Subject, exporter: Exporter, base: BaseFacts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if base.on_hub:
        found["base_model"] = subject.base
    if base.license:
        found["license"] = base.license
    found["library_name"] = exporter.library
    found["pipeline_tag"] = _TAGS[subject.model.task.name]
    found["tags"] = ["luthier"]
    return found


def _what(subject: Subject, exporter: Exporter, run: RunDirectory | None, base: BaseFacts) -> str:
    name = _base_name(subject, base)
    made = "a copy of" if run is None and subject.adapter is None else "a fine-tune of"
    form = "the adapter alone, which needs its base" if exporter.form == "adapter" else "whole weights"
    license_ = base.license or "not known: its card does not say"
    return (f"This is {made} `{name}`, written as {exporter.method_name()} by luthier {metadata.version('luthier')}: "
            f"{form}. License of the base: {license_}.\n")  # fmt: skip


def _base_name(subject: Subject, base: BaseFacts) -> str:
    return subject.base if subject.base == SEEDLING or base.on_hub else Path(subject.base).name


def _nameless(value: Any) -> Any:
    """A recipe without the folders of this machine: of an absolute path the name is kept."""
    if isinstance(value, Mapping):
        return {key: _nameless(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nameless(each) for each in value]
    absolute = isinstance(value, str) and "\n" not in value and Path(value).is_absolute()
    return (Path(value).name or value) if absolute else value


def _of_run(run: RunDirectory) -> Iterator[str]:
    """Data, training, and what came of it."""
    _, manifest = result_of(run)
    facts, summary, recipe = manifest.facts, run.read_json("summary.json"), run.read_recipe()
    data = facts["data"]
    yield "## Data\n\n" + "".join(
        f"- `{Path(name).name}`: {file['rows']:,} rows, {file['bytes']:,} bytes\n"
        for name, file in sorted(data["files"].items())
    ) + (f"\nDigest of the rows as they were read: `{data['digest']}`. {summary['data']['train_views']:,} were trained "
         f"on, {summary['data']['held_out_views']:,} held out. {facts['trained_tokens']:,} tokens carried loss, of "
         f"{count_text(summary['tokens']['total'])} in all.\n")  # fmt: skip
    recipe = _nameless({key: value for key, value in recipe.items() if key != "run"})
    yield (f"## Training\n\n{facts['steps']:,} steps; {count_text(summary['trainable_parameters'])} of "
           f"{count_text(summary['parameters'])} parameters were trained. `luthier train recipe.yaml`, with this "
           f"recipe and seed {recipe.get('seed', 0)}, on base weights with the digest `{facts['base_digest']}`:\n\n"
           f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```\n")  # fmt: skip
    yield "## Before and after\n\n| on held-out rows | base | this model |\n|---|---|---|\n" + _table(summary)


def _table(summary: Mapping[str, Any]) -> str:
    loss = summary["loss"]
    rows = [] if loss["eval"] is None else [("loss", loss["eval_first"], loss["eval"])]
    rows += [(name, before, after) for name, (before, after) in sorted(summary.get("metrics", {}).items())]
    if not rows:
        return "| nothing was held out | | |\n"
    return "".join(f"| {name} | {_number(before)} | {_number(after)} |\n" for name, before, after in rows)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _parity(report: ParityReport) -> str:
    """The numbers of the gate."""
    lines = [f"| prompts, tokens | {report.prompts}, {report.tokens} |",
             f"| max \\|logit difference\\| | {report.max_difference:.3g} (spread of the logits {report.spread:.3g}) |"]
    if report.mean_kl is not None and report.greedy is not None:
        lines += [f"| mean KL | {report.mean_kl:.3g} nats |", f"| greedy agreement | {report.greedy} |"]
    if report.rows:
        lines.append(f"| training rows that render to the same ids | {report.rows_equal} of {report.rows} |")
    return ("## Parity\n\nThe files were read back and compared with the model they were made from, before they were "
            f"given a name. Let pass for {report.tolerance.bounds()}.\n\n| measured | |\n|---|---|\n"
            + "\n".join(lines) + "\n")  # fmt: skip
