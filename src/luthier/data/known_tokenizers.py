"""Facts of tokenizers, remembered: the same files are read by the tokenizers library alone.

Idea: transformers is asked once for the files of a tokenizer. Where it leaves the library's own tokenizer as the file
describes it, the file and the facts are all that is needed from then on, and transformers is not even imported. The
facts are in the cache under a digest of all files that they follow from, of the code and of both libraries.
What transformers writes beside the tokenizer when it saves one is kept with them.
Cost: hashing tokenizer.json; a small file for each tokenizer, which is saved once for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, final

from tokenizers import Tokenizer as Core

from luthier.core.paths import cache_folder
from luthier.data.hub import ModelFiles, read_bytes
from luthier.data.tokenizer_facts import TokenizerFacts
from luthier.data.tokenizer_files import MAX_TOKENIZER
from luthier.store.remembered import code_of, recalled, remember

FOLDER: Final = "tokenizers"
_FILE: Final = "tokenizer.json"
_BESIDE: Final = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
                  "config.json")  # fmt: skip
_CODE: Final = ("data/tokenizer.py", "data/tokenizer_facts.py", "data/tokenizer_files.py", "data/hub.py")


@final
@dataclass(frozen=True, slots=True)
class Known:
    """The library's tokenizer, its facts, and what transformers writes beside its file: texts by their names."""

    core: Core
    facts: TokenizerFacts
    beside: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write what transformers would."""
        self.core.save(str(folder / _FILE))
        for name, text in self.beside.items():
            (folder / name).write_text(text, encoding="utf-8")


def known_tokenizer(files: ModelFiles) -> Known | None:
    """What is known of the tokenizer in these files, where transformers does nothing else to it."""
    path = _place(files)
    match {} if path is None else recalled(path):
        case {"facts": dict(said), "beside": dict(beside)} if all(isinstance(text, str) for text in beside.values()):
            facts = TokenizerFacts.of_json(said)
            return None if facts is None else Known(_alone(files), facts, beside)
    return None


def remember_tokenizer(files: ModelFiles, raw: Any, facts: TokenizerFacts) -> None:
    """Keep the facts of a tokenizer that transformers has made of these files, where it has changed nothing."""
    path = _place(files)
    if path is None:
        return
    core, alone = raw.backend_tokenizer, _alone(files)
    if alone.to_str() == core.to_str() and alone.encode_special_tokens == core.encode_special_tokens:
        with TemporaryDirectory() as folder:
            raw.save_pretrained(folder)
            beside = {each.name: each.read_text("utf-8") for each in Path(folder).iterdir() if each.name != _FILE}
        remember(path, {"facts": facts.as_json(), "beside": beside})


def _alone(files: ModelFiles) -> Core:
    """The tokenizer of the file as the library has it; it may say that texts are cut or filled up, without a word."""
    made = Core.from_file(str(files.find(_FILE)))
    made.no_truncation()
    made.no_padding()
    return made


def _place(files: ModelFiles) -> Path | None:
    """Where the facts of these files are kept; None of files that are in no folder."""
    if files.folder is None:
        return None
    total = hashlib.sha256()
    for name in (_FILE, *_BESIDE):
        path = files.find(name)
        total.update(b"none" if path is None else hashlib.sha256(read_bytes(path, most=MAX_TOKENIZER)).digest())
    total.update(json.dumps([version("tokenizers"), version("transformers"), *code_of(_CODE)]).encode())
    return cache_folder() / FOLDER / f"{total.hexdigest()[:32]}.json"
