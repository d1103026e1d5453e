"""The model card of a merge: which models, of which weights, by which method, what was measured, and what was not.

Idea: a merged model has no data and no training of its own; what it is follows from its parents and one recipe. So the
card names each parent by the digest of its weights, shows what merges them, and tells what the gates have found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, final

from luthier.recipes.exporting.card_parts import (
    INHERITED,
    UNKNOWN,
    BaseFacts,
    headed,
    limits,
    nameless,
    parity_section,
    told_of_base,
    yaml_block,
)

_ARITHMETIC: Final = (
    "A merge is arithmetic on weights: nothing was trained, and whether it is better than its parents only rows can "
    "tell."
)
_SPEAKS: Final = "ForCausalLM"
_USE: Final = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{title}")
model = AutoModelForCausalLM.from_pretrained("{title}")
```

Or `luthier generate {title} --prompt "..."`.
"""
_USE_ADAPTER: Final = """## Use

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{title}")
```

Or `luthier generate {base} --adapter {title} --prompt "..."`.
"""


@final
@dataclass(frozen=True)
class ParentFacts:
    """A parent as a card names it: what the user called it, and the digests of its weights and of an adapter."""

    name: str
    weights: str = ""
    adapter: str = ""
    share: Any = None


@final
@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells. `command` made it, with the values of `recipe` in a file where there are any.

    `architecture` is the class that the config names; an adapter has a `base` instead, on which it is used. `more` are
    the method's own figures.
    """

    title: str
    command: str
    parents: Sequence[ParentFacts]
    recipe: Mapping[str, Any]
    method: str
    evaluation: Mapping[str, Any] | None
    parity: Mapping[str, Any]
    notices: Sequence[str]
    architecture: str = ""
    base: str = ""
    more: str = ""


def merge_card(facts: CardFacts) -> str:
    """The card in Markdown."""
    names = [*(parent.name for parent in facts.parents), *([facts.base] if facts.base else [])]
    known = {name: told_of_base(name) for name in names}
    shown = _shown(known)
    what = f"adapters of `{shown[facts.base]}`" if facts.base else "models"
    parts = [
        headed(facts.title, _front(facts, known)),
        f"This is a merge of {what} by `{facts.method}`, made by luthier {metadata.version('luthier')}.\n",
        _use(facts, shown),
        _parents(facts.parents, known, shown),
        _recipe(facts, shown),
        _evaluation(facts.evaluation, shown),
        limits([_ARITHMETIC, INHERITED.replace("the base model gets", "its parents get"),
                *(_named(line, shown) for line in facts.notices)]),
        parity_section(facts.parity),
        facts.more,
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _front(facts: CardFacts, known: Mapping[str, BaseFacts]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    bases = [name for name, each in known.items() if each.on_hub and (name == facts.base or not facts.base)]
    if bases:
        found |= {"base_model": bases, "base_model_relation": "adapter" if facts.base else "merge"}
    licenses = {each.license for each in known.values()}
    if len(licenses) == 1 and "" not in licenses:
        found["license"] = licenses.pop()
    found["library_name"] = "peft" if facts.base else "transformers"
    if facts.base or facts.architecture.endswith(_SPEAKS):
        found["pipeline_tag"] = "text-generation"
    return {**found, "tags": ["luthier", "merge"]}


def _use(facts: CardFacts, shown: Mapping[str, str]) -> str:
    if facts.base:
        return _USE_ADAPTER.format(title=facts.title, base=shown[facts.base])
    return _USE.format(title=facts.title) if facts.architecture.endswith(_SPEAKS) else ""


def _shown(known: Mapping[str, BaseFacts]) -> dict[str, str]:
    """What parents are called: of folders of this machine the last name, or two where that says nothing."""
    found = {name: each.shown(name) for name, each in known.items()}
    alike = {each for each in found.values() if list(found.values()).count(each) > 1}
    return {name: "/".join(Path(name).parts[-2:]) if each in alike else each for name, each in found.items()}


def _parents(parents: Sequence[ParentFacts], known: Mapping[str, BaseFacts], shown: Mapping[str, str]) -> str:
    lines = []
    for parent in parents:
        digests = [f"{what} `{digest}`" for what, digest in (("weights", parent.weights), ("adapter", parent.adapter))
                   if digest]  # fmt: skip
        weight = "" if parent.share is None else str(nameless(parent.share))
        lines.append(f"| `{shown[parent.name]}` | {weight} | {', '.join(digests)} | "
                     f"{known[parent.name].license or UNKNOWN} |")  # fmt: skip
    return ("## Parents\n\n| model | weight | sha256 of its files | license |\n|---|---|---|---|\n"
            + "\n".join(lines) + "\n")  # fmt: skip


def _recipe(facts: CardFacts, shown: Mapping[str, str]) -> str:
    block = f", with this recipe:\n\n```yaml\n{yaml_block(nameless(facts.recipe))}```\n" if facts.recipe else "\n"
    return f"## Recipe\n\n`{_named(facts.command, shown)}`{block}"


def _evaluation(found: Mapping[str, Any] | None, shown: Mapping[str, str]) -> str:
    """What parents and result are worth on rows."""
    if found is None:
        return "## Beside its parents\n\nNot measured: no rows were given.\n"
    rows = [*found["parents"].items(), ("this model", found["merged"]), ("mean of the parents", found["expected"]),
            ("improvement over the best parent", found["improvement"])]  # fmt: skip
    lines = "".join(f"| {_named(name, shown)} | {score:.4f} |\n" for name, score in rows)
    data = nameless(found["data"])
    return f"## Beside its parents\n\n| on `{data}` | {found['measure']} |\n|---|---|\n{lines}"


def _named(text: str, shown: Mapping[str, str]) -> str:
    """A text without the folders of this machine."""
    for name in sorted(shown, key=len, reverse=True):
        text = text.replace(name, shown[name])
    return text
