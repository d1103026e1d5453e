"""Ollama's Modelfile: what to run, how a chat is written, and where answers end.

Idea: the chat template becomes a Go template that was checked against it (data/rendering/go_chat.py); where answers
end and how they are drawn is said as parameters. What has no place in a Modelfile is an error or a comment in it.
Source: Ollama's Modelfile reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from luthier.core.errors import RecipeError, TemplateError
from luthier.data.rendering.go_chat import go_template_for
from luthier.data.rendering.template import Template
from luthier.data.tokenizer import Tokenizer

NAME: Final = "Modelfile"
_PARAMETERS: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
"""What Ollama calls what generation_config.json says."""
_QUOTES: Final = '"""'


@final
@dataclass(frozen=True)
class Modelfile:
    """The text, and whether the model's file is to say that texts begin with BOS; None for as its tokenizer does."""

    text: str
    adds_bos: bool | None = None


def modelfile(
    *,
    base: str,
    tokenizer: Tokenizer,
    template: str | None,
    stop_ids: Sequence[int],
    generation: Mapping[str, Any],
    adapter: str = "",
    system: str = "",
) -> Modelfile:
    """A Modelfile. Raises TemplateError for a chat template that Ollama's language has no words for."""
    lines = [f"FROM {_plain('the name of the base', base)}"]
    notices: Sequence[str] = ()
    adds_bos = None
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    if template is None:
        # Without a line of its own Ollama would guess one from the file.
        lines.append(f"TEMPLATE {_QUOTES}{{{{ .Prompt }}}}{_QUOTES}")
    else:
        asked = Template(template, tokenizer.special_tokens, name="the model's chat template")
        try:
            made = go_template_for(asked, tokenizer)
        finally:
            asked.close()
        notices, adds_bos = made.notices, made.adds_bos
        if adapter and tokenizer.adds_bos and not adds_bos:
            raise TemplateError(
                "the chat template does not begin with BOS, which Ollama puts before every text of this base",
                allowed="a template that begins with the token that the tokenizer begins texts with",
                do="write {{- bos_token -}} at its start, or export the whole model: --set exporter.part=model",
            )
        lines.append(f"TEMPLATE {_QUOTES}{made.source}{_QUOTES}")
    if system:
        if _QUOTES in system or system.endswith('"'):
            raise RecipeError(f"the system message {system[:80]!r} has quotes that end it in a Modelfile",
                              allowed='a text without """ and without " at its end', do="use other quotes",
                              where="exporter.system")  # fmt: skip
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    for number in stop_ids:
        stop = str(tokenizer.backend.id_to_token(int(number)))
        lines.append(f'PARAMETER stop "{_plain("the stop token", stop)}"')
    lines += [f"PARAMETER {name} {generation[key]}" for key, name in _PARAMETERS.items()
              if isinstance(generation.get(key), (int, float))]  # fmt: skip
    return Modelfile("\n".join([*(f"# {notice}" for notice in notices), *lines]) + "\n", adds_bos)


def _plain(what: str, value: str) -> str:
    """A word that a Modelfile can hold: it knows no escapes."""
    if not value or any(letter in value for letter in '"\n\r'):
        raise RecipeError(f"{what} is {value!r:.80}", allowed="a text on one line, without double quotes",
                          do="export it with --to gguf")  # fmt: skip
    return value
