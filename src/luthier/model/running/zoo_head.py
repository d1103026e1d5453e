"""The zoo's own heads, computed on the few positions that need them.

Idea: heads differ from one architecture to the next: BERT pools the first token before it classifies, RoBERTa puts two
layers over it, a masked language model transforms each state before its output layer. Instead of a copy of each, a
shallow copy of the zoo's model is called whose body gives back chosen states as if each were a text of its own, and
whose last linear layer hands on what it is given. What comes out are the features that this layer turns into logits;
our chunked head does that.
Cost: a few dictionaries a call; the layers of the head over N rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from luthier.core.errors import RecipeError
from luthier.kernels.head import Head
from luthier.model.editing.edits import Edit, EditedModule, TrainedParameters, base_parameters
from luthier.model.editing.sites import Sites
from luthier.model.running.head import EditedHead, edited_head, head_of
from luthier.model.tasks import Task
from luthier.model.zoo import ZooModule


@dataclass(frozen=True)
class FeatureHead:
    """A head whose last linear layer is `plain`; what comes before it in the zoo's model is computed by the zoo."""

    module: ZooModule
    last: str
    plain: Head | EditedHead

    def features(self, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N e"]:
        """What the last linear layer is given for each of these final states of the body."""
        if len(hidden) == 0:
            return hidden
        return zoo_logits(_with(self.module, self.last, nn.Identity()), hidden)


def tempered(
    head: Head | EditedHead | FeatureHead | None, temperature: float
) -> Head | EditedHead | FeatureHead | None:
    """The head of the policy at a temperature: its logits divided by it. A cap is divided as what it caps is.

    Raises RecipeError for a head that only the zoo can compute.
    """
    if temperature == 1.0:
        return head
    if isinstance(head, FeatureHead):
        return replace(head, plain=_divided(head.plain, temperature))
    if head is None:
        raise RecipeError(
            f"a policy at temperature {temperature}, and the model zoo computes the output head here",
            allowed="temperature 1 for this model",
            do="set the temperature to 1",
        )
    return _divided(head, temperature)


def _divided(head: Head | EditedHead, temperature: float) -> Head | EditedHead:
    cap = None if head.cap is None else head.cap / temperature
    return replace(head, scale=head.scale / temperature, cap=cap)


def task_head(module: ZooModule, task: Task) -> FeatureHead | Head:
    """The head of a model for a task, as it is now. Raises RecipeError where there is no linear layer at its end."""
    if task.name in ("causal_lm", "seq2seq_lm"):
        return head_of(module)
    last = last_linear(module, task)
    if not task.classifies:
        return FeatureHead(module, last, edited_head(module) or head_of(module))
    linear = module.get_submodule(last)
    linear = linear.base if isinstance(linear, EditedModule) else linear
    if not isinstance(linear, nn.Linear):
        raise RecipeError(f"the output layer {last} is a {type(linear).__name__}", allowed="a linear layer")
    return FeatureHead(module, last, Head(linear.weight, linear.bias))


def last_linear(module: ZooModule, task: Task) -> str:
    """The name of the layer whose outputs are the logits: the vocabulary's, or the last with a row for each class."""
    embeddings = module.get_output_embeddings()
    names = {id(each): name for name, each in module.named_modules()}
    if not task.classifies:
        if embeddings is None or id(embeddings) not in names:
            raise RecipeError(f"{type(module).__name__} has no output layer", do="choose a masked language model")
        return names[id(embeddings)]
    body = body_name(module)
    rows = [
        name
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear) and each.out_features == len(task.classes) and not f"{name}.".startswith(body)
    ]
    if not rows:
        raise RecipeError(
            f"{type(module).__name__} has no linear layer with {len(task.classes)} rows", do="choose another model"
        )
    return rows[-1]


def head_modules(module: ZooModule, task: Task, fresh: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that are trained as a whole, whatever the adapter: those of a new head, and every classifier.

    As PEFT's `modules_to_save` names them: by the module below the model, or a new part of its body.
    """
    body = body_name(module)
    owners = dict.fromkeys(name.partition(".")[0] for name in fresh if not name.startswith(body))
    if task.classifies:
        owners.update(
            dict.fromkeys(name for name, each in module.named_children() if f"{name}." != body and _holds(each))
        )
    pooled = f"{body}pooler"
    if any(name.startswith(f"{pooled}.") for name in fresh):
        owners[pooled] = None
    return tuple(owners)


def new_parts(edits: Sequence[Edit], sites: Sites, task: Task, fresh: tuple[str, ...]) -> list[Edit]:
    """Edits that train the new head of a task beside what an adapter does, as far as it does not do so itself."""
    done = {(each.site_name, name) for each in edits if isinstance(each, TrainedParameters) for name in each.names}
    found: list[Edit] = []
    for site in sites.role("apart"):
        wanted = [
            name for name in base_parameters(site.module) if task.classifies or f"{site.name}.{name}" in fresh
        ]
        if left := tuple(name for name in wanted if (site.name, name) not in done):
            found.append(TrainedParameters(site, left, new=True))
    return found


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def body_name(module: ZooModule) -> str:
    """The name of the part of a model that makes the states, with a dot behind it."""
    return f"{module.base_model_prefix}."


def zoo_logits(module: ZooModule, hidden: Float[Tensor, "N d"]) -> Float[Tensor, "N out"]:
    """What the zoo's model makes of final states of its body, each taken as a text of one token."""
    body = module.get_submodule(module.base_model_prefix)
    headed = _with(module, module.base_model_prefix, _States(hidden[:, None], body._modules.get("pooler")))
    # Some models look for the last token that is no padding: here each text has one, and it is none.
    headed.config = copy.copy(headed.config)
    headed.config.pad_token_id = 0
    no_padding = torch.ones(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    found: Tensor = headed(input_ids=no_padding).logits
    return found.reshape(len(hidden), -1)


class _States(nn.Module):
    """A body that gives back states it was told, pooled by its own pooler where it has one."""

    def __init__(self, states: Float[Tensor, "N 1 d"], pooler: nn.Module | None) -> None:
        super().__init__()
        self.states = states
        self.pooler = pooler

    def forward(self, *ids: object, **settings: object) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        # Called as the zoo calls the body it stands for; nothing of that matters here.
        pooled = None if self.pooler is None else self.pooler(self.states)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=self.states, pooler_output=pooled)


Part = TypeVar("Part", bound=nn.Module)


def _with(module: Part, name: str, part: nn.Module) -> Part:
    """A shallow copy of a model with another module at `name`; parameters and all other modules are the same."""
    owner, _, rest = name.partition(".")
    inner = _with(module.get_submodule(owner), rest, part) if rest else part
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, owner: inner}
    return twin

