"""Intruder dimensions and forgetting by rank: LoRA with alpha = 2r, with a fixed alpha, as rsLoRA, and full tuning.

    python benchmarks/intruder_ranks.py --steps 60 --json docs/intruder-ranks.json --svg docs/intruder-ranks.svg

What: the claim of arXiv 2410.21228 (low-rank updates have intruder dimensions, full tuning has next to none, and
intruders go with forgetting) and the curves of arXiv 2312.03732 (a fixed alpha over r stunts high ranks, alpha over
sqrt(r) does not), on the seedling, which is small enough for minutes on two cores. All LoRA families meet at rank 4.
Each is trained from several seeds (its start and its rows) on two tasks: sentences about orders to JSON, and JSON to
sentences. Runs that the JSON file holds already are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from counts import count

from luthier.adapters import Adapter
from luthier.adapters.full import Full
from luthier.adapters.lora import LoRA
from luthier.assets.demo_task import REQUEST, demo_rows
from luthier.core.paths import cache_folder
from luthier.model.comparing.base_spectra import FOLDER, BaseSpectra
from luthier.model.comparing.pair import pair_of_adapter
from luthier.objectives.language_model import LanguageModelling
from luthier.optimizers.adamw import AdamW
from luthier.probes.drift import Drift
from luthier.probes.effective_rank import EffectiveRank
from luthier.probes.intruder_dimensions import IntruderDimensions
from luthier.recipes.demo import grown_on
from luthier.recipes.measuring import mean_loss
from luthier.recipes.opening.opened import Opened
from luthier.recipes.opening.session import load
from luthier.store.curves import Axis, tick_text, value_axis

ORDERS, SENTENCES = "orders", "sentences"
TASKS = {ORDERS: "sentence to JSON", SENTENCES: "JSON to sentence"}
SEEDS = (0, 1, 2)
HELD_OUT = 100
"""The seed of held-out rows whose phrasings are those of training."""
RANKS = (1, 4, 16, 64)
SHARED = 4
"""The rank at which all families of LoRA are the same run."""
COLOURS = {"LoRA, alpha = 2r": "#b3472f", "LoRA, alpha = 8": "#2f6db3", "rsLoRA, alpha = 4": "#3f7048",
           "full": "#8a8f98"}  # fmt: skip
PANELS = (("loss", "held-out loss"), ("forgetting", "rise of the base's loss"),
          ("intruders", "intruders, epsilon 0.5"), ("intruders_wide", "intruders, epsilon 0.8"))  # fmt: skip
WITH = {"intruders": "intruders at 0.5", "intruders_wide": "intruders at 0.8", "relative_change": "size of the change",
        "loss": "held-out loss"}  # fmt: skip
WIDE, TALL, LEFT, TOP, BOTTOM = 330, 210, 48, 34, 36


@dataclass(frozen=True)
class Outcome:
    """One run."""

    task: str
    seed: int
    family: str
    rank: int | None
    scale: float | None
    loss: float
    forgetting: float
    intruders: int
    intruders_wide: int
    random: float
    random_wide: float
    relative_change: float
    effective_rank: float
    losses: list[float]


def runs() -> list[tuple[str, int | None, Adapter, float]]:
    """Family, rank, adapter and learning rate. One rate for all LoRAs, so that their scales can be compared."""
    made: list[tuple[str, int | None, Adapter, float]] = []
    for rank in RANKS:
        made.append(("LoRA, alpha = 2r", rank, LoRA(rank=rank, alpha=2.0 * rank), 3e-3))
        if rank != SHARED:
            made.append(("LoRA, alpha = 8", rank, LoRA(rank=rank, alpha=8.0), 3e-3))
            made.append(("rsLoRA, alpha = 4", rank, LoRA(rank=rank, alpha=4.0, rslora=True), 3e-3))
    return [*made, ("full", None, Full(), 5e-4)]


def rows_of(task: str, count: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and 48 held-out ones: of new names, and for orders half of them phrased in unseen ways."""
    train = demo_rows(count, seed=seed, held_out=False)
    if task == ORDERS:
        return train, demo_rows(48, seed=1, held_out=True)
    return [turned(row) for row in train], [turned(row) for row in demo_rows(48, seed=HELD_OUT, held_out=False)]


