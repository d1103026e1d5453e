"""config.json through an allow-list: what reaches transformers is data that its config class declares, nothing else.

Idea: a config steers which code runs and what is downloaded, unless somebody who is not transformers decides what of it
is believed. The model type has to be one that transformers has. Of its keys those are kept that its config class
declares, or that its code reads by name; values are numbers, truth values, short names, and lists and objects of these.
Keys that steer code are refused, all others are dropped, named in a notice. The config object is made from what
remains, and transformers never sees the file.
Source: CVE-2026-4372 (`_attn_implementation_internal` downloads code), CVE-2026-5241 (a config turns remote code on),
CVE-2026-93348 (a model type pasted into code).
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from luthier.core.errors import CorruptError, RecipeError, UnsafeArtifactError
from luthier.core.nearest import nearest
from luthier.data.hub import AGAIN, read_json
from luthier.data.strict_json import excerpt
from luthier.model.files.checked import Checked

MAX_LAYERS: Final = 10_000
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_MOST: Final = 2**53
_NAME: Final = re.compile(r"[A-Za-z0-9_.+*\-]{0,256}")
"""What a text in a config may look like: the name of an activation, a layer type, a dtype. No path, no repository."""
_KEY: Final = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_SHOWN: Final = 6

_STEERING: Final = ("auto_map", "trust_remote_code", "code_revision")
_STEERING_PARTS: Final = ("attn_implementation", "experts_implementation")
_STEERING_ENDS: Final = ("_internal",)
_STEERING_STARTS: Final = ("custom_", "kernel_config", "use_kernels", "allow_all_kernels", "hub_kernel")
_AUTOSET: Final = "_attn_implementation_autoset"
"""Written by transformers 4.48 to 4.51 into every config: whether it chose the attention itself. It steers nothing."""

_DROPPED: Final = ("output_attentions", "output_hidden_states", "return_dict", "fusion_config", "transformers_weights",
                   "name_or_path")  # fmt: skip
"""Known to transformers, but not for a file to say: what a forward returns, and which other files are read."""
_OURS: Final = ("model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "_commit_hash",
                "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", _AUTOSET)  # fmt: skip
"""Not passed on and not worth a word: luthier chooses the precision, and the others say nothing about a language
model's computation."""
_QUANTIZED: Final = ("quantization_config", "compression_config")
_READABLE: Final = "quantization_config"
_SPECIAL: Final = {"Infinity": float("inf"), "-Infinity": float("-inf")}
_TAKERS: Final = frozenset(["__post_init__", "__init__", "convert_rope_params_to_dict"])
_READ: Final = re.compile(r'getattr\(\s*[\w.]*config,\s*"(\w+)"')


def read_config(path: Path, *, quantized: bool = False) -> Checked:
    """The config in a config.json. Where weights may be `quantized`, what it says of that is plain data beside it.

    Raises UnsafeArtifactError for keys and texts that could steer code, RecipeError for a model type that transformers
    does not have and for quantized weights that may not be, CorruptError for a file that is damaged or makes no sense.
    """
    values = read_json(path)
    _refuse_steering(path, values, "")
    kind = _config_class(path, values, "")
    gate = _Gate(path, [])
    quantization = gate.quantization(values) if quantized else {}
    made = gate.build(kind, {key: values[key] for key in values if not (quantization and key == _READABLE)}, "")
    return Checked(made, gate.notices(), quantization)


def _refuse_steering(path: Path, value: object, inside: str) -> None:
    """Refuse a key that steers which code is run, wherever it stands."""
    if isinstance(value, list):
        for item in value:
            _refuse_steering(path, item, inside)
    if not isinstance(value, dict):
        return
    steering = [key for key, held in value.items() if _steers(key, held)]
    if steering:
        raise UnsafeArtifactError(
            f"the config steers which code is run ({', '.join(excerpt(inside + key) for key in steering[:_SHOWN])})",
            allowed="a config that is data only",
            do="remove these keys if transformers itself has the model type; luthier runs no remote code",
            where=str(path),
        )
    for key, held in value.items():
        _refuse_steering(path, held, f"{inside}{key}.")


def _steers(key: str, value: object) -> bool:
    if key == _AUTOSET and isinstance(value, bool):
        return False
    if key in _STEERING or any(part in key for part in _STEERING_PARTS):
        return True
    return bool(value) and (key.startswith(_STEERING_STARTS) or key.endswith(_STEERING_ENDS))


def _config_class(path: Path, values: Mapping[str, object], inside: str) -> type[PretrainedConfig]:
    name = values.get("model_type")
    known = list(CONFIG_MAPPING.keys())
    if isinstance(name, str) and name in known:
        return CONFIG_MAPPING[name]  # type: ignore[no-any-return]  # transformers is untyped here
    close = nearest(name, known) if isinstance(name, str) else []
    raise RecipeError(
        f"{inside}model_type is {excerpt(str(name))}" if name is not None else f"there is no {inside}model_type",
        allowed=f"a model type of this transformers ({', '.join(close) if close else f'it has {len(known)}'})",
        do="choose another model, or update transformers if the model is newer than it",
        where=str(path),
    )


