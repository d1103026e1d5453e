"""Tiny models of several architectures, random forests, and what the engine must agree with.

The references here know nothing of the engine: they run the zoo's own forward on one path at a time, with the zoo's
own SDPA or eager attention, and take log-softmax of its logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GemmaConfig, MambaConfig, PreTrainedModel

from luthier.core.events import Event
from luthier.data.forest import Floats, Forest, Ints, Segment, Tree, row_tree
from luthier.data.rendering.rendered import TOKEN_ROLES, Rendered
from luthier.model.attending import attention
from luthier.model.language_model import LanguageModel
from luthier.model.load import state_digest
from luthier.train.state import LoopState
from tests.tiny import HIDDEN, KINDS, LAYERS, VOCABULARY, tiny_model

_GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = (*KINDS, "gemma")


def zoo(architecture: str, *, seed: int = 0, ours: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny zoo model with every parameter random, norms included: ones and zeros would hide mistakes."""
    attention.register()
    if architecture == "gemma":
        module = AutoModelForCausalLM.from_config(GemmaConfig(**_GEMMA), dtype=torch.float32)
        matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        for parameter in matrices:
            torch.nn.init.zeros_(parameter)
        shake(matrices, seed=seed, std=0.15)
    else:
        module = tiny_model(architecture, seed=seed)
    shake([parameter for parameter in module.parameters() if parameter.ndim == 1], seed=seed)
    # The zoo's SDPA has no soft cap, its eager attention has.
    module.set_attn_implementation(attention.NAME if ours else "eager" if architecture == "gemma2" else "sdpa")
    return module.to(dtype).eval()


def language_model(
    architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, fused: bool = True
) -> LanguageModel:
    """The tiny model as luthier has it: frozen, probed."""
    module = zoo(architecture, seed=seed, dtype=dtype)
    kernels = "auto" if fused else "torch"
    # A probe is two thirds of what such a model costs, and finds the same for other weights of an architecture.
    return LanguageModel(module, source=f"tiny/{architecture}", digest=state_digest(module), kernels=kernels,
                         known_as=f"tiny/{architecture}")  # fmt: skip


def mamba() -> PreTrainedModel:
    """A tiny recurrent model: no attention anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MambaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=2, conv_kernel=3, expand=2,
            time_step_rank=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# ------------------------------------------------------------------------------------------------------ forests


def tokens(rng: np.random.Generator, count: int) -> Ints:
    """Random token ids, none of them special."""
    return rng.integers(3, VOCABULARY, count).astype(np.int32)


def segment(
    rng: np.random.Generator, count: int, *, parent: int = -1, weights: Sequence[float] | None = None
) -> Segment:
    """A random segment; its weights are 0, 0.5, 1 or 2 unless they are given."""
    chosen = rng.choice([0.0, 0.5, 1.0, 2.0], count) if weights is None else weights
    return Segment(tokens(rng, count), np.asarray(chosen, dtype=np.float32), parent)


def rows(count: int, *, seed: int = 0, shortest: int = 2, longest: int = 14, ones: bool = False) -> list[Tree]:
    """Random one-segment trees, one for each data row."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(count):
        length = int(rng.integers(shortest, longest + 1))
        part = segment(rng, length, weights=[1.0] * length if ones else None)
        weights = part.weights.copy()
        weights[-1] = weights[-1] or 1.0
        made.append(row_tree(part.tokens, weights, row=row))
    return made


def branching(*, seed: int = 0, row: int = 0) -> Tree:
    """A prompt with three children, two of which have children of their own; first tokens of children carry weight.

    The segments are not in the order in which paths visit them.
    """
    rng = np.random.default_rng(seed)
    sizes = [(7, -1), (4, 0), (1, 0), (6, 0), (3, 3), (5, 1), (2, 3)]
    parts = []
    for count, parent in sizes:
        part = segment(rng, count, parent=parent)
        weights = part.weights.copy()
        weights[0] = 1.5
        parts.append(Segment(part.tokens, weights, parent))
    return Tree(tuple(parts), row=row)


def unshared(tree: Tree) -> list[Tree]:
    """The paths of a tree as rows of their own; a token carries its weight in the first path that holds it."""
    seen: set[int] = set()
    made = []
    for path in tree.paths():
        parts = [tree.segments[index] for index in path]
        weights = [
            np.zeros_like(part.weights) if index in seen else part.weights
            for index, part in zip(path, parts, strict=True)
        ]
        seen.update(path)
        made.append(row_tree(np.concatenate([p.tokens for p in parts]), np.concatenate(weights), row=tree.row))
    return made


# --------------------------------------------------------------------------------------------------- references


