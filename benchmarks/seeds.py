"""How often a text that is drawn with a seed is the same alone and among others.

    python benchmarks/seeds.py
    python benchmarks/seeds.py --model bench-home/m1/model --texts 16

For each precision and each length of prompts: of so many texts, each drawn with a seed of its own at temperature 1, how
many are token for token what they are when nothing else is under way. Random prompts; nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from luthier.data.forest import Ints
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.scheduler import Room
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import open_named

LENGTHS = (20, 60, 200)
SAID = 24
ROOM = 20_000


def texts(engine: Engine, prompts: Sequence[Ints], which: Sequence[int]) -> dict[int, list[int]]:
    """The tokens of the texts of these prompts, all under way at once, by the prompt's place."""
    found: dict[int, list[int]] = {place: [] for place in which}
    sampling = {place: Sampling(max_new_tokens=SAID, temperature=1.0, seed=place) for place in which}
    numbers = {engine.add(Request(prompt=prompts[place], sampling=sampling[place])): place for place in which}
    while engine.busy:
        for news in engine.step():
            found[numbers[news.request]] += [said.token for said in news.said]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seedling", help="what says the texts")
    parser.add_argument("--texts", type=int, default=24, help="texts under way at once")
    args = parser.parse_args()
    places = range(args.texts)
    for precision in ("float32", "bfloat16"):
        model = open_named(args.model, precision=precision).model
        for length in LENGTHS:
            draws = np.random.default_rng(0)
            prompts = [draws.integers(10, model.vocabulary_size, length).astype(np.int32) for _ in places]
            # Nothing that an earlier text has read is found again.
            together = texts(Engine(model, room=Room(tokens=ROOM)), prompts, places)
            alone = [texts(Engine(model, room=Room(tokens=ROOM)), prompts, [place])[place] for place in places]
            same = sum(together[place] == alone[place] for place in places)
            print(f"{precision} {length:4d} tokens: {same} of {args.texts} the same", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
