"""Our Go templates: what Go's documentation says of trim marks, variables, comparisons and slices."""

from __future__ import annotations

import pytest

from luthier.core.errors import TemplateError
from luthier.data.rendering.go_template import ollama_values, quoted, render

VALUES = ollama_values([
    {"role": "system", "content": "S"}, {"role": "user", "content": "one"}, {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
])  # fmt: skip


def test_ollamas_values_join_neighbours() -> None:
    assert VALUES["System"] == "S"
    assert [(m["Role"], m["Content"]) for m in VALUES["Messages"]] == [
        ("system", "S"), ("user", "one\n\nmore"), ("assistant", "two")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("plain } text { with braces", "plain } text { with braces"),
        ("a {{- \"b\" -}} \n c", "abc"),
        ("a {{ \"b\" }} c", "a b c"),
        ("{{/* nothing */}}x{{- /* nothing */ -}} y", "xy"),
        ("{{ .System }}{{ if .Response }}yes{{ else }}no{{ end }}", "Sno"),
        ("{{ range .Messages }}[{{ .Role }}]{{ end }}", "[system][user][assistant]"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }} {{ end }}", "0system 1user 2assistant "),
        ("{{ range $m := .Messages }}{{ $m.Role }}{{ end }}", "systemuserassistant"),
        ("{{ $x := \"a\" }}{{ range .Messages }}{{ $x = .Role }}{{ end }}{{ $x }}", "assistant"),
        ("{{ $x := \"a\" }}{{ range .Messages }}{{ $x := .Role }}{{ end }}{{ $x }}", "a"),
        ("{{range .Messages}}{{ if eq .Role \"user\" \"tool\" }}x{{ else if ne .Role \"s\" }}y{{ end }}{{ end }}",
         "yxy"),
        ("{{ if and .System (not .Response) }}a{{ end }}{{ if or .Response .System }}b{{ end }}", "ab"),
        ("{{ len .Messages }}{{ len .System }}{{ (index .Messages 1).Role }}", "31user"),
        ("{{ slice .System 0 1 }}{{ slice \"abc\" 1 }}", "Sbc"),
        ("{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ $m.Role }}{{ end }}{{ end }}",
         "assistant"),
        ("{{ \"quote \\\" back \\\\ line \\n tab \\t\" }}", "quote \" back \\ line \n tab \t"),
        ("{{ range .System2 }}{{ end }}", None),
        ("{{ if .System }}never closed", None),
        ("{{ end }}", None),
        ("{{ else }}", None),
        ("{{ slice \"no such order\" 999 }}", None),
        ("{{ frobnicate .System }}", None),
        ("{{ $nothing }}", None),
        ("{{ eq .System }}", None),
        ("{{ .Messages }}", None),
        ("{{ range .System }}x{{ end }}", None),
        ("{{ \"unfinished }}", None),
        ("{{ (len .Messages }}", None),
        ("{{ $x = \"undeclared\" }}", None),
        ("{{ }}", None),
    ],
)  # fmt: skip
def test_templates(source: str, wanted: str | None) -> None:
    if wanted is None:
        with pytest.raises(TemplateError, match="the Go template has"):
            render(source, VALUES)
    else:
        assert render(source, VALUES) == wanted


def test_an_end_closes_the_block_it_belongs_to() -> None:
    source = ("{{ range .Messages }}{{ if eq .Role \"user\" }}U{{ else if eq .Role \"system\" }}{{ if .Content }}"
              "C{{ end }}S{{ else }}{{ if false }}x{{ else }}A{{ end }}{{ end }};{{ end }}.")  # fmt: skip
    assert render(source, VALUES) == "CS;U;A;."


@pytest.mark.parametrize("text", ["", "plain", "a\"b\\c\n\t\r", "日本 🙂", "{{ }}", "\x7f\x00\u2028"])
def test_strings_are_what_they_were(text: str) -> None:
    assert render(f"{{{{ {quoted(text)} }}}}", {}) == text
