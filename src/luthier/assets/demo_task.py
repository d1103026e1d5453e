"""The demo's task: a free sentence about an order becomes strict JSON with fixed keys in a fixed order.

The held-out rows use names that neither the base model nor the fine-tuning ever saw, and half of their phrasings are
not among the training phrasings either. What counts is the exact match of all values, and nothing around the object.
"""

from __future__ import annotations

import json
import random
from typing import Any

from luthier.assets.world import Namer, draw_order

KEYS = ("name", "city", "item", "quantity", "price", "date")
REQUEST = "Write as JSON:"

_SHARED = (
    "On {date}, {name} from {city} ordered {goods} for {price} marks.",
    "{name} would like {goods} delivered to {city} on {date}; the price is {price} marks.",
    "Please book {goods} for {name} in {city}. Date: {date}, price: {price} marks.",
    "{goods} for {name}, to be sent to {city} by {date}, at {price} marks in all.",
    "We owe {name} in {city} {goods}, paid with {price} marks on {date}.",
    "For {price} marks, {name} gets {goods} on {date} in {city}.",
    "A customer in {city} called {name} reserved {goods} until {date} and will pay {price} marks.",
    "Note for {date}: {name} picks up {goods} in {city} and pays {price} marks.",
)
_TRAINED = (
    "{name} bought {goods} in {city} on {date} for {price} marks.",
    "{name} paid {price} marks in {city} on {date} and took {goods}.",
    "In {city}, on {date}, {name} asked for {goods} at {price} marks.",
    "Send {goods} to {name}, {city}. We agreed on {price} marks and on {date}.",
    "This is {name} from {city}. I need {goods} by {date} and can pay {price} marks.",
    "The bill of {date} says {price} marks for {goods}, bought by {name} of {city}.",
    "{city}: {name} ordered {goods}, {price} marks, {date}.",
    "Good morning, {goods} please, for {name} in {city}, on {date}. I pay {price} marks.",
)
_UNSEEN = (
    "On {date} in {city}, {name} bought {goods} and paid {price} marks.",
    "{name} of {city} wants {goods} by {date} and offers {price} marks.",
    "Please send {goods} to {city} for {name} on {date}. The bill is {price} marks.",
    "{name} in {city} ordered {goods} at {price} marks for {date}.",
    "The price is {price} marks: {goods} for {name} in {city}, {date}.",
    "For {name} from {city}: {goods}, on {date}, for {price} marks.",
)


def demo_rows(count: int, *, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """Rows in OpenAI messages form; `held_out` decides whose names they hold and in which phrasings."""
    rng = random.Random(f"demo/{seed}/{held_out}")
    names = Namer(rng, held_out)
    patterns = _SHARED + (_UNSEEN if held_out else _TRAINED)
    rows = []
    for _ in range(count):
        order = draw_order(rng, names)
        sentence = rng.choice(patterns).format_map(order.told)
        values: dict[str, str | int | float] = {key: order.written[key] for key in KEYS}
        values["quantity"] = int(order.written["quantity"])
        # json would write 12.50 as 12.5; the answer keeps the two decimals that the sentence has.
        answer = json.dumps(values, separators=(",", ":")).replace(
            f'"price":"{order.written["price"]}"', f'"price":{order.written["price"]}'
        )
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"{REQUEST} {sentence[0].upper()}{sentence[1:]}"},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return rows


def exact_match(answer: str, reference: str) -> bool:
    """Whether the answer is strict JSON with nothing around it, and has the keys, order and values of the reference."""
    try:
        said = json.loads(answer, object_pairs_hook=_pairs, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    if answer != answer.strip():
        return False
    return bool(said == json.loads(reference, object_pairs_hook=_pairs))


def _pairs(pairs: list[tuple[str, Any]]) -> list[tuple[str, bool, Any]]:
    # Python holds True == 1; the pairs keep the order and show doubled keys. 12.50, 12.5 and 12.500 are one number.
    return [(key, isinstance(value, bool), value) for key, value in pairs]


def _refuse(constant: str) -> Any:
    message = f"{constant} is not JSON"
    raise ValueError(message)
