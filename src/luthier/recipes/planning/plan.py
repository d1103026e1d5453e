"""Plan: what a fine-tune would take, told from a config alone: no weights, no data, no training.

Read top to bottom: the question, the model without memory with its adapter on, the bytes of its widest step, its FLOPs
and time, and what all that costs. The formulas are those that a run is planned by (memory.py, limits.py); what would
fit instead is in `plan_fits.py`, inference in `plan_inference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from luthier.adapters import Adapter
from luthier.arithmetic.compute import mean_context
from luthier.arithmetic.memory import masters, saving, staging
from luthier.arithmetic.shapes import Shape, shape_of
from luthier.arithmetic.training import (
    Sharding,
    State,
    activation_bytes,
    divided,
    logit_bytes,
    model_flops,
    state_bytes,
)
from luthier.core.chosen import Chosen, choose
from luthier.core.errors import RecipeError
from luthier.core.knobs import Knobs
from luthier.data.forest import Forest, Segment, Tree
from luthier.kernels.native_backend import NativeBackend
from luthier.model.editing.attachment import Attachment
from luthier.model.empty import attach_empty, empty_model
from luthier.model.files.config_gate import read_config
from luthier.model.language_model import LanguageModel
from luthier.model.load import choose_precision
from luthier.model.machine import Rates
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.planning.inference import longer_than
from luthier.recipes.schemas.finetune import require_trainable
from luthier.recipes.schemas.offload import (
    Offload,
    inputs_are_far,
    optimizer_is_far,
    require_blocks,
    require_device,
    require_recomputed,
)
from luthier.recipes.sizing.limits import plan_speed, rates_for
from luthier.recipes.sizing.memory import PARTS, Formulas, Pass, far_optimizer, lasting
from luthier.recipes.sizing.products import Flow, Stream
from luthier.recipes.sizing.room import free_memory
from luthier.train.source import MicroBatch

MOST_ROWS: Final = 2**16
MOST_TOKENS: Final = 2**21
"""More rows at once, and longer ones, are looked for by nobody, and take long to lay out."""
GATHERED = 2
"""Blocks that are whole on each device where weights are divided: the one at work and the one that is fetched."""


class PlanKnobs(Knobs):
    """What would be trained, and on what."""

    adapter: Annotated[Adapter, Chosen("adapters")] = Field(
        default_factory=lambda: choose("adapters", Adapter, "lora"), description="what is trained"
    )
    quantizer: Annotated[Quantizer, Chosen("quantizers")] = Field(
        default_factory=lambda: choose("quantizers", Quantizer, "none"), description="how the frozen weights are kept"
    )
    optimizer: Annotated[Optimizer, Chosen("optimizers")] = Field(
        default_factory=lambda: choose("optimizers", Optimizer, "adamw"), description="how a gradient becomes a step"
    )
    sequence: int = Field(2048, ge=2, le=MOST_TOKENS, description="tokens of a row")
    batch: int = Field(1, ge=1, le=MOST_ROWS, description="rows that go through the model at once, on each device")
    trained_share: float = Field(1.0, gt=0, le=1, description="share of the tokens that carry loss")
    recompute: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="blocks that are made again in the backward pass; auto takes as few as memory allows"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="dtype of weights and products")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="kind of device; auto is what is here")
    devices: int = Field(1, ge=1, description="how many of them")
    sharding: Sharding = Field("none", description="what several devices divide: zero1, zero2, zero3 or fsdp")
    offload: Offload = Field("none", description="what lies with the host: optimizer, activations or both")
    memory_bytes: float | None = Field(
        None, ge=1, description="memory of each; empty is what is free here"
    )

    @model_validator(mode="after")
    def _as_a_recipe_has_it(self) -> PlanKnobs:
        require_trainable(self.adapter, self.quantizer)
        require_recomputed(self.offload, self.recompute)
        return self


@dataclass(frozen=True)
class Machine:
    """How fast a device is said to be, and what share of that training reaches; empty rates are measured here."""

    flops: float | None = None
    bytes: float | None = None
    efficiency: float = 1.0

    @classmethod
    def of(cls, tflops: float | None, bandwidth: float | None, efficiency: float = 1.0) -> Machine:
        """The machine of a data sheet: products in TFLOP/s, memory in GB/s. Raises RecipeError for what is no rate."""
        rates = {"tflops": tflops, "bandwidth": bandwidth}
        wrong = {name: rate for name, rate in rates.items() if rate is not None and not 0 < rate < math.inf}
        if not 0 < efficiency <= 1:
            wrong["efficiency"] = efficiency
        if wrong:
            raise RecipeError(
                ", ".join(f"{name} {value}" for name, value in wrong.items()),
                allowed="rates above 0, and a share of them above 0 and at most 1",
                do="leave out what you do not know: it is measured here",
            )
        flops, bytes_ = (None if rate is None else rate * unit for rate, unit in ((tflops, 1e12), (bandwidth, 1e9)))
        return cls(flops, bytes_, efficiency)


@dataclass(frozen=True)
class Laid:
    """A model without memory, with the adapter of a plan on it, and the formulas of its passes."""

    knobs: PlanKnobs
    shape: Shape
    model: LanguageModel
    attachment: Attachment
    formulas: Formulas
    saves_meanwhile: bool = True
    """Whether checkpoints are written before the last step, beside passes."""
    known: tuple[tuple[Adapter, Formulas], ...] = ()
    """The formulas of every adapter that has been on this model: of the zoo's blocks they take seconds to count."""

    @classmethod
    def of(
        cls, knobs: PlanKnobs, shape: Shape, model: LanguageModel, *, saves_meanwhile: bool = True,
        known: tuple[tuple[Adapter, Formulas], ...] = (),
    ) -> Laid:  # fmt: skip
        """The model with the adapter put on; on a CPU without C++ tensors lie apart."""
        require_device(knobs.offload, kind_of_device(knobs))
        require_blocks(knobs.offload, model.recomputable)
        attachment = attach_empty(model, knobs.adapter.attach)
        kind = kind_of_device(knobs)
        apart = kind == "cpu" and not isinstance(model.executor.backend, NativeBackend)
        formulas = next((each for adapter, each in known if adapter == knobs.adapter), None)
        if formulas is None:
            formulas = Formulas.of(model, attachment, apart=apart, device=kind)
            known = (*known, (knobs.adapter, formulas))
        return cls(knobs, shape, model, attachment, formulas, saves_meanwhile, known)

    def asked(self, **other: Any) -> Laid:
        """The same with knobs that change neither the adapter nor the model."""
        return replace(self, knobs=self.knobs.model_copy(update=other))

    @property
    def kind(self) -> str:
        """The kind of device."""
        return kind_of_device(self.knobs)

    @property
    def blocks(self) -> int:
        """How many blocks can be made again."""
        return self.model.recomputable

    @cached_property
    def lasting(self) -> dict[str, int]:
        """What stays from step to step, on each device, and the copy that a checkpoint is written from."""
        knobs = self.knobs
        parts = lasting(
            self.model, self.attachment, knobs.optimizer, quantizer=knobs.quantizer, device=self.kind,
            offload=knobs.offload,
        )  # fmt: skip
        if self.kind == "cpu":
            parts["saving"] = staging(self.attachment.parameter_count, parts["optimizer"])
        if knobs.sharding == "none":
            return parts
        trained = () if optimizer_is_far(knobs.offload) else self.attachment.named_parameters().values()
        wide = sum(masters(each.numel(), each.element_size()) for each in trained)
        whole = {**parts, "trained": parts["trained"] - wide, "masters": wide}
        shared = divided({**whole, "weights": whole["weights"] + whole.pop("trained")}, knobs.devices, knobs.sharding)
        return {
            **{name: int(shared.get(name, 0)) for name in parts},
            "trained": int(shared["masters"]),
        }

    @property
    def gathered(self) -> int:
        """Weights of blocks that are whole while they compute, where devices divide weights."""
        if self.knobs.sharding not in ("zero3", "fsdp") or self.knobs.devices == 1:
            return 0
        whole = self.lasting["weights"] * self.knobs.devices
        apart = (self.shape.parameters - self.shape.blocks) * self.model.dtype.itemsize
        return int(GATHERED * max(0, whole - apart) / self.shape.layers)

    def step(self, rows: int, length: int, recomputed: int) -> Pass:
        """The widest moment of a pass of so many rows."""
        batch = MicroBatch(tuple(range(rows)), rows * length, length)
        each = max(1, min(length - 1, round(self.knobs.trained_share * length)))
        formulas = replace(self.formulas, far=inputs_are_far(self.knobs.offload))
        return formulas.of_pass(batch, rows * each, lambda: _forest(rows, length, each), recomputed)

    def needed(self, rows: int, length: int, available: float | None) -> dict[str, int]:
        """Bytes by part with `total`, how many blocks are `recomputed` for it, and what lies with the `host`."""
        fixed = {**self.lasting, "saving": self.lasting["saving"] * self.saves_meanwhile}
        room = None if available is None else available - sum(fixed.values()) - self.gathered
        count, widest = self._recomputed(rows, length, room)
        freed = fixed["gradients"] + widest.bytes
        copy = saving(self.lasting["saving"], meanwhile=self.saves_meanwhile, freed=freed)
        parts = {**fixed, "activations": widest.kept, "working": widest.working + self.gathered, "saving": copy}
        return {
            **{name: parts[name] for name in PARTS},
            "total": sum(parts.values()),
            "tokens": widest.tokens,
            "longest": widest.longest,
            "recomputed": count,
            "blocks": self.blocks,
            "host": widest.far + far_optimizer(self.attachment, self.knobs.optimizer, self.knobs.offload),
        }

    def _recomputed(self, rows: int, length: int, room: float | None) -> tuple[int, Pass]:
        """As few blocks as fit; if none do, as few as save most."""
        asked = self.knobs.recompute
        if asked != "auto":
            count = {"none": 0, "all": self.blocks}.get(str(asked), asked)
            if not isinstance(count, int) or count > self.blocks:
                why = f"{self.blocks} blocks can be made again" if self.blocks else "the model zoo runs its blocks"
                raise RecipeError(f"recompute is {asked!r}, and {why}", allowed=f"auto, none, or 0 to {self.blocks}")
            return count, self.step(rows, length, count)
        least = self.step(rows, length, 0)
        if room is None or least.bytes <= room or not self.blocks:
            return 0, least
        tried = {0: least}
        for count in range(1, self.blocks + 1):
            tried[count] = self.step(rows, length, count)
            if tried[count].bytes <= room:
                return count, tried[count]
        best = min(tried, key=lambda count: tried[count].bytes)
        return best, tried[best]


