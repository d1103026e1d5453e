"""The report of a run: one HTML file that says what came out, shows it, and holds what is needed to check it.

Idea: the report is a view. It reads the plain files of a run directory, never the run itself, so it can be written
again at any time and costs nothing while training. It loads nothing from anywhere: style, curves and the few lines of
script are inside. A file that is missing or cut short is named in the report; what is not known is never filled in.

Use when: a run has ended, was stopped or has failed, or when somebody wants to look while it goes on.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from luthier.core.errors import StorageError
from luthier.core.units import bytes_text, count_text, duration_text, percent_text
from luthier.store.files import write_text
from luthier.store.report_answers import clip, compare_answers
from luthier.store.report_curves import LOSS, Measure, curves_of, loss_text, measure_of
from luthier.store.report_feedback import feedback_of
from luthier.store.report_files import RunFiles, first_of, listing, mapping, number, read_run, step_of, text_of

REPORT: Final = "report.html"
_TEMPLATE: Final = "report.html.jinja"
_KNOBS: Final = 4
"""Knobs of a method that are told beside its name; all of them stand in the recipe."""
_STATUS: Final = {
    "finished": ("finished", "good"),
    "early-stopped": ("stopped early, as the held-out loss no longer fell", "good"),
    "out-of-time": ("stopped at the end of its time budget", "good"),
    "stopped": ("stopped on request", "open"),
    "running": ("not finished", "open"),
    "failed": ("failed", "bad"),
}


def write_report(run: Path, *, into: Path | None = None) -> Path:
    """Write `report.html` into the run, or `into` the one that it is a stage of, with what a judge decided there.

    Gives back its path. Raises StorageError when it cannot be written.
    """
    if not run.is_dir():
        raise StorageError("there is no such run directory", do="give the folder of a training run", where=str(run))
    target = (into or run) / REPORT
    # What came from a damaged file may hold half a surrogate pair, which UTF-8 cannot say.
    write_text(target, render_report(run, judged=into).encode("utf-8", errors="replace").decode("utf-8"))
    return target


def render_report(run: Path, *, judged: Path | None = None) -> str:
    """The report as text; nothing is written. In the folder `judged` lies what a judge decided."""
    files = read_run(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps, evaluations = files.of_kind("step"), files.of_kind("evaluation")
    measure = measure_of(files)
    summary = files.summary
    said, tone = _status(files)
    return environment.get_template(_TEMPLATE).render(
        name=(text_of(summary.get("run")).rstrip("/") if judged is None else str(judged)).rpartition("/")[2]
        or run.resolve().name,
        status=said,
        tone=tone,
        verdict=_verdict(files, measure, steps),
        about=_about(files, steps),
        notices=[text_of(notice) for notice in listing(summary.get("notices"))],
        problems=files.problems,
        error=_error(files),
        demo=_demo(summary),
        samples=compare_answers(files.samples),
        measure=measure,
        curves=curves_of(files, measure),
        numbers=_numbers(summary, steps),
        feedback=feedback_of(judged),
        data=_data(mapping(summary.get("data"))),
        worst=_worst(files, evaluations),
        proof=_proof(mapping(summary.get("proof")), text_of(summary.get("result"))),
        command=_command(text_of(files.environment.get("command"))),
        folder=text_of(files.environment.get("folder")),
        resume=f"luthier resume {shlex.quote(text_of(summary.get('run')) or str(run))}" if tone == "open" else "",
        recipe=files.recipe,
    )


# ------------------------------------------------------------------------------------------------------ the verdict


def _status(files: RunFiles) -> tuple[str, str]:
    status = text_of(files.summary.get("status") or files.status.get("state"))
    return _STATUS.get(status, (status or "not finished", "open"))


def _verdict(files: RunFiles, measure: Measure, steps: Sequence[dict[str, Any]]) -> str:
    """One sentence: what happened to the held-out loss or reward, on how many trained tokens, in what time."""
    said = mapping(files.summary.get("loss"))
    held_out = [value for _, value in measure.held_out(files)]
    first = first_of(measure.of_loss(said.get("eval_first")), held_out[0] if len(held_out) > 1 else None)
    last = first_of(measure.of_loss(said.get("eval")), held_out[-1] if len(held_out) > 1 else None)
    best, best_step = measure.of_loss(said.get("best")), number(said.get("best_step"))
    what = f"Held-out {measure.noun}"
    if first is None or last is None:
        trained = [value for _, value in measure.trained(files)]
        own = said if measure == LOSS else {}
        what, best = f"Training {measure.noun}", None
        first = first_of(own.get("first"), trained[0] if trained else None)
        last = first_of(own.get("last"), trained[-1] if trained else None)
    if first is None or last is None:
        return "No step of this run was recorded."
    went = "fell" if last < first else "rose" if last > first else "stayed"
    sentence = f"{what} {went} from {loss_text(first)} to {loss_text(last)}"
    if went == "stayed":
        sentence = f"{what} stayed at {loss_text(first)}"
    if best is not None and best_step is not None:
        level = "" if loss_text(best) == loss_text(last) else f" with {loss_text(best)}"
        sentence += f", best at step {best_step:,.0f}{level}"
    tokens = first_of(mapping(files.summary.get("tokens")).get("trained"), _total(steps, "trained_tokens"))
    seconds = first_of(files.summary.get("train_seconds"), _total(steps, "seconds"))
    parts = [f"{tokens:,.0f} trained tokens" if tokens else "", duration_text(seconds) if seconds else ""]
    effort = " in ".join(part for part in parts if part)
    return f"{sentence}, {'on' if tokens else 'in'} {effort}." if effort else f"{sentence}."


def _about(files: RunFiles, steps: Sequence[dict[str, Any]]) -> list[str]:
    """The line above the verdict: model, adapter, steps, day."""
    summary = files.summary
    count = first_of(summary.get("steps"), step_of(steps[-1]) if steps else None)
    times = [time for event in files.events if (time := number(event.get("time")))]
    parts = [_brief(summary.get("model")), _brief(summary.get("adapter"))]
    if count is not None:
        parts.append(_count(round(count), "step"))
    if times and 0 < times[-1] < 32e9:
        moment = datetime.fromtimestamp(times[-1], UTC)
        parts.append(f"{moment.day} {moment:%B %Y, %H:%M} UTC")
    return [part for part in parts if part]


def _command(command: str) -> str:
    """The command without the folder that it lay in."""
    program, space, rest = command.partition(" ")
    return program.rpartition("/")[2] + space + rest


def _error(files: RunFiles) -> str:
    """What a failed run said last."""
    last: dict[str, Any] = next((event for event in reversed(files.events) if event.get("error")), {})
    error = files.summary.get("error") or last.get("error") or files.status.get("reason") or ""
    if isinstance(error, Mapping):
        return "; ".join(text_of(error[key]) for key in ("where", "received", "allowed", "do") if error.get(key))
    return text_of(error)


def _demo(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    demo = mapping(summary.get("demo"))
    before, after = (number(mapping(demo.get(when)).get("exact_match")) for when in ("before", "after"))
    shown = []
    if before is not None and after is not None:
        shares = {"before": percent_text(before), "after": percent_text(after)}
        shown.append({"label": "answers that match exactly", **shares})
    forgetting = mapping(demo.get("forgetting"))
    before, after = number(forgetting.get("before")), number(forgetting.get("after"))
    if before is not None and after is not None:
        shares = {"before": loss_text(before), "after": loss_text(after)}
        shown.append({"label": "loss on the base model's own text", **shares})
    return shown


# ------------------------------------------------------------------------------------------------------ the numbers

def _numbers(summary: Mapping[str, Any], steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Token counts, speed and size, as labels and texts."""
    tokens = mapping(summary.get("tokens"))
    total = first_of(tokens.get("total"), _total(steps, "tokens"))
    trained = first_of(tokens.get("trained"), _total(steps, "trained_tokens"))
    seconds = first_of(summary.get("train_seconds"), _total(steps, "seconds"))
    speed = first_of(summary.get("tokens_per_second"), total / seconds if total and seconds else None)
    waited, worked = _total(steps, "source_seconds"), _total(steps, "seconds")
    reached = number(summary.get("share_of_limit"))
    of_limit = "" if reached is None else f" ({percent_text(reached)} of the machine's limit)"
    memory, parameters = number(summary.get("peak_memory_bytes")), number(summary.get("parameters"))
    trainable = number(summary.get("trainable_parameters"))
    share = f" ({percent_text(trained / total)})" if trained is not None and total else ""
    part = f" of {count_text(parameters)} ({percent_text((trainable or 0) / parameters)})" if parameters else ""
    rows = [
        *_metrics(summary),
        ("Tokens seen", "" if total is None else f"{total:,.0f}"),
        ("Tokens trained on", "" if trained is None else f"{trained:,.0f}{share}"),
        ("Training time", "" if seconds is None else duration_text(seconds)),
        ("Waited for rows", f"{percent_text(waited / worked)} of that" if waited and worked else ""),
        ("Speed", "" if speed is None else f"{speed:,.0f} tokens a second{of_limit}"),
        ("Peak memory", "" if memory is None else bytes_text(memory)),
        ("Trained parameters", "" if trainable is None else f"{count_text(trainable)}{part}"),
    ]
    return [(label, text) for label, text in rows if text]


