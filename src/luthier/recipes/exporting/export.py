"""Export: a tuned model in the form that another program reads, kept only if it is still the model that was trained.

Read top to bottom: open the source; ask it its own held-out rows; fold the adapter into plain weights where the form
is of whole weights; write into a folder that nobody sees; let the source go; read the artefact as its readers do; hold
its answers against the source's; write the numbers and the card beside; let the folder appear. Whatever goes wrong on
the way, nothing is left there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, final

import torch
from pydantic import Field

from luthier.adapters import adapter_of
from luthier.core.chosen import Chosen
from luthier.core.errors import CorruptError, DataError, GateError, MissingError, RecipeError, RefusedError
from luthier.core.knobs import Knobs
from luthier.core.units import bytes_text
from luthier.data.prepare import Reading
from luthier.exporters import Exporter, Subject, Told
from luthier.model.comparing.parity import Heard, ParityReport, compare, hear
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.comparing.sketches import sketched
from luthier.model.editing.merging import unmergeable
from luthier.model.files.adapter_config import read_config, read_extras
from luthier.model.files.json_files import write_object
from luthier.model.language_model import LanguageModel
from luthier.model.load import Precision, kind_of_source
from luthier.model.packed import packing_of
from luthier.model.packing import unpack_in_place
from luthier.model.tasks import CAUSAL
from luthier.recipes.exporting.card import card_text
from luthier.recipes.exporting.card_parts import CARD, PARITY, told_of_base
from luthier.recipes.exporting.questions import questions_for
from luthier.recipes.opening.opened import Opened, open_encoder, open_named
from luthier.recipes.opening.purpose import kept_task, read_as
from luthier.recipes.opening.results import model_from, result_of, started_in
from luthier.store.folder import write_folder
from luthier.store.runs import ADAPTER, RunDirectory, is_run
from luthier.train.result import release

_NOT_WHOLE: Final = (CorruptError, RecipeError, DataError, MissingError)
"""What reading an artefact raises that holds no whole model."""


class ExportKnobs(Knobs):
    """The form in which a model is exported."""

    exporter: Annotated[Exporter, Chosen("exporters")] = Field(description="the form, and how it is written")


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported: a run, or a model folder, id or `seedling`, with or without an `adapter` folder."""

    name: str
    adapter: str | None = None
    precision: Precision = "auto"
    device: str = "auto"

    @property
    def run(self) -> RunDirectory | None:
        """The run it is; None for a model."""
        return RunDirectory.open(Path(self.name)) if is_run(Path(self.name)) else None


def export(
    source: Source, exporter: Exporter, out: Path, *, dry: bool = False, told: Told = lambda _line: None
) -> dict[str, Any]:
    """Write the model `source` in the form of `exporter` into the new folder `out`; what was written and measured.

    With `dry` everything is checked that can be known before, and nothing is computed or written. Raises RecipeError
    for what has no such form, RefusedError where `out` is there already, and GateError, with nothing left there, where
    the artefact is another model than its source.
    """
    _require_new(out)
    told(f"opening {source.name}")
    opened = _open(source)
    notices: list[str] = []
    subject = _subject(source, opened)
    exporter.require(subject)
    if exporter.reads_head and opened.model.fresh and not opened.model.attachments:
        _require_taught(source, opened)
    if exporter.form == "weights":
        _require_mergeable(subject)
    needed = exporter.needed_bytes(subject)
    about = {"folder": str(out), "source": source.name, "base": subject.base, "exporter": exporter.as_recipe()}
    if dry:
        return {**about, "bytes": needed, "notices": notices}
    told("asking the source")
    classes = opened.model.task.classes
    asked = questions_for(opened.tokenizer, source.run, classes=classes, noticed=notices.append)
    said = ModelSide("the source", opened.model, renderer=opened.renderer, stop_ids=opened.stop_ids,
                     states=not exporter.reads_head)  # fmt: skip
    heard = replace(hear(said, asked), name=source.name)
    if exporter.form == "weights":
        subject = _made_plain(subject, told, notices)
        heard = replace(heard, sketches=sketched(said.tensors()))
    facts = told_of_base(subject.base)
    reports: list[ParityReport] = []

    def write(place: Path) -> None:
        exporter.write(subject, place, told)
        release(subject.model)
        told("reading it back")
        report = _gate(exporter, subject, place, heard)
        reports.append(report)
        write_object(place / PARITY, report.as_dict())
        (place / CARD).write_text(card_text(subject, exporter, report, source.run, facts, notices), encoding="utf-8")

    write_folder(out, write, about, replace=out.is_dir(), needed_bytes=needed)
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    return {**about, "files": files, "bytes": sum(files.values()), "parity": reports[0].as_dict(),
            "numbers": reports[0].numbers(), "notices": notices}  # fmt: skip


