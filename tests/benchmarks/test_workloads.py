"""The table of workloads, and the limit that follows from a workload's shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.adapters.lora import LoRA
from luthier.arithmetic.compute import flops_per_token
from luthier.arithmetic.shapes import shape_of
from luthier.core import catalog
from luthier.model.empty import empty_model
from luthier.model.load import load_model
from luthier.recipes.planning.plan import Laid, PlanKnobs
from luthier.recipes.sizing.products import Flow, Stream, work
from tests.benchmarks.lines import line_of, module

WORKLOADS = ("m1-lora", "m1-full", "m2-lora", "m2-fixed", "m2-qlora", "m2-lora-64", "m8-lora-4096")


@pytest.mark.parametrize(("model", "parameters"), [("m1", 56_369_664), ("m2", 494_032_768), ("m8", 8_030_261_248)])
def test_shapes_are_those_of_the_models_they_stand_for(model: str, parameters: int) -> None:
    """494,032,768 is what Qwen2.5-0.5B has; and the model that is built has what the shape says."""
    prepare, shape = module("prepare"), module("workloads").MODELS[model]
    assert shape.parameters == parameters
    with torch.device("meta"):
        config = prepare._config(shape)
        zoo = prepare.LlamaForCausalLM if shape.family == "llama" else prepare.Qwen2ForCausalLM
        built = zoo(config)
    assert sum(item.numel() for item in built.parameters()) == parameters
    first = dict(built.model.layers[0].named_modules())
    sizes = {name.rpartition(".")[2].removesuffix("_proj"): (item.in_features, item.out_features)
             for name, item in first.items() if name.endswith("_proj")}  # fmt: skip
    assert sizes == shape.blocks


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_can_be_run(name: str) -> None:
    workloads, systems, prepare = module("workloads"), module("systems"), module("prepare")
    work = workloads.WORKLOADS[name]
    assert work.model in workloads.MODELS and set(workloads.WORKLOADS) == set(WORKLOADS)
    prepared = prepare.ROWS if work.rows == "rows.jsonl" else prepare.FIXED_ROWS[work.model]
    for tier in (work.quick, work.full):
        assert set(tier.systems) <= set(systems.SYSTEMS) and len(set(tier.systems)) == len(tier.systems)
        assert 1 <= tier.warm < tier.steps and tier.steps * work.batch <= prepared
        kinds = [systems.kind(system) for system in tier.systems]
        assert kinds[0] == "ours" and "tuned" in kinds
    assert "stock" in map(systems.kind, work.full.systems)
    assert work.full.repetitions >= 5 and set(work.quick.systems) <= set(work.full.systems)


def test_flops_of_a_token() -> None:
    """Breaks when padding counts as work, or when the gradient of an input is counted that nobody needs."""
    limits, shape = module("limits"), module("workloads").MODELS["m1"]
    lora = limits.token_flops(shape, "lora", rank=16, share=0.4, context=100.0)
    # 4 x 23.6 million for the blocks, 4 x 16.4 million for two fifths of the tokens, the adapter, attention over 100.
    whole = 4 * 23.592960e6 + 0.4 * 4 * 16.384e6 + 6 * 1.196032e6 + 3.5 * 4 * 100 * 512 * 8
    # The inputs of the first q, k and v need no gradient, neither through the weights nor through the adapter.
    first = 2 * (512 * 512 + 2 * 512 * 256) + 3 * 2 * 16 * 512
    assert lora == pytest.approx(whole - first, rel=1e-6)
    full = limits.token_flops(shape, "full", rank=16, share=0.4, context=100.0)
    assert full == pytest.approx(6 * 23.592960e6 + 0.4 * 6 * 16.384e6 + 3.5 * 4 * 100 * 512 * 8, rel=1e-6)


def test_a_tied_head_is_frozen_under_lora() -> None:
    limits, shape = module("limits"), module("workloads").MODELS["m2"]
    with_head, without = (
        limits.token_flops(shape, "lora", rank=16, share=share, context=1.0) for share in (1.0, 0.0)
    )
    assert with_head - without == pytest.approx(4 * 896 * 151936)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flops_agree_with_those_read_off_a_model(family: str, method: str, tmp_path: Path) -> None:
    """The plan of a run finds the same work by walking through the modules."""
    shape = module("workloads").Shape(
        family=family, hidden=32, layers=2, heads=4, key_value_heads=2, inner=48, vocabulary=64,
        tied=family == "qwen2", biases=family == "qwen2", positions=64, rope_theta=1e4, norm_epsilon=1e-6,
    )  # fmt: skip
    module("prepare")._model(shape).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), precision="float32", device="cpu")
    assert sum(item.numel() for item in model.module.parameters()) == shape.parameters
    knobs = {"rank": 4} if method == "lora" else {}
    attachment = model.attach(catalog.load("adapters", method)(**knobs).attach(model.sites))
    found = flops_per_token(*work(model, attachment, Flow(texts=Stream(context=10.0), predicted=0.25)))
    assert module("limits").token_flops(shape, method, rank=4, share=0.25, context=10.0) == pytest.approx(found)


def test_percent_takes_the_highest_rate_that_was_probed() -> None:
    limits = module("limits")
    one = limits.percent_of_limit(line_of(rate=1000.0), rank=16)
    flops = limits.token_flops(module("workloads").MODELS["m1"], "lora", rank=16, share=0.4, context=100.0)
    assert one == pytest.approx(100 * 1000 * flops / 400e9, abs=0.06)
    faster = line_of(rate=1000.0, probes={"before": {"gemm_gflops": 1.0, "block_gflops": 800.0}})
    assert limits.percent_of_limit(faster, rank=16) == pytest.approx(one / 2, abs=0.06)


@pytest.mark.parametrize("name", ["m2-lora-64", "m8-lora-4096"])
def test_work_for_a_gpu_fits_into_one(name: str) -> None:
    """Breaks when a workload is given that a GPU of 139 GiB cannot hold, or only by making blocks again; the float32
    reference as well, in the micro-batches in which it is made."""
    workloads, prepare, ours = module("workloads"), module("prepare"), module("sft_luthier")
    work = workloads.WORKLOADS[name]
    shape, most = workloads.MODELS[work.model], ours.MICRO_TOKENS["cuda"]
    assert work.longest <= min(most, shape.positions)
    for dtype in (torch.bfloat16, torch.float32):
        model = empty_model(prepare._config(shape), name, dtype=dtype, device="cuda")
        knobs = PlanKnobs(
            adapter=LoRA(rank=16, alpha=32.0), device="cuda", memory_bytes=139 * 2**30, recompute="none",
            precision="bfloat16" if dtype == torch.bfloat16 else "float32",
        )  # fmt: skip
        laid = Laid.of(knobs, shape_of(prepare._config(shape).to_dict()), model)
        tokens = min(most, work.batch * work.longest)
        needed = laid.needed(tokens // work.longest, work.longest, knobs.memory_bytes)
        assert needed["total"] <= 139 * 2**30 and needed["recomputed"] == 0
