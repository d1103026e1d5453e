"""PEFT as the oracle of our adapter files: ours load there, theirs load here, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.adapters import Adapter, adapter_of, saved_adapter
from luthier.adapters.dora import DoRA
from luthier.adapters.ia3 import IA3
from luthier.adapters.lora import LoRA, Start
from luthier.adapters.p_tuning import PTuning
from luthier.adapters.prefix_tuning import PrefixTuning
from luthier.adapters.prompt_tuning import PromptTuning
from luthier.adapters.trainable_tokens import TrainableTokens
from luthier.core.errors import CorruptError, RecipeError
from luthier.model.files.adapter_config import read_config
from luthier.model.files.adapter_files import check_base, fill
from luthier.objectives.sft import SFT
from luthier.optimizers.adamw import AdamW
from luthier.train.result import save_result
from luthier.train.stepper import Stepper
from tests import forests

peft = pytest.importorskip("peft")
peft_optimizers = pytest.importorskip("peft.optimizers")
# What PEFT warns of in its own and the zoo's code is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.array([5, 17, 90, 3, 44, 71, 8, 8, 120], dtype=np.int32)
OURS: dict[str, Adapter] = {
    "lora": LoRA(rank=4, alpha=8.0),
    "rslora": LoRA(rank=4, alpha=8.0, rslora=True, dropout=0.1, targets=("q", "down")),
    "patterns": LoRA(rank=4, alpha=8.0, rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3.0}),
    "gaussian": LoRA(rank=4, alpha=8.0, init="gaussian"),
    "orthogonal": LoRA(rank=4, alpha=8.0, init="orthogonal"),
    "pissa": LoRA(rank=4, alpha=8.0, init="pissa"),
    "pissa, rslora": LoRA(rank=4, alpha=8.0, rslora=True, init="pissa", targets=("q", "down")),
    "olora": LoRA(rank=4, alpha=8.0, init="olora"),
    "ia3": IA3(),
    "dora": DoRA(rank=4, alpha=8.0),
    "prefix": PrefixTuning(prefix_tokens=4),
    "projected prefix": PrefixTuning(prefix_tokens=4, projection=True, projection_size=8),
    "prompt": PromptTuning(prompt_tokens=4),
    "p_tuning": PTuning(prompt_tokens=4, encoder_size=8),
}
CHANGED = ("pissa", "olora")
"""How the names begin of what PEFT, unless it is asked to convert it, saves for a base that it has changed."""
TOKENS = (90, 5, 44)
EACH = [
    *((architecture, name) for architecture in ("llama", "qwen2", "gpt2", "mistral") for name in OURS
      if (architecture, name) != ("gpt2", "patterns")),
    ("gemma", "lora"), ("gemma", "ia3"), ("gemma", "prefix"), ("gemma", "prompt"),
]  # fmt: skip


def their_logits(module: torch.nn.Module) -> Tensor:
    """Logits of a PEFT model in evaluation mode."""
    module.eval()
    with torch.no_grad():
        found: Tensor = module(input_ids=torch.from_numpy(IDS.astype(np.int64))[None]).logits[0]
    # Behind a prompt PEFT gives its logits too.
    return found[-len(IDS) :]


@pytest.mark.parametrize(("architecture", "name"), EACH)
def test_ours_load_in_peft_with_equal_logits(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when a key, an orientation, a scale or a list of targets means something else to PEFT."""
    model = forests.language_model(architecture)
    attachment = model.attach(OURS[name].attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, OURS[name], {})
    theirs = peft.PeftModel.from_pretrained(forests.zoo(architecture, ours=False), str(folder))
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5


def test_one_layer_alone_is_one_layer_in_peft(tmp_path: Path) -> None:
    """Breaks when a full name is shortened to an ending that matches in every layer."""
    model = forests.language_model("llama")
    method = LoRA(rank=4, targets=("layers.1.mlp.down_proj",))
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, method, {})
    theirs = peft.PeftModel.from_pretrained(forests.zoo("llama", ours=False), str(folder))
    assert sum("lora_A" in key for key in theirs.state_dict()) == 1
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5


