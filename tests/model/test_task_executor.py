"""Encoders, classifiers and encoder-decoders: the engine's numbers and gradients are the zoo's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.adapters.full import Full
from luthier.core.errors import DataError, RecipeError
from luthier.data.forest import Forest, Segment, Tree
from luthier.model.editing.edits import Edit, LearnedPrompt
from luthier.model.running.executor import Entry
from luthier.model.running.task_executor import run_task, task_head_of
from luthier.model.tasks import SCORES, Task
from luthier.recipes.opening.opened import require_room
from tests import forests, task_models
from tests.task_models import ANSWERS, MASKED, TEXTS, WORDS

FLAT = [
    *((name, task) for name in ("bert", "roberta", "electra", "distilbert", "modernbert") for task in
      (MASKED, TEXTS, WORDS)),
    ("albert", MASKED), ("albert", WORDS),
    ("gpt2", TEXTS), ("gpt2", WORDS), ("llama", TEXTS), ("llama", WORDS), ("t5", ANSWERS), ("t5-gated", ANSWERS),
]  # fmt: skip
PADDED = [("albert", TEXTS), ("deberta", MASKED), ("deberta", TEXTS), ("mpnet", WORDS), ("bart", ANSWERS)]
IDS = [f"{name}-{task.name}" for name, task in FLAT]


def rows(name: str, task: Task) -> list[Tree]:
    typed = name in ("bert", "electra", "albert")
    return task_models.trees(task, both_ways=name not in ("gpt2", "llama"), types=typed)


@pytest.mark.parametrize(("name", "task"), FLAT, ids=IDS)
def test_flat_passes_have_the_numbers_and_gradients_of_the_zoo(name: str, task: Task) -> None:
    """Breaks when texts see each other, positions or types are another's, or a head is computed otherwise."""
    model = task_models.language_model(name, task)
    assert model.executor.kind == "segments", model.executor.reason
    made = rows(name, task)
    parameters = forests.trainable(model)
    found = forests.gradients(forests.engine_loss(model, made), parameters)
    expected_log_probs = task_models.brute_log_probs(model.module, made)
    expected = forests.gradients(-(expected_log_probs * task_models.weights_of(made)).sum(), parameters)
    log_probs = model.token_outputs(Forest(tuple(made))).log_probs
    assert forests.relative_error(log_probs, expected_log_probs) < 1e-5
    forests.assert_same_gradients(found, expected, tolerance=2e-5)


@pytest.mark.parametrize(("name", "task"), FLAT + PADDED, ids=IDS + [f"{n}-{t.name}-padded" for n, t in PADDED])
def test_padded_rows_have_the_numbers_of_the_zoo(name: str, task: Task) -> None:
    """Breaks when padding is attended to, or a row's answer is taken from another row."""
    model = task_models.language_model(name, task)
    made = rows(name, task)
    padded = replace(model.executor, kind="unrolled", entry=Entry())
    outputs = run_task(model.module, Forest(tuple(made)), task=task, executor=padded, head=model.head)
    assert forests.relative_error(outputs.log_probs, task_models.brute_log_probs(model.module, made)) < 1e-5


@pytest.mark.parametrize(("name", "task"), PADDED)
def test_what_cannot_be_driven_is_padded_and_says_why(name: str, task: Task) -> None:
    """Breaks when a model whose attention goes its own way is run flat, so that its texts see each other."""
    model = task_models.language_model(name, task)
    assert model.executor.kind == "unrolled" and model.executor.reason
    assert any("forest executor: unrolled" in notice for notice in model.notices)


@pytest.mark.parametrize(("name", "task"), [("bert", TEXTS), ("distilbert", WORDS), ("llama", TEXTS)])
def test_classes_come_with_all_their_log_probabilities(name: str, task: Task) -> None:
    """Breaks when an objective cannot see which class the model would choose."""
    made = rows(name, task)
    outputs = task_models.language_model(name, task).token_outputs(Forest(tuple(made)))
    assert outputs.classes is not None and outputs.classes.shape == (len(outputs.labels), 3)
    assert torch.allclose(outputs.classes.exp().sum(-1), torch.ones(len(outputs.labels)), atol=1e-5)
    assert torch.equal(outputs.classes.gather(1, outputs.labels[:, None])[:, 0], outputs.log_probs)


def test_answers_share_the_work_of_the_encoder_and_nothing_else() -> None:
    """Breaks when an answer sees another one, or a text is read for each of its answers."""
    model = task_models.language_model("t5", ANSWERS)
    (tree,) = task_models.trees(ANSWERS, both_ways=True, count=3)[2:]
    assert len(tree.segments) == 4
    parameters = forests.trainable(model)
    together = forests.gradients(forests.engine_loss(model, [tree]), parameters)
    alone = [Tree((tree.segments[0], each)) for each in tree.segments[1:]]
    apart = forests.gradients(forests.engine_loss(model, alone), parameters)
    forests.assert_same_gradients(together, apart, tolerance=1e-5)
    read: list[int] = []
    handle = model.module.get_encoder().register_forward_hook(lambda module, given, out: read.append(out[0].shape[1]))
    model.token_outputs(Forest((tree,)))
    handle.remove()
    assert read == [len(tree.segments[0].tokens)]


