"""How the little world is told: sentence patterns, questions with their answers, and the notations of a record.

Idea: a pattern is a sentence with the keys of a `Subject` in braces, so the sentence and the record it stands for are
drawn together and can never disagree. No notation here is the demo's: braces hold other keys than the demo's orders.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.assets.world import Subject

PATTERNS: Mapping[str, tuple[str, ...]] = {
    "order": (
        "On {date} {name} bought {goods} in {city} for {price} marks.",
        "{name} of {city} ordered {goods} on {date} and paid {price}.",
        "{name} paid {price} marks for {goods} in {city} on {date}.",
        "A parcel with {goods} went to {name} in {city} on {date}; it cost {price}.",
        "Please send {goods} to {name} in {city} by {date}. The price is {price} marks.",
        "In {city}, {name} sold {goods} for {price} marks on {date}.",
        "For {price} marks {name} took {goods} home to {city} on {date}.",
        "It was {date} when {name} came to {city} to fetch {goods} for {price}.",
        "{name} asked for {goods} on {date}. The bill of {price} marks was sent to {city}.",
        "The shop in {city} sold {goods} to {name} for {price} on {date}.",
        "{goods} at {price} marks: ordered by {name} from {city}, {date}.",
        "Dated {date}: {name}, {city}, wants {goods} and offers {price} marks.",
        "{name} bought {goods} in {city}.",
        "{name} bought {goods} for {price} marks.",
        "On {date}, {name} went to {city}.",
        "{name} lives in {city} and sells {goods} at {price} marks.",
        "On {date} there were {goods} on the market of {city}, all for {price}.",
        "{name} needs {goods} before {date}.",
        "Last week {name} sent {goods} to {city}, worth {price} marks.",
        "In the cellar of {name} in {city} there are {goods}.",
        "I met {name} in {city} on {date}; we shared {goods}.",
        "Yesterday {name} lost {goods}. They were worth {price} marks.",
    ),
    "person": (
        "{name} is a {trade} in {city}.",
        "{name} is {age} years old and lives in {city}.",
        "{name} lives at {street} in {city}.",
        "{name} was born on {born}.",
        "{name} was born in {city} on {born}.",
        "The {trade} {name} has a {pet} called {pet_name}.",
        "{name} has a {colour} {pet}.",
        "{name} likes {hobby}, and so does {friend}.",
        "The best friend of {name} is {friend}.",
        "{name} works as a {trade} and loves {hobby}.",
        "Everybody in {city} knows {name}, the {trade}.",
        "{name} wears a {colour} coat and is never seen without {friend}.",
        "At the age of {age}, {name} still goes {hobby}.",
        "{friend} told me that {name} has moved to {city}.",
        "{name} keeps a {pet}. Its name is {pet_name}.",
        "The {pet} of {name} is called {pet_name} and is {colour}.",
        "My neighbour {name} of {street} is a {trade}.",
        "{name}, {age}, {trade}, lives in {city}.",
        "When {name} came to {city}, {friend} was already there.",
        "A {trade} called {name} painted the door {colour}.",
        "{pet_name} is the {pet} of {name} from {city}.",
        "There is a {trade} at {street}: {name}.",
        "{friend} and {name} met in {city}.",
        "{name} turned {age} this year.",
    ),
    "place": (
        "{city} is a {kind} on the river {river}.",
        "{city} is a {kind} with {people} people.",
        "{city} lies {miles} miles from {near}.",
        "The {kind} of {city} was founded in {founded}.",
        "{city} is known for its {known}.",
        "The mayor of {city} is {mayor}.",
        "There is often {weather} in {city}.",
        "From {near} to {city} it is {miles} miles.",
        "{people} people live in {city}, a {kind} near {near}.",
        "The river {river} flows through {city}.",
        "{mayor} has been mayor of {city} for years.",
        "People come to {city} from {near} to buy {known}.",
        "In {founded}, {city} was only a few houses by the {river}.",
        "Nobody makes better {known} than the {kind} of {city}.",
        "{city} and {near} share the river {river}.",
        "In {city} they talk about the {weather} and about {mayor}.",
        "A road of {miles} miles joins {city} and {near}.",
        "The {kind} of {city}, founded in {founded}, has {people} people.",
    ),
    "house": (
        "{owner} owns a house of {material} in {city}.",
        "The house at {street} has {rooms} rooms.",
        "The house of {owner} was built in {built}.",
        "At {street} in {city} stands a {colour} house.",
        "{owner} painted the house at {street} {colour}.",
        "The {colour} house in {city} belongs to {owner}.",
        "It was built of {material} in {built}.",
        "The inn at {street} has {rooms} rooms and a {colour} door.",
        "{owner} has lived at {street} in {city} for many years.",
        "In {built} the people of {city} built a hall of {material}.",
        "There are {rooms} rooms in the house of {owner}.",
        "Behind the {material} wall at {street} lives {owner}.",
    ),
    "journey": (
        "{name} travels from {from} to {to} by {by}.",
        "The {by} from {from} to {to} leaves at {time}.",
        "On {date} {name} left {from} for {to}.",
        "A seat in the {by} to {to} costs {price} marks.",
        "{name} booked {seats} seats in the {by} to {to} for {date}.",
        "At {time} the {by} reached {to}; {name} was on board.",
        "{name} paid {price} marks for {seats} seats from {from} to {to}.",
        "From {from} {name} took the {by} at {time}.",
        "On {date} at {time}, the {by} left {from} with {name}.",
        "{seats} seats, {from} to {to}, {date}, in the name of {name}.",
        "The {by} of {date} was late, so {name} stayed in {from}.",
        "{name} will come to {to} by {by} on {date} at {time}.",
        "If you want to go from {from} to {to}, take the {by} at {time}.",
        "Dear {name}, your {by} to {to} leaves on {date} at {time}.",
    ),
}

# Each entry: a question, the key that answers it, and a whole sentence as an answer.
QUESTIONS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "order": (
        ("Who is it about?", "name", "It is about {name}."),
        ("Which town is named?", "city", "The town is {city}."),
        ("Where did this happen?", "city", "It happened in {city}."),
        ("What was it?", "item", "It was about the {item}."),
        ("How many were there?", "quantity", "There were {quantity}."),
        ("What did it cost?", "price", "It cost {price} marks."),
        ("How much was paid?", "price", "{price} marks were paid."),
        ("When was it?", "date", "It was on {date}."),
        ("On which day?", "date", "On {date}."),
        ("Give the name.", "name", "The name is {name}."),
    ),
    "person": (
        ("Where does {name} live?", "city", "{name} lives in {city}."),
        ("How old is {name}?", "age", "{name} is {age} years old."),
        ("What does {name} do?", "trade", "{name} is a {trade}."),
        ("Who is the friend of {name}?", "friend", "The friend is {friend}."),
        ("What is the name of the {pet}?", "pet_name", "The {pet} is called {pet_name}."),
        ("Which animal does {name} have?", "pet", "{name} has a {pet}."),
        ("What does {name} like?", "hobby", "{name} likes {hobby}."),
        ("Which colour was it?", "colour", "It was {colour}."),
        ("Who is told of?", "name", "{name} is told of."),
        ("When was {name} born?", "born", "{name} was born on {born}."),
        ("At which address?", "street", "At {street}."),
        ("Which town is named?", "city", "The town is {city}."),
    ),
    "place": (
        ("Which river is named?", "river", "The river is called {river}."),
        ("Who is the mayor of {city}?", "mayor", "{mayor} is the mayor."),
        ("How many people live in {city}?", "people", "{people} people live there."),
        ("When was {city} founded?", "founded", "It was founded in {founded}."),
        ("What is {city} known for?", "known", "It is known for {known}."),
        ("What is near {city}?", "near", "{near} is near."),
        ("How many miles is it?", "miles", "It is {miles} miles."),
        ("What is {city}?", "kind", "{city} is a {kind}."),
        ("Which place is told of?", "city", "It is {city}."),
        ("How is the weather?", "weather", "There is often {weather}."),
    ),
    "house": (
        ("Whose house is it?", "owner", "It belongs to {owner}."),
        ("How many rooms are there?", "rooms", "There are {rooms} rooms."),
        ("When was it built?", "built", "It was built in {built}."),
        ("Which colour is it?", "colour", "It is {colour}."),
        ("What is it made of?", "material", "It is made of {material}."),
        ("In which street is it?", "street", "It is at {street}."),
        ("In which town is it?", "city", "It is in {city}."),
    ),
    "journey": (
        ("Who travels?", "name", "{name} travels."),
        ("Where does it start?", "from", "It starts in {from}."),
        ("Where does it go?", "to", "It goes to {to}."),
        ("How does {name} travel?", "by", "By {by}."),
        ("At what time?", "time", "At {time}."),
        ("What does it cost?", "price", "It costs {price} marks."),
        ("How many seats?", "seats", "There are {seats} seats."),
        ("On which day?", "date", "On {date}."),
    ),
}

# What a key may be called in a record. The demo's JSON object uses one fixed set of keys; records here draw theirs.
LABELS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "who", "person"),
    "owner": ("owner", "who", "name"),
    "city": ("city", "town", "place", "where"),
    "item": ("item", "thing", "what"),
    "quantity": ("quantity", "number", "count"),
    "price": ("price", "cost", "paid"),
    "date": ("date", "day", "when"),
    "born": ("born", "birthday"),
    "pet_name": ("pet name", "called"),
    "kind": ("kind", "type"),
    "time": ("time", "hour"),
    "street": ("street", "address"),
}
NOTATIONS = ("lines", "lines", "lines", "quoted", "semicolons", "brackets", "tags", "table", "bars")


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence and the keys it tells, in the order of the sentence."""

    subject: Subject
    sentence: str
    keys: tuple[str, ...]