def config_of(architecture: str, name: str) -> object:
    """The same method as PEFT is asked for it."""
    conv = architecture == "gpt2"
    linear = ["c_attn", "c_proj", "c_fc"] if conv else "all-linear"
    if name in ("lora", "gaussian", "orthogonal"):
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear, fan_in_fan_out=conv,
            init_lora_weights=True if name == "lora" else name,
        )  # fmt: skip
    if name == "patterns":
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear, rank_pattern={"v_proj": 2},
            alpha_pattern={"up_proj": 3},
        )  # fmt: skip
    if name == "rslora":
        targets = ["c_attn"] if conv else ["q_proj", "down_proj"]
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules=targets, fan_in_fan_out=conv
        )
    if name == "ia3":
        forward = ["mlp.c_proj"] if conv else ["down_proj"]
        targets = ["c_attn", *forward] if conv else ["k_proj", "v_proj", *forward]
        return peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=forward, fan_in_fan_out=conv
        )
    if name == "dora":
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, use_dora=True, target_modules=linear, fan_in_fan_out=conv
        )
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if name == "prompt":
        return peft.PromptTuningConfig(**virtual)
    if name == "p_tuning":
        return peft.PromptEncoderConfig(**virtual, encoder_hidden_size=8)
    projected = {"prefix_projection": True, "encoder_hidden_size": 8} if name == "projected prefix" else {}
    return peft.PrefixTuningConfig(**virtual, **projected)


@pytest.mark.parametrize(("architecture", "name"), [(a, name) for a, name in EACH if not name.startswith(CHANGED)])
def test_theirs_load_here_with_equal_logits(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when a file as PEFT writes it is refused, or computes something else here."""
    base = forests.zoo(architecture, ours=False)
    theirs = peft.get_peft_model(base, config_of(architecture, name))
    forests.shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = forests.language_model(architecture)
    check_base(tmp_path, model)
    attachment = model.attach(adapter_of(read_config(tmp_path)).attach(model.sites))
    fill(attachment, tmp_path)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5


# ------------------------------------------------------------------------------------------------ starts of factors

ALL_STARTS = ("gaussian", "orthogonal", "pissa", "olora")
STARTS = pytest.mark.parametrize("init", ALL_STARTS)


def started(architecture: str, init: str) -> Any:
    """PEFT's model with that start."""
    conv = architecture == "gpt2"
    linear = ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"] if conv else "all-linear"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=linear, fan_in_fan_out=conv, init_lora_weights=init
    )
    return peft.get_peft_model(forests.zoo(architecture, ours=False), config)


# PEFT takes the QR of a Conv1D's weight as it lies, whose factors then do not fit the layer.
@pytest.mark.parametrize(
    ("architecture", "init"),
    [*(("llama", init) for init in ALL_STARTS), *(("gpt2", init) for init in ALL_STARTS if init != "olora")],
)
def test_a_start_is_theirs(architecture: str, init: Start) -> None:
    """Breaks when a factor is scaled, cut or transposed otherwise, or drawn from another distribution."""
    sites = {site.name: site for site in forests.language_model(architecture).sites.linear()}
    method = LoRA(rank=4, alpha=6.0, init=init)
    modules = started(architecture, init).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("base_model.model.") for name in layers} == set(sites)
    for name, layer in layers.items():
        torch.manual_seed(5)
        down, up = method.start(sites[name.removeprefix("base_model.model.")])
        torch.manual_seed(5)
        if init == "orthogonal":
            layer.orthogonal_init("default")
        elif init == "gaussian":
            layer.reset_lora_parameters("default", init)
        theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # The sign of a singular vector is anybody's.
        torch.testing.assert_close(down.abs(), theirs[0].abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(up.abs(), theirs[1].abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(up @ down, theirs[1] @ theirs[0], rtol=1e-3, atol=1e-4)


@STARTS
def test_training_from_a_start_is_theirs(init: Start) -> None:
    """Breaks when what is taken off is not what was there, which PEFT has taken off the weight."""
    model = forests.language_model("llama")
    theirs = started("llama", init)
    method = LoRA(rank=4, alpha=6.0, init=init)
    ours = model.attach(method.attach(model.sites))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in ours.named_parameters().items():
            name, _, factor = key.rpartition(".")
            its = {"down": "lora_A", "up": "lora_B"}[factor]
            value = trained[f"base_model.model.{name}.{its}.default.weight"]
            # With the same signs of singular vectors, and the same draws.
            parameter.copy_(value)
            if (first := ours.named_constants().get(f"{name}.first_{factor}")) is not None:
                first.copy_(value)
    tree = forests.row_tree(IDS, np.ones(len(IDS), dtype=np.float32), row=0)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    theirs.eval()
    optimizers = [torch.optim.SGD(list(found.values()), lr=0.02) for found in (ours.named_parameters(), trained)]
    before = forests.logits(model, IDS)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        forests.engine_loss(model, [tree]).backward()
        log_probs = torch.log_softmax(theirs(input_ids=ids).logits[0].float(), -1)
        (-log_probs[:-1].gather(1, ids[0, 1:, None]).sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-4
    assert forests.relative_error(forests.logits(model, IDS), before) > 1e-2


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_lora_plus_is_theirs(init: Start) -> None:
    """Breaks when the ratio is A's, is lost on the way to the optimizer, or a schedule puts it back."""
    model, theirs = forests.language_model("llama"), started("llama", init)
    method = LoRA(rank=4, alpha=6.0, init=init, plus_ratio=8.0)
    ours = model.attach(method.attach(model.sites))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in {**ours.named_parameters(), **ours.named_constants()}.items():
            name, _, factor = key.rpartition(".")
            its = "lora_A" if factor.endswith("down") else "lora_B"
            parameter.copy_(trained[f"base_model.model.{name}.{its}.default.weight"])
    knobs = AdamW(learning_rate=1e-3, weight_decay=0.1)
    stepper = Stepper(model, ours, SFT(), knobs, max_grad_norm=None)
    optimizer = peft_optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    tree = forests.row_tree(IDS, np.ones(len(IDS), dtype=np.float32), row=0)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    theirs.eval()
    before = forests.logits(model, IDS)
    for step in range(4):
        stepper.forward_backward([tree])
        stepper.optim_step(factor=1 / (step + 1))
        optimizer.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    model.train(False)
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-4
    assert forests.relative_error(forests.logits(model, IDS), before) > 1e-2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_their_converted_files_load_here(init: Start, tmp_path: Path) -> None:
    """Breaks when what PEFT makes of such an adapter, for the base as it is, is refused or means something else."""
    theirs = started("llama", init)
    theirs.save_pretrained(str(tmp_path / "start"))
    forests.shake([p for n, p in theirs.named_parameters() if p.requires_grad], std=0.05)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path / "end"))
    with pytest.raises(RecipeError, match="weights were changed"):
        adapter_of(read_config(tmp_path / "end"))
    converted = tmp_path / "converted"
    theirs.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = forests.language_model("llama")
    attachment = model.attach(adapter_of(read_config(converted)).attach(model.sites))
    fill(attachment, converted)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5


# ------------------------------------------------------------------------------------------------ the embedding

TABLES = {
    "llama": ["embed_tokens", "q_proj"], "qwen2": ["embed_tokens", "q_proj"], "gpt2": ["wte", "c_attn"],
    "gemma": ["embed_tokens"], "gemma2": ["embed_tokens", "down_proj"],
}  # fmt: skip
tables = pytest.mark.parametrize("architecture", TABLES)


def with_table(architecture: str, **more: Any) -> Any:
    """PEFT's model with factors at the token embedding, where they do nothing yet."""
    knobs = {"target_modules": TABLES[architecture], "fan_in_fan_out": architecture == "gpt2", **more}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **knobs)
    return peft.get_peft_model(forests.zoo(architecture, ours=False), config)