@pytest.mark.parametrize(("name", "kept"), [("mpnet", 2), ("roberta", 2), ("bert", 0), ("bart", 0), ("deberta", 0)])
def test_positions_that_stand_for_padding_are_no_room(name: str, kept: int) -> None:
    """Breaks when a row is let in that is longer than the positions it is given, and a lookup fails midway."""
    task = ANSWERS if name == "bart" else WORDS
    model = task_models.language_model(name, task)
    rows = model.context_tokens
    assert rows == 128 and model.executor.entry.first_position == kept
    require_room(np.array([rows - kept]), model)
    if kept:
        with pytest.raises(RecipeError, match="126 positions"):
            require_room(np.array([rows - kept + 1]), model)
    if name in ("mpnet", "roberta", "bert"):
        for size in (rows - kept, rows - kept + 1):
            labels, ones = np.zeros(size, np.int32), np.ones(size, np.float32)
            row = Tree((Segment(np.full(size, 7, np.int32), ones, labels=labels),))
            if size <= rows - kept:
                model.token_outputs(Forest((row,)))
            else:
                with pytest.raises((IndexError, RuntimeError)):
                    model.token_outputs(Forest((row,)))


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else (out,)
        self.found |= {tuple(each.shape) for each in made if torch.is_tensor(each)}
        return out


def test_no_tensor_is_made_for_all_pairs_of_answers_and_texts() -> None:
    """Breaks when the decoder's reading takes a bias of zeros from the zoo, which grows with the square of a batch."""
    model = task_models.language_model("t5", ANSWERS)
    trees = task_models.trees(ANSWERS, both_ways=True)
    read = sum(len(tree.segments[0].tokens) for tree in trees)
    said = sum(len(segment.tokens) for tree in trees for segment in tree.segments[1:])
    with Shapes() as shapes:
        model.token_outputs(Forest(tuple(trees)))
    assert (1, said, forests.HIDDEN) in shapes.found
    assert not [shape for shape in shapes.found if len(shape) == 4 and shape[2:] == (said, read)]
    own = [name for name, module in model.module.named_modules() if "compute_bias" in module.__dict__]
    assert not own
    readers = [module for name, module in model.module.named_modules() if name.endswith("EncDecAttention")]
    assert not any(reader.has_relative_attention_bias for reader in readers)


class Prompt(LearnedPrompt):
    """A prompt of three random embeddings."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.learned = torch.nn.Parameter(torch.randn(3, forests.HIDDEN, generator=generator) * 0.3)

    @property
    def token_count(self) -> int:
        return 3

    def embeddings(self, dtype: torch.dtype) -> torch.Tensor:
        return self.learned.to(dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"prompt_embeddings": self.learned}


@pytest.mark.parametrize("name", ["bert", "distilbert", "t5"])
def test_a_prompt_stands_before_each_text_and_sees_it(name: str) -> None:
    """Breaks when a prompt in an encoder is computed once for all texts: there it reads what comes after it."""
    task = ANSWERS if name == "t5" else WORDS
    model = task_models.language_model(name, task)
    made = rows("distilbert", task)
    edits: list[Edit] = [Prompt()]
    attachment = model.attach(edits)
    prompt = attachment.root
    assert isinstance(prompt, Prompt)
    found = model.token_outputs(Forest(tuple(made))).log_probs
    expected = []
    for tree in made:
        read, *answers = tree.segments
        embedded = model.module.get_input_embeddings()(torch.from_numpy(read.tokens.astype(np.int64)))
        given = {"inputs_embeds": torch.cat([prompt.learned, embedded])[None]}
        for answer in answers:
            said = torch.from_numpy(answer.tokens.astype(np.int64))
            logits = torch.log_softmax(model.module(**given, decoder_input_ids=said[None]).logits[0], -1)
            expected += [logits[i - 1, said[i]] for i in np.flatnonzero(answer.weights).tolist()]
        if not answers:
            assert read.labels is not None
            logits = torch.log_softmax(model.module(**given).logits[0, 3:], -1)
            expected += [logits[i, int(read.labels[i])] for i in np.flatnonzero(read.weights).tolist()]
    assert forests.relative_error(found, torch.stack(expected)) < 1e-5
    assert torch.autograd.grad(found.sum(), prompt.learned)[0].abs().sum() > 0


def test_positions_are_counted_as_roberta_does() -> None:
    """Breaks when its texts begin at position 0, which it keeps for padding."""
    assert task_models.language_model("roberta", WORDS).executor.entry.first_position == 2
    assert task_models.language_model("bert", WORDS).executor.entry == Entry(0, types=True)


def test_a_head_is_the_zoos_last_layer_and_what_comes_before_it() -> None:
    """Breaks when the layers of a head below its last one are left out."""
    module = task_models.zoo("roberta", TEXTS)
    head = task_head_of(module, TEXTS, task_models.language_model("bert", TEXTS).executor.backend)
    assert head is not None and head.last == "classifier.out_proj"  # type: ignore[union-attr]


def test_a_class_beyond_the_last_is_refused_and_so_is_an_odd_tree() -> None:
    """Breaks when a label that the head has no row for reads another one's."""
    model = task_models.language_model("bert", WORDS)
    ids = np.arange(5, 9).astype(np.int32)
    ones = np.ones(4, np.float32)
    wrong = Tree((Segment(ids, ones, labels=np.array([0, 1, 2, 3], np.int32), both_ways=True),))
    with pytest.raises(DataError, match="class 3"):
        model.token_outputs(Forest((wrong,)))
    t5 = task_models.language_model("t5", ANSWERS)
    with pytest.raises(DataError, match="0 ancestors"):
        t5.token_outputs(Forest((Tree((Segment(ids, ones),)),)))
    with pytest.raises(DataError, match="first token"):
        t5.token_outputs(Forest((Tree((Segment(ids, 0 * ones, both_ways=True), Segment(ids, ones, 0))),)))