def tell(rng: random.Random, subject: Subject, *, pattern: str = "") -> Fact:
    """One sentence about a subject, with the keys that its record has."""
    pattern = pattern or rng.choice(PATTERNS[subject.kind])
    keys: list[str] = []
    for _, key, _, _ in string.Formatter().parse(pattern):
        if key:
            keys.extend(("quantity", "item") if key == "goods" else (key,))
    sentence = pattern.format_map(subject.told)
    return Fact(subject, sentence[0].upper() + sentence[1:], tuple(dict.fromkeys(keys)))


def tell_much(rng: random.Random, subject: Subject, count: int) -> Fact:
    """A paragraph of several sentences about one subject."""
    patterns = rng.sample(PATTERNS[subject.kind], min(count, len(PATTERNS[subject.kind])))
    facts = [tell(rng, subject, pattern=pattern) for pattern in patterns]
    keys = dict.fromkeys(key for fact in facts for key in fact.keys)
    return Fact(subject, " ".join(fact.sentence for fact in facts), tuple(keys))


def ask(rng: random.Random, fact: Fact) -> tuple[str, str, str] | None:
    """A question that the fact answers, with its short answer and its whole sentence; None when no question fits."""
    fitting = []
    for question, key, answer in QUESTIONS[fact.subject.kind]:
        named = {name for text in (question, answer) for _, name, _, _ in string.Formatter().parse(text) if name}
        if named <= set(fact.keys) and key in fact.keys:
            fitting.append((question, key, answer))
    if not fitting:
        return None
    question, key, answer = rng.choice(fitting)
    written = fact.subject.written
    return question.format_map(written), written[key], answer.format_map(written)


