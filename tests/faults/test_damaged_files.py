"""Damaged and mutated files, a few: `make faults` tries a thousand, a hundred thousand and a million."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import data_mutants, flips, header_mutants

SEED = 1


def test_a_damaged_file_is_found_before_it_is_used(faults: Path) -> None:
    """Breaks when a file that a result depends on is read without its digest, or a fallback is not told."""
    flips.run(60, seed=SEED, folder=faults, commands=10).must_hold()


def test_a_manifest_without_digests_is_noticed(tmp_path: Path) -> None:
    """Breaks when the trials damage nothing that matters."""
    flips.control(seed=SEED, folder=tmp_path).must_fail()


def test_a_mutated_data_file_is_read_strictly_or_refused(tmp_path: Path) -> None:
    """Breaks when a row is lost, counted twice or altered, or an exception of a library reaches the user."""
    pytest.importorskip("pyarrow")
    data_mutants.run(900, seed=SEED, folder=tmp_path).must_hold()


def test_lenient_json_is_noticed(tmp_path: Path) -> None:
    """Breaks when the independent parser is as lenient."""
    data_mutants.control(seed=SEED, folder=tmp_path).must_fail()


def test_a_mutated_header_is_refused_or_caught_by_its_digest(tmp_path: Path) -> None:
    """Breaks when a reader trusts a size, a type or a key of a file, or a file is not guarded by a manifest."""
    campaign = header_mutants.run(2500, seed=SEED, folder=tmp_path).must_hold()
    assert all(campaign.verdicts.get(verdict) for verdict in header_mutants.PASSES), campaign.verdicts


def test_digests_that_nobody_compares_are_noticed(tmp_path: Path) -> None:
    """Breaks when every mutant is refused by its reader anyway: then digests are not tried at all."""
    header_mutants.control(seed=SEED, folder=tmp_path).must_fail()