def test_two_heads_are_not_trained_at_once() -> None:
    """Breaks when two adapters silently train one classifier."""
    model = task_models.language_model("bert", TEXTS)
    model.attach([])
    with pytest.raises(RecipeError, match="same parameters"):
        model.attach([], name="other")


def test_a_new_head_is_trained_and_comes_off_again() -> None:
    """Breaks when a classifier is left as it was drawn, or stays when its adapter is taken off."""
    model = task_models.language_model("bert", TEXTS)
    before = forests.snapshot(model.module)
    attachment = model.attach([])
    assert sorted(attachment.named_parameters()) == ["classifier.bias", "classifier.weight"]
    assert not attachment.trains_base and attachment.new_parts == ["classifier"]
    forests.shake(attachment.named_parameters().values())
    model.detach()
    assert forests.snapshot(model.module) == before


def test_a_new_head_is_trained_whole_whatever_part_of_it_an_adapter_takes() -> None:
    """Breaks when BitFit trains the bias of a classifier and leaves its weight as it was drawn."""
    model = task_models.language_model("bert", TEXTS)
    attachment = model.attach(Full(parts="biases").attach(model.sites))
    trained = [name for name in attachment.named_parameters() if name.startswith("classifier")]
    assert sorted(trained) == ["classifier.bias", "classifier.weight"] and attachment.trains_base


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_scores_are_the_zoos_raw_outputs(name: str) -> None:
    """Breaks when a score is normalised away, since one class has always all of the probability, or is another's."""
    model = task_models.language_model(name, SCORES)
    assert model.executor.kind == "segments", model.executor.reason
    made = [
        replace(tree, segments=tuple(replace(each, labels=np.zeros_like(each.tokens)) for each in tree.segments))
        for tree in rows(name, TEXTS)
    ]
    zoo = []
    for [segment] in (tree.segments for tree in made):
        given = {"input_ids": torch.from_numpy(segment.tokens.astype(np.int64))[None]}
        if segment.types is not None:
            given["token_type_ids"] = torch.from_numpy(segment.types.astype(np.int64))[None]
        zoo.append(model.module(**given).logits[:, 0])
    expected = torch.cat(zoo)
    found = model.token_outputs(Forest(tuple(made)))
    assert found.scores is not None and found.classes is None and not found.log_probs.any()
    assert forests.relative_error(found.scores, expected) < 1e-5 and float(expected.std()) > 0
    padded = replace(model.executor, kind="unrolled", entry=Entry())
    again = run_task(model.module, Forest(tuple(made)), task=SCORES, executor=padded, head=model.head)
    assert again.scores is not None and forests.relative_error(again.scores, expected) < 1e-5


def test_two_answers_are_scored_with_one_prompt() -> None:
    """Breaks when an answer's score sees the other answer, or a prompt is read for each of its answers."""
    model = task_models.language_model("llama", SCORES)
    ids = (np.arange(14) * 5 % 50 + 3).astype(np.int32)
    end = np.array([0, 0, 0, 1], dtype=np.float32)
    prompt = Segment(ids[:6], np.zeros(6, np.float32))
    leaves = [Segment(ids[start : start + 4], end, 0, labels=np.zeros(4, np.int32)) for start in (6, 10)]
    together = model.token_outputs(Forest((Tree((prompt, *leaves)),))).scores
    alone = []
    for leaf in leaves:
        whole = torch.from_numpy(np.concatenate([prompt.tokens, leaf.tokens]).astype(np.int64))
        alone.append(model.module(whole[None]).logits[0, 0])
    assert together is not None and forests.relative_error(together, torch.stack(alone)) < 1e-5
