"""The documents of the little world: what the seedling reads while it grows.

Idea: copying from context is the one skill that everything else in a small model stands on, so nearly every document
says its names more than once: paragraphs and their questions, sentences and their records, lists that are read back.
Use when growing a base model, or when a base text is needed to measure what fine-tuning made it forget.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from luthier.assets.world import (
    COLOURS,
    HOBBIES,
    ITEMS,
    MATERIALS,
    MONTHS,
    PETS,
    TRADES,
    WEEKDAYS,
    Namer,
    Subject,
    draw_date,
    draw_house,
    draw_journey,
    draw_order,
    draw_person,
    draw_place,
    draw_price,
    spell_date,
    spell_number,
)
from luthier.assets.world_text import NOTATIONS, ask, draw_labels, tell, tell_much, write_record

Turns = list[tuple[str, str]]
_DRAWS = (draw_order, draw_order, draw_person, draw_person, draw_place, draw_house, draw_journey)


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text, or a chat of (role, content) turns; `kind` names the maker."""

    kind: str
    text: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns in the form that chat templates take; empty for a plain text."""
        return [{"role": role, "content": content} for role, content in self.turns]


def documents(seed: int, *, held_out: bool = False, late_from: int | None = None) -> Iterator[Document]:
    """An endless stream of documents; with `held_out` every invented name is one that training never shows.

    From document `late_from` on, the mix holds more objects in braces, things and their numbers among them: what is
    rare and hard is read last, when the learning rate falls.
    """
    kinds = list(_TEXTS) + list(_CHATS)
    shares = [share for _, share in (_TEXTS | _CHATS).values()]
    index = 0
    while True:
        if index == late_from:
            kinds, shares = [*kinds, *_LATE], [*shares, *_LATE.values()]
        # One generator per document: a change to one kind of document leaves the others of a seed as they were.
        rng = random.Random(f"{seed}/{index}/{held_out}")
        kind = rng.choices(kinds, shares)[0]
        names = Namer(rng, held_out)
        if kind in _TEXTS:
            yield Document(kind, text=_TEXTS[kind][0](rng, names))
        else:
            yield Document(kind, turns=tuple(_CHATS[kind][0](rng, names)))
        index += 1


# --- plain texts -----------------------------------------------------------------------------------------------------


def _subject(rng: random.Random, names: Namer) -> Subject:
    return rng.choice(_DRAWS)(rng, names)


def _paragraph(rng: random.Random, names: Namer) -> str:
    return tell_much(rng, _subject(rng, names), rng.randint(2, 5)).sentence


def _record_text(rng: random.Random, names: Namer) -> str:
    subject = _subject(rng, names)
    fact = tell(rng, subject)
    record = write_record(subject, draw_labels(rng, fact.keys), notation=rng.choice(NOTATIONS))
    return f"{fact.sentence}\n{record}" if rng.random() < 0.7 else f"{record}\n{fact.sentence}"


def _letter(rng: random.Random, names: Namer) -> str:
    reader, writer = names.first(), names.first()
    body = tell_much(rng, _subject(rng, names), rng.randint(1, 3)).sentence
    opening = rng.choice(
        (
            "how are you?",
            "I hope you are well.",
            "thank you for your letter.",
            f"here in {names.place()} we had {rng.choice(('rain', 'snow', 'sunshine'))}.",
            "I have news.",
        )
    )
    ending = rng.choice(("Yours,", "With love,", "Best wishes,", "Until soon,"))
    answer = f"\nDear {writer}, thank you. Yours, {reader}" if rng.random() < 0.3 else ""
    return f"Dear {reader}, {opening} {body} {ending} {writer}{answer}"


def _price_list(rng: random.Random, names: Namer) -> str:
    place = names.place()
    goods = rng.sample(ITEMS, rng.randint(2, 5))
    prices = [draw_price(rng) for _ in goods]
    lines = "\n".join(f"{item[0]}: {price}" for item, price in zip(goods, prices, strict=True))
    (item, _), price = rng.choice(list(zip(goods, prices, strict=True)))
    end = rng.choice(
        (
            f"In {place} a {item} costs {price} marks.",
            f"The price of a {item} is {price}.",
            f"{names.first()} paid {price} for the {item}.",
        )
    )
    return f"Prices in {place}\n{lines}\n{end}"


def _sum(rng: random.Random, names: Namer) -> str:
    top = rng.choice((10, 20, 100, 100, 1000))
    a, b = rng.randrange(top), rng.randrange(top)
    items = rng.choice(ITEMS)[1]
    match rng.randrange(6):
        case 0 | 1:
            return f"{a} + {b} = {a + b}. {max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}."
        case 2 if a + b < 1000:
            return f"{spell_number(a)} plus {spell_number(b)} is {spell_number(a + b)}."
        case 3:
            name = names.first()
            return f"{name} has {a + 2} {items} and buys {b + 2} more. Now {name} has {a + b + 4} {items}."
        case 4:
            start = a % 50
            step = rng.randint(1, 5)
            return "Count: " + ", ".join(str(start + step * i) for i in range(rng.randint(4, 10))) + "."
        case _:
            return f"{spell_number(a)} is written {a}, and {spell_number(b)} is written {b}."


def _calendar(rng: random.Random, names: Namer) -> str:
    date = draw_date(rng)
    told, day = spell_date(rng, date), WEEKDAYS[date.weekday()]
    following = WEEKDAYS[(date.weekday() + 1) % 7]
    month = date.month - 1
    return rng.choice(
        (
            f"{told} is written {date.isoformat()}.",
            f"{date.isoformat()} is {told}.",
            f"The day is {told}, in numbers {date.isoformat()}.",
            f"{told} is a {day}. The day after is a {following}.",
            f"After {day} comes {following}. After {MONTHS[month]} comes {MONTHS[(month + 1) % 12]}.",
            f"{names.first()} waits until {told}. It is a {day}, in numbers {date.isoformat()}.",
            f"{MONTHS[month]} is month {date.month:02d}. {told} is {date.isoformat()}.",
        )
    )


def _echo(rng: random.Random, names: Namer) -> str:
    words = _words(rng, names, rng.randint(3, 9))
    line = rng.choice((" ", ", ", "\n", " / ")).join(words)
    return "\n".join([line] * rng.randint(2, 3))


def _listing(rng: random.Random, names: Namer) -> str:
    people = [names.first() for _ in range(rng.randint(2, 5))]
    place = names.place()
    told = ", ".join(people[:-1]) + " and " + people[-1]
    return rng.choice(
        (
            f"{told} came to {place}.\n" + "\n".join(f"- {name}" for name in people),
            f"{told} live in {place}. So there are {len(people)} names: {', '.join(people)}.",
            "\n".join(f"{i}. {name}" for i, name in enumerate(people, 1)) + f"\nIn short: {told}.",
            f"The list of {place}: " + "[" + ",".join(f'"{name}"' for name in people) + "]. " + f"{told}.",
        )
    )


def _traits(rng: random.Random) -> dict[str, str]:
    pools = {"colour": COLOURS, "made of": MATERIALS, "pet": PETS, "trade": TRADES, "likes": HOBBIES}
    kinds = rng.sample(sorted(pools), rng.randint(1, 3))
    return {kind: rng.choice(pools[kind]) for kind in kinds}


def _braces(rng: random.Random, names: Namer) -> str:
    """Objects in braces, with traits as keys: the signs of JSON in another schema than the demo's."""
    traits = _traits(rng)
    told = ", ".join(f"{key} {value}" for key, value in traits.items())
    pairs = [f'"{key}":"{value}"' for key, value in traits.items()]
    if rng.random() < 0.5:
        size = rng.randint(1, 99)
        at = rng.randrange(len(pairs) + 1)
        pairs.insert(at, f'"size":{size}')
        told += f", size {size}"
    if rng.random() < 0.5:
        word = names.scramble() if rng.random() < 0.5 else names.first()
        pairs.append(f'"mark":"{word}"')
        told += f", mark {word}"
    return f"{told}: {{{','.join(pairs)}}}"


