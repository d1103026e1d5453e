"""Groups of answers: a speaker that reads a prompt once, however many answers to it are asked for in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import final

from luthier.data.forest import Ints
from luthier.infer.engine import Engine
from luthier.infer.request import Request
from luthier.model.speaker import Sampling, Spoken


@final
class GroupSpeaker:
    """Continues prompts by an engine. Each answer draws by its place in the list, as `Engine.speak` has it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def speak(self, prompts: Sequence[Ints], sampling: Sampling) -> list[Spoken]:
        """One continuation for each prompt, in order."""
        places = [list(own) for _, own in groupby(range(len(prompts)), key=lambda place: prompts[place].tobytes())]
        requests = [Request(prompt=prompts[own[0]], sampling=sampling, choices=len(own)) for own in places]
        found = self.engine.answer(requests, draws=[own[0] for own in places])
        return [spoken for group in found for spoken in group]
