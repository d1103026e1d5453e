"""What a program may hand over as a request, in a process that checks no types, as programs are."""

from __future__ import annotations

import subprocess
import sys

from tests.architecture.source import SOURCE

SCRIPT = """
import numpy as np
import luthier

for prompt in ([5, 6, 7], np.array([5, 6, 7], np.int64), np.array([5.0, 6.0, 7.0]), []):
    request = luthier.Request(prompt=prompt)
    assert request.prompt.dtype == np.int32 and request.prompt.tolist() in ([5, 6, 7], []), prompt
for prompt in ("a text", [[1, 2], [3, 4]], [[1], [2, 3]], np.array([5.5, 6]), [2**40], None, [True]):
    try:
        luthier.Request(prompt=prompt)
    except luthier.LuthierError as error:
        assert "token ids, one after another" in str(error), error
    else:
        raise SystemExit(f"{prompt!r} was taken")
try:
    luthier.Sampling(stop="answer")
except luthier.LuthierError as error:
    assert "write (text,)" in str(error), error
else:
    raise SystemExit("a text was taken for its letters")
"""


def test_what_is_no_prompt_is_told_and_ids_in_any_form_are_one() -> None:
    """Breaks when a number is cut off, only one type of array is taken, or a text ends in an AttributeError."""
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{SCRIPT}"],
                          capture_output=True, text=True, check=False, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
