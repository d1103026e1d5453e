"""Without a network a hub id is told apart from what is cached in one question, not in a minute of retries."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from luthier.core.errors import MissingError
from luthier.data import hub


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Online by the settings, at an address where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_a_model_that_is_nowhere_is_one_quick_sentence(nobody_answers: None, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    for name in ("nobody/nothing", "no name/at/all"):
        with pytest.raises(MissingError, match=r"127\.0\.0\.1:9 does not answer; check the name"):
            hub.only_cached(name)
    assert time.monotonic() - began < 3
    told = capfd.readouterr()
    assert told.out == told.err == ""


def test_what_is_cached_is_used(nobody_answers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, name: str(tmp_path / name))
    assert hub.only_cached("owner/name")


def test_who_asked_to_be_offline_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail("the hub was asked"))
    assert hub.only_cached("nobody/nothing")


def test_a_hub_that_answers_is_used(nobody_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)
    assert not hub.only_cached("nobody/nothing")