def lay(config: Path, knobs: PlanKnobs, before: Laid | None = None, *, saves_meanwhile: bool = True) -> Laid:
    """The model of a config file with the adapter on; that of `before`, saved as it is, where there is one."""
    if before is not None:
        on = before.model.attachments.values()
        if before.knobs.adapter == knobs.adapter and any(each is before.attachment for each in on):
            return replace(before, knobs=knobs)
        return Laid.of(
            knobs, before.shape, before.model, saves_meanwhile=before.saves_meanwhile, known=before.known
        )
    checked = read_config(config, quantized=True)
    shape = shape_of(checked.config.get_text_config().to_dict())
    kind = kind_of_device(knobs)
    dtype, _ = choose_precision(knobs.precision, (shape.hidden, shape.inner), torch.device(kind))
    model = empty_model(checked.config, str(config), dtype=dtype, device=kind)
    return Laid.of(knobs, shape, model, saves_meanwhile=saves_meanwhile)


def plan_training(laid: Laid, machine: Machine = Machine()) -> dict[str, Any]:
    """What a fine-tune of this shape takes: parameters, memory by part, FLOPs, time, and whether it fits."""
    knobs = laid.knobs
    available = available_to(laid)
    memory = laid.needed(knobs.batch, knobs.sequence, available)
    speed = _speed(laid, machine, memory["recomputed"])
    rate = speed["tokens_per_second"]
    return {
        "parameters": {"total": laid.shape.parameters, "trained": laid.attachment.parameter_count, **laid.shape.parts},
        "memory": {**memory, "available": None if available is None else int(available)},
        "flops_per_token": speed["flops_per_token"],
        "seconds_per_1k_tokens": None if rate is None else 1000 / rate,
        "fits": None if available is None else memory["total"] <= available,
        "speed": speed,
        "handbook": _handbook(laid),
        "notices": [
            *longer_than(laid.shape, knobs.sequence, "rows", "luthier train refuses them"),
            *knobs.adapter.remarks(laid.model.sites),
        ],
    }


