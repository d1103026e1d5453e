"""Tasks: what a model of the zoo is loaded for, and which of its classes does it.

Idea: one base can be put to several uses, and the zoo has a class for each: a decoder that goes on with a text, an
encoder that fills in masked tokens, an encoder that tells the class of a text or of each word, an encoder-decoder that
answers a text with another. An objective names the task it is for; the classes of a task come from the data.
Source: transformers' Auto classes; the names in capitals are PEFT's (peft.TaskType), which its files carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from luthier.core.errors import RecipeError
from luthier.data.rendering.renderer import Kind
from luthier.model.own.config import OwnConfig
from luthier.model.zoo import ZooConfig, ZooModule

TaskName = Literal["causal_lm", "masked_lm", "sequence_classes", "token_classes", "scores", "seq2seq_lm"]
_AUTO: Final[Mapping[TaskName, str]] = MappingProxyType({
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classes": "AutoModelForSequenceClassification",
    "token_classes": "AutoModelForTokenClassification",
    "scores": "AutoModelForSequenceClassification",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
})  # fmt: skip
"""The zoo's class for each task; it has a table of the classes of all configs that do it."""
PEFT_TYPES: Final[Mapping[TaskName, str]] = MappingProxyType({
    "causal_lm": "CAUSAL_LM",
    "masked_lm": "FEATURE_EXTRACTION",
    "sequence_classes": "SEQ_CLS",
    "token_classes": "TOKEN_CLS",
    "scores": "SEQ_CLS",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
})  # fmt: skip
"""PEFT's names. It has none for masked language modelling; what it calls feature extraction adds nothing to a model."""

_DOES: Final[Mapping[TaskName, str]] = MappingProxyType({
    "causal_lm": "causal language model",
    "masked_lm": "masked language model",
    "sequence_classes": "model that classifies texts",
    "token_classes": "model that classifies words",
    "scores": "model that scores texts",
    "seq2seq_lm": "encoder-decoder",
})  # fmt: skip
_FITS: Final[Mapping[Kind, str]] = MappingProxyType({
    "causal": "sft, language_model or classification",
    "encoder": "classification or masked_lm",
    "seq2seq": "seq2seq or t_few",
})  # fmt: skip
_KINDS: Final[Mapping[TaskName, tuple[Kind, ...]]] = MappingProxyType({
    "causal_lm": ("causal",),
    "masked_lm": ("encoder",),
    "sequence_classes": ("causal", "encoder"),
    "token_classes": ("causal", "encoder"),
    "scores": ("causal", "encoder"),
    "seq2seq_lm": ("seq2seq",),
})  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task, and the names of its classes where it has some."""

    name: TaskName = "causal_lm"
    classes: tuple[str, ...] = ()

    @property
    def speaks(self) -> bool:
        """Whether the model says text."""
        return self.name in ("causal_lm", "seq2seq_lm")

    @property
    def classifies(self) -> bool:
        """Whether a layer of its own makes the outputs, one for each of its classes."""
        return self.name in ("sequence_classes", "token_classes", "scores")


CAUSAL: Final = Task()
"""Going on with a text: what a model is loaded for unless something else is asked for."""
SCORES: Final = Task("scores", ("score",))
"""Saying with one number how good a text is: a reward model, kept as a classifier with a single class."""


def kind_of(config: ZooConfig) -> Kind:
    """How the model of a config reads.

    BERT-like configs are in the zoo's table of causal models too, as decoders; they are encoders unless the config
    itself says otherwise.
    """
    if isinstance(config, OwnConfig):
        return "causal"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    reads_both_ways = type(config) in _table("masked_lm") and not getattr(config, "is_decoder", False)
    return "encoder" if reads_both_ways else "causal"


def class_for(config: ZooConfig, task: Task, source: str) -> tuple[type[ZooModule], ZooConfig]:
    """The class that the zoo has for a config and a task, and the part of the config that it takes.

    Raises RecipeError when the model is not of a kind that does the task, with the objectives that fit it.
    """
    mapping, kind = _table(task.name), kind_of(config)
    if kind not in _KINDS[task.name] or type(config) not in mapping:
        known = type(config) in _table("causal_lm") or kind != "causal"
        raise RecipeError(
            f"{source} is a {config.model_type} model, which is no {_DOES[task.name]}",
            allowed=f"objective {_FITS[kind]}" if known else "",
            do=f"set objective.method to {_FITS[kind]}, or choose another model" if known
            else "choose a model that generates text",
        )  # fmt: skip
    kinds = mapping[type(config)]
    if isinstance(kinds, (list, tuple)):
        named = [kind for kind in kinds if kind.__name__ in (config.architectures or ())]
        kinds = (named or kinds)[0]
    if kinds.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return kinds, config


def with_classes(config: ZooConfig, task: Task) -> ZooConfig:
    """The config with the names of the task's classes, by which the zoo sizes its output layer."""
    if task.classifies:
        config.id2label = dict(enumerate(task.classes))
        config.label2id = {name: number for number, name in enumerate(task.classes)}
    return config


def auto_class(task: Task) -> Any:
    """The zoo's class that makes models for a task."""
    import transformers

    return getattr(transformers, _AUTO[task.name])


def _table(task: TaskName) -> Any:
    """The zoo's classes for a task, by the class of a config."""
    return auto_class(Task(task))._model_mapping
