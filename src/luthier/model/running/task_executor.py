"""Executors of tasks other than going on with a text: classes, masked tokens, answers of an encoder-decoder.

As in executor.py there are two ways, and a probe with a few tokens finds out whether the fast one computes what the
zoo's own forward computes: one flat pass by segment, or padded rows through the zoo's whole model.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from luthier.core.errors import DataError, RecipeError, UndrivableAttentionError
from luthier.data.forest import Forest, Segment, Tree
from luthier.kernels.backend import Backend
from luthier.kernels.head import Head
from luthier.model.attending.attention import NAME
from luthier.model.editing.edits import LearnedRoot
from luthier.model.running import encoder_decoder
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import Entry, Executor, predicting_states
from luthier.model.running.outputs import TokenOutputs
from luthier.model.running.probing import apart, attention_calls, tolerance
from luthier.model.running.scoring import AnyHead, long, outputs_of, score
from luthier.model.running.zoo_head import FeatureHead, task_head, zoo_logits
from luthier.model.tasks import Task, kind_of
from luthier.model.zoo import ZooModule

_FAILS = (UndrivableAttentionError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What a model of the zoo raises that cannot be driven by segment."""


_OF_TEXTS: Final = ("sequence_classes", "scores")
"""Tasks that say one thing of a whole text."""


def run_task(
    module: ZooModule,
    forest: Forest,
    *,
    task: Task,
    executor: Executor,
    head: AnyHead,
    root: LearnedRoot | None = None,
) -> TokenOutputs:
    """A forest through a model that was loaded for `task`."""
    if executor.kind == "unrolled" and root is not None:
        raise RecipeError(
            "this model's attention cannot be driven by luthier, and learned roots need it",
            do="choose an adapter that works at sites, such as lora",
        )
    if task.name == "seq2seq_lm":
        if executor.kind == "segments":
            return encoder_decoder.run_flat(module, forest, head=head, root=root)
        return encoder_decoder.run_padded(module, forest, head=head)
    layout = forest.layout
    if kind_of(module.config) == "encoder":
        # How an encoder reads is not for a row to say.
        layout = replace(layout, spans=tuple(replace(span, both_ways=True) for span in layout.spans))
    labels = long(layout.labels, module)
    if executor.kind == "unrolled":
        logits = _padded_logits(module, forest, task)
        return _of_logits(forest, logits, labels, module, task)
    hidden = predicting_states(
        module, layout, root=root, blocks=executor.blocks, by_mask=executor.by_mask, entry=executor.entry
    )
    if isinstance(head, FeatureHead) and isinstance(head.plain, Head) and task.classifies:
        features = head.features(hidden)
        logits = torch.nn.functional.linear(features, head.plain.weight, head.plain.bias)
        return _of_logits(forest, logits, labels, module, task)
    return outputs_of(layout, score(module, hidden, head, labels), module)


def _of_logits(
    forest: Forest, logits: Float[Tensor, "N C"], labels: Tensor, module: ZooModule, task: Task
) -> TokenOutputs:
    if task.classifies and len(labels) and int(labels.max()) >= logits.shape[1]:
        raise DataError(f"a row has class {int(labels.max())}", allowed=f"0 to {logits.shape[1] - 1}")
    log_probs = torch.log_softmax(logits.float(), -1)
    outputs = outputs_of(forest.layout, log_probs.gather(1, labels[:, None])[:, 0], module)
    if task.name == "scores":
        return replace(outputs, scores=logits.float()[:, 0])
    return replace(outputs, classes=log_probs) if task.classifies else outputs