def _handbook(laid: Laid) -> dict[str, float]:
    """What formulas of papers say of any engine on one device: 18 bytes a trained parameter, GPT's activations without
    squares, all logits at once."""
    knobs, shape = laid.knobs, laid.shape
    trains_base = laid.attachment.trains_base
    frozen = 0 if trains_base else laid.lasting["weights"]
    state = state_bytes(laid.attachment.parameter_count, State(), frozen=frozen)
    activations = activation_bytes(
        sequence=knobs.sequence, batch=knobs.batch, hidden=shape.hidden, heads=shape.heads.count,
        layers=shape.layers, recompute="selective",
    )  # fmt: skip
    logits = logit_bytes(tokens=knobs.batch * knobs.sequence, vocabulary=shape.vocabulary)
    flops = model_flops(
        shape.active + shape.table, layers=shape.layers, width=shape.query, sequence=knobs.sequence,
        trained_base=trains_base,
    )  # fmt: skip
    return {"total": sum(state.values()) + activations + logits, "activations": activations, "logits": logits,
            "flops_per_token": flops}  # fmt: skip


def _speed(laid: Laid, machine: Machine, recomputed: int) -> dict[str, Any]:
    """FLOPs and bytes of a token, and the tokens a second of all devices; None where the device is not here."""
    knobs, model = laid.knobs, laid.model
    rates = _rates(laid, machine)
    context = mean_context([knobs.sequence])
    made = plan_speed(
        model,
        laid.attachment,
        Flow(texts=Stream(context=context), predicted=knobs.trained_share),
        at_once=knobs.batch * knobs.sequence,
        step_tokens=knobs.batch * knobs.sequence,
        recomputed=recomputed,
        machine=rates or Rates(1.0, 1.0),
    )
    # What is made again takes time, though it need not be done.
    share = made["flops_per_token"] / (made["flops_per_token"] + made["recomputed_flops_per_token"])
    most = made["tokens_per_second"] * share * machine.efficiency * knobs.devices
    return {
        **made,
        "tokens_per_second": most if rates else None,
        "flops_per_second": rates.flops if rates else None,
        "bytes_per_second": rates.bytes if rates and math.isfinite(rates.bytes) else None,
        "efficiency": machine.efficiency,
        "devices": knobs.devices,
    }


