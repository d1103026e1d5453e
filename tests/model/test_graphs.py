"""Recorded passes without a GPU: a recorder that calls the module again on the tensors it was shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from luthier.adapters.lora import LoRA
from luthier.data.forest import Forest, Tree, row_tree
from luthier.kernels import varlen
from luthier.kernels.torch_backend import TorchBackend
from luthier.kernels.triton_backend import TritonBackend
from luthier.model.empty import empty_model
from luthier.model.language_model import LanguageModel
from luthier.model.running.graphs import SIZES, Graphs, Pass, Played
from luthier.optimizers.adamw import AdamW
from luthier.recipes import graphed
from luthier.recipes.graphed import recorded, worth_recording
from tests import forests
from tests.kernels.flash_stand_in import stand_in
from tests.train.test_in_backward import made as stepper_of

MOST = 256
SIZES_OF = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


class Again:
    """Plays a module again as a graph would: on the tensors it was shown, refilled. `bends` spoils what it gives."""

    def __init__(self, bends: Callable[[Tensor], Tensor] = lambda states: states) -> None:
        self.recorded: list[int] = []
        self.played = 0
        self.bends = bends

    def __call__(self, module: nn.Module, sample: tuple[Tensor, ...]) -> Played:
        own = tuple(each.clone() for each in sample)
        self.recorded.append(len(own[0]))

        def play(*given: Tensor) -> Tensor:
            self.played += 1
            for kept, new in zip(own, given, strict=True):
                assert kept.shape == new.shape and kept.dtype == new.dtype and kept.data_ptr() != new.data_ptr()
                kept.copy_(new)
            return self.bends(Pass.forward(module, *own))  # type: ignore[arg-type]

        return play


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on a GPU: by where texts begin on the device, in a stand-in of torch's operation."""
    stand_in(monkeypatch)
    monkeypatch.setattr(TorchBackend, "_finder", varlen.Finder(), raising=False)
    for name in ("attends", "attend", "attend_backward"):
        monkeypatch.setattr(TorchBackend, name, vars(TritonBackend)[name])


def with_graphs(model: LanguageModel, recorder: Again) -> Graphs:
    blocks = model.executor.blocks
    assert blocks is not None
    graphs = Graphs(recorder, MOST)
    model.executor = replace(model.executor, blocks=replace(blocks, graphs=graphs, backend=TorchBackend()))
    return graphs


def rows(*lengths: int, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    found = []
    for index, length in enumerate(lengths):
        weights = np.ones(length, np.float32)
        weights[: length // 2] = 0
        found.append(row_tree(forests.tokens(rng, length), weights, row=index))
    return found


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_played_pass_is_the_pass(adapter: str) -> None:
    """Breaks when padding has a loss, a text sees another, or a replay reads what an earlier one was given."""
    plain, graphed = (stepper_of(AdamW(), adapter=adapter, micro_tokens=MOST) for _ in range(2))
    recorder = Again()
    graphs = with_graphs(graphed.model, recorder)
    batches = [rows(40, 50), rows(60, 25, seed=1), rows(90, 31, 33, seed=2), rows(96, seed=3), rows(70, 20, seed=4)]
    for trees in batches:
        expected, found = plain.forward_backward(trees), graphed.forward_backward(trees)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6) and found.tokens == expected.tokens
        for name, master in plain.masters.items():
            grad, other = master.grad, graphed.masters[name].grad
            assert grad is not None and other is not None
            torch.testing.assert_close(other, grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))
        plain.optim_step()
        graphed.optim_step()
    assert recorder.recorded == [96, 160] and graphs.told() == {"sizes": [96, 160], "refused": {}}
    assert recorder.played == len(batches) + len(recorder.recorded), "each recording is tried once"