def _padded_logits(module: ZooModule, forest: Forest, task: Task) -> Float[Tensor, "N out"]:
    """The zoo's whole model on right-padded rows: the logits of each weighted token, or of its text."""
    width = max(tree.token_count for tree in forest.trees)
    tokens = np.zeros((len(forest.trees), width), dtype=np.int64)
    mask, types = np.zeros_like(tokens), np.zeros_like(tokens)
    for index, tree in enumerate(forest.trees):
        if len(tree.segments) > 1:
            raise DataError(f"row {tree.row} has {len(tree.segments)} segments", allowed="one, for this task")
        segment = tree.segments[0]
        count = len(segment.tokens)
        tokens[index, :count], mask[index, :count] = segment.tokens, 1
        if segment.types is not None:
            types[index, :count] = segment.types
    given = {"input_ids": tokens, "attention_mask": mask}
    if takes_types(module):
        given["token_type_ids"] = types
    tensors = {name: torch.from_numpy(each).to(module.device) for name, each in given.items()}
    trees = long(forest.layout.trees, module)
    starts = np.array([span.start for span in forest.layout.spans])
    columns = long(forest.layout.predictors - starts[forest.layout.trees], module)
    if len(forest.trees) > 1 and task.name in _OF_TEXTS and kind_of(module.config) == "causal":
        # The zoo looks for the last token that is no padding, and would take an end that is that token for it.
        states = module.get_submodule(module.base_model_prefix)(**tensors, use_cache=False).last_hidden_state
        return zoo_logits(module, states[trees, columns])
    logits: Tensor = module(**tensors).logits
    return logits.index_select(0, trees) if logits.ndim == 2 else logits[trees, columns]


def takes_types(module: ZooModule) -> bool:
    """Whether the embeddings of a model tell two texts apart."""
    takes = "token_type_ids" in inspect.signature(module.forward).parameters
    return takes and int(getattr(module.config, "type_vocab_size", 0) or 0) > 1


@torch.no_grad()
def probe_task(module: ZooModule, task: Task, backend: Backend, *, fused: bool) -> Executor:
    """Find out, with a few tokens in two trees, which executor reproduces the zoo's own forward for a task."""
    forest = _probe_forest(module, task)
    truth = torch.cat([_plain(module, Forest((tree,)), task) for tree in forest.trees])
    driven = module.config._attn_implementation == NAME
    reason = "" if driven else "the model does not support the attention interface"
    best: tuple[float, Executor | None] = (tolerance(module.dtype), None)
    for entry in _entries(module) if driven else []:
        executor = Executor("segments", own_head=True, backend=backend, entry=entry)
        error, failure = _error(module, forest, task, executor, truth)
        reason = reason or failure
        # Of two ways to count positions the right one is the nearer one, even where both are near.
        best = (error, executor) if error < best[0] else best
    if best[1] is not None:
        return _with_blocks(module, forest, task, best[1], truth) if fused else best[1]
    if driven:
        from transformers import PreTrainedModel

        # A model whose attention does not go by the interface would add our kind of mask to its scores.
        for each in module.modules():
            if isinstance(each, PreTrainedModel):
                each.config._attn_implementation = "eager"
    padded = Executor(
        "unrolled", own_head=task.name == "seq2seq_lm", backend=backend, entry=Entry(_kept_for_padding(module)),
        reason=reason or "segments do not reproduce the model's own logits",
    )  # fmt: skip
    if not _error(module, forest, task, padded, truth)[0] <= tolerance(module.dtype):
        raise RecipeError(
            f"{type(module).__name__}: padded rows do not reproduce the model's own logits",
            do="report the model type; it cannot be trained with this version",
        )
    return padded


