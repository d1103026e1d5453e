"""QLoRA in the benchmarks: what is packed, what its reference is, and when two means differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.optimizers.paged_adamw import PagedAdamW
from tests.benchmarks.lines import job, module


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job of the workload m2-qlora on a small model of that shape, and two rows."""
    workloads, prepare = module("workloads"), module("prepare")
    shape = workloads.Shape(
        family="qwen2", hidden=64, layers=2, heads=4, key_value_heads=2, inner=128, vocabulary=96, tied=True,
        biases=True, positions=64, rope_theta=1e4, norm_epsilon=1e-6,
    )  # fmt: skip
    monkeypatch.setitem(workloads.MODELS, "m2", shape)
    model = prepare._model(shape)
    (tmp_path / "m2").mkdir()
    model.save_pretrained(tmp_path / "m2" / "model")
    save_file(prepare._lora_start(model), tmp_path / "m2" / "lora.safetensors")
    rows = [{"input_ids": [1, *range(5, 20), 2], "prompt_tokens": 4}, {"input_ids": [1, 9, 8, 2], "prompt_tokens": 2}]
    (tmp_path / "m2" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return job(home=tmp_path, workload="m2-qlora")


def test_the_reference_is_the_model_of_the_numbers_that_are_kept(work: Any) -> None:
    """Breaks when one of the two computes with the weights there were, or the head is packed too."""
    ours, reference, worker = module("sft_luthier"), module("sft_reference"), module("worker")
    rows = worker.read_rows(work)
    _, stepper = ours.make(work, "float32")
    loss = stepper.forward_backward(ours.trees_of(rows, [0, 1])).loss
    assert loss == pytest.approx(reference.plain_loss(work, rows), abs=1e-5)
    plain = reference.plain_loss(job(home=work.home, workload="m2-lora"), rows)
    assert abs(loss - plain) > 1e-4
    assert isinstance(stepper.method, PagedAdamW) and stepper.optim_step().applied
    bits = ours.packed_bits([*stepper.model.module.parameters()])["bits_a_packed_weight"]
    # Small matrices: the one mean of each weighs more than in the card's 4.127.
    assert 4.127 < bits < 4.14
    assert ours.packed_bits([torch.ones(3)]) == {}


def test_the_other_workloads_pack_nothing() -> None:
    """Breaks when a workload that is not QLoRA loses what it was measured with."""
    table = module("workloads").WORKLOADS
    assert [name for name, each in table.items() if each.packed] == ["m2-qlora"]
    assert "bitsandbytes==0.50.2" in (Path(module("sft").HERE) / "peers-trl.txt").read_text("utf-8").split()


def test_means_differ_when_seeds_do_not_explain_it() -> None:
    """Breaks when noise is taken for a difference, or a difference for noise."""
    verdict = module("qlora_quality").verdict
    assert verdict([1.0, 1.1, 0.9], [1.05, 1.15, 0.95])["within_noise"]
    found = verdict([1.0, 1.01, 0.99], [1.1, 1.11, 1.09])
    assert not found["within_noise"] and found["difference"] == pytest.approx(0.1)
    assert found["noise"] == pytest.approx(2 * (2 * 1e-4 / 3) ** 0.5)


def test_a_run_says_what_it_kept_and_learned() -> None:
    """Breaks when a run is not of the quantizer it stands for, or learns nothing."""
    quality = module("qlora_quality")
    runs = {name: quality.trained("seedling", *way, seed=0, steps=4) for name, way in quality.WAYS.items()}
    assert runs["lora-bfloat16"]["bits"] == 16.0
    assert quality.BITS < runs["qlora"]["bits"] < 4.129
    assert all(run["after"] < run["before"] for run in runs.values())
