"""What there is to know of a tokenizer beside its vocabulary, as plain values: found out once, from transformers.

Idea: what ends a turn, whether a BOS is added, which ids are control tokens and how its files name them is asked of the
transformers object, a few dozen questions. The answers follow from the files, so they can be kept
(`known_tokenizers.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@final
@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """The answers. `eos_ids` are its own eos, first, and those of generation_config.json; `roles` are ids by role.

    `texts` are those of the control tokens, the longest first; some swallow white space to their left or
    right. `prefix_space` says that a space is added before a text that follows a control token or nothing.
    """

    digest: str
    eos_ids: tuple[int, ...]
    adds_bos: bool
    special_ids: tuple[int, ...]
    texts: tuple[str, ...]
    swallow_left: tuple[str, ...]
    swallow_right: tuple[str, ...]
    chat_template: str | None
    vocabulary_size: int
    prefix_space: bool
    roles: dict[str, int]
    named: dict[str, str]

    @classmethod
    def of(cls, raw: Any, generation_eos: Sequence[int]) -> TokenizerFacts:
        """The facts of a transformers tokenizer that cuts and pads nothing."""
        roles = {role: int(token) for role in _ROLES if (token := getattr(raw, f"{role}_token_id")) is not None}
        own = [roles["eos"]] if "eos" in roles else []
        eos_ids = tuple(dict.fromkeys([*own, *(int(token) for token in generation_eos)]))
        bos = roles.get("bos")
        adds_bos = bos is not None and list(raw("x")["input_ids"])[:1] == [bos]
        template = _template_of(raw)
        state = [raw.backend_tokenizer.to_str(), template, bos, eos_ids, adds_bos]
        added = raw.added_tokens_decoder
        ids = {int(token) for token in raw.all_special_ids} | {int(each) for each, own in added.items() if own.special}
        return cls(
            digest=hashlib.sha256(json.dumps(state).encode()).hexdigest(),
            eos_ids=eos_ids,
            adds_bos=adds_bos,
            special_ids=tuple(sorted(ids)),
            texts=tuple(sorted((str(raw.convert_ids_to_tokens(token)) for token in ids), key=len, reverse=True)),
            swallow_left=tuple(sorted({entry.content for entry in added.values() if entry.lstrip})),
            swallow_right=tuple(sorted({entry.content for entry in added.values() if entry.rstrip})),
            chat_template=template,
            vocabulary_size=len(raw),
            prefix_space=_prefix_space(raw),
            roles=roles,
            named={str(name): str(text) for name, text in raw.special_tokens_map.items() if isinstance(text, str)},
        )

    @property
    def ends(self) -> frozenset[int]:
        """The control tokens that may end a turn. One for the unknown or for a beginning is no end of anything."""
        never = {self.roles.get(role) for role in ("bos", "unk", "cls", "mask")} - {self.roles.get("eos")}
        return frozenset(self.special_ids) - never

    def as_json(self) -> dict[str, Any]:
        """As JSON can keep them."""
        return asdict(self)

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> TokenizerFacts | None:
        """The facts in what JSON kept; None where it holds other things."""
        match said:
            case {"digest": str(digest), "eos_ids": list(eos), "adds_bos": bool(adds_bos), "special_ids": list(ids),
                  "texts": list(texts), "swallow_left": list(left), "swallow_right": list(right),
                  "chat_template": str() | None as template, "vocabulary_size": int(size),
                  "prefix_space": bool(prefix_space), "roles": dict(roles), "named": dict(named)}:  # fmt: skip
                numbers, words = [*eos, *ids, *roles.values()], [*texts, *left, *right, *named.values()]
                if {type(each) for each in numbers} <= {int} and {type(each) for each in words} <= {str}:
                    return cls(digest, tuple(eos), adds_bos, tuple(ids), tuple(texts), tuple(left), tuple(right),
                               template, size, prefix_space, roles, named)  # fmt: skip
        return None


def _template_of(raw: Any) -> str | None:
    """The chat template; of several named ones the default."""
    template = raw.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template.strip() else None


def _prefix_space(raw: Any) -> bool:
    """Whether a space is added in front of a text, seen by encoding one and reading it back."""
    anchors = ["", *(str(token) for token in raw.all_special_tokens[:2])]
    for anchor in anchors:
        # Behind two letters nothing is added, so what differs there is the added space.
        ids = raw.backend_tokenizer.encode(anchor + "xy", add_special_tokens=False).ids
        tail = ids[1:] if anchor else ids
        around = raw.backend_tokenizer.encode("xy\n", add_special_tokens=False).ids
        text = raw.decode([*around, *tail], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith(" xy"):
            return True
    return False