class _Gate:
    """The cleaning of one file; `dropped` collects the keys that were left out."""

    def __init__(self, path: Path, dropped: list[str]) -> None:
        self._path = path
        self._dropped = dropped

    def notices(self) -> tuple[str, ...]:
        if not self._dropped:
            return ()
        more = len(self._dropped) - _SHOWN
        names = ", ".join(self._dropped[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return (f"config.json: not used are {names}",)

    def quantization(self, values: Mapping[str, object]) -> dict[str, object]:
        """What the file says of quantized weights, as plain data; empty where it says nothing."""
        said = values.get(_READABLE)
        if not isinstance(said, dict):
            return {}
        return {key: self._plain(value, f"{_READABLE}.{key}") for key, value in said.items()}

    def build(self, kind: type[PretrainedConfig], values: Mapping[str, object], inside: str) -> PretrainedConfig:
        """The config of that class with what of `values` it knows."""
        for key in _QUANTIZED:
            if values.get(key):
                raise RecipeError(
                    f"the weights are quantized ({inside}{key})",
                    allowed="weights in float32, bfloat16 or float16",
                    do="take the version of this model that is not quantized",
                    where=str(self._path),
                )
        known, parts = known_keys(kind), dict(kind.sub_configs)
        kept: dict[str, Any] = {}
        left = []
        for key, value in values.items():
            place = f"{inside}{key}"
            if key in _OURS or key in _QUANTIZED:
                continue
            if key not in known or key in _DROPPED or key.startswith("_"):
                left.append(key)
            elif key in parts and isinstance(value, dict):
                own = parts[key]
                part = own if issubclass(own, PretrainedConfig) else self._part_class(kind, key, value)
                kept[key] = self.build(part, value, f"{place}.")
            else:
                kept[key] = self._plain(value, place)
                self._bounded(key, kept[key], place)
        made = self._made(kind, kept, inside)
        # What says nothing, or what the config says without being told, is no loss.
        lost = [key for key in left if values[key] and getattr(made, key, None) != values[key]]
        self._dropped += [excerpt(f"{inside}{key}")[1:-1] for key in lost]
        return made

    def _part_class(self, kind: type[PretrainedConfig], key: str, value: dict[str, object]) -> type[PretrainedConfig]:
        if "model_type" in value:
            return _config_class(self._path, value, f"{key}.")
        default = kind.sub_configs_defaults[key].model_type
        return _config_class(self._path, {"model_type": default}, f"{key}.")

    def _made(self, kind: type[PretrainedConfig], kept: dict[str, Any], inside: str) -> PretrainedConfig:
        try:
            return kind(**kept)
        except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as failure:
            words = " ".join(str(failure).split())[:300]
            raise CorruptError(
                f"{inside}{kind.__name__} cannot be made from these values: {words}",
                allowed="values that transformers accepts",
                do="fetch the file again, or correct the value",
                where=str(self._path),
            ) from None

    def _plain(self, value: object, place: str) -> Any:
        """`value` when it is plain data."""
        if value is None or isinstance(value, (bool, float)):
            return value
        if isinstance(value, int):
            if abs(value) > _MOST:
                raise CorruptError(
                    f"{place} is {str(value)[:30]}", allowed=f"at most {_MOST}", do=AGAIN, where=str(self._path)
                )
            return value
        if isinstance(value, str):
            if not _NAME.fullmatch(value):
                raise UnsafeArtifactError(
                    f"{place} is the text {excerpt(value)}",
                    allowed="a name of letters, digits and . _ - + *",
                    do="correct the config, or choose another model",
                    where=str(self._path),
                )
            return value
        if isinstance(value, list):
            return [self._plain(item, place) for item in value]
        entries = dict(value) if isinstance(value, dict) else {}
        if set(entries) == {"__float__"} and entries["__float__"] in _SPECIAL:
            return _SPECIAL[str(entries["__float__"])]
        wrong = [key for key in entries if not _KEY.fullmatch(key)]
        if wrong:
            raise UnsafeArtifactError(
                f"{place} has the key {excerpt(wrong[0])}", allowed="names as keys", where=str(self._path)
            )
        return {key: self._plain(item, f"{place}.{key}") for key, item in entries.items() if key[0] != "_"}

    def _bounded(self, key: str, value: object, place: str) -> None:
        if key in _LAYERS and isinstance(value, int) and value > MAX_LAYERS:
            raise CorruptError(
                f"{place} is {value}", allowed=f"at most {MAX_LAYERS} layers", do=AGAIN, where=str(self._path)
            )


def known_keys(kind: type[PretrainedConfig]) -> frozenset[str]:
    """The keys that a config class declares, and those that its code, or that of its model, takes or reads by name."""
    known = {field.name for field in dataclasses.fields(kind)}
    # A file may use either name of a key that has two, and transformers writes the one that is no field.
    known |= {*kind.attribute_map, *kind.attribute_map.values()}
    for base in kind.__mro__:
        # Older names of a key are taken from the keyword arguments that come beside the declared ones.
        for name in _TAKERS & set(vars(base)):
            code = getattr(vars(base)[name], "__code__", None)
            if code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
                known |= set(_texts(code))
                if base is not PretrainedConfig:
                    known |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    file = Path(inspect.getfile(kind))
    beside = file.with_name(file.name.replace("configuration_", "modeling_"))
    if beside.is_file():
        known |= set(_READ.findall(beside.read_text(encoding="utf-8")))
    return frozenset(key for key in known if _KEY.fullmatch(key))


def _texts(code: types.CodeType) -> Iterator[str]:
    """The texts that a function holds as constants."""
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _texts(constant)
        elif isinstance(constant, (tuple, frozenset)):
            yield from (item for item in constant if isinstance(item, str))
