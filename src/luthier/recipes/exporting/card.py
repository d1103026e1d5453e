"""The model card: what a stranger has to know of an artefact, from the files of its run and nothing else.

Idea: whoever finds the folder later asks what it was made from, with what, by which command, whether it got better and
at what, what is not known of it, and whether this copy is the model that was trained. All of it stands in the run's
manifest, recipe and summary. Equal runs have equal cards: no date, no path of this machine's folders, no figure that
was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from luthier.core.units import count_text
from luthier.exporters import Exporter, Subject
from luthier.model.comparing.parity import ParityReport
from luthier.recipes.exporting.card_parts import (
    INHERITED,
    UNKNOWN,
    BaseFacts,
    headed,
    limits,
    nameless,
    parity_section,
    yaml_block,
)
from luthier.recipes.opening.results import result_of
from luthier.store.runs import RunDirectory

_TAGS: Final = {"causal_lm": "text-generation", "seq2seq_lm": "text2text-generation", "masked_lm": "fill-mask",
                "sequence_classes": "text-classification", "token_classes": "token-classification",
                "scores": "text-classification"}  # fmt: skip
_LOSSES: Final = "The losses are of rows like those it was trained on, and say nothing of other tasks."


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
    use = exporter.usage(subject).replace("FOLDER", ".").replace(subject.base, base.shown(subject.base))
    parts = [
        headed(title, _front(subject, exporter, base)),
        _what(subject, exporter, run, base),
        f"## Use\n\nIn this folder:\n\n{use}",
    ]
    if run is not None:
        parts += _of_run(run)
    parts += [limits([_LOSSES, INHERITED, *notices]), parity_section(report.as_dict())]
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
    name = base.shown(subject.base)
    made = "a copy of" if run is None and subject.adapter is None else "a fine-tune of"
    form = "the adapter alone, which needs its base" if exporter.form == "adapter" else "whole weights"
    return (f"This is {made} `{name}`, written as {exporter.method_name()} by luthier {metadata.version('luthier')}: "
            f"{form}. License of the base: {base.license or UNKNOWN}.\n")  # fmt: skip


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
    recipe = nameless({key: value for key, value in recipe.items() if key != "run"})
    yield (f"## Training\n\n{facts['steps']:,} steps; {count_text(summary['trainable_parameters'])} of "
           f"{count_text(summary['parameters'])} parameters were trained. `luthier train recipe.yaml`, with this "
           f"recipe and seed {recipe.get('seed', 0)}, on base weights with the digest `{facts['base_digest']}`:\n\n"
           f"```yaml\n{yaml_block(recipe)}```\n")  # fmt: skip
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
