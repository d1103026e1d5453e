"""Adapters of one base as one: files that PEFT reads, the sum that PEFT computes, and bases that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from luthier.recipes.exporting.card_parts import CARD, PARITY
from luthier.recipes.merging import adapters as merge_adapters
from tests.cli.commands import luthier

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters with other ranks, scales and targets."""
    home = tmp_path_factory.mktemp("adapters")
    made = []
    for number, targets in enumerate((["q_proj", "down_proj"], ["q_proj", "v_proj"])):
        model = AutoModelForCausalLM.from_pretrained(llama)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2 + number, lora_alpha=3, target_modules=targets))
        torch.manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        tuned.save_pretrained(home / str(number))
        made.append(home / str(number))
    return made


def logits(llama: Path, folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder)
    with torch.no_grad():
        return model(IDS).logits


def test_side_by_side_is_what_peft_computes_of_both(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Breaks when a scale, a module of one adapter alone, or padding to one rank is wrong."""
    out = tmp_path / "out"
    found = luthier("merge", *adapters, "--adapters", "--method", "cat", "--weight", "0.7", "--weight", "0.4",
                    "--out", out, "--json").must(0).json  # fmt: skip
    assert found["rank"] == 5 and found["lost"] == 0 and found["modules"] == 6
    parity = json.loads((out / PARITY).read_text())
    assert parity == found["parity"] and parity["passed"] and parity["max_difference"] < 1e-3 and parity["cut"] is None
    card = (out / CARD).read_text()
    for part in ("--method cat --weight 0.7 --weight 0.4 --out out", "| `0` | 0.7 | adapter `", "library_name: peft",
                 "| greedy agreement | 100.0 % of the tokens |",
                 f"a merge of adapters of `{llama.name}` by `cat`"):  # fmt: skip
        assert part in card, part
    assert "/tmp" not in card and "What the rank costs" not in card
    model = AutoModelForCausalLM.from_pretrained(llama)
    parts = [peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), each) for each in adapters]
    whole = [part.merge_and_unload().state_dict() for part in parts]
    base = model.state_dict()
    model.load_state_dict({key: base[key] + 0.7 * (whole[0][key] - base[key]) + 0.4 * (whole[1][key] - base[key])
                           for key in base})  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(logits(llama, out), model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_cut_rank_and_other_methods_and_a_dry_run(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Breaks when a rank is not that of the result, or what is lost is not told."""
    said = luthier("merge", *adapters, "--adapters", "--method", "svd", "--set", "rank=1", "--out", tmp_path / "one")
    assert "of the norm of the merged change" in said.must(0).out and "rank 1" in said.out
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["r"] == 1
    # The files hold what is left of the sum; what is gone is told, and no reason to refuse.
    parity = json.loads((tmp_path / "one" / PARITY).read_text())
    assert parity["passed"] and parity["max_difference"] < 1e-3 and parity["cut"]["max_difference"] > 0.1
    assert not parity["cut"]["passed"] and parity["cut"]["numbers"] in (tmp_path / "one" / CARD).read_text()
    for method in ("ties", "slerp", "linear"):
        found = luthier("merge", *adapters, "--adapters", "--method", method, "--out", tmp_path / method, "--json")
        assert found.must(0).json["rank"] == 3 and logits(llama, tmp_path / method).isfinite().all()
    told = luthier("merge", *adapters, "--adapters", "--method", "cat", "--dry-run", "--json").must(0).json
    assert told["rank"] == 5 and told["modules"] == 6


def _wrong_scale(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name]:
        tensors[name] = tensors[name] * 1.5


def _swapped(tensors: dict[str, np.ndarray]) -> None:
    one, other = (f"base_model.model.model.layers.{n}.mlp.down_proj.lora_A.weight" for n in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _dropped(tensors: dict[str, np.ndarray]) -> None:
    tensors.pop("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_wrong_scale, "logits differ by up to"), (_swapped, "logits differ by up to"),
     (_dropped, "no whole adapter: ")],
)  # fmt: skip
def test_another_sum_is_not_kept(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str
) -> None:
    """Breaks when the folder is believed because it was written."""

    def wrong(tensors: dict[str, np.ndarray], *given: Any, **more: Any) -> None:
        damage(tensors)
        save_file(tensors, *given, **more)

    monkeypatch.setattr(merge_adapters, "save_file", wrong)
    for method in ("cat", "svd"):
        luthier("merge", *adapters, "--adapters", "--method", method, "--out", tmp_path / "out").must(78, said)
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_here_is_told(adapters: list[Path], tmp_path: Path) -> None:
    """Breaks when adapters cannot be merged any more where their base is elsewhere, or nobody hears of it."""
    lost = Path(shutil.copytree(adapters[0], tmp_path / "lost"))
    said = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "/gone/model"}))
    done = luthier("merge", lost, lost, "--adapters", "--method", "cat", "--out", tmp_path / "out").must(0)
    assert "parity     logits were not compared: the base /gone/model cannot be opened" in done.out
    assert "cannot be opened" in (tmp_path / "out" / CARD).read_text()


def test_what_cannot_be_merged_is_told(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    """Breaks when adapters of two bases are added, or a knob is read over."""
    elsewhere = Path(shutil.copytree(adapters[1], tmp_path / "elsewhere"))
    said = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "another"}))
    to = ("--out", tmp_path / "out")
    luthier("merge", adapters[0], elsewhere, "--adapters", "--method", "cat", *to).must(77, "another")
    (elsewhere / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    luthier("merge", adapters[0], elsewhere, "--adapters", "--method", "cat", *to).must(2, "uses use_dora")
    luthier("merge", *adapters, "--adapters", "--method", "cats", *to).must(2, "cat")
    luthier("merge", *adapters, "--adapters", "--method", "cat", "--set", "dtype=float32", *to).must(2, "rank=N")
    luthier("merge", *adapters, "--adapters", "--method", "cat", "--set", "method.t=1", *to).must(2, "has no knob t")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