def _metrics(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An objective's own numbers of held-out rows, before and after; nothing that is no pair of numbers.

    What is part of a part of a reward (`right/answered`) is not among them.
    """
    found = []
    for name, pair in mapping(summary.get("metrics")).items():
        before, after = (number(each) for each in pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if before is not None and after is not None and "/" not in name:
            found.append((f"Held-out {name}", f"{before:.3f} before, {after:.3f} after"))
    return found


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read = kept + rejected, the files, and what rendering did with the rows."""
    counts = [(key, value) for key in ("read", "kept", "rejected") if (value := number(data.get(key))) is not None]
    read, kept, rejected = (number(data.get(key)) for key in ("read", "kept", "rejected"))
    sums = None not in (read, kept, rejected) and read != (kept or 0) + (rejected or 0)
    return {
        "rows": [(f"Rows {key}", f"{value:,.0f}") for key, value in counts],
        "mismatch": sums,
        "files": [_brief(entry) for entry in listing(data.get("files"))],
        "rendered": [(_label(key), _value(value)) for key, value in mapping(data.get("rendered")).items()],
    }


def _worst(files: RunFiles, evaluations: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows with the highest loss; from the last evaluation, without texts, when there is no table of them."""
    entries = files.worst or (listing(evaluations[-1].get("worst_rows")) if evaluations else [])
    return [
        {"row": text_of(entry.get("row")), "loss": loss_text(loss), "text": clip(text_of(entry.get("text")))}
        for entry in entries
        if isinstance(entry, dict) and (loss := number(entry.get("loss"))) is not None
    ]


def _proof(proof: Mapping[str, Any], folder: str) -> list[tuple[str, str]]:
    """What was checked of the saved result, each as `held`, `open` (not checked) or `broken`."""
    if not proof:
        return []
    tensors = number(proof.get("tensors"))
    count = "" if tensors is None else f", {_count(round(tensors), 'tensor')}"
    said = []
    if folder:
        said.append(("held", f"Saved to {folder}{count}, and every tensor found its place when read back."))
    if proof.get("differs_from_start") is not None:
        held, differ = ("held", "differ") if proof["differs_from_start"] else ("broken", "do not differ")
        said.append((held, f"The trained parameters {differ} from their start."))
    before, after = number(proof.get("eval_loss")), number(proof.get("reloaded_loss"))
    if before is None or after is None:
        said.append(("open", "No held-out loss was computed again, as there were no held-out rows."))
    else:
        held = "held" if math.isclose(before, after, rel_tol=1e-5, abs_tol=1e-5) else "broken"
        said.append((held, f"The reloaded files give a held-out loss of {after:.6f}; the run reported {before:.6f}."))
    return said


# -------------------------------------------------------------------------------------------------- numbers as text


def _total(events: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [value for event in events if (value := number(event.get(key))) is not None]
    return math.fsum(values) if values else None


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _label(key: str) -> str:
    return key.replace("_", " ").strip().capitalize()


def _value(value: Any) -> str:
    """A value of unknown kind for people."""
    amount = number(value)
    if amount is not None:
        return f"{amount:,.0f}" if amount == round(amount) else f"{amount:,.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_label(text_of(key)).lower()} {_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value) or "none"
    return text_of(value) or "none"


def _brief(value: Any) -> str:
    """A name, or what stands for one, and the first few of its knobs that say something: `lora (rank 16, alpha 32)`."""
    if not isinstance(value, Mapping):
        return text_of(value)
    name = next((text_of(value[key]) for key in ("method", "path", "file", "name") if value.get(key)), "")
    told = [(key, item) for key, item in value.items() if item and text_of(item) != name]
    rest = dict(told[:_KNOBS])
    return f"{name} ({_value(rest)})" if name and rest else name or _value(value)
