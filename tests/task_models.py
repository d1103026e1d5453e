"""Tiny models for tasks other than going on with a text, and what the engine must agree with on them.

The references know nothing of the engine: they call the zoo's whole model on one row at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from luthier.core.chosen import choose
from luthier.data.forest import Forest, Segment, Tree
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.load import state_digest
from luthier.model.tasks import CAUSAL, SCORES, Task, auto_class, with_classes
from luthier.objectives import Objective, Vocabulary
from tests import forests
from tests.tiny import HIDDEN, LAYERS, VOCABULARY

CLASSES = ("bad", "fair", "good")
TEXTS = Task("sequence_classes", CLASSES)
WORDS = Task("token_classes", CLASSES)
MASKED = Task("masked_lm")
ANSWERS = Task("seq2seq_lm")

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
    "num_decoder_layers": LAYERS, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    "dropout_rate": 0.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip


def config(architecture: str) -> Any:
    """The transformers config of a tiny encoder, encoder-decoder or decoder."""
    made = {
        "bert": lambda: transformers.BertConfig(**_SHARED, **_QUIET),
        "roberta": lambda: transformers.RobertaConfig(**{**_SHARED, "pad_token_id": 1}, **_QUIET),
        "electra": lambda: transformers.ElectraConfig(**_SHARED, **_QUIET, embedding_size=16),
        "albert": lambda: transformers.AlbertConfig(**_SHARED, **_QUIET, embedding_size=16),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=HIDDEN, hidden_dim=48, n_layers=LAYERS, n_heads=4, max_position_embeddings=128,
            dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        ),
        "modernbert": lambda: transformers.ModernBertConfig(
            **_SHARED, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8,
            global_attn_every_n_layers=2,
        ),
        "deberta": lambda: transformers.DebertaV2Config(
            **_SHARED, **_QUIET, relative_attention=True, pos_att_type=["c2p", "p2c"]
        ),
        "mpnet": lambda: transformers.MPNetConfig(**{**_SHARED, "pad_token_id": 1}, **_QUIET),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1,
        ),
        "llama": lambda: transformers.LlamaConfig(**{**_SHARED, "pad_token_id": None}, num_key_value_heads=2),
        "t5": lambda: transformers.T5Config(**_T5),
        "t5-gated": lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "bart": lambda: transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, dropout=0.0,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
            max_position_embeddings=128, pad_token_id=1, attention_dropout=0.0, activation_dropout=0.0,
        ),
    }  # fmt: skip
    return made[architecture]()


def zoo(architecture: str, task: Task, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of the zoo with every parameter random, wide enough that texts that are mixed up show."""
    attention.register()
    named = with_classes(copy.deepcopy(config(architecture)), task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = auto_class(task).from_config(copy.deepcopy(named), attn_implementation=attention.NAME)
        except (ValueError, KeyError):
            module = auto_class(task).from_config(named)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.3)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
                else:
                    parameter.normal_(1.0, 0.1)
    return module.to(dtype).eval()