@tables
def test_an_embedding_of_ours_loads_in_peft(architecture: str, tmp_path: Path) -> None:
    """Breaks when factors go by another name or are turned, an embedding's own scale is lost, or a tied head moves."""
    model = forests.language_model(architecture)
    named = tuple("embed" if name in ("embed_tokens", "wte") else name for name in TABLES[architecture])
    method = LoRA(rank=4, alpha=6.0, targets=named, plus_ratio=2.0)
    attachment = model.attach(method.attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, method, {})
    assert sorted(read_config(folder)["target_modules"]) == sorted(TABLES[architecture])
    theirs = peft.PeftModel.from_pretrained(forests.zoo(architecture, ours=False), str(folder))
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5
    model.switch("default", on=False)
    assert forests.relative_error(their_logits(theirs), forests.logits(model, IDS)) > 1e-2


@tables
def test_an_embedding_of_theirs_loads_here(architecture: str, tmp_path: Path) -> None:
    """Breaks when the table that PEFT writes beside the factors is refused, or is not compared with the base's."""
    theirs = with_table(architecture)
    forests.shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = forests.language_model(architecture)
    attachment = model.attach(saved_adapter(tmp_path, model.sites).attach(model.sites))
    fill(attachment, tmp_path)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tables = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    assert bool(tables) == (architecture != "gpt2")
    for name in tables:
        tensors[name][3, 0] += 1
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CorruptError, match="differs from the base model's"):
            fill(attachment, tmp_path)


def test_an_embedding_and_a_head_of_theirs_load_here(tmp_path: Path) -> None:
    """Breaks when a head with factors of its own cannot be read, with the matrix that PEFT writes beside them."""
    theirs = with_table("llama", target_modules=r".*(embed_tokens|lm_head|\.1\.mlp\.up_proj)")
    forests.shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = forests.language_model("llama")
    attachment = model.attach(saved_adapter(tmp_path, model.sites).attach(model.sites))
    assert len(attachment.edits) == 3
    fill(attachment, tmp_path)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5