def _tally(rng: random.Random, names: Namer) -> str:
    """Things that were counted, as a sentence and as objects in braces: a plural becomes its singular in quotes."""
    counted = [(rng.choice(ITEMS), rng.randint(1, 20)) for _ in range(rng.randint(1, 3))]
    told = []
    for (one, many), count in counted:
        number = str(count) if rng.random() < 0.5 else spell_number(count)
        told.append(f"{number} {one if count == 1 else many}")
    objects = [f'{{"thing":"{one}","count":{count}}}' for (one, _), count in counted]
    opening = rng.choice(("{} has {}", "{} counted {}", "{} sold {}", "in the house of {} are {}"))
    said = opening.format(names.first(), ", ".join(told))
    return f"{said}: {','.join(objects)}"


def _words(rng: random.Random, names: Namer, count: int) -> list[str]:
    draws: tuple[Callable[[], str], ...] = (
        names.first,
        names.last,
        names.place,
        names.scramble,
        lambda: rng.choice(ITEMS)[rng.randrange(2)],
        lambda: str(rng.randrange(1000)),
    )
    if rng.random() < 0.5:
        draw = rng.choice(draws)
        return [draw() for _ in range(count)]
    return [rng.choice(draws)() for _ in range(count)]


# --- chats -----------------------------------------------------------------------------------------------------------