def language_model(
    architecture: str, task: Task, *, seed: int = 0, fused: bool = True, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The tiny model as luthier has it: frozen, probed."""
    module = zoo(architecture, task, seed=seed, dtype=dtype)
    return LanguageModel(
        module, source=f"tiny/{architecture}", digest=state_digest(module), kernels="auto" if fused else "torch",
        task=task,
    )  # fmt: skip


def trees(task: Task, *, both_ways: bool, count: int = 4, seed: int = 0, types: bool = False) -> list[Tree]:
    """Random rows for a task, of different lengths, two of them alike."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        size = int(rng.integers(4, 12)) if row != 1 else len(made[0].segments[0].tokens)
        if task.name == "seq2seq_lm":
            read = Segment(forests.tokens(rng, size), np.zeros(size, np.float32), both_ways=True)
            said = [_answer(rng, int(rng.integers(2, 6))) for _ in range(1 + row % 3)]
            made.append(Tree((read, *said), row=row))
            continue
        weights = rng.choice([0.0, 0.5, 1.0], size).astype(np.float32)
        weights[rng.integers(size)] = 2.0
        if task.name == "sequence_classes":
            where = 0 if both_ways else size - 1
            weights = np.zeros(size, np.float32)
            weights[where] = 1.5
        labels = rng.integers(0, len(task.classes) or VOCABULARY, size).astype(np.int32)
        kinds = (np.arange(size) > size // 2).astype(np.uint8) if types else None
        # That an encoder sees both ways is not said by its rows.
        part = Segment(forests.tokens(rng, size), weights, labels=labels, types=kinds)
        made.append(Tree((part,), row=row))
    return made


def _answer(rng: np.random.Generator, count: int) -> Segment:
    tokens, weights = forests.tokens(rng, count), rng.choice([0.5, 1.0], count).astype(np.float32)
    tokens[0], weights[0] = 0, 0
    return Segment(tokens, weights, 0)


def brute_log_probs(module: PreTrainedModel, made: list[Tree]) -> Tensor:
    """log p of every weighted label, by the zoo's whole model, one row (and one answer) at a time."""
    found = []
    for tree in made:
        read, *answers = tree.segments
        ids = torch.from_numpy(read.tokens.astype(np.int64))[None]
        if answers:
            for answer in answers:
                said = torch.from_numpy(answer.tokens.astype(np.int64))
                logits = module(input_ids=ids, decoder_input_ids=said[None], use_cache=False).logits[0]
                log_probs = torch.log_softmax(logits.float(), -1)
                found += [log_probs[i - 1, said[i]] for i in np.flatnonzero(answer.weights).tolist()]
            continue
        given: dict[str, Tensor] = {"input_ids": ids}
        if read.types is not None:
            given["token_type_ids"] = torch.from_numpy(read.types.astype(np.int64))[None]
        logits = module(**given).logits
        log_probs = torch.log_softmax(logits.float(), -1)
        assert read.labels is not None
        for place in np.flatnonzero(read.weights).tolist():
            label = int(read.labels[place])
            found.append(log_probs[0, label] if logits.ndim == 2 else log_probs[0, place, label])
    return torch.stack(found)


def weights_of(made: list[Tree]) -> Tensor:
    """The weights of all labels, in the order of the forest."""
    return torch.from_numpy(Forest(tuple(made)).layout.weights)


# ------------------------------------------------------------------------------------------------- rendered rows


def fitting(name: str) -> Objective:
    """An objective of the catalog with its defaults, and the vocabulary of the tiny models."""
    return choose("objectives", Objective, name).with_vocabulary(Vocabulary(VOCABULARY, mask_id=2))


def model_for(
    objective: Objective, *, architecture: str = "llama", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A tiny model of the task that an objective is for: `architecture`, where that is to go on with texts."""
    task = objective.task(CLASSES)
    if task == CAUSAL:
        return forests.language_model(architecture, dtype=dtype)
    kinds = {ANSWERS: "t5", SCORES: "llama"}
    return language_model(kinds.get(task, "bert"), task, dtype=dtype)


def views_for(objective: Objective, count: int = 5, *, seed: int = 4) -> list[Rendered]:
    """Random rendered rows as an objective wants them."""
    task = objective.task(CLASSES)
    plain = forests.views(count, seed=seed)
    rng = np.random.default_rng(seed)
    if {"preference", "conversation"} <= set(objective.meanings or ()):
        # Both kinds of rows, in turn.
        return [answered(each, rng, answers=2) if each.row % 2 else each for each in plain]
    if "preference" in (objective.meanings or ()):
        return [answered(each, rng, answers=2 + each.row % 3) for each in plain]
    if "judged" in (objective.meanings or ()):
        return [answered(each, rng, answers=1, good=bool(each.row % 2)) for each in plain]
    if task == CAUSAL:
        return plain
    return [_view(each, task, rng) for each in plain]


def answered(
    prompt: Rendered, rng: np.random.Generator, *, answers: int, good: bool = True, scores: Sequence[float] = ()
) -> Rendered:
    """The tokens of a row as a prompt, with random answers to it, of which the first is a good one."""
    sizes = rng.integers(2, 7, answers).tolist()
    numbers = np.repeat(np.arange(answers + 1, dtype=np.uint8), [len(prompt.tokens), *sizes])
    tokens = np.concatenate([prompt.tokens, forests.tokens(rng, sum(sizes))])
    names = ["user", "assistant" if good else "wrong", *["wrong"] * answers]
    roles = [TOKEN_ROLES.index(names[number]) for number in numbers]
    view = forests.view(prompt.row, tokens, weights=(numbers > 0).astype(np.float32), roles=roles)
    marks = np.array([0.0, *scores], np.float32)[numbers] if scores else None
    return replace(view, answers=numbers, scores=marks)


def with_reference(trees: Sequence[Tree], *, seed: int = 0) -> list[Tree]:
    """Trees that bear the note of a reference, which are random log-probabilities."""
    rng = np.random.default_rng(seed)
    return [
        replace(tree, segments=tuple(
            each.noting("reference", -rng.exponential(2.0, int(each.weighted.sum())).astype(np.float32))
            if each.weighted.any() else each
            for each in tree.segments
        ))
        for tree in trees
    ]  # fmt: skip


def _view(plain: Rendered, task: Task, rng: np.random.Generator) -> Rendered:
    size = len(plain.tokens)
    if task == ANSWERS:
        parts = [("template", [0]), ("assistant", plain.tokens), ("template", [0]), ("wrong", plain.tokens[::-1])]
        tokens = np.concatenate([plain.tokens, *(np.array(part, np.int32) for _, part in parts)]).astype(np.int32)
        roles = ["user"] * size + [role for role, part in parts for _ in part]
        weights = np.array([role in ("assistant", "wrong") for role in roles], np.float32)
        return forests.view(plain.row, tokens, weights=weights, roles=[TOKEN_ROLES.index(role) for role in roles])
    labels, weights = np.full(size, -1, np.int32), np.ones(size, np.float32)
    if task.classifies:
        labels[0], weights = rng.integers(len(CLASSES)), np.zeros(size, np.float32)
        weights[0] = 1
    made = forests.view(plain.row, plain.tokens, weights=weights, role="text")
    return replace(made, labels=labels if task.classifies else None, types=np.zeros(size, np.uint8))
