"""White space that a chat template strips around messages: found by asking it, and stripped by a Go template.

Idea: Go's templates have no function that strips, but a template may call itself on a slice of what it was given: one
cuts white space off the beginning until there is none, and hands the rest to another, which cuts it off the end. There
is no subtraction either; the length of a text without its first byte is its length less one.
Equation: strip(s) = strip(s[k:]) where s begins with white space of k bytes, otherwise rstrip(s);
rstrip(s) = rstrip(s[:|s[k:]|]) where it ends with such, otherwise s.
Source: Go's text/template (slice and len count bytes; `and` stops at the first that is not true, from Go 1.18 on);
Python's str.strip, which is what Jinja's trim is, for what white space is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import groupby
from typing import Final, Literal

Strip = Literal["none", "end", "both"]
"""Where white space is stripped from a message."""
_SPACES: Final = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008" \
                 "\u2009\u200a\u2028\u2029\u202f\u205f\u3000"  # fmt: skip
"""All that str.strip strips, by the number of bytes in UTF-8."""
AROUND: Final = "\u3000\n \xa0\t\u2003\r\n"
"""White space of every length, for asking."""
_NAMES: Final[Mapping[Strip, str]] = {"end": "rstrip", "both": "strip"}


def learn(text: str, marks: Sequence[str], pairs: Sequence[tuple[str, str]],
          found: MutableMapping[tuple[str, str], Strip | None]) -> None:  # fmt: skip
    """Take from `text`, with contents of `marks` between AROUND, what is stripped behind each pair of roles.

    None stands for a pair that is not the same everywhere, or has it at the beginning only.
    """
    for mark, pair in zip(marks, pairs, strict=True):
        before, _, after = text.partition(mark)
        begins, ends = before.endswith(AROUND), after.startswith(AROUND)
        strip: Strip | None = "none" if begins and ends else "end" if begins else None if ends else "both"
        found[pair] = strip if found.get(pair, strip) == strip else None


def definitions(strips: Sequence[Strip]) -> list[str]:
    """The Go templates that are needed for these, each in one line."""
    made = []
    if "both" in strips:
        made.append(_definition("strip", "slice . 0 {size}", "slice . {size}", '{{- template "rstrip" . -}}'))
    if made or "end" in strips:
        last = "len (slice . {size})"
        made.append(_definition("rstrip", f"slice . ({last})", f"slice . 0 ({last})", "{{ . }}"))
    return made


def content(strip: Strip) -> str:
    """The action that writes a message's content."""
    return "{{- .Content -}}" if strip == "none" else f'{{{{- template "{_NAMES[strip]}" .Content -}}}}'


def _definition(name: str, asked: str, rest: str, otherwise: str) -> str:
    parts = []
    for size, letters in groupby(_SPACES, key=lambda letter: len(letter.encode())):
        spaces = " ".join(map(json.dumps, letters))
        parts.append(f"if and (ge (len .) {size}) (eq ({asked.format(size=size)}) {spaces}) -}}}}"
                     f'{{{{- template "{name}" ({rest.format(size=size)}) -}}}}')  # fmt: skip
    body = "{{- else ".join(parts)
    return f'{{{{- define "{name}" -}}}}{{{{- {body}{{{{- else -}}}}{otherwise}{{{{- end -}}}}{{{{- end -}}}}'