def _kept_for_padding(module: ZooModule) -> int:
    """The first positions of a table that stand for padding, as RoBERTa and MPNet have them: no row comes to these."""
    named = {name.rpartition(".")[2]: each for name, each in module.named_modules()}
    padding = getattr(named.get("position_embeddings"), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def task_head_of(module: ZooModule, task: Task, backend: Backend) -> AnyHead:
    """The head of a model for a task, computed by `backend`; None when only the zoo can compute it."""
    try:
        head = task_head(module, task)
    except RecipeError:
        return None
    if isinstance(head, FeatureHead):
        plain = head.plain
        return replace(head, plain=replace(plain, backend=backend)) if isinstance(plain, Head) else head
    return replace(head, backend=backend)


def _entries(module: ZooModule) -> list[Entry]:
    """How the embeddings may count positions: from 0, or behind the number that RoBERTa keeps for padding."""
    types = takes_types(module)
    pad = getattr(module.config, "pad_token_id", None)
    return [Entry(0, types), *([Entry(int(pad) + 1, types)] if isinstance(pad, int) else [])]


def _error(
    module: ZooModule, forest: Forest, task: Task, executor: Executor, truth: Tensor
) -> tuple[float, str]:
    """How far an executor is from the truth, and why it cannot run this model at all."""
    head = task_head_of(module, task, executor.backend)
    if head is None and executor.kind == "segments":
        return math.inf, "its head is none that luthier can compute"
    try:
        outputs = run_task(module, forest, task=task, executor=executor, head=head)
    except _FAILS as failure:
        return math.inf, f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    return apart(outputs.log_probs if outputs.scores is None else outputs.scores, truth), ""


def _with_blocks(module: ZooModule, forest: Forest, task: Task, executor: Executor, truth: Tensor) -> Executor:
    """The executor with our own operations, where they run this model: they do decoders."""
    if task.name == "seq2seq_lm" or kind_of(module.config) != "causal":
        return executor
    ours = replace(executor, blocks=Blocks.of(module, attention_calls(module), executor.backend))
    if ours.blocks is None:
        return executor
    return ours if _error(module, forest, task, ours, truth)[0] <= tolerance(module.dtype) else executor


def _probe_forest(module: ZooModule, task: Task) -> Forest:
    size = int(module.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
    ids = (np.arange(12) * 7 + 5).astype(np.int32) % size
    both_ways = kind_of(module.config) != "causal"
    if task.name == "seq2seq_lm":
        ones, nothing = np.array([0, 1, 1], dtype=np.float32), np.zeros(4, dtype=np.float32)
        answers = [Segment(ids[4:7], ones, 0), Segment(ids[7:9], ones[:2], 0)]
        several = Tree((Segment(ids[:4], nothing, both_ways=True), *answers))
        return Forest((several, Tree((Segment(ids[9:12], nothing[:3], both_ways=True), Segment(ids[2:5], ones, 0)))))
    trees = []
    for start, stop in ((0, 5), (5, 12)):
        count = stop - start
        weights = np.zeros(count, dtype=np.float32)
        labels = (np.arange(count) % (len(task.classes) or size)).astype(np.int32)
        where = slice(None) if task.name not in _OF_TEXTS else slice(0, 1) if both_ways else slice(count - 1, None)
        weights[where] = 1
        types = (np.arange(count) > 2).astype(np.uint8) if takes_types(module) else None
        trees.append(Tree((Segment(ids[start:stop], weights, labels=labels, types=types, both_ways=both_ways),)))
    return Forest(tuple(trees))


def _plain(module: ZooModule, tree: Forest, task: Task) -> Tensor:
    """The zoo's own log-probabilities of one tree, one row at a time."""
    if task.name != "seq2seq_lm":
        labels, logits = long(tree.layout.labels, module), _padded_logits(module, tree, task).float()
        log_probs = logits if task.name == "scores" else torch.log_softmax(logits, -1)
        return log_probs.gather(1, labels[:, None])[:, 0]
    read, *answers = tree.trees[0].segments
    found = []
    for answer in answers:
        given = {"input_ids": long(read.tokens, module)[None], "decoder_input_ids": long(answer.tokens, module)[None]}
        log_probs = torch.log_softmax(module(**given, use_cache=False).logits[0].float(), -1)
        found.append(log_probs[:-1].gather(1, long(answer.tokens, module)[1:, None])[:, 0])
    return torch.cat(found)