def turned(row: dict[str, Any]) -> dict[str, Any]:
    """A row of orders the other way round: its JSON is asked with, its sentence is the answer."""
    asked, answer = (message["content"] for message in row["messages"])
    sentence = asked.removeprefix(REQUEST).strip()
    return {"messages": [{"role": "user", "content": f"Tell as a sentence: {answer}"},
                         {"role": "assistant", "content": sentence}]}  # fmt: skip


def measured(
    task: str, seed: int, family: str, rank: int | None, adapter: Adapter, rate: float, *,
    steps: int, rows: int, save: Path | None = None,
) -> Outcome:  # fmt: skip
    """Train, and look; with `save` the result and the rows it is measured on are kept, for `luthier probe`."""
    session = load("seedling", adapter=adapter, optimizer=AdamW(learning_rate=rate), precision="float32", seed=seed)
    train, test = rows_of(task, steps * rows, seed)
    opened = Opened(session.model, session.tokenizer, session.renderer, session.renderer.stop_ids)
    kept = grown_on(opened)[:60]
    with session.model.without_attachments():
        before = mean_loss(session.model, LanguageModelling(), kept)[0]
    losses = []
    for step in range(steps):
        report = session.forward_backward(train[step * rows : (step + 1) * rows])
        losses.append(report.loss)
        session.optim_step(factor=1 - step / steps)
    after = mean_loss(session.model, LanguageModelling(), kept)[0]
    if save is not None:
        name = family.replace(", ", "-").replace(" = ", "-").replace(" ", "-")
        session.save(save / f"{task}-{seed}-{name}-rank-{rank or 'all'}")
        (save / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test), "utf-8")
    pair = pair_of_adapter(session.model, spectra=BaseSpectra(cache_folder() / FOLDER))
    found = IntruderDimensions(side="left", thresholds=(0.8,), controls=1).of(pair)
    wide = next(row for row in found.tables[0].rows if row[0] == 0.8)
    return Outcome(
        task=task,
        seed=seed,
        family=family,
        rank=rank,
        scale=adapter.scale if isinstance(adapter, LoRA) else None,
        loss=session.loss(test),
        forgetting=after - before,
        intruders=int(found.numbers["intruders"] or 0),
        intruders_wide=int(wide[1] or 0),
        random=float(found.numbers["random_change"] or 0.0),
        random_wide=float(wide[2] or 0.0),
        relative_change=float(Drift().of(pair).numbers["middle_relative_change"] or 0.0),
        effective_rank=float(EffectiveRank().of(pair).numbers["effective_rank"] or 0.0),
        losses=[round(each, 4) for each in losses] if (task, seed) == (ORDERS, SEEDS[0]) else [],
    )