def _rates(laid: Laid, machine: Machine) -> Rates | None:
    """As they were given, or measured where the device is here."""
    if machine.flops is not None:
        return Rates(machine.flops, machine.bytes or float("inf"))
    if laid.kind == "cuda" and not torch.cuda.is_available():
        return None
    found = rates_for(laid.model, torch.device(laid.kind))
    return Rates(found.flops, machine.bytes or found.bytes)


def available_to(laid: Laid) -> float | None:
    """Bytes that each device has for the run: as said, or free here; None of one that is not here."""
    if laid.knobs.memory_bytes is not None:
        return laid.knobs.memory_bytes
    if laid.kind == "cuda" and not torch.cuda.is_available():
        return None
    return float(free_memory(torch.device(laid.kind)))


def kind_of_device(knobs: PlanKnobs) -> str:
    """cpu or cuda."""
    if knobs.device != "auto":
        return knobs.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def cost(plan: Mapping[str, Any], tokens: float, price_per_hour: float | None) -> dict[str, Any]:
    """Time and price of training on so many tokens, on all devices."""
    rate = plan["seconds_per_1k_tokens"]
    seconds = None if rate is None else rate * tokens / 1000
    devices = plan["speed"]["devices"]
    priced = None if seconds is None or price_per_hour is None else seconds / 3600 * price_per_hour * devices
    return {"tokens": tokens, "seconds": seconds, "price": priced}


def _forest(rows: int, length: int, trained: int) -> Forest:
    """Rows of plain text, with loss on so many tokens at the end of each."""
    weights = np.zeros(length, dtype=np.float32)
    weights[length - trained :] = 1
    tree = Tree((Segment(np.zeros(length, dtype=np.int32), weights),))
    return Forest((tree,) * rows)
