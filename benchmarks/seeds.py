"""How often a text that is drawn with a seed is the same alone and among others.

    python benchmarks/seeds.py
    python benchmarks/seeds.py --model bench-home/m1/model --texts 16

For each precision and each length of prompts: of so many texts, each drawn with a seed of its own at temperature 1, how
many are token for token what they are when nothing else is under way, and what it costs to have all of them so. Random
prompts. Times are the least of so many rounds in turns: until each text has its first token, and of the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
from counts import count

from luthier.data.forest import Ints
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.infer.scheduler import Room
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import open_named

LENGTHS = (20, 60, 200)
SAID = 24
ROOM = 20_000


def texts(
    engine: Engine, prompts: Sequence[Ints], which: Sequence[int], *, invariant: bool
) -> tuple[dict[int, list[int]], float, float]:
    """The tokens of the texts of these prompts, all under way at once, by the prompt's place; seconds until each has
    begun, and until the end."""
    found: dict[int, list[int]] = {place: [] for place in which}
    began = time.perf_counter()
    first = 0.0
    numbers = {}
    for place in which:
        sampling = Sampling(max_new_tokens=SAID, temperature=1.0, seed=place)
        numbers[engine.add(Request(prompt=prompts[place], sampling=sampling, batch_invariant=invariant))] = place
    while engine.busy:
        for news in engine.step():
            found[numbers[news.request]] += [said.token for said in news.said]
        if not first and all(found.values()):
            first = time.perf_counter() - began
    return found, first, time.perf_counter() - began - first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seedling", help="what says the texts")
    parser.add_argument("--texts", type=count, default=24, help="texts under way at once")
    parser.add_argument("--rounds", type=count, default=3, help="how often each is timed")
    parser.add_argument("--precisions", default="float32,bfloat16", help="precisions, with commas")
    args = parser.parse_args()
    places = range(args.texts)
    for precision in args.precisions.split(","):
        model = open_named(args.model, precision=precision).model
        for length in LENGTHS:
            draws = np.random.default_rng(0)
            prompts = [draws.integers(10, model.vocabulary_size, length).astype(np.int32) for _ in places]

            def made(which: Sequence[int], *, invariant: bool) -> tuple[dict[int, list[int]], float, float]:
                # Nothing that an earlier text has read is found again.
                return texts(Engine(model, room=Room(tokens=ROOM)), prompts, which, invariant=invariant)  # noqa: B023

            rounds = [{kind: made(places, invariant=kind) for kind in (False, True)} for _ in range(args.rounds)]
            for kind in (False, True):
                together = rounds[0][kind][0]
                same = sum(together[place] == made([place], invariant=kind)[0][place] for place in places)
                first, rest = (min(each[kind][at] for each in rounds) for at in (1, 2))
                print(
                    f"{precision:8s} {length:4d} tokens, {'batch-invariant' if kind else 'as ever':15s}: {same} of "
                    f"{args.texts} the same; {first:.3f} s until all have begun, {rest:.3f} s after",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