@dataclass(frozen=True)
class Spread:
    """What several seeds of one run came to: the mean, the least and the most."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, runs: list[Outcome], key: str) -> Spread:
        values = [float(getattr(each, key)) for each in runs]
        return cls(sum(values) / len(values), min(values), max(values))


def lines_of(found: list[Outcome], key: str) -> dict[str, list[tuple[float, Spread]]]:
    """For each family the spread of its values by rank; families of LoRA share their run at rank 4."""
    lines = {}
    for family in COLOURS:
        by_rank: dict[int, list[Outcome]] = {}
        for each in found:
            if each.rank is not None and family != "full" and (each.family == family or each.rank == SHARED):
                by_rank.setdefault(each.rank, []).append(each)
        if by_rank:
            lines[family] = [(float(rank), Spread.of(runs, key)) for rank, runs in sorted(by_rank.items())]
    return lines


def draw(found: list[Outcome]) -> str:
    """The picture: a column for each task, a panel for each measure over the rank; below, losses over steps."""
    width, height = 2 * WIDE, (len(PANELS) + 1) * TALL + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="sans-serif" font-size="11"><title>LoRA by rank, and full tuning, on the seedling'
        f'</title><rect width="{width}" height="{height}" fill="#ffffff"/>'
    ]
    for column, (task, name) in enumerate(TASKS.items()):
        own = [each for each in found if each.task == task]
        full = [each for each in own if each.family == "full"]
        for row, (key, title) in enumerate(PANELS):
            level = Spread.of(full, key).mean if full else None
            parts += panel(lines_of(own, key), f"{name}: {title}", 2 * row + column, level, logarithmic=True)
    top, steps = max(RANKS), {}
    for each in found:
        if each.rank in (top, None) and (each.task, each.seed) == (ORDERS, SEEDS[0]):
            losses = enumerate(smooth(each.losses))
            steps[each.family] = [(float(step + 1), Spread(loss, loss, loss)) for step, loss in losses]
    parts += panel(steps, f"{TASKS[ORDERS]}: loss over steps, rank {top}", 2 * len(PANELS), None, logarithmic=False)
    x = WIDE + LEFT
    for number, (family, colour) in enumerate(COLOURS.items()):
        y = len(PANELS) * TALL + 70 + 22 * number
        parts.append(f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{x + 32}" y="{y + 4}" fill="#30343a">{escape(family)}</text>')  # fmt: skip
    return "".join(parts) + "</svg>\n"


def panel(
    lines: dict[str, list[tuple[float, Spread]]], title: str, place: int, level: float | None, *, logarithmic: bool
) -> list[str]:
    """One panel: means, with bars from the least to the most. `level` is drawn across it: full tuning has no rank."""
    left, top = (place % 2) * WIDE + LEFT, (place // 2) * TALL + TOP
    right, bottom = left + WIDE - LEFT - 18, top + TALL - TOP - BOTTOM
    every = [point for points in lines.values() for point in points]
    reach = [value for _, spread in every for value in (spread.low, spread.high)]
    low, high = min(x for x, _ in every), max(x for x, _ in every)
    marks = tuple(float(rank) for rank in RANKS) if logarithmic else tuple(
        float(step) for step in range(0, int(high) + 1, 10) if step >= low)  # fmt: skip
    across = Axis(low=low, high=high, ticks=marks, first=left, last=right, logarithmic=logarithmic)
    up = value_axis(reach + ([] if level is None else [level]), bottom=bottom, top=top)
    parts = [f'<text x="{left}" y="{top - 12}" fill="#30343a" font-weight="bold">{escape(title)}</text>']
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e5e8"/>')
        words = f'y="{y + 4:.1f}" text-anchor="end" fill="#5c636b">{tick_text(tick)}'
        parts.append(f'<text x="{left - 6}" {words}</text>')
    for tick in across.ticks:
        parts.append(f'<text x="{across.place(tick):.1f}" y="{bottom + 15}" text-anchor="middle" fill="#5c636b">'
                     f'{"r = " if logarithmic else ""}{tick:g}</text>')  # fmt: skip
    if level is not None:
        y = up.place(level)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{COLOURS["full"]}" '
                     'stroke-width="2" stroke-dasharray="5 4"/>')  # fmt: skip
    for family, points in lines.items():
        colour = COLOURS[family]
        path = " ".join(f"{across.place(x):.1f},{up.place(spread.mean):.1f}" for x, spread in points)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        for x, spread in points if logarithmic else ():
            at, ends = across.place(x), f'y1="{up.place(spread.low):.1f}" y2="{up.place(spread.high):.1f}"'
            parts += [f'<line x1="{at:.1f}" x2="{at:.1f}" {ends} stroke="{colour}" stroke-opacity="0.6"/>',
                      f'<circle cx="{at:.1f}" cy="{up.place(spread.mean):.1f}" r="3" fill="{colour}"/>']  # fmt: skip
    return parts


def smooth(values: list[float]) -> list[float]:
    """A running mean of three."""
    return [sum(values[max(0, place - 1) : place + 2]) / len(values[max(0, place - 1) : place + 2])
            for place in range(len(values))]  # fmt: skip


def table(found: list[Outcome]) -> str:
    """The runs of one task as Markdown: means over seeds, with the least and the most."""
    heads = ("run", "rank", "scale", "held-out loss", "forgetting", "intruders 0.5 (random)", "0.8 (random)",
             "change / norm", "effective rank")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * 8]
    for family, rank, adapter, _ in runs():
        own = [each for each in found if (each.family, each.rank) == (family, rank)]
        if not own:
            continue
        scale = f"{adapter.scale:.3g}" if isinstance(adapter, LoRA) else "-"
        counts = [f"{ranged(own, key, '.0f')} ({Spread.of(own, random).mean:.0f})"
                  for key, random in (("intruders", "random"), ("intruders_wide", "random_wide"))]  # fmt: skip
        cells = [family, str(rank or "-"), scale, ranged(own, "loss", ".2f"), ranged(own, "forgetting", ".2f"), *counts,
                 ranged(own, "relative_change", ".0%"), f"{Spread.of(own, 'effective_rank').mean:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranged(runs: list[Outcome], key: str, form: str) -> str:
    """A mean, and the range around it unless that is nothing."""
    spread = Spread.of(runs, key)
    low, high, mean = (format(value, form) for value in (spread.low, spread.high, spread.mean))
    return mean if low == high else f"{mean} [{low}, {high}]"


def correlations(found: list[Outcome]) -> str:
    """Rank correlations of forgetting with what may go with it, over the runs of one seed and task: all of them."""
    lines = ["| forgetting and | " + " | ".join(TASKS.values()) + " |", "| --- |" + " ---: |" * len(TASKS)]
    for key, name in WITH.items():
        cells = []
        for task in TASKS:
            each = [rank_correlation([(getattr(run, key), run.forgetting) for run in found
                                      if (run.task, run.seed) == (task, seed)]) for seed in SEEDS]  # fmt: skip
            cells.append(", ".join(f"{value:+.2f}" for value in each))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean."""
    ranks = [[(2 * sum(other < value for other in values) + sum(other == value for other in values) + 1) / 2
              for value in values] for values in zip(*pairs, strict=True)]  # fmt: skip
    return statistics.correlation(*ranks)