def brute_log_probs(module: PreTrainedModel, forest: Forest) -> Tensor:
    """log p of every weighted token, in the order of the forest, one plain forward for each segment's whole path."""
    found = []
    for tree in forest.trees:
        for index, part in enumerate(tree.segments):
            ids = np.concatenate([tree.segments[each].tokens for each in tree.path(index)]).astype(np.int64)
            logits = module(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()
            log_probs = torch.log_softmax(logits, -1)
            start = len(ids) - len(part.tokens)
            for offset, weight in enumerate(part.weights):
                place = start + offset
                if weight != 0 and place > 0:
                    found.append(log_probs[place - 1, int(ids[place])])
    return torch.stack(found)


def brute_loss(module: PreTrainedModel, forest: Forest) -> Tensor:
    """The summed loss that any executor must reproduce."""
    weights = []
    for tree in forest.trees:
        for part in tree.segments:
            first = 1 if part.parent < 0 else 0
            weights.extend(float(weight) for weight in part.weights[first:] if weight != 0)
    return -(brute_log_probs(module, forest) * torch.tensor(weights)).sum()


def engine_loss(model: LanguageModel, trees: Iterable[Tree]) -> Tensor:
    """The summed loss as the engine computes it, in one forest."""
    outputs = model.token_outputs(Forest(tuple(trees)))
    return -(outputs.weights * outputs.log_probs).sum()


def trainable(model: LanguageModel) -> dict[str, nn.Parameter]:
    """All parameters of the base, unfrozen and without gradients."""
    model.module.requires_grad_(True)
    model.module.zero_grad(set_to_none=True)
    return dict(model.module.named_parameters())


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of `loss` in each parameter, zeros where it does not reach."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }


def assert_same_gradients(left: Mapping[str, Tensor], right: Mapping[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of each tensor's largest entry (of a hundredth of the largest of all, where it is tiny)."""
    assert set(left) == set(right)
    floor = 1e-2 * max(float(tensor.abs().max()) for tensor in right.values())
    for name, expected in right.items():
        size = max(float(expected.abs().max()), floor)
        error = float((left[name] - expected).abs().max()) / size
        assert error <= tolerance, f"{name} is off by {error:.2e} of its largest entry"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest expected entry."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


def shake(parameters: Iterable[Tensor], *, seed: int = 0, std: float = 0.1) -> None:
    """Move parameters away from where they start, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def snapshot(module: nn.Module) -> tuple[dict[str, int], dict[str, bytes]]:
    """Which objects a module is made of, and the bytes of its state."""
    objects = {f"m:{name}": id(each) for name, each in module.named_modules()}
    objects.update({f"p:{name}": id(each) for name, each in module.named_parameters(remove_duplicate=False)})
    flat = {name: tensor.detach().contiguous().view(-1) for name, tensor in module.state_dict().items()}
    return objects, {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in flat.items()}


# ------------------------------------------------------------------------------------------- data and run doubles


def view(
    row: int, ids: Ints, *, weights: Floats | None = None, role: str = "assistant", roles: Sequence[int] | None = None
) -> Rendered:
    """A rendered row around given tokens; all of them carry weight 1 unless `weights` says otherwise."""
    count = len(ids)
    return Rendered(
        row=row,
        text="x" * count,
        tokens=ids,
        weights=np.ones(count, dtype=np.float32) if weights is None else weights,
        roles=np.asarray(roles if roles is not None else [TOKEN_ROLES.index(role)] * count, dtype=np.uint8),
        spans=np.stack([np.arange(count), np.arange(1, count + 1)], 1).astype(np.int32),
    )


def views(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[Rendered]:
    """Random rendered rows."""
    rng = np.random.default_rng(seed)
    return [view(row, tokens(rng, int(rng.integers(shortest, longest + 1)))) for row in range(count)]


def lengths(made: Sequence[Rendered]) -> np.ndarray:
    """Token counts of rendered rows, as a source wants them."""
    return np.array([len(each.tokens) for each in made], dtype=np.int64)


def logits(model: LanguageModel, ids: Ints, *, seen: DynamicCache | None = None) -> Tensor:
    """The model's logits for one row, (T, V), attachments included; a learned root enters as a cache."""
    root = model.seen_root()
    cache = DynamicCache() if seen is None else seen
    before = cache.get_seq_length()
    if root is not None:
        before = root.token_count
        for layer in range(model.sites.layers):
            cache.update(*root.keys_values(layer, model.dtype), layer)
    places = torch.arange(before, before + len(ids))[None]
    every = torch.ones(1, before + len(ids), dtype=torch.long)
    row = torch.from_numpy(ids.astype(np.int64))[None]
    found: Tensor = model.module(input_ids=row, position_ids=places, attention_mask=every, past_key_values=cache).logits
    return found[0].detach()


@dataclass
class Diary:
    """A recorder and a keeper in one: it notes everything in the order in which it happened."""

    events: list[Event] = field(default_factory=list)
    saves: list[tuple[int, bool]] = field(default_factory=list)
    row_excess: dict[int, float] = field(default_factory=dict)
    on_save: Callable[[LoopState], None] | None = None
    abandoned: bool | None = None

    def record(self, event: Event) -> None:
        json.dumps(event.as_dict(), allow_nan=False)
        self.events.append(event)

    def save(self, state: LoopState, *, best: bool) -> bool:
        self.saves.append((state.step, best))
        if self.on_save is not None:
            self.on_save(state)
        self.record(Event("checkpoint", {"best": best}, step=state.step))
        return True

    def poll(self) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        return []

    def abandon(self, *, at_once: bool) -> None:
        self.abandoned = at_once

    def pin(self) -> str:
        return f"step-{self.saves[-1][0]:06d}" if self.saves else ""

    def kinds(self) -> list[tuple[str, int | None]]:
        """What happened, and at which step."""
        return [(event.kind, event.step) for event in self.events]

    def values(self, kind: str, key: str) -> list[Any]:
        """One value of all events of a kind."""
        return [event.values[key] for event in self.events if event.kind == kind]