def test_recordings_are_few_whatever_comes() -> None:
    """Breaks when each length is recorded, and a run with many lengths records for ever."""
    graphs = Graphs(Again(), MOST)
    sizes = {graphs.size(tokens, 1) for tokens in range(1, MOST + 1)}
    assert sizes == {MOST // SIZES * n for n in range(1, SIZES + 1)} | ({None} if None in sizes else set())
    assert graphs.size(MOST + 1, 1) is None and graphs.size(MOST, MOST // 16) is None
    assert all((graphs.size(tokens, 1) or MOST) - tokens < MOST // SIZES for tokens in range(33, MOST))


@pytest.mark.parametrize("case", ["tree", "no gradient", "many texts", "too long", "switched off"])
def test_what_was_not_recorded_runs_as_ever(case: str) -> None:
    """Breaks when a shared prefix, a pass that learns nothing, or another adapter is played from a recording."""
    model = forests.language_model("llama")
    torch.manual_seed(0)
    attachment = model.attach(LoRA(rank=2).attach(model.sites))
    forests.shake(attachment.named_parameters().values())
    recorder = Again()
    with_graphs(model, recorder)
    forests.engine_loss(model, rows(40, 30)).backward()
    before = recorder.played
    assert before
    others = {"tree": [forests.branching()], "many texts": rows(*[4] * 12), "too long": rows(MOST + 1)}
    trees = others.get(case, rows(40, 30))
    if case == "no gradient":
        with torch.no_grad():
            forests.engine_loss(model, trees)
    elif case == "switched off":
        with model.without_attachments():
            off = model.token_outputs(Forest(tuple(trees))).log_probs
        assert not torch.equal(off, model.token_outputs(Forest(tuple(trees))).log_probs)
        assert recorder.played == before + 1
        return
    else:
        forests.engine_loss(model, trees).backward()
    assert recorder.played == before


def test_a_pass_whose_backward_pass_may_come_is_left_alone() -> None:
    """Breaks when a second pass writes over what the first one's backward pass still reads."""
    model = forests.language_model("llama")
    forests.trainable(model)
    recorder = Again()
    with_graphs(model, recorder)
    first = forests.engine_loss(model, rows(40, 30))
    played = recorder.played
    second = forests.engine_loss(model, rows(40, 31))
    assert recorder.played == played
    first.backward()
    del second
    forests.engine_loss(model, rows(40, 30)).backward()
    assert recorder.played == played + 1
    kept = forests.engine_loss(model, rows(40, 30))
    del kept
    forests.engine_loss(model, rows(40, 30)).backward()
    assert recorder.played == played + 3, "a pass that was dropped stands in nobody's way"


def test_a_recording_that_gives_something_else_is_refused_and_told() -> None:
    """Breaks when what cannot be recorded ends a run, or what differs is trained with."""

    def fail(states: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for bends, why in ((lambda states: states * 1.01, "not what the pass gives"), (fail, "not permitted when stream")):
        model = forests.language_model("llama")
        forests.trainable(model)
        recorder = Again(bends)
        graphs = with_graphs(model, recorder)
        expected = forests.engine_loss(forests.language_model("llama"), rows(40, 30)).item()
        random = torch.get_rng_state()
        assert forests.engine_loss(model, rows(40, 30)).item() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(torch.get_rng_state(), random)
        assert why in graphs.refused[96] and "\n" not in graphs.refused[96]
        played = recorder.played
        forests.engine_loss(model, rows(40, 30))
        assert recorder.played == played, "tried once"


def test_small_models_on_a_gpu_are_recorded_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a rule is turned round: a CPU, recomputed blocks, several adapters or a large model are recorded."""
    model = empty_model(LlamaConfig(**SIZES_OF), "tiny", dtype=torch.bfloat16, device="cuda")
    assert not worth_recording(model, alone=True), "it is on no device"
    monkeypatch.setattr(LanguageModel, "device", property(lambda self: torch.device("cuda")))
    assert worth_recording(model, alone=True) and not worth_recording(model, alone=False)
    graphs = recorded(model, MOST, alone=True, recorder=Again)
    assert graphs is not None and model.executor.blocks is not None and model.executor.blocks.graphs is graphs
    monkeypatch.setattr(graphed, "SMALL", 1000)
    assert not worth_recording(model, alone=True)
    monkeypatch.undo()
    assert not worth_recording(forests.language_model("llama"), alone=True)