def _answer_questions(rng: random.Random, names: Namer) -> Turns:
    subject = _subject(rng, names)
    fact = tell_much(rng, subject, rng.randint(1, 4))
    turns: Turns = []
    whole = rng.random() < 0.3
    for _ in range(rng.randint(1, 4)):
        question = ask(rng, fact)
        if question is None:
            break
        asked, short, sentence = question
        turns.append(("user", asked if turns else f"{fact.sentence} {asked}"))
        turns.append(("assistant", sentence if whole else short))
    if not turns:
        return _repeat(rng, names)
    return [("system", "Answer in a sentence."), *turns] if whole else turns


def _write_record(rng: random.Random, names: Namer) -> Turns:
    """Sentence to record: the form is either asked for by name, or shown by the labels to fill."""
    subject = _subject(rng, names)
    fact = tell(rng, subject)
    labels = draw_labels(rng, fact.keys)
    notation = rng.choice(NOTATIONS)
    record = write_record(subject, labels, notation=notation)
    wanted = ", ".join(label for _, label in labels)
    asked = rng.choice(
        (
            f"Write as {notation} with {wanted}: {fact.sentence}",
            f"{fact.sentence}\nWrite as {notation}: {wanted}",
            f"Fill {wanted} as {notation}.\n{fact.sentence}",
        )
    )
    return [("user", asked), ("assistant", record)]


def _read_record(rng: random.Random, names: Namer) -> Turns:
    subject = _subject(rng, names)
    fact = tell(rng, subject)
    labels = draw_labels(rng, fact.keys)
    record = write_record(subject, labels, notation=rng.choice(NOTATIONS))
    turns: Turns = []
    for key, label in rng.sample(labels, rng.randint(1, len(labels))):
        asked = rng.choice((f"What is the {label}?", f"Give the {label}.", f"{label}?"))
        turns.append(("user", asked if turns else f"{record}\n{asked}"))
        turns.append(("assistant", subject.written[key]))
    return turns


def _repeat(rng: random.Random, names: Namer) -> Turns:
    said = rng.choice((" ", ", ")).join(_words(rng, names, rng.randint(1, 7)))
    if rng.random() < 0.3:
        said = tell(rng, _subject(rng, names)).sentence
    asked, answer = rng.choice(
        (
            (f"Repeat: {said}", said),
            (f"Say after me: {said}", said),
            (f"Say twice: {said}", f"{said}\n{said}"),
            (f"Put in quotes: {said}", f'"{said}"'),
            (f"Copy this.\n{said}", said),
        )
    )
    return [("user", asked), ("assistant", answer)]


