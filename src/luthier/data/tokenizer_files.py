"""A tokenizer from its files: tokenizer.json says what it does, tokenizer_config.json names tokens and the template.

Idea: tokenizer.json is read by the tokenizers library as it stands. Which Python class a file names, what code comes
with it and what other files lie beside it has no influence: the class is always the plain one. Of
tokenizer_config.json only the keys are used that are listed here, and only values of the type that they must have.

Use through `Tokenizer.load`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken

from luthier.core.errors import CorruptError, LuthierError, MissingError, UnsafeArtifactError
from luthier.data.hub import ModelFiles, no_model_but, read_bytes
from luthier.data.strict_json import Place, decode_text, excerpt

MAX_TOKENIZER: Final = 256 * 1024 * 1024
"""Bytes of a tokenizer.json; the largest in use have 35 million."""
MAX_TEMPLATE: Final = 4 * 1024 * 1024
_ROLES: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS: Final = ("clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space")
_SIDES: Final = ("padding_side", "truncation_side")
_NAMED: Final = re.compile(r"[a-z][a-z0-9_]{0,60}_token")
_WORD: Final = re.compile(r"[a-z_]{1,60}")
_PICKLE: Final = re.compile(r"(tok|vocab).*\.(pkl|pickle|bin|pt|pth|joblib)$", re.IGNORECASE)


def read_tokenizer(files: ModelFiles) -> Any:
    """The transformers tokenizer (the plain fast class) in the files of a model.

    Raises UnsafeArtifactError where code or a pickle would be needed, MissingError where there is no tokenizer.json,
    and CorruptError for files that are damaged.
    """
    config = files.json("tokenizer_config.json")
    if config.get("auto_map") or config.get("trust_remote_code"):
        raise UnsafeArtifactError(
            "the tokenizer needs Python code that comes with the model",
            allowed="tokenizers that have a tokenizer.json and need no code",
            do="save a converted tokenizer.json without auto_map, or choose another model",
            where=files.source,
        )
    path = files.find("tokenizer.json")
    if path is None:
        raise _no_tokenizer(files)
    size = path.stat().st_size
    if size > MAX_TOKENIZER:
        raise CorruptError(f"tokenizer.json has {size} bytes", allowed=f"at most {MAX_TOKENIZER}", where=str(path))
    settings = {**_settings(config), **_special_tokens(files, config), "chat_template": _chat_template(files, config)}
    raw = _made(str(path), settings)
    if not any(role in settings for role in _ROLES):
        # Very old models name no token and leave that to a Python class; their config says the same by number.
        for role in ("bos_token", "eos_token"):
            ids = [token for token in stop_ids(files.json("config.json"), f"{role}_id") if token < len(raw)]
            if ids:
                setattr(raw, role, raw.convert_ids_to_tokens(ids[0]))
    return raw


def stop_ids(config: Mapping[str, object], key: str = "eos_token_id") -> list[int]:
    """The token numbers under `key`, which may be one, several, or none."""
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and not isinstance(token, bool) and token >= 0]


def _made(path: str, settings: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_file=path, **settings)
    except BaseException as failure:
        # The tokenizers library raises Exception itself, and PanicException, which is no Exception.
        if type(failure) not in (Exception, ValueError, TypeError) and type(failure).__name__ != "PanicException":
            raise
        words = " ".join(str(failure).split())[:300]
        raise CorruptError(f"the tokenizers library cannot read it: {words}", where=path) from None


def _no_tokenizer(files: ModelFiles) -> LuthierError:
    names = sorted(entry.name for entry in files.folder.iterdir()) if files.folder is not None else []
    pickles = [name for name in names if _PICKLE.search(name)]
    if pickles:
        return UnsafeArtifactError(
            f"the tokenizer is a pickle: {', '.join(pickles)}",
            allowed="tokenizers that have a tokenizer.json",
            do="convert it in a place where its origin is trusted",
            where=files.source,
        )
    if files.folder is None:
        return MissingError(
            f"no tokenizer could be loaded from {files.source!r}: it has no tokenizer.json on the hub or in its cache",
            do="give a folder with a tokenizer.json, or a hub id that is cached or can be reached",
        )
    older = [name for name in names if name.startswith(("vocab.", "merges.", "spiece.")) or name.endswith(".model")]
    return MissingError(
        f"there is no tokenizer.json in {files.source!r}" + (f" (it has {', '.join(older[:3])})" if older else ""),
        do=no_model_but(files)
        or "convert the tokenizer once with transformers' save_pretrained, or take a version that has a tokenizer.json",
    )


def _settings(config: Mapping[str, object]) -> dict[str, Any]:
    """What of the config changes how texts are read or how the tokenizer is saved, besides its tokens."""
    kept: dict[str, Any] = {key: config[key] for key in _FLAGS if isinstance(config.get(key), bool)}
    kept.update({key: config[key] for key in _SIDES if config.get(key) in ("left", "right")})
    longest = config.get("model_max_length")
    if isinstance(longest, (int, float)) and not isinstance(longest, bool) and longest > 0:
        kept["model_max_length"] = int(longest)
    inputs = config.get("model_input_names")
    if isinstance(inputs, list) and inputs and all(isinstance(name, str) and _WORD.fullmatch(name) for name in inputs):
        kept["model_input_names"] = inputs
    return kept


def _special_tokens(files: ModelFiles, config: Mapping[str, object]) -> dict[str, Any]:
    """The named tokens. A file of older versions says more than the config, unless that lists all added tokens."""
    said = dict(config)
    if "added_tokens_decoder" not in config:
        said.update(files.json("special_tokens_map.json"))
    kept: dict[str, Any] = {}
    for key in _ROLES:
        token = _token(said.get(key), key, files)
        if token is not None:
            kept[key] = token
    extra = said.get("extra_special_tokens") or said.get("additional_special_tokens") or []
    named = {key: value for key, value in said.items() if _NAMED.fullmatch(key) and key not in _ROLES}
    if isinstance(extra, dict):
        named.update({key: value for key, value in extra.items() if _NAMED.fullmatch(key)})
    elif isinstance(extra, list):
        listed = [_token(value, "extra_special_tokens", files) for value in extra]
        if tokens := [token for token in listed if token is not None]:
            kept["extra_special_tokens"] = tokens
    read = {key: _token(value, key, files) for key, value in named.items()}
    own = {key: token for key, token in read.items() if token is not None}
    if own:
        kept["model_specific_special_tokens"] = own
    return kept


def _token(value: object, key: str, files: ModelFiles) -> str | AddedToken | None:
    """A token as the files write it: its text, or an object with its text and flags; None for anything else."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict):
        return None
    content = value.get("content")
    if not isinstance(content, str) or not content:
        raise CorruptError(f"{key} is {excerpt(str(value))}", allowed="a token's text", where=files.source)
    flags = {flag: value[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized")
             if isinstance(value.get(flag), bool)}  # fmt: skip
    return AddedToken(content, special=True, **flags)


def _chat_template(files: ModelFiles, config: Mapping[str, object]) -> str | None:
    """The model's own chat template; of several named ones the default."""
    path = files.find("chat_template.jinja")
    if path is not None:
        try:
            text = decode_text(read_bytes(path, most=MAX_TEMPLATE), Place(str(path)))
        except LuthierError as failure:
            raise CorruptError(f"no chat template: {failure.received}", where=failure.where or str(path)) from None
        return text if text.strip() else None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) and template.strip() else None
