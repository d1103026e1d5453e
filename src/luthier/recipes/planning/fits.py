"""What fits: the largest batch, the longest row, and the changes that make a plan fit, cheapest first.

Idea: a change has a price in results (none, a little, another method) and one in time. Those that change no result come
first; among these the ones that cost least time. Where no single change is enough, they are taken together, in the same
order, until it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.planning.plan import MOST_ROWS, MOST_TOKENS, Laid, PlanKnobs, available_to, lay
from luthier.recipes.schemas.offload import Offload, inputs_are_far, optimizer_is_far

MOST_DEVICES: Final = 64
LEAST_RANK: Final = 4


def largest(laid: Laid) -> dict[str, Any]:
    """The most rows of the plan's length (`batch`), and the longest single row (`sequence`), that fit; 0 if none does.

    A search ends somewhere: `at_least` names which of the two may be more than the most that is tried.
    """
    available = available_to(laid)
    if available is None:
        return {"batch": None, "sequence": None, "at_least": []}
    length = laid.knobs.sequence
    limit = max(2, min(laid.shape.context or MOST_TOKENS, MOST_TOKENS))

    def fits(rows: int, tokens: int) -> bool:
        return laid.needed(rows, tokens, available)["total"] <= available

    rows = _most(lambda rows: fits(rows, length), 1, MOST_ROWS)
    tokens = _most(lambda tokens: fits(1, tokens), 2, limit)
    # No row may be longer than the model has positions, where its config says how many.
    ended = {"batch": rows == MOST_ROWS, "sequence": tokens == limit != laid.shape.context}
    return {"batch": rows, "sequence": tokens, "at_least": [name for name, at_end in ended.items() if at_end]}


@dataclass(frozen=True)
class Change:
    """Something else than was asked for: what it is, its keys, and what it costs."""

    what: str
    sets: tuple[str, ...]
    price: str
    knobs: PlanKnobs


def advice(config: Path, laid: Laid) -> list[dict[str, Any]]:
    """Changes with what they would need, cheapest first, those that are enough before those that are not.

    Where no single one is enough, the first of each kind are taken together until they are. Empty where the plan fits.
    """
    available = available_to(laid)
    knobs = laid.knobs
    if available is None or laid.needed(knobs.batch, knobs.sequence, available)["total"] <= available:
        return []
    found, now = [], laid
    # All of them first: from then on the model has other adapters on.
    for change in [change for kind in _KINDS for change in kind(laid, available)]:
        now = lay(config, change.knobs, now)
        found.append(_told(now, change, available))
    laid = lay(config, knobs, now)
    if not any(each["fits"] for each in found):
        found += _together(config, laid, available)
    return [each for each in found if each["fits"]] + [each for each in found if not each["fits"]]


def _together(config: Path, laid: Laid, available: float) -> list[dict[str, Any]]:
    """The first change of each kind after the other, until they are enough; nothing if they never are."""
    taken: list[Change] = []
    now = laid
    for kind in _KINDS:
        change = next(iter(kind(now, available)), None)
        if change is None:
            continue
        taken.append(change)
        now = lay(config, change.knobs, now)
        sets = {key.partition("=")[0]: key for each in taken for key in each.sets}
        both = Change(
            " and ".join(each.what for each in taken), tuple(sets.values()),
            "; ".join(dict.fromkeys(each.price for each in taken)), change.knobs,
        )  # fmt: skip
        told = _told(now, both, available)
        if told["fits"]:
            return [told]
    return []


def _told(changed: Laid, change: Change, available: float) -> dict[str, Any]:
    """A change, and the total with it."""
    total = changed.needed(change.knobs.batch, change.knobs.sequence, available)["total"]
    return {
        "change": change.what, "set": list(change.sets), "price": change.price, "total": total,
        "fits": total <= available,
    }  # fmt: skip


def _change(laid: Laid, what: str, sets: Sequence[str], price: str, **update: Any) -> Change:
    return Change(what, tuple(sets), price, laid.knobs.model_copy(update=update))


def _fewer_rows(laid: Laid, available: float) -> Iterator[Change]:
    if laid.knobs.batch > 1:
        rows = max(1, largest(laid)["batch"] or 1)
        price = "no result changes; small products are slower"
        yield _change(laid, f"{rows:,} rows at once", [f"batch={rows}"], price, batch=rows)


def _made_again(laid: Laid, available: float) -> Iterator[Change]:
    if laid.knobs.recompute not in ("auto", "all") and laid.blocks:
        price = "no result changes; a forward pass more"
        yield _change(laid, "all blocks made again", ["recompute=all"], price, recompute="all")


def _far_inputs(laid: Laid, available: float) -> Iterator[Change]:
    knobs = laid.knobs
    if laid.kind == "cuda" and laid.blocks and knobs.recompute not in ("none", 0) and not inputs_are_far(knobs.offload):
        offload: Offload = "both" if optimizer_is_far(knobs.offload) else "activations"
        price = "no result changes; the link to the host carries each input of a block twice"
        yield _change(laid, "inputs of blocks with the host", [f"offload={offload}"], price, offload=offload)


def _far_optimizer(laid: Laid, available: float) -> Iterator[Change]:
    knobs = laid.knobs
    if laid.kind == "cuda" and not optimizer_is_far(knobs.offload):
        offload: Offload = "both" if inputs_are_far(knobs.offload) else "optimizer"
        price = "results change by rounding; the host steps, and the link carries gradients and weights"
        yield _change(laid, "the optimizer with the host", [f"offload={offload}"], price, offload=offload)


def _optimizers(laid: Laid, available: float) -> Iterator[Change]:
    """Optimizers that keep less on the device: those that change nothing first, by what they say of themselves."""
    shapes = {name: tuple(each.shape) for name, each in laid.attachment.named_parameters().items()}
    now = laid.knobs.optimizer
    found = []
    for name in catalog.names("optimizers"):
        other = choose("optimizers", Optimizer, {"method": name})
        resident = other.resident_bytes(shapes)
        if resident < now.resident_bytes(shapes) and not other.steps_in_backward:
            # The same numbers elsewhere cost time; fewer of them cost something of the result.
            elsewhere = other.state_bytes(shapes) == now.state_bytes(shapes)
            price = "no result changes; a step reads and writes its state" if elsewhere else "steps are other ones"
            change = _change(laid, f"optimizer {name}", [f"optimizer.method={name}"], price, optimizer=other)
            found.append((not elsewhere, resident, change))
    yield from (change for _, _, change in sorted(found, key=lambda one: one[:2]))


def _lower_rank(laid: Laid, available: float) -> Iterator[Change]:
    adapter = laid.knobs.adapter
    rank = getattr(adapter, "rank", None)
    if isinstance(rank, int) and rank > LEAST_RANK:
        lower = adapter.model_copy(update={"rank": LEAST_RANK})
        yield _change(laid, f"rank {LEAST_RANK}", [f"adapter.rank={LEAST_RANK}"], "a smaller adapter", adapter=lower)


def _other_weights(laid: Laid, available: float) -> Iterator[Change]:
    """Packed weights beside an adapter; or an adapter in the place of all weights, on plain or packed ones."""
    knobs, nf4 = laid.knobs, choose("quantizers", Quantizer, "nf4")
    if "trains-base" in knobs.adapter.provides:
        lora, price = PlanKnobs().adapter, "another method: an adapter beside frozen weights"
        one = ["adapter.method=lora"]
        yield _change(laid, "LoRA in the place of all weights", one, price, adapter=lora)
        both, price = [*one, "quantizer.method=nf4"], f"{price}, which are rounded"
        yield _change(laid, "LoRA on weights in NF4", both, price, adapter=lora, quantizer=nf4)
    elif "packed-weights" not in knobs.quantizer.provides:
        price = "a rounded base; its weights are unpacked for each product"
        yield _change(laid, "weights in NF4", ["quantizer.method=nf4"], price, quantizer=nf4)


def _more_devices(laid: Laid, available: float) -> Iterator[Change]:
    count = _devices(laid, available) if laid.knobs.sharding == "none" else None
    if count is not None:
        sets, price = [f"devices={count}", "sharding=fsdp"], f"{count} devices, and what they say to each other"
        what = f"weights divided over {count} devices"
        yield _change(laid, what, sets, price, devices=count, sharding="fsdp")


def _shorter_rows(laid: Laid, available: float) -> Iterator[Change]:
    tokens = largest(laid)["sequence"]
    if tokens and tokens < laid.knobs.sequence:
        price = "longer rows are cut, or left out"
        sets = [f"sequence={tokens}", "batch=1"]
        yield _change(laid, f"rows of {tokens:,} tokens, one at once", sets, price, sequence=tokens, batch=1)


_KINDS: Final = (
    _fewer_rows, _made_again, _far_inputs, _far_optimizer, _optimizers, _lower_rank, _other_weights, _more_devices,
    _shorter_rows,
)  # fmt: skip
"""Kinds of change, cheapest first."""


def _devices(laid: Laid, available: float) -> int | None:
    """The fewest devices, doubling, that are enough where they divide weights, gradients and state."""
    knobs = laid.knobs
    # Of several that hold the same, all are there to divide it.
    count = max(2, knobs.devices)
    while count <= MOST_DEVICES:
        divided = laid.asked(devices=count, sharding="fsdp")
        if divided.needed(knobs.batch, knobs.sequence, available)["total"] <= available:
            return count
        count *= 2
    return None


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` to `high` that fits, 0 if none does; more never needs less."""
    if not fits(low):
        return 0
    reach = low
    while reach < high and fits(min(high, 2 * reach)):
        reach = min(high, 2 * reach)
    low, high = reach, min(high, 2 * reach)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


