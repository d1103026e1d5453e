"""The files beside the weights of a merged model: config, tokenizer, template and where generation stops.

Idea: they are the first parent's, byte for byte, but for what a merge has changed: the type of numbers, the count of
layers in a stack, the size of a vocabulary and the tokens added to it. A chat template comes from the first parent that
has one, and where that is not the first parent it is told. What an adapter was trained with lies beside the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from luthier.data.hub import ModelFiles, read_bytes
from luthier.kernels.floats import DType
from luthier.merge.parents import TOKENIZER, Parent
from luthier.merge.plan import OF_LAYERS, Slice
from luthier.merge.vocabulary import MAX_TOKENIZER, United
from luthier.model.files.json_files import write_object

GENERATION: Final = "generation_config.json"
_COPIED: Final = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_OF_EITHER: Final = (GENERATION, "preprocessor_config.json")
"""An adapter's own where it has any, whether it brings a tokenizer or not."""
_TEMPLATE: Final = "chat_template.jinja"
_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers")
_DECODER: Final = "added_tokens_decoder"


def write_beside(
    folder: Path, parents: Sequence[Parent], dtype: DType, *, layers: int, slices: Sequence[Slice], united: United
) -> tuple[str, ...]:
    """Write everything but the weights; what a user should know of it."""
    first = parents[0]
    write_object(folder / "config.json", _config(parents, dtype, layers, slices, united))
    for name in (*_COPIED, *_OF_EITHER):
        path = first.find(name) if name in _OF_EITHER else first.texts.find(name)
        if path is not None:
            (folder / name).write_bytes(read_bytes(path, most=MAX_TOKENIZER))
    if united.more:
        _add_tokens(folder, united)
    return _template(folder, parents)


def _config(
    parents: Sequence[Parent], dtype: DType, layers: int, slices: Sequence[Slice], united: United
) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(parents[0].config))
    name = dtype.name
    # Older readers know `torch_dtype`, newer ones `dtype`; each goes by its own and passes over the other.
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        if values is config or "dtype" in values or "torch_dtype" in values:
            values.update(dtype=name, torch_dtype=name)
        if united.count and "vocab_size" in values:
            values["vocab_size"] = united.count
        if slices:
            for key in _LAYERS:
                if key in values:
                    values[key] = layers
            _stack(values, parents, slices)
    config.pop("_name_or_path", None)
    return config


def _stack(values: dict[str, Any], parents: Sequence[Parent], slices: Sequence[Slice]) -> None:
    """Lists with an entry for each layer, in the order of the stack."""
    for key in OF_LAYERS:
        lists = [parent.text_config.get(key) for parent in parents]
        if isinstance(values.get(key), list) and all(isinstance(each, list) for each in lists):
            values[key] = [lists[each.sources[0][0]][each.sources[0][1] + step]  # type: ignore[index]  # lists, above
                           for each in slices for step in range(each.count)]  # fmt: skip


def _add_tokens(folder: Path, united: United) -> None:
    path = folder / TOKENIZER
    whole = json.loads(path.read_bytes())
    whole["added_tokens"] = [*(whole.get("added_tokens") or []), *united.more.values()]
    path.write_text(json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_bytes()) if config.is_file() else {}
    if isinstance(said.get(_DECODER), dict):
        for entry in united.more.values():
            said[_DECODER][str(entry["id"])] = {key: value for key, value in entry.items() if key != "id"}
        write_object(config, said)


def _template(folder: Path, parents: Sequence[Parent]) -> tuple[str, ...]:
    if _text(parents[0].texts) is not None:
        return ()
    for parent in parents[1:]:
        text = _text(parent.texts)
        if text is not None:
            (folder / _TEMPLATE).write_text(text, encoding="utf-8")
            return (f"template: {parents[0].name} has no chat template, that of {parent.name} is taken",)
    return ()


def _text(files: ModelFiles) -> str | None:
    path = files.find(_TEMPLATE)
    if path is not None:
        return read_bytes(path, most=MAX_TOKENIZER).decode("utf-8", "replace")
    said = files.json("tokenizer_config.json").get("chat_template")
    return said if isinstance(said, str) and said.strip() else None
