"""The parity of a merge: what was written is held against the parents, by logits and by every tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.core.errors import GateError
from luthier.kernels.floats import FLOAT32
from luthier.merge import parity as gate
from luthier.merge.parents import Parent
from luthier.merge.parity import Merge, parity
from luthier.merge.plan import Wanted, plan
from luthier.merge.settings import Setting
from luthier.merge.stream import Room
from luthier.merge.vocabulary import United
from luthier.mergers import Part
from luthier.model.comparing.parity import Questions
from luthier.model.files.shards import SINGLE
from tests.mergers_of import merger

PROMPTS = tuple(np.random.default_rng(0).integers(3, 128, size).astype(np.int32) for size in (24, 9))
DOWN, UP = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
Damage = Callable[[dict[str, torch.Tensor]], Any]


@pytest.fixture(scope="module")
def home(tiny_path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two`, and `out`, which is their mean in float32, made here from whole tensors. Read only."""
    home, llama = tmp_path_factory.mktemp("merge"), tiny_path("llama")
    for name in ("one", "two", "out"):
        shutil.copytree(llama, home / name)
    own = torch.Generator().manual_seed(1)
    one = load_file(llama / SINGLE)
    two = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=own) for name, tensor in one.items()}
    save_file(two, home / "two" / SINGLE, metadata={"format": "pt"})
    save_file({name: (one[name] + two[name]) / 2 for name in one}, home / "out" / SINGLE, metadata={"format": "pt"})
    return home


def merge(home: Path, *, room: Room | None = None, name: str = "linear") -> Merge:
    parents = [Parent.open(each, str(home / each)) for each in ("one", "two")]
    wanted = Wanted(merger(name), (0, 1), None, (Setting.of(1.0, "weight"),) * 2, FLOAT32)
    return Merge(parents=parents, plan=plan(parents, wanted), united=United(), dtype=FLOAT32,
                 room=room or Room(10**8, 2))  # fmt: skip


@pytest.mark.parametrize("room", [Room(10**8, 2), Room(60_000, 1)], ids=["whole tensors", "blocks"])
def test_the_logits_are_those_of_the_parents_merged(home: Path, room: Room) -> None:
    """Breaks when the source is not the merge, or the folder is not what was read: here both by transformers."""
    asked = Questions(PROMPTS)
    found = parity(merge(home, room=room), home / "out", asked).report
    assert found.passed and found.tokens > 10 and found.max_difference < 1e-4
    one, two = (load_file(home / each / SINGLE) for each in ("one", "two"))
    model = AutoModelForCausalLM.from_pretrained(home / "one")
    model.load_state_dict({name: (one[name] + two[name]) / 2 for name in one})
    source = gate.StreamedModel(gate.config_of(str(home / "one")), gate.Anew(merge(home, room=room)), "it")
    with torch.no_grad():
        for prompt, logits in zip(PROMPTS, source.logits(PROMPTS), strict=True):
            wanted = model(torch.from_numpy(prompt).long()[None]).logits[0].numpy()
            np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


def test_blocks_are_the_method_on_whole_tensors(home: Path) -> None:
    """Breaks when a look is over other rows than the merge, or an angle is that of a block."""
    one, two = (load_file(home / each / SINGLE) for each in ("one", "two"))
    anew = gate.Anew(merge(home, room=Room(60_000, 1), name="slerp"))
    pieces = 0
    for name in anew.slots:
        blocks = list(anew.blocks(name))
        pieces += len(blocks) > 1
        rows = tuple(each[name].reshape(-1, each[name].shape[-1]).numpy() for each in (one, two))
        wanted = merger("slerp").whole(Part(rows, None, (1.0, 1.0), 0, rows[0].size, 0))
        np.testing.assert_allclose(np.concatenate(blocks), wanted, 1.3e-6, 1e-5)
    assert pieces > 5


def _swap(held: dict[str, torch.Tensor]) -> None:
    held[DOWN], held[UP] = held[UP].clone(), held[DOWN].clone()


FAULTS: dict[str, tuple[Damage, str]] = {
    "scaled tensor": (lambda held: held[DOWN].mul_(1.5), f"logits differ by up to .*{DOWN} is 1.5 times what it was"),
    "dropped tensor": (lambda held: held.pop(DOWN), f"no whole model.*1 tensors are missing.*{DOWN}"),
    "swapped layers": (_swap, f"logits differ by up to .*({DOWN}|{UP}) differs"),
    "wrong vocabulary row": (lambda held: held["lm_head.weight"][7].copy_(held["lm_head.weight"][8]),
                             "logits differ by up to .*lm_head.weight differs"),
    "rounded twice": (lambda held: held[UP].copy_(held[UP].bfloat16().float()), f"{UP} differs"),
    "one number": (lambda held: held["model.embed_tokens.weight"][0, 0].add_(0.5), "model.embed_tokens.weight differs"),
    "not finite": (lambda held: held[UP][0].fill_(float("nan")), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(home: Path, tmp_path: Path, fault: str) -> None:
    """Breaks when the gate lets another model pass. A row that no prompt asks for shows in its tensor's sketch."""
    damage, said = FAULTS[fault]
    bad = Path(shutil.copytree(home / "out", tmp_path / "bad"))
    held = load_file(bad / SINGLE)
    damage(held)
    save_file(held, bad / SINGLE, metadata={"format": "pt"})
    with pytest.raises(GateError, match=said) as caught:
        parity(merge(home), bad, Questions(PROMPTS))
    assert caught.value.exit_code == 78


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
         "logits differ by .*|rope_theta is 500000.0"),
        ("generation_config.json", {"eos_token_id": 3}, "answers end at 1/3"),
        ("config.json", {"num_attention_heads": 8}, "no whole model|logits differ"),
    ],
)  # fmt: skip
def test_what_lies_beside_the_weights_is_compared_too(
    home: Path, tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    bad = Path(shutil.copytree(home / "out", tmp_path / "bad"))
    held = json.loads((bad / name).read_text())
    (bad / name).write_text(json.dumps({**held, **values}))
    with pytest.raises(GateError, match=said):
        parity(merge(home), bad, Questions(PROMPTS))


def test_logits_take_their_share_of_the_memory(home: Path) -> None:
    """Breaks when prompts of any length are kept whatever the vocabulary."""
    room = Room(8 * 4 * 128 * 20, 1)
    cut = gate._cut(Questions(PROMPTS), merge(home, room=room))
    assert [len(prompt) for prompt in cut.prompts] == [20]
