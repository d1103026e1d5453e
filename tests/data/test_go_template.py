"""Our Go templates: what Go's documentation says of trim marks, variables, comparisons and slices."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from luthier.core.errors import TemplateError
from luthier.data.rendering.go_chat import BLANK, CHECKS, PADDED, go_template_for
from luthier.data.rendering.go_template import ollama_values, quoted, render
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

VALUES = ollama_values([
    {"role": "system", "content": "S"}, {"role": "user", "content": "one"}, {"role": "user", "content": "more"},
    {"role": "assistant", "content": "two"},
])  # fmt: skip


def test_ollamas_values_join_neighbours() -> None:
    assert VALUES["System"] == "S"
    assert [(m["Role"], m["Content"]) for m in VALUES["Messages"]] == [
        ("system", "S"), ("user", "one\n\nmore"), ("assistant", "two")
    ]  # fmt: skip


TEMPLATES = [
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
    ("{{ define \"x\" }}<{{ . }}{{ $ }}>{{ end }}a{{ template \"x\" (slice .System 0) }}b", "a<SS>b"),
    ("{{ define \"x\" }}{{ if ge (len .) 2 }}{{ template \"x\" (slice . 1) }}{{ end }}{{ . }}{{ end }}"
     "{{ template \"x\" \"abc\" }}", "cbcabc"),
    ("{{ len \"é\" }}{{ slice \"aéb\" (len (slice \"aéb\" 3)) }}", "2éb"),
    ("{{ eq (slice \"é\" 0 1) \"e\" \"é\" }}{{ slice \"é\" 0 2 }}", "falseé"),
    ("{{ if and (ge (len .Response) 1) (eq (slice .Response 0 1) \"x\") }}a{{ else }}b{{ end }}", "b"),
    ("{{ if or true (slice .Response 9) }}a{{ end }}", "a"),
    ("{{ template \"x\" . }}", None),
    ("{{ define \"x\" }}{{ $y }}{{ end }}{{ $y := \"\" }}{{ template \"x\" . }}", None),
    ("{{ define x }}{{ end }}", None),
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
]  # fmt: skip


@pytest.mark.parametrize(("source", "wanted"), TEMPLATES)
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


GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked []struct {
		Source, System string
		Messages       []message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	said := make([]*string, len(asked))
	for number, one := range asked {
		var out strings.Builder
		made, err := template.New("").Option("missingkey=zero").Parse(one.Source)
		if err == nil {
			err = made.Execute(&out, map[string]any{"Messages": one.Messages, "System": one.System, "Response": ""})
		}
		if text := out.String(); err == nil {
			said[number] = &text
		}
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""
UNLIKE = {"{{ .Messages }}", "{{ range .System2 }}{{ end }}"}
"""Go shows any value, and what is not there as nothing: our templates have neither."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_writes_the_same(tmp_path: Path) -> None:
    """Every template above, and those of chats with every kind of conversation, through Go's own text/template."""
    (tmp_path / "main.go").write_text(GO)
    asked = [(source, VALUES) for source, _ in TEMPLATES if source not in UNLIKE]
    tokenizer = Tokenizer.of(tiny_tokenizer())
    for end in ("", ".strip()", ".rstrip()"):
        text = CHAT_TEMPLATE.replace("message['content']", f"message['content']{end}")
        chat = go_template_for(Template(text, tokenizer.special_tokens, name="here"), tokenizer)
        asked += [(chat.source, ollama_values(messages)) for messages in (*CHECKS, *PADDED, *BLANK)]
    given = json.dumps([{"Source": source, **values} for source, values in asked])
    run = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=given, capture_output=True, text=True, check=True
    )
    for (source, values), theirs in zip(asked, json.loads(run.stdout), strict=True):
        try:
            ours = render(source, values)
        except TemplateError:
            ours = None
        assert ours == theirs, source