@tables
def test_training_an_embedding_is_theirs(architecture: str) -> None:
    """Breaks when a token's column gets another one's gradient, or B none."""
    model, theirs = forests.language_model(architecture), with_table(architecture)
    ours = model.attach(LoRA(rank=4, alpha=6.0, targets=tuple(TABLES[architecture])).attach(model.sites))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    values = ours.named_tensors()
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_embedding_B" in key:
                assert parameter.std() == pytest.approx(float(values[key.replace(".default", "")].std()), rel=0.3)
            parameter.copy_(values[key.replace(".default", "")])
    tree = forests.row_tree(IDS, np.ones(len(IDS), dtype=np.float32), row=0)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    theirs.eval()
    before = forests.logits(model, IDS)
    optimizers = [torch.optim.SGD(list(found.values()), lr=0.002) for found in (ours.named_parameters(), trained)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        forests.engine_loss(model, [tree]).backward()
        log_probs = torch.log_softmax(theirs(input_ids=ids).logits[0].float(), -1)
        (-log_probs[:-1].gather(1, ids[0, 1:, None]).sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-4
    assert forests.relative_error(forests.logits(model, IDS), before) > 1e-3


# ------------------------------------------------------------------------------------------------ trained tokens

ROWS: dict[str, Adapter] = {
    "lora": LoRA(rank=4, alpha=8.0, trainable_tokens=TOKENS),
    "lora, embedding": LoRA(rank=4, alpha=8.0, trainable_tokens=TOKENS, trainable_token_targets=("embed",)),
    "tokens": TrainableTokens(tokens=TOKENS),
    "tokens, embedding": TrainableTokens(tokens=TOKENS, targets=("embed",)),
}
each_rows = pytest.mark.parametrize("name", ROWS)
tied_and_not = pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2"])


def rows_config_of(architecture: str, name: str) -> object:
    """The same trained tokens as PEFT is asked for them."""
    conv = architecture == "gpt2"
    both = architecture == "llama" and "embedding" not in name
    indices = {"embed_tokens": list(TOKENS), "lm_head": list(TOKENS)} if both else list(TOKENS)
    if name.startswith("lora"):
        linear = ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"] if conv else "all-linear"
        return peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear, fan_in_fan_out=conv,
            trainable_token_indices=indices,
        )  # fmt: skip
    targets = ["embed_tokens", "lm_head"] if both else None
    return peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=list(TOKENS), target_modules=targets)


@each_rows
@tied_and_not
def test_trained_tokens_of_ours_load_in_peft(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when rows go by another key, in another order, or a tied head does not see them there."""
    model = forests.language_model(architecture)
    attachment = model.attach(ROWS[name].attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    folder = save_result(tmp_path, model, attachment, ROWS[name], {})
    theirs = peft.PeftModel.from_pretrained(forests.zoo(architecture, ours=False), str(folder))
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5


@each_rows
@tied_and_not
def test_trained_tokens_of_theirs_load_here(architecture: str, name: str, tmp_path: Path) -> None:
    """Breaks when PEFT's list, mapping or repeated tensor is refused, or means other rows here."""
    theirs = peft.get_peft_model(forests.zoo(architecture, ours=False), rows_config_of(architecture, name))
    forests.shake(p for n, p in theirs.named_parameters() if p.requires_grad)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = forests.language_model(architecture)
    attachment = model.attach(saved_adapter(tmp_path, model.sites).attach(model.sites))
    fill(attachment, tmp_path)
    assert forests.relative_error(forests.logits(model, IDS), expected) <= 1e-5


@each_rows
@tied_and_not
def test_a_training_step_is_theirs(architecture: str, name: str) -> None:
    """Breaks when a row gets the gradient of the embedding or of the head alone, or another token's."""
    model = forests.language_model(architecture)
    torch.manual_seed(3)
    ours = model.attach(ROWS[name].attach(model.sites))
    theirs = peft.get_peft_model(forests.zoo(architecture, ours=False), rows_config_of(architecture, name))
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    values = ours.named_tensors()
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora" in key:
                parameter.copy_(values[key.replace(".default", "")])
    tree = forests.row_tree(IDS, np.ones(len(IDS), dtype=np.float32), row=0)
    ids = torch.from_numpy(IDS.astype(np.int64))[None]
    theirs.eval()
    optimizers = [torch.optim.SGD(list(found.values()), lr=0.1) for found in (ours.named_parameters(), trained)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        forests.engine_loss(model, [tree]).backward()
        log_probs = torch.log_softmax(theirs(input_ids=ids).logits[0].float(), -1)
        (-log_probs[:-1].gather(1, ids[0, 1:, None]).sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert forests.relative_error(forests.logits(model, IDS), their_logits(theirs)) <= 1e-5
    model.switch("default", on=False)
    assert forests.relative_error(their_logits(theirs), forests.logits(model, IDS)) > 1e-2
