"""How many calls of a test have the shapes of their tensors checked: the first ones.

A checked call takes some ten times as long as a small one, and the thousandth finds what the first ones found.
"""

from __future__ import annotations

from jaxtyping import config


class _Counted(type(config)):  # type: ignore[misc]
    """jaxtyping's settings, which it asks at each call whether it is to look on; so many times it is."""

    left = 0

    @property
    def jaxtyping_disable(self) -> bool:
        self.left -= 1
        return self.left < 0

    @jaxtyping_disable.setter
    def jaxtyping_disable(self, value: bool) -> None:
        """What a variable of the environment says at the start; tests say it by `check`."""


def check(calls: float) -> None:
    """From now on have so many calls checked, and those after them not."""
    config.left = calls


config.__class__ = _Counted