def main() -> None:
    """Train all that the file does not hold yet, write what came out."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--steps", type=count, default=60)
    arguments.add_argument("--rows", type=count, default=8, help="rows of a step")
    arguments.add_argument("--json", type=Path, default=Path("intruder-ranks.json"))
    arguments.add_argument("--svg", type=Path, default=Path("intruder-ranks.svg"))
    arguments.add_argument("--task", choices=TASKS, help="only this one")
    arguments.add_argument("--seed", type=int, help="only this one")
    arguments.add_argument("--family", default="", help="only this one, such as 'LoRA, alpha = 8'")
    arguments.add_argument("--rank", type=int, default=0, help="only this one")
    arguments.add_argument("--save", type=Path, help="folder for the tuned adapters")
    given = arguments.parse_args()
    facts = {"steps": given.steps, "rows": given.rows, "torch": torch.__version__}
    found = kept(given.json, facts)
    for seed, task, (family, rank, adapter, rate) in itertools.product(SEEDS, TASKS, runs()):
        asked = ((given.task, task), (given.seed, seed), (given.family or None, family), (given.rank or None, rank))
        if any(wanted is not None and wanted != own for wanted, own in asked):
            continue
        if any((each.task, each.seed, each.family, each.rank) == (task, seed, family, rank) for each in found):
            continue
        found.append(measured(task, seed, family, rank, adapter, rate,
                              steps=given.steps, rows=given.rows, save=given.save))  # fmt: skip
        print(table(found[-1:]).splitlines()[-1], flush=True)
        given.json.write_text(json.dumps({**facts, "runs": [asdict(each) for each in found]}, indent=1) + "\n", "utf-8")
    asked_for = (given.task, given.seed is not None, given.family, given.rank)
    if not any(asked_for):
        given.svg.write_text(draw(found), "utf-8")
    for task in dict.fromkeys(each.task for each in found):
        print(table([each for each in found if each.task == task]))
    if not any(asked_for):
        print(correlations(found))


def kept(path: Path, facts: dict[str, Any]) -> list[Outcome]:
    """What a file holds of runs that were made in the same way."""
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    same = all(held.get(key) == value for key, value in facts.items())
    return [Outcome(**run) for run in held["runs"]] if same else []


if __name__ == "__main__":
    main()
