"""The weights of a base model: read whole, and a module of the zoo that holds nothing else.

Idea: luthier finds and reads the tensors itself and hands them to transformers, together with a config that has passed
the gate. So transformers opens no file of the model: no index, no adapter that lies in a base's folder, no code for
generation. What the config asks for is compared with what the files hold before memory is taken for it.

Use through `load.load_model`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from luthier.core.errors import CorruptError, RecipeError
from luthier.data.hub import ModelFiles
from luthier.model.attending import attention
from luthier.model.tasks import Task, auto_class, class_for, with_classes
from luthier.model.zoo import ZooConfig, ZooModule

_BROKEN: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
"""What the zoo raises for a config that describes no model."""


@dataclass(frozen=True)
class Loaded:
    """A module of the zoo, the names of parameters that the files did not hold, and what a user should know."""

    module: ZooModule
    fresh: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def module_with(
    config: ZooConfig, tensors: dict[str, Tensor], dtype: torch.dtype, source: str, *, task: Task, seed: int
) -> Loaded:
    """The zoo's model for `config` and `task` with these tensors.

    Only a head for a task may be missing in the files (or have been made for other classes): it is drawn anew, the same
    for the same seed.
    """
    kind, config = class_for(with_classes(config, task), task, source)
    other = _other_shapes(kind, config, tensors, source)
    body = f"{kind.base_model_prefix}."
    replaced = sorted(name for name in other if task.classifies and not name.startswith(body))
    kept = {name: tensor for name, tensor in tensors.items() if name not in replaced}
    # transformers reports missing and unexpected tensors in a table on its logger; we raise instead.
    # It also warns of layers that no tensor-parallel plan covers, where there is one device.
    for noisy in ("transformers.modeling_utils", "transformers.distributed.tensor_parallel"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    settings = {"config": config, "state_dict": kept, "dtype": dtype, "output_loading_info": True}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, info = _with_our_attention(kind, settings)
    except (OSError, ValueError, KeyError) as failure:
        raise RecipeError(f"{source} cannot be loaded: {_words(failure)}") from None
    except RuntimeError as failure:
        if "mismatch" not in str(failure):
            raise
        wrong = list(other.values())
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CorruptError(
            f"{source}: tensors have another shape than the config says: {shown or _words(failure)}",
            do="the weight files do not belong to this config.json",
        ) from None
    missing = sorted(set(info.get("missing_keys", ())))
    fresh = tuple(name for name in missing if _may_be_new(name, body, task))
    missing = [name for name in missing if name not in fresh]
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        raise CorruptError(
            f"{source}: {len(missing)} tensors are missing and {len(mismatched)} have another shape "
            f"({', '.join([*missing, *mismatched][:4])})",
            do="the weight files do not belong to this config.json",
        )
    unused = sorted(str(key) for key in info.get("unexpected_keys", ()))
    notices = [f"weights: new, and trained whatever the adapter: {_some(fresh)}"] if fresh else []
    notices += [f"weights: made for other classes, and drawn anew: {_some(replaced)}"] if replaced else []
    notices += [f"weights: the model has no place for {_some(unused)}"] if unused else []
    return Loaded(module, fresh, tuple(notices))


def _may_be_new(name: str, body: str, task: Task) -> bool:
    """Whether a parameter belongs to the head of a task and not to the model below it."""
    if task.name in ("causal_lm", "seq2seq_lm"):
        return False
    return not name.startswith(body) or name.startswith(f"{body}pooler.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def without_weights(config: ZooConfig, source: str, *, task: Task) -> ZooModule:
    """The zoo's model for `config` with no memory for its weights. Raises CorruptError for one that describes none."""
    kind, config = class_for(with_classes(config, task), task, source)
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except _BROKEN as failure:
        raise _no_model(source, failure) from None


def fresh_module(config: ZooConfig, dtype: torch.dtype, seed: int, source: str, *, task: Task) -> Loaded:
    """The zoo's model for `config` and `task` with weights drawn anew; the same for the same seed."""
    auto = auto_class(task)
    class_for(with_classes(config, task), task, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # A copy: a class that refuses our attention leaves its name in the config.
            own = copy.deepcopy(config)
            return Loaded(auto.from_config(own, dtype=dtype, attn_implementation=attention.NAME))
        except _BROKEN as failure:
            if not _has_its_own_attention(failure):
                raise _no_model(source, failure) from None
        return Loaded(auto.from_config(config, dtype=dtype))


def take_generation_settings(module: ZooModule, files: ModelFiles) -> None:
    """The numbers of generation_config.json, where there is one: what to sample with, and where to stop."""
    said = files.json("generation_config.json")
    if not said or not module.can_generate():
        return
    from transformers import GenerationConfig

    known = vars(GenerationConfig())
    kept = {key: value for key, value in said.items() if key in known and key[0] != "_" and _is_number(value)}
    try:
        module.generation_config = GenerationConfig(**kept)
    except (ValueError, TypeError) as failure:
        raise CorruptError(
            f"generation_config.json holds values that make no sense: {_words(failure)}", where=files.source
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, list) and all(map(_is_number, value)))


def _other_shapes(
    kind: type[ZooModule], config: ZooConfig, tensors: Mapping[str, Tensor], source: str
) -> dict[str, str]:
    """The tensors whose shape is not the one that the config asks for, as far as names tell, and how they differ.

    Raises CorruptError for a config that describes no model, or a much larger one than the files hold: memory would be
    taken for it.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(tensors):
        raise CorruptError(
            f"{source}: the config says {layers} layers, the weight files hold {len(tensors)} tensors",
            do="the weight files do not belong to this config.json",
        )
    try:
        with torch.device("meta"):
            wanted = kind(copy.deepcopy(config)).state_dict()
    except _BROKEN as failure:
        raise _no_model(source, failure) from None
    count = sum(tensor.numel() for tensor in wanted.values())
    held = sum(tensor.numel() for tensor in tensors.values())
    if count > 2 * held + 1_000_000:
        raise CorruptError(
            f"{source}: the config describes {count} numbers, the weight files hold {held}",
            do="the weight files do not belong to this config.json",
        )
    return {
        name: f"{name} is {list(tensor.shape)} and should be {list(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and wanted[name].shape != tensor.shape
    }


def _with_our_attention(
    kind: type[ZooModule], settings: dict[str, Any]
) -> tuple[ZooModule, dict[str, Any]]:
    # Without a name transformers reads no file. Its answer with loading info is a pair.
    try:
        return kind.from_pretrained(None, attn_implementation=attention.NAME, **settings)
    except (ValueError, KeyError) as failure:
        if not _has_its_own_attention(failure):
            raise
        return kind.from_pretrained(None, **settings)


def _has_its_own_attention(failure: Exception) -> bool:
    """Whether the zoo's class takes no attention from outside: some say so, older ones look the name up in a table."""
    said = str(failure)
    return isinstance(failure, (ValueError, KeyError)) and ("attention" in said.lower() or attention.NAME in said)


def _no_model(source: str, failure: Exception) -> CorruptError:
    return CorruptError(
        f"{source}: the config describes no model: {type(failure).__name__}: {_words(failure)}",
        do="correct config.json, or fetch it again",
    )


def _words(failure: Exception) -> str:
    return " ".join(str(failure).split())[:300]
