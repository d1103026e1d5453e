"""Units as text."""

from __future__ import annotations

import pytest

from luthier.core.errors import RecipeError
from luthier.core.units import bytes_from, bytes_text, count_text, duration_text, percent_text, signed_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (312, "312 B"), (999, "999 B"), (1000, "1 kB"), (1.6e9, "1.6 GB"), (999_960, "1 MB"),
     (123_456_789, "123 MB"), (4e18, "4000 PB"), (-2500, "-2.5 kB")],
)  # fmt: skip
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (950, "950"), (12_400, "12.4k"), (5_770_000, "5.8M"), (7_600_000_000, "7.6B")]
)
def test_counts(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"),
     (3599.7, "1 h"), (7500, "2 h 5 min"), (86_399, "1 d"), (3 * 86_400 + 4 * 3600, "3 d 4 h"), (-5, "-5.0 s"),
     (float("nan"), "unknown")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0 %"), (1, "100.0 %"), (0.0312, "3.1 %"), (0.00004, "0.004 %"), (0.000096, "0.0096 %")]
)
def test_shares(share: float, text: str) -> None:
    assert percent_text(share) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("16 GiB", 16 * 2**30), ("512M", 512e6), ("1.5TB", 1.5e12), ("80B", 80), ("3kB", 3000), ("2b", 2),
     ("1000000", 1e6), ("24000000000", 24e9), ("24gb", 24e9), ("16gib", 16 * 2**30), ("1m", 1e6)],
)
def test_sizes_from_text(text: str, size: float) -> None:
    assert bytes_from(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "3 iB", "1e9", "nan", "5 X", "0.0001kB", "9" * 400 + "GB"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="a size of"):
        bytes_from(text)


@pytest.mark.parametrize("text", ["24", " 80 ", "1.5", "999999"])
def test_a_small_number_without_a_unit_is_no_size(text: str) -> None:
    """Breaks when 24 is planned for as 24 bytes."""
    with pytest.raises(RecipeError, match=f"which has no unit; .*; write {text.strip()}GB"):
        bytes_from(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "0.0000"), (0.0, "0.0000"), (-0.00004, "0.0000"), (-0.00006, "-0.0001"), (-1.5, "-1.5000")],
)  # fmt: skip
def test_what_is_shown_as_a_zero_has_no_minus(value: float, text: str) -> None:
    """Breaks when a reward of nothing is shown as less than nothing."""
    assert signed_text(value) == text
