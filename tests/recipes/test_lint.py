"""What is told of an adapter before another server gets it, with PEFT's own scales as what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.recipes.lint import VLLM_RANKS, _Adapter, lint
from luthier.recipes.schemas.reinforce import RolloutKnobs
from tests.cli.commands import luthier

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Save = Callable[..., Path]
ALL = ("vllm", "sglang", "llama.cpp")


@pytest.fixture
def save(tmp_path: Path, tiny_path: Callable[[str], Path]) -> Save:
    """A folder with an adapter as PEFT writes it."""

    def made(config: peft.PeftConfig) -> Path:
        config.task_type = "CAUSAL_LM"
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path("llama")), config)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return made


TARGETS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, set()),
        ({"r": 64}, {("vllm", "refuses")}),
        ({"use_dora": True}, {("vllm", "refuses"), ("sglang", "otherwise"), ("llama.cpp", "refuses")}),
        ({"use_rslora": True}, {("sglang", "otherwise"), ("llama.cpp", "otherwise")}),
        ({"alpha_pattern": {"v_proj": 3}}, {(server, "otherwise") for server in ALL}),
        ({"rank_pattern": {"v_proj": 4}}, {("vllm", "otherwise"), ("sglang", "otherwise")}),
        ({"alpha_pattern": {"v_proj": 16}}, set()),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, {("vllm", "refuses")}),
        ({"target_modules": [*TARGETS, "lm_head"]}, {("vllm", "refuses"), ("llama.cpp", "refuses")}),
        ({"modules_to_save": ["norm"]}, {("vllm", "refuses"), ("sglang", "otherwise"), ("llama.cpp", "otherwise")}),
        ({"modules_to_save": ["up_proj"]}, {("vllm", "refuses"), ("sglang", "otherwise"), ("llama.cpp", "refuses")}),
        ({"trainable_token_indices": [3]}, {("vllm", "otherwise"), ("sglang", "otherwise"), ("llama.cpp", "refuses")}),
        ({"bias": "lora_only"}, {("vllm", "refuses"), ("sglang", "otherwise"), ("llama.cpp", "refuses")}),
    ],
)
def test_each_server_is_told_what_it_takes_amiss(
    save: Save, knobs: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    """Breaks when a server's rule is forgotten, or told of an adapter that it does not concern."""
    folder = save(peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **knobs}))
    found = lint(str(folder))
    assert {(finding.server, finding.kind) for finding in found} == expected, found
    if knobs == {"r": 64}:
        assert found[0].do == "start it with --max-lora-rank 64" and not lint(str(folder), max_rank=64)


def test_the_scale_of_a_module_is_pefts(tiny_path: Callable[[str], Path]) -> None:
    """Breaks when a pattern is matched in another way than PEFT matches it."""
    config = peft.LoraConfig(
        r=8, lora_alpha=12, target_modules=[*TARGETS, "up_proj"], use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 4}, alpha_pattern={"v_proj": 5, "q_proj": 7},
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path("llama")), config)
    adapter = _Adapter(config.to_dict(), {})
    seen = 0
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            seen += 1
            assert adapter.scale(name.removeprefix("base_model.model.")) == pytest.approx(module.scaling["default"])
    assert seen == 6


def test_what_is_no_lora_is_refused_by_all_and_told_by_the_command(save: Save) -> None:
    """Breaks when a script that asks takes an adapter for servable."""
    folder = save(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    told = luthier("lint", folder, "--for", "vllm").must(65)
    assert "an adapter of type IA3" in told.out and "sglang" not in told.out
    assert len(luthier("lint", folder, "--json").must(65).json["findings"]) == 3
    luthier("lint", folder, "--for", "vlm").must(2, "did you mean vllm?")
    with pytest.raises(RecipeError, match="holds no adapter_config.json"):
        lint(str(folder.parent))


def test_an_adapter_that_all_take_is_told_so(save: Save) -> None:
    """Breaks when the command finds fault with plain LoRA."""
    folder = save(peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    assert luthier("lint", folder).must(0).out.count("takes it as it is") == 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "abc", 'r is "abc"; a whole number above 0'),
        ("r", 0, 'r is "0"'),
        ("r", None, 'r is "None"'),
        ("lora_alpha", "x", 'lora_alpha is "x"; a number'),
        ("rank_pattern", {"(": 3}, 'rank_pattern names "("'),
        ("rank_pattern", [1], 'rank_pattern is "[1]"'),
        ("alpha_pattern", {"v_proj": None}, 'alpha_pattern.v_proj is "None"'),
    ],
)
def test_a_config_that_makes_no_scale_is_told_as_damaged(save: Save, key: str, value: object, said: str) -> None:
    """Breaks when a damaged adapter ends the command with an error of Python's."""
    folder = save(peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), key: value}), "utf-8")
    luthier("lint", folder).must(74, f"{file}: {said}", "save or fetch the adapter again")


def test_words_of_the_command_are_read_as_they_are_meant(save: Save) -> None:
    """Breaks when a server is told of twice, one module is spelt letter by letter, or no rank is one."""
    folder = save(peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    file = folder / "adapter_config.json"
    whole = {"modules_to_save": "lm_head", "bias": None}
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **whole}), "utf-8")
    told = luthier("lint", folder, "--for", "vllm", "--for", "vllm").must(65).out.splitlines()
    assert len(told) == 1 and "whole modules beside LoRA: lm_head;" in told[0]
    luthier("lint", folder, "--max-rank", 0).must(2, "--max-rank")


def test_a_rank_that_vllm_does_not_start_with_is_refused(save: Save) -> None:
    """Breaks when an adapter is called fit for a server that nobody can start."""
    folder = save(peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    allowed = ", ".join(map(str, VLLM_RANKS))
    said = ("a --max-lora-rank of 17, with which vLLM does not start", allowed, "start it with 32")
    luthier("lint", folder, "--max-rank", 17).must(2, *said)
    luthier("lint", folder, "--for", "vllm", "--max-rank", 513).must(2, "start it with 512")
    assert not lint(str(folder), ("sglang",), max_rank=17)
    assert all(not lint(str(folder), max_rank=rank) for rank in VLLM_RANKS if rank >= 8)
    with pytest.raises(RecipeError, match="rollouts.engine: a --max-lora-rank of 17"):
        validate(RolloutKnobs, {"engine": {"url": "http://127.0.0.1:9", "max_rank": 17}}, where="rollouts")
    validate(RolloutKnobs, {"engine": {"url": "http://127.0.0.1:9", "max_rank": 17, "dialect": "sglang"}})
