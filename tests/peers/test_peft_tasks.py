"""PEFT reads what luthier trains on classifiers and encoder-decoders, and the other way round, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters import Adapter, saved_adapter
from luthier.core.chosen import choose
from luthier.data.forest import Forest, Segment, Tree
from luthier.model.files.adapter_files import fill
from luthier.model.language_model import LanguageModel
from luthier.model.tasks import Task
from luthier.train.result import save_result
from tests import forests, task_models
from tests.task_models import ANSWERS, TEXTS, WORDS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = [np.arange(5, 5 + size).astype(np.int32) for size in (9, 4, 12)]
SAID = np.array([0, 40, 41, 42], dtype=np.int32)
CASES = [
    ("bert", TEXTS, "lora"), ("bert", WORDS, "lora"), ("bert", TEXTS, "ia3"), ("bert", TEXTS, "prefix_tuning"),
    ("roberta", TEXTS, "lora"), ("distilbert", TEXTS, "lora"), ("gpt2", TEXTS, "lora"),
    ("t5", ANSWERS, "lora"), ("t5", ANSWERS, "ia3"), ("t5", ANSWERS, "prompt_tuning"),
]  # fmt: skip


def ours(model: LanguageModel) -> Tensor:
    """The log-probabilities of some labels of each text, by the engine."""
    task, trees = model.task, []
    for ids in IDS:
        if task == ANSWERS:
            weights = (np.arange(len(SAID)) > 0).astype(np.float32)
            read = Segment(ids, np.zeros(len(ids), np.float32), both_ways=True)
            trees.append(Tree((read, Segment(SAID, weights, 0))))
            continue
        weights, labels = np.zeros(len(ids), np.float32), np.ones(len(ids), np.int32)
        weights[0 if model.module.config.model_type != "gpt2" else -1] = 1
        trees.append(Tree((Segment(ids, weights, labels=labels),)))
    with torch.no_grad():
        return model.token_outputs(Forest(tuple(trees))).log_probs


def theirs(module: Any, task: Task) -> Tensor:
    """The same by PEFT, one text at a time."""
    found = []
    for ids in IDS:
        given = torch.from_numpy(ids.astype(np.int64))[None]
        mask = torch.ones_like(given)
        with torch.no_grad():
            if task == ANSWERS:
                said = torch.from_numpy(SAID.astype(np.int64))
                logits = module(input_ids=given, attention_mask=mask, decoder_input_ids=said[None]).logits[0]
                found += [torch.log_softmax(logits, -1)[i - 1, said[i]] for i in range(1, len(said))]
                continue
            logits = torch.log_softmax(module(input_ids=given, attention_mask=mask).logits, -1)
            found.append(logits[0, 1] if logits.ndim == 2 else logits[0, 0, 1])
    return torch.stack(found)


def base(architecture: str, task: Task) -> PreTrainedModel:
    """The zoo's model alone, as PEFT is given it."""
    module = task_models.zoo(architecture, task)
    module.set_attn_implementation("eager")
    return module


@pytest.mark.parametrize(("architecture", "task", "name"), CASES)
def test_peft_reads_ours(architecture: str, task: Task, name: str, tmp_path: Path) -> None:
    """Breaks when a head is saved under another name, a prefix in another place, or the kind of task is not told."""
    model = task_models.language_model(architecture, task)
    method = choose("adapters", Adapter, name)
    torch.manual_seed(3)
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values(), std=0.3)
    folder = save_result(tmp_path, model, attachment, method, {})
    read = peft.PeftModel.from_pretrained(base(architecture, task), folder).eval()
    assert forests.relative_error(theirs(read, task), ours(model)) < 1e-5


@pytest.mark.parametrize(("architecture", "task"), [("bert", TEXTS), ("distilbert", WORDS), ("t5", ANSWERS)])
def test_we_read_what_peft_saved(architecture: str, task: Task, tmp_path: Path) -> None:
    """Breaks when PEFT's classifier is left behind, or its targets are other modules here."""
    kinds = {"bert": peft.TaskType.SEQ_CLS, "distilbert": peft.TaskType.TOKEN_CLS, "t5": peft.TaskType.SEQ_2_SEQ_LM}
    targets = {"bert": ["query", "dense"], "distilbert": ["q_lin", "lin1"], "t5": ["q", "wo"]}[architecture]
    config = peft.LoraConfig(task_type=kinds[architecture], r=4, target_modules=targets)
    wrapped = peft.get_peft_model(base(architecture, task), config).eval()
    forests.shake([each for each in wrapped.parameters() if each.requires_grad], std=0.3)
    wrapped.save_pretrained(str(tmp_path))
    model = task_models.language_model(architecture, task)
    fill(model.attach(saved_adapter(tmp_path, model.sites).attach(model.sites)), tmp_path)
    assert forests.relative_error(ours(model), theirs(wrapped, task)) < 1e-5


def test_a_prefix_of_an_encoder_decoder_is_refused_by_peft_and_read_by_us(tmp_path: Path) -> None:
    """Breaks when PEFT reads a prefix of ours and computes with other layers' keys."""
    model = task_models.language_model("t5", ANSWERS)
    method = choose("adapters", Adapter, "prefix_tuning")
    attachment = model.attach(method.attach(model.sites))
    folder = save_result(tmp_path, model, attachment, method, {})
    with pytest.raises((KeyError, ValueError), match="DECODER_PREFIX_TUNING"):
        peft.PeftModel.from_pretrained(base("t5", ANSWERS), folder)
    fresh = task_models.language_model("t5", ANSWERS)
    fill(fresh.attach(saved_adapter(folder, fresh.sites).attach(fresh.sites)), folder)
    assert torch.equal(ours(fresh), ours(model))