def _list_names(rng: random.Random, names: Namer) -> Turns:
    people = [names.first() for _ in range(rng.randint(2, 6))]
    told = ", ".join(people[:-1]) + " and " + people[-1]
    asked, answer = rng.choice(
        (
            (f"{told} are here. How many are they?", str(len(people))),
            (f"{told} are here. List the names.", "\n".join(people)),
            (f"{told} are here. Who is first?", people[0]),
            (f"{told} are here. Who is last?", people[-1]),
            (f"{told} are here. Write them in quotes.", "[" + ",".join(f'"{name}"' for name in people) + "]"),
            (f"{', '.join(people)}: in reverse.", ", ".join(reversed(people))),
        )
    )
    return [("user", asked), ("assistant", answer)]


def _sort(rng: random.Random, names: Namer) -> Turns:
    count = rng.randint(2, 5)
    if rng.random() < 0.5:
        numbers = rng.sample(range(100), count)
        return [
            ("user", "Sort: " + ", ".join(map(str, numbers))),
            ("assistant", ", ".join(map(str, sorted(numbers)))),
        ]
    words = [rng.choice(ITEMS)[0] for _ in range(count)]
    return [("user", "Sort: " + ", ".join(words)), ("assistant", ", ".join(sorted(words)))]


def _convert(rng: random.Random, names: Namer) -> Turns:
    date, number = draw_date(rng), rng.randrange(1000 if rng.random() < 0.3 else 100)
    item, items = rng.choice(ITEMS)
    told = spell_date(rng, date)
    name = names.first()
    asked, answer = rng.choice(
        (
            (f"Write in numbers: {told}", date.isoformat()),
            (f"Write in numbers: {told}", date.isoformat()),
            (f"Write in numbers: {spell_number(number)}", str(number)),
            (f"Write in words: {number}", spell_number(number)),
            (f"One of the {items}?", item),
            (f"Many of {item}?", items),
            (f"Spell {name}.", "-".join(name.upper())),
            (f"Which weekday is {told}?", WEEKDAYS[date.weekday()]),
            (f"What is {number} + {number % 7}?", str(number + number % 7)),
        )
    )
    return [("user", asked), ("assistant", answer)]


def _greet(rng: random.Random, names: Namer) -> Turns:
    name, place = names.person(), names.place()
    turns: Turns = [
        ("user", rng.choice((f"Hello, I am {name} from {place}.", f"My name is {name} and I live in {place}."))),
        ("assistant", f"Hello, {name}!"),
    ]
    asked = rng.choice((("What is my name?", name), ("Where do I live?", place), ("Thank you.", f"Goodbye, {name}!")))
    turns.extend((("user", asked[0]), ("assistant", asked[1])))
    return turns


_TEXTS: dict[str, tuple[Callable[[random.Random, Namer], str], float]] = {
    "paragraph": (_paragraph, 9),
    "record_text": (_record_text, 10),
    "letter": (_letter, 4),
    "price_list": (_price_list, 3),
    "sum": (_sum, 4),
    "calendar": (_calendar, 6),
    "echo": (_echo, 12),
    "listing": (_listing, 6),
    "braces": (_braces, 4),
    "tally": (_tally, 0),
}
_LATE: dict[str, float] = {"braces": 6, "tally": 14}
_CHATS: dict[str, tuple[Callable[[random.Random, Namer], Turns], float]] = {
    "answer": (_answer_questions, 14),
    "write_record": (_write_record, 16),
    "read_record": (_read_record, 5),
    "repeat": (_repeat, 12),
    "list_names": (_list_names, 4),
    "sort": (_sort, 2),
    "convert": (_convert, 8),
    "greet": (_greet, 2),
}
