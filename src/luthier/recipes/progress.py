"""Live progress on stderr: a bar with the latest numbers on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

from luthier.core.events import Event, Recorder
from luthier.core.units import count_text, duration_text, signed_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINES = 20
"""About how many lines a run prints where nobody watches a terminal."""


@contextmanager
def progress(*, quiet: bool = False, notices: Sequence[str] = ()) -> Iterator[Recorder]:
    """A recorder that shows what happens while the block runs."""
    if quiet:
        yield Silent()
        return
    from rich.console import Console

    # Paths and notices may hold brackets and be long: no markup, and a line stays one line where nobody sees a width.
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for notice in notices:
        console.print(f"note: {notice}", style="yellow")
    if not console.is_terminal:
        yield Lines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        yield Bar(bar)


def teller(*, quiet: bool = False) -> Callable[[str], None]:
    """What says on stderr what is being done, where there are no steps to count."""

    def tell(line: str) -> None:
        if not quiet:
            print(f"{line} ...", file=sys.stderr, flush=True)

    return tell


@final
class Silent:
    """Shows nothing."""

    def record(self, event: Event) -> None:
        """Take an event and let it be."""


@final
class Lines:
    """A line for every N-th step, and for everything that is not a step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.every = 1
        self.steps = 0
        self.reward = ""

    def record(self, event: Event) -> None:
        if event.kind == "start":
            self.steps = int(event.values["steps"])
            self.every = max(1, self.steps // LINES)
            for line in start_lines(event.values):
                self.console.print(line)
        elif event.kind == "step" and ((event.step or 0) % self.every == 0 or event.step == self.steps):
            self.console.print(f"step {event.step}/{self.steps}  {self.reward}{figures(event.values)}")
        elif event.kind == "rollout":
            self.reward = rewards(event.values)
        elif (told := event_line(event)) is not None:
            self.console.print(told)


@final
class Bar:
    """A progress bar with the latest loss, and lines above it for everything that is not a step."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task: TaskID | None = None
        self.reward = ""

    def record(self, event: Event) -> None:
        if event.kind == "start":
            for line in start_lines(event.values):
                self.bar.console.print(line)
            self.task = self.bar.add_task("training", total=event.values["steps"], figures="")
            self.bar.update(self.task, completed=event.step or 0)
        elif event.kind == "step" and self.task is not None:
            self.bar.update(self.task, completed=event.step, figures=self.reward + figures(event.values))
        elif event.kind == "rollout":
            self.reward = rewards(event.values)
        elif (told := event_line(event)) is not None:
            self.bar.console.print(told)


def start_lines(values: Any) -> list[str]:
    """What a person wants to know before the first step."""
    tokens = values["tokens"]
    trained = f"{count_text(tokens['trained'])} trained" if tokens["trained"] else "prompts, to be answered"
    lines = [
        f"{values['model']}: {count_text(values['parameters'])} parameters, "
        f"{count_text(values['trainable_parameters'])} trained with {values['adapter']['method']}",
        f"{values['data']['train_views']:,} rows to train, {values['data']['held_out_views']:,} held out, "
        f"{count_text(tokens['total'])} tokens ({trained}), {values['steps']:,} steps",
    ]
    lost = {"rejected": values["data"].get("rejected", 0), **values["data"].get("rendered", {})}
    told = [f"{lost[what]:,} {what}" for what in ("rejected", "dropped", "truncated") if lost.get(what)]
    lines += [f"note: of {values['data']['read']:,} rows {', '.join(told)}"] if told else []
    lines += [f"note: {notice}" for notice in values["notices"]]
    if values.get("resumed_at"):
        lines.append(f"going on after step {values['resumed_at']}")
    return lines


def figures(values: Any) -> str:
    """The numbers of a step."""
    rate = values["tokens"] / values["seconds"] if values["seconds"] else 0.0
    return f"loss {values['loss']:.4f}  {rate:,.0f} tokens/s"


def rewards(values: Any) -> str:
    """The numbers of a rollout: its mean reward, its parts, and what was drawn again; nothing where nobody rewards."""
    if math.isnan(values["reward"]):
        return ""
    parts = "".join(f" {name} {signed_text(value, 3)}" for name, value in values["parts"].items() if "/" not in name)
    again = f", {values['redrawn']:,} groups drawn again in {values['redraws']:,} attempts" if values["redraws"] else ""
    return f"reward {signed_text(values['reward'], 3)}{f' ({parts[1:]})' if parts else ''}{again}  "


def event_line(event: Event) -> str | None:
    """A line for an event that a person wants to see; None for the others."""
    line = _event_line(event)
    return f"{event.values['adapter']}: {line}" if line is not None and "adapter" in event.values else line


def _event_line(event: Event) -> str | None:
    if event.kind == "evaluation" and "reward" in event.values:
        return f"step {event.step}: held-out reward {signed_text(event.values['reward'])} over {_prompts(event.values)}"
    if event.kind == "evaluation":
        return f"step {event.step}: held-out loss {event.values['loss']:.4f} over {event.values['rows']} rows"
    if event.kind == "doing":
        return f"{event.values['what']} ..."
    if event.kind == "bad_step":
        rows = ", ".join(map(str, event.values["rows"][:8]))
        place = event.values.get("tensor") or event.values["what"]
        bad = f"the {event.values['what']} is not finite ({place}; rows {rows})"
        return f"step {event.step}: {bad}; nothing was applied"
    if event.kind == "save_failed":
        pause = event.values["retry_in_seconds"]
        again = "" if pause is None else f"; training goes on, and it is tried again in {duration_text(pause)}"
        return f"step {event.step} was not saved: {event.values['reason']}{again}"
    if event.kind == "micro_batch_split":
        cut = f"{event.values['from_tokens']:,} to {event.values['to_tokens']:,} tokens"
        return f"step {event.step}: out of memory; micro-batches are cut from {cut}, the gradient is the same"
    if event.kind == "feedback":
        return str(event.values["message"])
    if event.kind == "waiting":
        return _wait_line(event.values)
    if event.kind == "warning":
        return f"warning: {event.values['message']}"
    return None


def _prompts(values: Any) -> str:
    """The prompts that a held-out reward is the mean of, and what it cannot be compared with."""
    if not (lost := values.get("not_scored", 0)):
        return f"{values['rows']} prompts"
    why = next(iter(values["failures"]))
    told = f"{values['rows']} of {values['rows'] + lost} prompts; {lost} could not be scored ({why})"
    if (best := values.get("not_compared_with")) is not None:
        told += f", so it is not compared with that of step {best}, which was scored on others, and step {best} stays "
        told += "the best"
    return told


def _wait_line(values: Any) -> str:
    """A wait that has become long, or is over."""
    seconds = duration_text(values["waited_seconds"])
    if values["over"]:
        return f"{values['who']} has answered after {seconds}"
    reason = f": {values['reason']}" if values["reason"] else ""
    return f"waiting for {values['who']}, for {seconds} now{reason}"
