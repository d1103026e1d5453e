"""Models of any size and rows for any objective, for measurements of memory: what `memory_peak.py` runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import auto_class, with_classes
from luthier.objectives import Objective
from tests import forests

CLASSES = ("bad", "fair", "good")
VOCABULARY = 4096
SPECIAL = 2
"""A token that no text has."""
WORD = 3
"""Tokens of a word, whose first one has its class."""


def config_for(given: dict[str, Any]) -> Any:
    """The config of a model of the zoo with the sizes of a case."""
    hidden, layers, dropped = given["hidden"], given["layers"], given.get("dropout", 0.0)
    heads, vocabulary = hidden // 32, given.get("vocabulary", VOCABULARY)
    made = {
        "llama": lambda: transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=given.get("inner", 8 * hidden // 3),
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=given.get("key_value_heads", 2),
            tie_word_embeddings=True, max_position_embeddings=4096,
        ),
        "qwen3": lambda: transformers.Qwen3Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
            attention_dropout=dropped,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=1024, resid_pdrop=dropped,
            embd_pdrop=dropped, attn_pdrop=dropped, bos_token_id=None, eos_token_id=1,
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, hidden_dropout_prob=dropped, attention_probs_dropout_prob=dropped,
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=vocabulary, d_model=hidden, d_kv=32, d_ff=4 * hidden, num_layers=layers, num_heads=heads,
            decoder_start_token_id=0, dropout_rate=dropped, **given.get("t5", {}),
        ),
    }  # fmt: skip
    return made[given.get("architecture", "llama")]()


def model_for(given: dict[str, Any], objective: Objective) -> LanguageModel:
    """A fresh model for the task of an objective."""
    task = objective.task(CLASSES)
    config = with_classes(config_for(given), task)
    dtype = getattr(torch, given.get("precision", "float32"))
    module = auto_class(task).from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()
    return LanguageModel(
        module, source="fresh", digest="", kernels=given.get("kernels", "auto"), task=task,
    )  # fmt: skip


def views_for(objective: Objective, count: int, *, longest: int, seed: int = 0) -> list[Rendered]:
    """Random rows as an objective wants them, of a quarter of `longest` tokens and more."""
    plain = forests.views(count, seed=seed, shortest=max(4, longest // 4), longest=longest)
    task = objective.task(CLASSES)
    if answers := {"preference": 2, "judged": 1}.get(next(iter(objective.meanings or ()), "")):
        return [_answered(each, answers) for each in plain]
    return [_row(each, task.name, np.random.default_rng([seed, each.row])) for each in plain]


def _answered(plain: Rendered, answers: int) -> Rendered:
    """The beginning of a row as a prompt, and a quarter as each of its answers."""
    size = len(plain.tokens)
    sizes = [size - answers * (size // 4), *[size // 4] * answers]
    numbers = np.repeat(np.arange(answers + 1, dtype=np.uint8), sizes)
    roles = [TOKEN_ROLES.index(("user", "assistant", "wrong")[number]) for number in numbers]
    made = forests.view(plain.row, plain.tokens, weights=(numbers > 0).astype(np.float32), roles=roles)
    return replace(made, answers=numbers)


def _row(plain: Rendered, task: str, draw: np.random.Generator) -> Rendered:
    size = len(plain.tokens)
    if task == "causal_lm":
        return plain
    if task == "seq2seq_lm":
        # Three answers of an eighth each: one is right.
        each = max(1, size // 8)
        answers = [(role, plain.tokens[:each]) for role in ("assistant", "wrong", "wrong")]
        parts = [("user", plain.tokens[: size - 3 * each]), *((part for role, said in answers
                 for part in (("template", np.zeros(1, np.int32)), (role, said))))]  # fmt: skip
        tokens = np.concatenate([part for _, part in parts]).astype(np.int32)
        roles = [TOKEN_ROLES.index(role) for role, part in parts for _ in part]
        weights = np.array([TOKEN_ROLES[role] in ("assistant", "wrong") for role in roles], np.float32)
        return forests.view(plain.row, tokens, weights=weights, roles=roles)
    labels, weights = np.full(size, -1, np.int32), np.ones(size, np.float32)
    if task != "masked_lm":
        at = slice(0, 1) if task == "sequence_classes" else slice(0, size, WORD)
        weights[:] = 0
        weights[at] = 1
        labels[at] = draw.integers(len(CLASSES), size=len(labels[at]))
    made = forests.view(plain.row, plain.tokens, weights=weights, role="text")
    return Rendered(
        row=made.row, text=made.text, tokens=made.tokens, weights=made.weights, roles=made.roles, spans=made.spans,
        labels=None if task == "masked_lm" else labels, types=np.zeros(size, np.uint8),
    )  # fmt: skip
