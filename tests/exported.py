"""Subjects for exporters: tiny models of several architectures, with or without an adapter that has been moved."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Phi3Config, PhiConfig, PreTrainedModel

from luthier.adapters import Adapter, saved_adapter
from luthier.core.chosen import choose
from luthier.data.conversation import Conversation, Message, Row
from luthier.data.prepare import Reading, make_renderer
from luthier.data.rendering.renderer import Renderer
from luthier.data.tokenizer import Tokenizer
from luthier.exporters import Exporter, Subject
from luthier.model.attending import attention
from luthier.model.comparing.parity import Heard, ParityReport, Questions, compare, hear
from luthier.model.comparing.parity_sides import ModelSide
from luthier.model.comparing.sketches import sketched
from luthier.model.files.adapter_files import fill, save_adapter
from luthier.model.language_model import LanguageModel
from luthier.model.load import state_digest
from tests import forests
from tests.tiny import VOCABULARY, tiny_tokenizer

ARCHITECTURES = ("llama", "qwen2", "gemma", "gemma2", "gemma3", "gpt2", "phi", "phi3")
ROWS = (Row(0, "rows.jsonl:1:1", Conversation((Message("user", "hello there"), Message("assistant", "well"))),),
        Row(1, "rows.jsonl:2:1", Conversation((Message("system", "be short"), Message("user", "an answer"),
                                               Message("assistant", "no")))))  # fmt: skip
_SHARED = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
           "eos_token_id": 1}  # fmt: skip
_CONFIGS = {
    # Parts of each head are turned, and there are biases everywhere.
    "phi": lambda: PhiConfig(**_SHARED),
    # One matrix for q, k and v.
    "phi3": lambda: Phi3Config(**_SHARED, num_key_value_heads=2),
    # Norms of q and k, and every sixth layer sees all, with a rotation of its own.
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SHARED, "num_hidden_layers": 6}, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        sliding_window=6,
    ),
}  # fmt: skip


def language_model(architecture: str, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A tiny model with every parameter random; the same each time."""
    if architecture not in _CONFIGS:
        return forests.language_model(architecture, dtype=dtype)
    module = _zoo(architecture).to(dtype)
    return LanguageModel(module, source=f"tiny/{architecture}", digest=state_digest(module))


def _zoo(architecture: str) -> PreTrainedModel:
    attention.register()
    module = AutoModelForCausalLM.from_config(_CONFIGS[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    forests.shake(module.parameters(), std=0.15)
    forests.shake([each for each in module.parameters() if each.ndim == 1])
    module.set_attn_implementation(attention.NAME)
    return module.eval()


def subject(architecture: str, folder: Path, *, adapter: str = "", dtype: torch.dtype = torch.float32) -> Subject:
    """A model with an adapter of the catalog, moved away from its start; its files are below `folder`."""
    model = language_model(architecture, dtype=dtype)
    tokenizer = Tokenizer.of(tiny_tokenizer())
    held = None
    if adapter:
        method = choose("adapters", Adapter, adapter)
        torch.manual_seed(0)
        attachment = model.attach(method.attach(model.sites))
        forests.shake(attachment.named_parameters().values(), seed=3)
        if method.peft_type is not None:
            held = folder / "adapter"
            save_adapter(held, attachment, peft_type=method.peft_type, config=method.peft_config(model.sites),
                         base=model.source, extras={})  # fmt: skip

    def anew(place: Path) -> LanguageModel:
        made = language_model(architecture, dtype=dtype)
        fill(made.attach(saved_adapter(place, made.sites).attach(made.sites)), place)
        return made

    return Subject(
        name="a run", base=model.source, model=model, tokenizer=tokenizer, chat_template=tokenizer.chat_template,
        stop_ids=(1,), reading=Reading(), precision="float32" if dtype == torch.float32 else "bfloat16", adapter=held,
        open_adapter=anew,
    )  # fmt: skip


@cache
def _renderer() -> Renderer:
    """Of every subject: they have one tokenizer, and a template of its own process each would take most of the time."""
    renderer, _ = make_renderer(Tokenizer.of(tiny_tokenizer()), Reading(), context_tokens=256)
    return renderer


def heard(given: Subject) -> Heard:
    """What the subject says as it is."""
    draws = np.random.default_rng(0)
    prompts = tuple(draws.integers(3, VOCABULARY, size).astype(np.int32) for size in (24, 9, 40))
    side = ModelSide("a run", given.model, renderer=_renderer(), stop_ids=given.stop_ids)
    return hear(side, Questions(prompts, ROWS))


def exported(exporter: Exporter, given: Subject, place: Path) -> ParityReport:
    """What an exporter makes of a subject, held against it."""
    exporter.require(given)
    said = heard(given)
    if exporter.form == "weights":
        for name in list(given.model.attachments):
            given.model.merge(name, reversible=False)
        said = replace(said, sketches=sketched(ModelSide("", given.model).tensors()))
    place.mkdir()
    exporter.write(given, place, lambda _line: None)
    return compare(said, exporter.read(given, place), exporter.tolerance(given))
