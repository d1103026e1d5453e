"""generation_config.json: where generation stops, for every program that reads a result.

Idea: a run knows the tokens that ended its trained answers. They are written beside the weights, in the one file that
transformers, vLLM and others ask for stop tokens; what the base's own file says of sampling is carried over.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier.model.files.json_files import read_object, write_object
from luthier.model.language_model import LanguageModel

GENERATION = "generation_config.json"


def save_generation_config(
    folder: Path,
    model: LanguageModel,
    stop_ids: Collection[int],
    *,
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> Path:
    """Write the stop tokens, and pad and BOS where there are any, into `folder`; the file.

    Without a stop token (texts that end in nothing) none is named, whatever the base's own file says.
    """
    ids = sorted({int(token) for token in stop_ids})
    values = _settings(model)
    values.pop("eos_token_id", None)
    for key, own in (("pad_token_id", pad_id), ("bos_token_id", bos_id)):
        if own is not None:
            values[key] = own
    if ids:
        values["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    values["transformers_version"] = metadata.version("transformers")
    path = folder / GENERATION
    write_object(path, values)
    return path


def read_stop_ids(folder: Path) -> frozenset[int]:
    """The stop tokens that `folder` names; none when it has no such file."""
    path = folder / GENERATION
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    listed = named if isinstance(named, list) else [named]
    return frozenset(token for token in listed if type(token) is int and token >= 0)


def _settings(model: LanguageModel) -> dict[str, Any]:
    """What the base says of generation, as far as it is numbers, flags and lists of them."""
    own = model.module.generation_config
    said = {} if own is None else own.to_diff_dict()
    return {key: value for key, value in said.items() if not key.startswith("_") and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is not None and isinstance(value, (bool, int, float))