def draw_labels(rng: random.Random, keys: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The keys of a record in some order, each with what it is called; labels are never used twice."""
    chosen: dict[str, str] = {}
    for key in keys:
        free = [label for label in LABELS.get(key, (key,)) if label not in chosen.values()]
        if free:
            chosen[key] = rng.choice(free)
    order = list(chosen.items())
    if rng.random() < 0.4:
        rng.shuffle(order)
    return tuple(order)


def write_record(subject: Subject, labels: tuple[tuple[str, str], ...], *, notation: str) -> str:
    """The record of a subject: the chosen keys and their values in one of the NOTATIONS."""
    pairs = [(label, subject.written[key]) for key, label in labels]
    match notation:
        case "lines":
            return "\n".join(f"{label}: {value}" for label, value in pairs)
        case "quoted":
            return "\n".join(f'{label} = "{value}"' for label, value in pairs)
        case "semicolons":
            return "; ".join(f"{label} {value}" for label, value in pairs)
        case "brackets":
            return "".join(f"[{label}:{value}]" for label, value in pairs)
        case "tags":
            return "".join(f"<{label}>{value}</{label}>" for label, value in pairs)
        case "table":
            return ",".join(label for label, _ in pairs) + "\n" + ",".join(value for _, value in pairs)
        case _:
            return "|".join(f'"{label}"|"{value}"' for label, value in pairs)
