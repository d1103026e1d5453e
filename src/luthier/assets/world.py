"""The little world: its invented names, and the facts about its people, places, orders, houses and journeys.

Idea: a small model can only be asked to copy names that it cannot know by heart, so every proper name is built from
syllables and a hash of the word decides, once and for all, whether it belongs to the training world or is held out.
A fact is a `Subject`: for each key the words in which it is told, and the value in which it is written down
("the ninth of May 2031" and 2031-05-09), so that every sentence knows its own record.

Pure Python and reproducible: the same `random.Random` gives the same world on every machine.
"""

from __future__ import annotations

import datetime
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_HELD_OUT_IN = 5


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_FIRST = _split(
    "Ma Te Lo Sa Be Ri No Ka El An Ve Ju Da Fi Go Ha Is Or Pe Tu Al Bri Co De Em Fa Gre Hil Ir Jo Ki Lu Mi Na Os Pa "
    "Ro Si Ta Ul Wi Ya Ze Tha Sve Cla Dru Ed Ga Hu"
)
_MIDDLE = _split(
    "ra li vo de mi sa ne lo ki ta bu ga re no fi du la mo si ve ri ba te lu ma je pi zo na ho den lar min sol var "
    "tel nor bas ker fen"
)
_FIRST_END = _split(
    "ra lin vo der mi na bert ka ris dan la mus ne tha ven ko lia sen ro bel do rik sa nor mir ta gar lie"
)
_LAST = _split(
    "Tol Bran Kes Mor Hal Ver Dun Pel Gar Wen Sto Lar Fen Cor Ash Bel Tur Rod Nim Ost Quil Har Sil Mar Dra Lin Kor "
    "Wal Ros Gil Bor Tam Ved Jas Pol Fer Eck Ull Zim Hol Cra Bry Sten Fal Ruth Gan Vos Kel"
)
_LAST_END = _split(
    "ven ker dal mann sted ton wick ley berg low stra ner gard man sen dorf well ford rick lund den ham mark ski "
    "rov net bury mond"
)
_PLACE = _split(
    "Vel Nor Cas Lum Tre Or Hav Stel Bru Mer Kal Dor Fal Win Sar Gren Ald Pen Rav Osk Thal Mel Quar Lin Bal Ere Fro "
    "Hul Isk Jor Kem Lod Nes Pra Ryl Sund Tov Ulm Wes Yar Zel Cam Dres Gal"
)
_PLACE_END = _split(
    "mora wick haven burg stad ford field mouth dale ness port gate holm by minster beck ville moor heim water ria "
    "tal brook crest mere hollow bridge combe"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SMALL = _split(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = _split("_ _ twenty thirty forty fifty sixty seventy eighty ninety")

_ITEMS = (
    "lantern lanterns, basket baskets, kettle kettles, blanket blankets, lamp lamps, chair chairs, table tables, "
    "candle candles, bottle bottles, jar jars, rope ropes, hammer hammers, bucket buckets, ladder ladders, mirror "
    "mirrors, clock clocks, drum drums, flute flutes, pipe pipes, cup cups, plate plates, spoon spoons, knife "
    "knives, pan pans, coat coats, hat hats, scarf scarves, boot boots, glove gloves, shirt shirts, belt belts, bag "
    "bags, book books, map maps, pen pens, letter letters, stamp stamps, picture pictures, frame frames, apple "
    "apples, pear pears, plum plums, melon melons, onion onions, cabbage cabbages, loaf loaves, cake cakes, pie "
    "pies, egg eggs, cheese cheeses, barrel barrels, sack sacks, crate crates, wheel wheels, saddle saddles, oar "
    "oars, sail sails, net nets, anchor anchors, rug rugs, pillow pillows, curtain curtains, broom brooms, brush "
    "brushes, comb combs, ring rings, button buttons, needle needles, ribbon ribbons, bell bells, key keys, lock "
    "locks, box boxes, ticket tickets, compass compasses, tent tents, shovel shovels, saw saws, axe axes, violin "
    "violins"
)
ITEMS: tuple[tuple[str, str], ...] = tuple((pair.split()[0], pair.split()[1]) for pair in _ITEMS.split(","))
TRADES = _split(
    "baker miller smith teacher sailor carpenter doctor weaver tailor farmer fisher potter printer gardener clerk "
    "painter mason shepherd cook driver singer judge hunter brewer"
)
PETS = _split("dog cat goat parrot horse rabbit goose hen pony turtle mouse lizard owl donkey")
COLOURS = _split("red blue green yellow white black brown grey purple orange silver golden pink")
HOBBIES = _split("chess fishing singing dancing cooking drawing reading swimming riding running sewing rowing skating")
PLACE_KINDS = _split("town village city port hamlet harbour market fortress")
WEATHERS = _split("rain snow fog sunshine wind frost thunder drizzle")
MATERIALS = _split("wood stone brick clay glass iron straw timber slate")
VEHICLES = _split("train boat ferry coach wagon bicycle cart sledge ship bus")


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can be told: `told` holds the words of a sentence, `written` the values of its record."""

    kind: str
    told: Mapping[str, str]
    written: Mapping[str, str]


def is_held_out(word: str) -> bool:
    """Whether an invented word belongs to the held-out names; the hash never changes."""
    return zlib.crc32(word.lower().encode()) % _HELD_OUT_IN == 0


@dataclass(frozen=True, slots=True)
class Namer:
    """Invents names on one side of the split: the training world, or the held-out one."""

    rng: random.Random
    held_out: bool = False

    def first(self) -> str:
        """A given name."""
        return self._invent(lambda: self._syllables(_FIRST, _FIRST_END, 0.35))

    def last(self) -> str:
        """A family name."""
        return self._invent(lambda: self._syllables(_LAST, _LAST_END, 0.35))

    def place(self) -> str:
        """The name of a town."""
        return self._invent(lambda: self._syllables(_PLACE, _PLACE_END, 0.35))

    def person(self) -> str:
        """Given name and family name."""
        return f"{self.first()} {self.last()}"

    def scramble(self) -> str:
        """A word without syllables: letters in any order, so that copying cannot lean on familiar pieces."""
        size = self.rng.randint(2, 7)
        word = self._invent(lambda: "".join(self.rng.choice(_LETTERS) for _ in range(size)))
        return word.capitalize() if self.rng.random() < 0.4 else word

    def _syllables(self, starts: tuple[str, ...], ends: tuple[str, ...], long: float) -> str:
        middle = self.rng.choice(_MIDDLE) if self.rng.random() < long else ""
        return self.rng.choice(starts) + middle + self.rng.choice(ends)

    def _invent(self, draw: Callable[[], str]) -> str:
        word = draw()
        while is_held_out(word) is not self.held_out:
            word = draw()
        return word


def spell_number(number: int) -> str:
    """A number from 0 to 999 in words."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_SMALL[hundreds]} hundred" + (f" and {spell_number(rest)}" if rest else "")


def spell_date(rng: random.Random, date: datetime.date) -> str:
    """A date as people say it, in one of several ways."""
    month, day, year = MONTHS[date.month - 1], date.day, date.year
    ways = (
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"the {ordinal(day)} of {month} {year}",
        f"{month} {ordinal(day)}, {year}",
    )
    return rng.choice(ways)


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def draw_date(rng: random.Random) -> datetime.date:
    """A day of the years 2020 to 2039."""
    return datetime.date(2020, 1, 1) + datetime.timedelta(days=rng.randrange(7305))


def draw_price(rng: random.Random) -> str:
    """A price with two decimals; round prices are the more common ones."""
    whole = rng.randint(1, 9) if rng.random() < 0.4 else rng.randint(10, 99)
    return f"{whole}.{rng.choice(('00', '50', '25', '75', f'{rng.randrange(100):02d}'))}"


def draw_order(rng: random.Random, names: Namer) -> Subject:
    """Somebody buys, books or orders a number of things somewhere, at a price, on a day."""
    item, items = rng.choice(ITEMS)
    quantity, price, date = rng.randint(1, 20), draw_price(rng), draw_date(rng)
    number = str(quantity) if rng.random() < 0.5 else spell_number(quantity)
    goods = f"{number} {item if quantity == 1 else items}"
    written = {"item": item, "quantity": str(quantity), "price": price, "date": date.isoformat()}
    told = {"goods": goods, "price": price, "date": spell_date(rng, date)}
    people = {"name": names.person(), "city": names.place()}
    return Subject("order", people | told, people | written)


def draw_person(rng: random.Random, names: Namer) -> Subject:
    """A person of the world."""
    facts = {
        "name": names.person(),
        "city": names.place(),
        "friend": names.first(),
        "pet_name": names.first(),
        "pet": rng.choice(PETS),
        "trade": rng.choice(TRADES),
        "hobby": rng.choice(HOBBIES),
        "colour": rng.choice(COLOURS),
        "age": str(rng.randint(8, 92)),
        "street": f"{names.last()} Street {rng.randint(1, 99)}",
    }
    born = draw_date(rng)
    return Subject("person", facts | {"born": spell_date(rng, born)}, facts | {"born": born.isoformat()})


def draw_place(rng: random.Random, names: Namer) -> Subject:
    """A town or village."""
    facts = {
        "city": names.place(),
        "kind": rng.choice(PLACE_KINDS),
        "river": names.last(),
        "near": names.place(),
        "mayor": names.person(),
        "people": str(rng.randint(2, 999) * 10),
        "founded": str(rng.randint(1100, 1999)),
        "known": rng.choice(ITEMS)[1],
        "miles": str(rng.randint(2, 99)),
        "weather": rng.choice(WEATHERS),
    }
    return Subject("place", facts, facts)


def draw_house(rng: random.Random, names: Namer) -> Subject:
    """A house or shop."""
    facts = {
        "owner": names.person(),
        "city": names.place(),
        "colour": rng.choice(COLOURS),
        "material": rng.choice(MATERIALS),
        "rooms": str(rng.randint(2, 30)),
        "built": str(rng.randint(1100, 1999)),
        "street": f"{names.last()} Street {rng.randint(1, 99)}",
    }
    return Subject("house", facts, facts)


def draw_journey(rng: random.Random, names: Namer) -> Subject:
    """Somebody travels from one place to another."""
    date, hour, minute = draw_date(rng), rng.randrange(24), rng.choice((0, 15, 30, 45, rng.randrange(60)))
    facts = {
        "name": names.person(),
        "from": names.place(),
        "to": names.place(),
        "by": rng.choice(VEHICLES),
        "time": f"{hour:02d}:{minute:02d}",
        "price": draw_price(rng),
        "seats": str(rng.randint(2, 9)),
    }
    return Subject("journey", facts | {"date": spell_date(rng, date)}, facts | {"date": date.isoformat()})
