"""Places, optional packages, events."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from luthier.core.errors import MissingError
from luthier.core.events import Event, Several, plain
from luthier.core.optional import require
from luthier.core.paths import cache_folder, run_folder, slug

TODAY = datetime.date(2026, 11, 20)


def test_own_variables_go_before_xdg_and_that_before_home() -> None:
    assert cache_folder({"LUTHIER_CACHE": "/c", "XDG_CACHE_HOME": "/x"}) == Path("/c")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/luthier")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/luthier"
    assert cache_folder({"LUTHIER_CACHE": "~/h"}) == Path.home() / "h"
    assert cache_folder({}) == Path.home() / ".cache/luthier"


def test_a_new_run_never_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    first = run_folder("My Model/lora", today=TODAY, parent=tmp_path)
    assert first == tmp_path / "2026-11-20-my-model-lora"
    first.mkdir()
    assert run_folder("my model lora", today=TODAY, parent=tmp_path).name == "2026-11-20-my-model-lora-2"


@pytest.mark.parametrize(
    ("name", "text"),
    [("Qwen/Qwen2.5-0.5B", "qwen-qwen2.5-0.5b"), ("../../etc", "etc"), ("", "run"),
     ("日本", "run"), ("é" * 99, "e" * 60)],
)  # fmt: skip
def test_slugs_are_harmless(name: str, text: str) -> None:
    assert slug(name) == text


def test_a_missing_package_comes_with_its_command() -> None:
    assert require("json", extra="data", purpose="x") is json
    with pytest.raises(MissingError, match=r'reading Parquet needs the package nosuch.*pip install "luthier\[data\]"'):
        require("nosuch.inner", extra="data", purpose="reading Parquet")


def test_events_become_strict_json() -> None:
    event = Event("bad_step", {"loss": float("nan"), "rows": (1, 2), "deep": {"x": float("-inf")}}, step=3)
    assert event.as_dict() == {
        "kind": "bad_step", "step": 3, "loss": "NaN", "rows": [1, 2], "deep": {"x": "-Infinity"},
    }  # fmt: skip
    json.dumps(event.as_dict(), allow_nan=False)
    assert plain(1.5) == 1.5


def test_several_recorders_see_every_event_in_order() -> None:
    class Notes:
        def __init__(self) -> None:
            self.kinds: list[str] = []

        def record(self, event: Event) -> None:
            self.kinds.append(event.kind)

    one, two = Notes(), Notes()
    recorder = Several([one, two])
    recorder.record(Event("a", {}))
    recorder.record(Event("b", {}))
    assert one.kinds == two.kinds == ["a", "b"]
