"""From the zoo's module to our own: what it is, and the proof that ours computes the same.

Idea: nothing is concluded from the name of a model. Its modules are looked at, ours are made after what they are, over
the same parameters, and both read the same tokens: by our operations, and module by module, as where something
surrounds a block. Names, angles and states have to be equal, the numbers to the last bit; else there is no likeness.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.forest import Forest, Segment, Tree
from luthier.model.attending.attention import ForestPlan
from luthier.model.own.config import OwnConfig
from luthier.model.own.decoder import EMBED, HEAD, Decoder, Shape
from luthier.model.running.block_parts import HEAD_NORMS, NORMS, dropout_of
from luthier.model.running.blocks import Blocks
from luthier.model.running.executor import Executor, flat_hidden
from luthier.model.zoo import ZooModule

_STEADY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary angles that are the same for texts of all lengths."""


def likeness_of(module: ZooModule, executor: Executor) -> Shape | None:
    """What makes our own modules compute as this one does; None where they do not, to the bit."""
    blocks = executor.blocks
    if blocks is None or not _is_plain(module, executor) or not blocks.take_everything:
        return None
    parameters = dict(module.named_parameters(remove_duplicate=False))
    rotary = module.base_model.get_submodule("rotary_emb")
    norms = [each for name, each in module.named_modules() if name.rpartition(".")[2] in (*NORMS, *HEAD_NORMS, "norm")]
    embed = module.get_input_embeddings()
    epsilons = {vars(each).get("variance_epsilon") for each in norms}
    if len(epsilons) != 1 or not isinstance(embed, nn.Embedding):
        return None
    shape = Shape(
        parameters={name: tuple(each.shape) for name, each in parameters.items()},
        head_size=blocks.head_size,
        epsilon=float(epsilons.pop()),
        padding=embed.padding_idx,
        tied=parameters[HEAD] is parameters[EMBED],
        frequencies=tuple(rotary.get_buffer("inv_freq").tolist()),
        scaling=float(vars(rotary)["attention_scaling"]),
        calls=blocks.calls,
    )
    return shape if _computes_alike(module, shape, parameters, blocks) else None


def _is_plain(module: ZooModule, executor: Executor) -> bool:
    """Whether a module is whole, of one precision, run by our operations alone, and neither drops nor stretches."""
    if executor.kind != "segments" or not executor.own_head or executor.by_mask is not None or executor.reason:
        return False
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = {name for name, _ in module.named_children()}
    if names != {"model", "lm_head"} or module.base_model_prefix != "model" or not {HEAD, EMBED} <= set(parameters):
        return False
    layers = list(module.base_model.get_submodule("layers").children())
    rotary = module.base_model.get_submodule("rotary_emb")
    embed, head = module.get_input_embeddings(), module.get_output_embeddings()
    return (
        all(type(each) is nn.Parameter and each.dtype == module.dtype for each in parameters.values())
        and not any(dropout_of(layer.get_submodule("self_attn")) for layer in layers)
        and vars(rotary).get("rope_type") in _STEADY
        and type(head) is nn.Linear
        and type(embed) is nn.Embedding
        and embed.max_norm is None
        and not embed.scale_grad_by_freq
        and not embed.sparse
    )


@torch.no_grad()
def _computes_alike(
    module: ZooModule, shape: Shape, parameters: Mapping[str, nn.Parameter], blocks: Blocks
) -> bool:
    """Whether our modules over the same parameters have the same names, and give the same numbers to the bit."""
    ours: Any = Decoder(shape, parameters, OwnConfig({}))
    ours.train(module.training)
    same = [name for name, _ in ours.named_modules()] == [name for name, _ in module.named_modules()]
    same = same and list(ours.state_dict()) == list(module.state_dict())
    own_blocks = Blocks.of(ours, shape.calls, blocks.backend) if same else None
    if own_blocks is None:
        return False
    far = int(getattr(module.config, "max_position_embeddings", 0) or 0)
    places = torch.tensor([[0, 1, 5, 1023, max(far - 1, 0), 4 * far]])
    x = torch.zeros(1, 1, 1, dtype=module.dtype)
    theirs, own = (each.base_model.get_submodule("rotary_emb")(x, position_ids=places) for each in (module, ours))
    if not all(map(torch.equal, theirs, own)):
        return False
    forest = _few_tokens(shape)
    return torch.equal(_states(module, forest, blocks), _states(ours, forest, own_blocks)) and torch.equal(
        _one_by_one(module, forest), _one_by_one(ours, forest)
    )


def _few_tokens(shape: Shape) -> Forest:
    """A tree with two branches and another without any."""
    ids = (np.arange(9) * 7 + 3).astype(np.int32) % shape.parameters[EMBED][0]
    ones = np.ones(3, np.float32)
    branched = Tree((Segment(ids[:3], ones), Segment(ids[3:5], ones[:2], 0), Segment(ids[5:7], ones[:2], 0)))
    return Forest((branched, Tree((Segment(ids[6:9], ones),))))


def _states(module: ZooModule, forest: Forest, blocks: Blocks) -> Tensor:
    """The final states by our operations."""
    tokens, positions, plan = _laid_out(forest)
    return flat_hidden(module, tokens, positions, plan, blocks=blocks)


def _one_by_one(module: ZooModule, forest: Forest) -> Tensor:
    """The final states by the modules themselves, as the executor calls them."""
    tokens, positions, plan = _laid_out(forest)
    body = module.base_model
    x = body.get_submodule("embed_tokens")(tokens[None])
    angles = body.get_submodule("rotary_emb")(x, position_ids=positions[None])
    untouched = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    for layer in body.get_submodule("layers").children():
        made = layer(x, position_embeddings=angles, attention_mask=untouched, forest_plan=plan)
        x = made if isinstance(made, Tensor) else made[0]
    states: Tensor = body.get_submodule("norm")(x)
    return states


def _laid_out(forest: Forest) -> tuple[Tensor, Tensor, ForestPlan]:
    layout = forest.layout
    tokens, positions = (torch.from_numpy(each.astype(np.int64)) for each in (layout.tokens, layout.positions))
    return tokens, positions, ForestPlan(spans=layout.spans)