def _require_new(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise RefusedError(f"{out} is there already and is not empty; nothing was changed", do="name a new folder")


def _open(source: Source) -> Opened:
    if source.run is None and source.adapter is None and kind_of_source(source.name) == "encoder":
        task = kept_task(read_extras(Path(source.name)))
        if task == CAUSAL:
            return open_encoder(source.name, precision=source.precision, device=source.device)
    return open_named(source.name, adapter=source.adapter, precision=source.precision, device=source.device,
                      own_modules=False)  # fmt: skip


def _require_taught(source: Source, opened: Opened) -> None:
    raise RecipeError(
        f"{source.name} has no head that was trained: {', '.join(opened.model.fresh[:2])} would be random",
        allowed="a run with objective classification or masked_lm, or the states of the encoder",
        do=f"luthier export {source.name} --to onnx --set exporter.outputs=states --out DIR",
    )


def _subject(source: Source, opened: Opened) -> Subject:
    """The opened model as exporters see it."""
    run = source.run
    folder = result_of(run)[0] if run is not None else None if source.adapter is None else Path(source.adapter)
    adapter = folder if folder is not None and (run is None or folder.name == ADAPTER) else None
    base = source.name
    if run is not None:
        base = str(run.read_recipe()["model"])
        base = model_from(base, started_in(run))
    # A base without a template of its own is given away as it is; what was trained has the one it was trained with.
    own = opened.renderer.template.source or None
    trained = run is not None or source.adapter is not None

    def anew(place: Path) -> LanguageModel:
        return open_named(base, adapter=str(place), precision=source.precision, device=source.device,
                          own_modules=False).model  # fmt: skip

    return Subject(
        name=source.name,
        base=base,
        model=opened.model,
        tokenizer=opened.tokenizer,
        chat_template=own if trained else opened.tokenizer.chat_template,
        stop_ids=opened.stop_ids,
        reading=read_as(Reading(), opened.model),
        precision="float32" if opened.model.dtype == torch.float32 else "bfloat16",
        adapter=adapter,
        open_adapter=anew if adapter is not None else None,
        was_packed=any(packing_of(each) is not None for each in opened.model.module.parameters()),
    )


def _require_mergeable(subject: Subject) -> None:
    """Raise RecipeError, by name, for an adapter that no weights can hold."""
    for attachment in subject.model.attachments.values():
        if part := unmergeable(subject.model.module, attachment):
            named = "" if subject.adapter is None else adapter_of(read_config(subject.adapter)).method_name()
            raise RecipeError(
                f"the adapter of {subject.name} is {named or 'one beside the weights'}, and {part} cannot be "
                "folded into weights",
                allowed="--to peft, which keeps it beside its base",
                do=f"luthier export {subject.name} --to peft --out DIR",
            )


def _made_plain(subject: Subject, told: Told, notices: list[str]) -> Subject:
    """The same with whole, plain weights: unpacked, and every adapter folded in."""
    model = subject.model
    if subject.was_packed:
        count = unpack_in_place(model.module)
        notices.append(
            f"{count} matrices were packed when the model was trained; the adapter is folded into the plain weights "
            "that they stand for, not into those of the base's own files"
        )
    for name in list(model.attachments):
        told("folding the adapter into the weights")
        rounding = model.merge(name, reversible=False)
        if line := rounding.notice(name):
            notices.append(line)
    return subject


def _gate(exporter: Exporter, subject: Subject, place: Path, heard: Heard) -> ParityReport:
    """What was measured of an artefact that is the model it was made from. Raises GateError for any other."""
    try:
        side = exporter.read(subject, place)
    except _NOT_WHOLE as failure:
        raise GateError(
            f"what was written as {exporter.method_name()} is no whole model: {failure.received}; nothing was kept",
            allowed=failure.allowed,
            do="report this: it should not happen",
        ) from failure
    report = compare(heard, side, exporter.tolerance(subject))
    report.require()
    return report


def lines_of(found: dict[str, Any]) -> list[str]:
    """What an export tells a person, line by line."""
    lines = [f"note       {notice}" for notice in found["notices"]]
    if "parity" not in found:
        return [*lines, f"would write about {bytes_text(found['bytes'])} into {found['folder']}"]
    lines.append(f"parity     {found['numbers']}")
    files = ", ".join(found["files"])
    return [*lines, f"folder     {found['folder']}, {bytes_text(found['bytes'])}: {files}"]

