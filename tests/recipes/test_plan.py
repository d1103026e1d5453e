"""The plan by config alone: the same numbers as of the model with its weights, what fits, and what is said of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.adapters import Adapter
from luthier.core import catalog
from luthier.core.chosen import choose
from luthier.core.errors import RecipeError
from luthier.core.recipe_file import read_layers, validated
from luthier.model.load import load_model
from luthier.optimizers import Optimizer
from luthier.quantizers import Quantizer
from luthier.recipes.opening.quantized import quantize
from luthier.recipes.planning import plan as planning
from luthier.recipes.planning.asked import asked
from luthier.recipes.planning.explained import explained
from luthier.recipes.planning.fits import _far_inputs, _far_optimizer, advice, largest
from luthier.recipes.planning.of_recipe import in_keys_of_recipes
from luthier.recipes.planning.plan import Laid, Machine, PlanKnobs, cost, lay, plan_training
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.sizing.memory import Formulas, lasting
from luthier.train.source import MicroBatch
from tests.arithmetic.published import config as published
from tests.cli.commands import environ, luthier
from tests.tiny import VOCABULARY

PathOf = Callable[[str], Path]
KEYS = ("parameters", "memory", "flops_per_token", "seconds_per_1k_tokens", "fits")
RATES = Machine(flops=1e12, bytes=1e11)


def adapter_named(name: str) -> Adapter:
    tokens = {"tokens": [3, 4]} if name == "trainable_tokens" else {}
    return choose("adapters", Adapter, {"method": name, **tokens})


def same(folder: Path, precision: str, adapter: Adapter, quantizer: str = "none") -> tuple[Laid, Formulas, bool]:
    """The plan by config, the formulas of the model itself, and whether both keep the same from step to step."""
    packing, optimizer = choose("quantizers", Quantizer, quantizer), choose("optimizers", Optimizer, "adamw")
    real = load_model(str(folder), precision=precision, device="cpu")  # type: ignore[arg-type]
    quantize(real, packing)
    attachment = real.attach(adapter.attach(real.sites))
    knobs = PlanKnobs(adapter=adapter, quantizer=packing, optimizer=optimizer, precision=precision, device="cpu")
    laid = lay(folder / "config.json", knobs)
    assert laid.attachment.parameter_count == attachment.parameter_count == adapter.parameter_count(real.sites)
    assert all(each.is_meta for each in laid.attachment.named_parameters().values())
    found = lasting(laid.model, laid.attachment, optimizer, quantizer=packing, device="cpu")
    return laid, Formulas.of(real, attachment), found == lasting(real, attachment, optimizer)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("adapter", catalog.names("adapters"))
def test_a_config_says_what_the_model_says(tiny_path: PathOf, adapter: str, kind: str) -> None:
    """Breaks when a plan without weights is another one than the run's: for each method, also one that is new."""
    precision = "float32" if kind == "llama" else "bfloat16"
    laid, formulas, kept = same(tiny_path(kind), precision, adapter_named(adapter))
    assert kept
    for rows, length, again in ((1, 5, 0), (3, 20, 1), (2, 200, 2)):
        batch = MicroBatch(tuple(range(rows)), rows * length, length)
        told = formulas.of_pass(batch, rows * (length - 1), lambda: planning._forest(3, 20, 19), again)
        assert laid.step(rows, length, again) == told


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("gpt2", "lora"), *(pytest.param(kind, adapter, marks=pytest.mark.slow)
                         for kind in ("gpt2", "gemma2") for adapter in catalog.names("adapters"))],
)  # fmt: skip
def test_blocks_of_the_zoo_are_counted_without_memory(tiny_path: PathOf, kind: str, adapter: str) -> None:
    """Breaks when a pass without memory keeps something else than a real one: within half a per cent, as counts are."""
    laid, formulas, kept = same(tiny_path(kind), "float32", adapter_named(adapter))
    assert kept and laid.blocks == 0
    batch = MicroBatch((0, 1, 2), 60, 20)
    real = formulas.of_pass(batch, 57, lambda: planning._forest(3, 20, 19), 0)
    assert laid.step(3, 20, 0).bytes == pytest.approx(real.bytes, rel=0.005)


@pytest.mark.parametrize("quantizer", catalog.names("quantizers"))
def test_packed_weights_are_told_before_they_are_packed(tiny_path: PathOf, quantizer: str) -> None:
    """Breaks when a quantizer packs another matrix than the plan thinks, or says another size."""
    _, _, kept = same(tiny_path("llama"), "float32", adapter_named("lora"), quantizer)
    assert kept


@pytest.mark.parametrize("quantizer", catalog.names("quantizers"))
def test_packed_weights_are_counted_beside_blocks_of_the_zoo(tiny_path: PathOf, quantizer: str) -> None:
    """Breaks when a packed weight, which has no memory of its own, ends the count of a pass: no such run began."""
    laid, formulas, kept = same(tiny_path("gpt2"), "float32", adapter_named("lora"), quantizer)
    assert kept
    real = formulas.of_pass(MicroBatch((0, 1, 2), 60, 20), 57, lambda: planning._forest(3, 20, 19), 0)
    assert laid.step(3, 20, 0).bytes == pytest.approx(real.bytes, rel=0.005)


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """The config of an 8B model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published("Llama-3.1-8B") | {"max_position_embeddings": 131072}), encoding="utf-8")
    return path


def knobs(method: str, memory: float | None = 24e9, **more: Any) -> PlanKnobs:
    return asked(method, ["device=cuda"], memory).model_copy(update=more)


def total(laid: Laid, rows: int | None = None, length: int | None = None) -> int:
    own = laid.knobs
    return laid.needed(rows or own.batch, length or own.sequence, own.memory_bytes)["total"]


def test_an_8b_model_is_planned_without_its_weights(eight: Path) -> None:
    """The whole answer, against sums by hand."""
    laid = lay(eight, knobs("qlora", sequence=4096))
    found = plan_training(laid, RATES)
    assert [key for key in found if key in KEYS] == list(KEYS)
    assert found["parameters"]["total"] == 8_030_261_248
    assert found["parameters"]["trained"] == 167_772_160  # 32 x 64 x (2 x 8192 + 2 x 5120 + 3 x 18432)
    memory, trained = found["memory"], 167_772_160
    assert memory["gradients"] == memory["trained"] == 4 * trained
    blocks = 6_979_321_856 * 4.126953 / 8
    assert memory["weights"] == pytest.approx(blocks + 2 * 1_050_939_392 + 2 * 14336 * 4096, rel=1e-4)
    assert memory["total"] == sum(memory[part] for part in planning.PARTS) and found["fits"]
    ranks = 7 * 64
    assert memory["activations"] == pytest.approx(2 * 32 * 4096 * (47_104 + ranks), rel=0.03)
    # 4 FLOPs a parameter of products, and attention to half of the row forward and two and a half times backward.
    flops = 4 * (6_979_321_856 + 525_336_576) + 6 * trained + 3.5 * 4 * 32 * 4096 * 4097 / 2
    assert found["flops_per_token"] == pytest.approx(flops, rel=0.01)
    assert found["seconds_per_1k_tokens"] == pytest.approx(1000 * flops / 1e12, rel=0.01)
    handbook = found["handbook"]
    assert handbook["activations"] == 34 * 4096 * 4096 * 32 and handbook["logits"] == 8 * 4096 * 128256
    state = memory["weights"] + 18 * trained
    assert handbook["total"] == state + handbook["activations"] + handbook["logits"]
    assert handbook["flops_per_token"] == 4 * (6_979_321_856 + 525_336_576) + 6 * 32 * 4096 * 4096
    named = dict(explained(laid, found))
    assert f"{47_104:,} numbers of 2 bytes" in named["activations"] and "8,030,261,248" in named["parameters"]
    assert "167,772,160" in named["trained"]


def test_recomputing_takes_as_few_blocks_as_fit(eight: Path) -> None:
    plenty = lay(eight, knobs("lora", 80e9, sequence=8192))
    needs = [plenty.needed(1, 8192, None)["total"]]
    for count in range(1, 33):
        needs.append(total(plenty.asked(recompute=count)))
    for count in (1, 7, 20):
        told = plenty.needed(1, 8192, needs[count])
        assert told["recomputed"] == next(n for n in range(33) if needs[n] <= needs[count])
        assert told["total"] <= needs[count]
    again, none = (plan_training(plenty.asked(recompute=each), RATES) for each in ("all", "none"))
    assert again["memory"]["recomputed"] == 32 and none["memory"]["recomputed"] == 0
    # Time counts what is made again, the FLOPs that must be done do not.
    assert again["flops_per_token"] == none["flops_per_token"]
    assert again["seconds_per_1k_tokens"] > 1.2 * none["seconds_per_1k_tokens"]
    with pytest.raises(RecipeError, match="recompute is 99"):
        plenty.asked(recompute=99).needed(1, 8, 1e9)


def test_the_largest_that_fits_is_the_largest(eight: Path) -> None:
    """Breaks when a search stops one too early or too late."""
    laid = lay(eight, knobs("qlora", sequence=4096))
    found = largest(laid)
    rows, tokens = found["batch"], found["sequence"]
    assert rows and tokens and total(laid, rows) <= 24e9 < total(laid, rows + 1)
    assert total(laid, 1, tokens) <= 24e9 < total(laid, 1, tokens + 1)
    assert largest(lay(eight, knobs("qlora", 4e9), laid)) == {"batch": 0, "sequence": 0, "at_least": []}
    # No longer than the model was made for.
    assert largest(lay(eight, knobs("qlora", 4e12), laid))["sequence"] == 131072 and found["at_least"] == []


def test_what_would_fit_does(eight: Path) -> None:
    """Breaks when advice is a guess: every change is planned, and the ones that fit come first."""
    assert advice(eight, lay(eight, knobs("qlora"))) == []
    laid = lay(eight, knobs("full", 80e9, batch=4))
    found = advice(eight, laid)
    assert [each["fits"] for each in found] == sorted((each["fits"] for each in found), reverse=True)
    assert {"LoRA in the place of all weights", "weights divided over 4 devices", "optimizer adamw_8bit"} <= {
        each["change"] for each in found
    }
    for each in found:
        sets = ["device=cuda", f"batch={laid.knobs.batch}", *each["set"]]
        if each["set"][0].startswith("adapter"):
            sets = [*each["set"], "device=cuda", "batch=4"]
        changed = lay(eight, asked("full", sets, 80e9), laid)
        assert total(changed) == each["total"] and (each["total"] <= 80e9) == each["fits"]
    # The same for the plan of a recipe, in keys that a recipe has; it cannot ask for more devices.
    written = in_keys_of_recipes(found, 2048)
    assert "optimizer adamw_8bit" in (known := [each["change"] for each in written]) and len(known) < len(found)
    for each in written:
        layered = read_layers(None, sets=each["set"], defaults={"model": "m", "data": "rows.jsonl", "adapter": "full"})
        validated(FinetuneRecipe, layered)
    assert next(each["set"] for each in written if "at once" in each["change"])[-1].startswith("batch.micro_tokens=")
    lay(eight, laid.knobs, laid)
    two = advice(eight, lay(eight, knobs("qlora", 7e9, batch=8), laid))[0]
    assert two["fits"] and " and " in two["change"] and two["set"] == ["batch=1", "offload=both"]


def test_devices_divide_what_they_are_said_to(eight: Path) -> None:
    one = lay(eight, knobs("full", 80e9))
    whole = one.needed(1, 2048, None)
    for way, divided in (("zero1", {"optimizer"}), ("zero2", {"optimizer", "gradients"}),
                         ("fsdp", {"optimizer", "gradients", "weights"})):  # fmt: skip
        told = lay(eight, knobs("full", 80e9, devices=8, sharding=way), one).needed(1, 2048, None)
        for part in ("optimizer", "gradients"):
            assert told[part] == (whole[part] // 8 if part in divided else whole[part])
        both = 8 * told["weights"] if "weights" in divided else told["weights"]
        # What computes is weights; masters are divided with the optimizer's state.
        assert both == pytest.approx(whole["weights"] + 2 * 8_030_261_248, rel=1e-6)
        assert told["trained"] == 4 * 8_030_261_248 // 8
    assert told["working"] > whole["working"], "blocks are whole while they compute"


def test_a_run_has_a_price(eight: Path) -> None:
    found = plan_training(lay(eight, knobs("lora", devices=2)), Machine(flops=1e15, efficiency=0.5))
    told = cost(found, 1e9, 3.0)
    assert told["seconds"] == pytest.approx(1e9 * found["flops_per_token"] / (1e15 * 0.5 * 2), rel=1e-6)
    assert told["price"] == pytest.approx(2 * 3.0 * told["seconds"] / 3600)
    assert cost(found, 1e9, None)["price"] is None
    nowhere = plan_training(lay(eight, knobs("lora", None)))
    if not torch.cuda.is_available():
        assert nowhere["seconds_per_1k_tokens"] is None and nowhere["fits"] is None
        assert cost(nowhere, 1e9, 3.0) == {"tokens": 1e9, "seconds": None, "price": None}


def test_the_command_prints_the_answer(eight: Path) -> None:
    shape = ("plan", "--model-config", eight, "--method", "qlora", "--sequence", 4096, "--tflops", 400)
    there = ("--memory", "24GB", "--device", "cuda", "--json")
    found = luthier(*shape, *there, "--tokens", 1e6, "--price", 2).must(0).json
    assert list(found)[:5] == list(KEYS) and {"total", "trained"} <= set(found["parameters"])
    assert found["fits"] is True and found["largest"]["batch"] >= 1 and found["advice"] == [] and found["cost"]["price"]
    assert luthier(*shape, *there, "--explain").must(0).json["formulas"]
    said = luthier(*shape, "--memory", "5GiB", "--device", "cuda", "--explain", "--batch", 8).must(0).out
    assert "it does not fit" in said and "|" in said and "not enough" in said and "formulas" in said
    assert "W weights" in said and "time       at least" in said
    whole = luthier("plan", "--model-config", eight.parent, "--method", "lora", "--device", "cuda").must(0).out
    assert "name its rate with --tflops" in whole or torch.cuda.is_available()


def test_answering_is_planned_without_torch(eight: Path) -> None:
    """Breaks when the shortest way to an answer loads a library that takes seconds."""
    shape = ["plan", "--model-config", str(eight), "--inference", "--clients", "8", "--context", "8192"]
    more = ["--memory", "24GB", "--tflops", "400", "--bandwidth", "3350", "--json"]
    code = f"""
import sys
sys.argv = ["luthier", *{[*shape, *more]!r}]
from luthier.cli.main import main
try:
    main()
finally:
    print([name for name in ("torch", "transformers", "numpy") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ())
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    found = json.loads(done.stdout)
    assert list(found)[:5] == list(KEYS)
    memory = found["memory"]
    assert memory["weights"] == 2 * 8_030_261_248 and memory["cache"] == 8 * 8192 * 131_072
    assert memory["total"] == memory["weights"] + memory["cache"] > 24e9 and found["fits"] is False
    assert memory["rule_of_thumb"] == round(1.2 * memory["weights"])
    assert found["largest"]["context"] == (24_000_000_000 - memory["weights"]) // (8 * 131_072)
    assert found["largest"]["clients"] == 7 and found["largest"]["at_least"] == []
    read = memory["weights"] - 2 * 525_336_576 + memory["cache"]
    assert found["seconds_per_1k_tokens"] == pytest.approx(1000 * read / 3350e9 / 8)
    packed = luthier(*shape, "--quantizer", "nf4", "--json").must(0).json["memory"]["weights"]
    assert packed == pytest.approx(6_979_321_856 * 4.126953 / 8 + 2 * 1_050_939_392, rel=1e-4)
    said = luthier(*shape, *more[:-1]).must(0).out
    assert "1.2 x weights = 19.3 GB" in said and "7 texts of 8,192 tokens" in said and "it does not fit" in said


def test_the_plan_of_a_recipe_is_that_of_the_run(recipe: Path) -> None:
    """Breaks when `plan` and `train --dry-run` tell different things, or the plan by config is another one."""
    found = luthier("plan", recipe, "--json", "--set", "batch.micro_tokens=64").must(0).json
    dry = luthier("train", recipe, "--dry-run", "--json", "--set", "batch.micro_tokens=64").must(0).json["plan"]
    assert list(found)[:5] == list(KEYS)
    known = {key: value for key, value in found["memory"].items() if key != "available"}
    assert known == {key: value for key, value in dry["memory"].items() if key != "available"}
    assert found["parameters"] == {"total": dry["parameters"], "trained": dry["trainable_parameters"]}
    assert found["flops_per_token"] == dry["speed"]["flops_per_token"] and found["fits"] is True
    assert found["largest"]["batch"] > 1 and found["largest"]["sequence"] == 256
    assert "it fits" in luthier("plan", recipe).must(0).out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "neither of RECIPE.yaml and --model-config"),
        (("recipe.yaml", "--model-config", "x"), "both of"),
        (("--model-config", "nowhere.json"), "there is no nowhere.json"),
        (("--model-config", "{}", "--memory", "much"), "a size of 'much'"),
        (("--model-config", "{}", "--method", "qlra"), "qlora"),
        (("--model-config", "{}", "--optimizer", "adamv"), "adamw"),
        (("--model-config", "{}", "--sharding", "half"), "sharding"),
        (("--model-config", "{}", "--set", "sequense=3"), "sequence"),
        (("--model-config", "{}", "--inference", "--clients", "0"), "clients is 0; 1 or more"),
        (("--model-config", "{}", "--inference", "--method", "lora"), "--method with --inference"),
        (("--model-config", "{}", "--clients", "3"), "--clients with training"),
        (("--model-config", "{}", "--price", "3"), "price is 3.0 of a run of no known length"),
        (("--model-config", "{}", "--tflops", "0"), "tflops 0.0"),
        (("--model-config", "{}", "--inference", "--bandwidth", "-1"), "bandwidth is -1; a rate above 0"),
        (("recipe.yaml", "--memory", "3GB"), "--memory with a recipe"),
        (("--model-config", "{}", "--inference", "--tflops", "nan", "--bandwidth", "1"), "tflops is nan"),
        (("--model-config", "{}", "--inference", "--precision", "bf16"), "precision is 'bf16'; float32, bfloat16"),
        (("--model-config", "{}", "--tokens", "-5"), "tokens is -5"),
        (("--model-config", "{}", "--tokens", "nan"), "tokens is nan"),
        (("--model-config", "{}", "--tokens", "9", "--price", "-3"), "price is -3"),
        (("--model-config", "{}", "--efficiency", "nan"), "error[recipe]: efficiency nan"),
        (("--model-config", "{}", "--method", "in_context"), "in_context trains nothing"),
        (("--model-config", "{}", "--method", "full", "--quantizer", "nf4"), "adapter full trains the weights that"),
        (("--model-config", "{}", "--batch", "100000000"), "error[recipe]: batch: 100000000"),
        (("--model-config", "{}", "--sequence", "0"), "error[recipe]: sequence: 0"),
        (("--model-config", "{}", "--set", "sequence=9999999"), "error[recipe]: --set: sequence: 9999999"),
        (("--model-config", "{}", "--set", "memory_bytes=.inf"), "memory_bytes: inf"),
        (("--model-config", "{}", "--device", "cuda", "--set", "offload=both", "--set", "recompute=none"),
         "offload is 'both', which moves the inputs of recomputed blocks, and recompute is 'none'"),
        (("recipe.yaml", "--tflops", "3"), "--tflops with a recipe, which is planned for the machine that this is"),
        (("{}",), "is a model, and no recipe; luthier plan --model-config"),
    ],
)
def test_what_cannot_be_planned_is_said(tiny_path: PathOf, words: tuple[str, ...], said: str) -> None:
    config = str(tiny_path("llama") / "config.json")
    luthier("plan", *(config if word == "{}" else word for word in words)).must(2, said)


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    """The sizes of a model that nobody knows here are not guessed."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": VOCABULARY}))
    luthier("plan", "--model-config", tmp_path).must(2, "model_type is 'bloom'", "llama")
    luthier("plan", "--model-config", tmp_path, "--inference").must(2, "model_type is 'bloom'")


@pytest.mark.parametrize("what", [(), ("--inference",)])
@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', "[1]", "\0", "{"])
def test_a_file_that_is_no_config_is_told_as_what_it_is(tmp_path: Path, text: str, what: tuple[str, ...]) -> None:
    """Breaks when a data file in the place of a config is answered with advice about runs."""
    (tmp_path / "rows.jsonl").write_text(text)
    failed = luthier("plan", "--model-config", tmp_path / "rows.jsonl", *what)
    assert "resume" not in failed.must(74, "JSON", "the file that was meant").err


def test_what_lies_with_the_host_is_not_on_the_device(eight: Path) -> None:
    """Breaks when masters, gradients or states are planned in both memories, or in none."""
    near = lay(eight, knobs("full", 1e12, recompute="all"))
    words = ("none", "optimizer", "activations", "both")
    parts = {word: near.asked(offload=word).needed(1, 2048, 1e12) for word in words}
    parameters, number = 8_030_261_248, 2
    assert parts["none"]["host"] == 0
    far = parts["optimizer"]
    assert far["trained"] == number * parameters and far["optimizer"] == 0
    assert far["gradients"] == 2 * number * 128256 * 4096
    # Masters, gradients, moments; and the copy of masters and moments that a checkpoint is written from.
    assert far["host"] == (4 + 4 + 8) * parameters + (4 + 8) * parameters
    inputs = 32 * 2048 * 4096 * number
    assert parts["activations"]["host"] == inputs and parts["both"]["host"] == far["host"] + inputs
    saved = parts["none"]["activations"] - parts["activations"]["activations"]
    assert 0.9 * inputs * 30 / 32 <= saved <= inputs and parts["both"]["activations"] < far["activations"]


def test_what_would_fit_with_the_host_is_proposed(eight: Path) -> None:
    """Breaks when a plan that the host could help is told to train something else, or to buy devices."""
    laid = lay(eight, knobs("full", 80e9, sequence=256, recompute="all"))
    found = advice(eight, laid)
    assert found[0]["fits"] and found[0]["set"] == ["offload=optimizer"]
    assert found[0]["price"].startswith("results change by rounding")
    moved = [change.sets for kind in (_far_inputs, _far_optimizer) for change in kind(laid, 80e9)]
    assert moved == [("offload=activations",), ("offload=optimizer",)]
    half = laid.asked(offload="optimizer")
    moved = [change.sets for kind in (_far_inputs, _far_optimizer) for change in kind(half, 80e9)]
    assert moved == [("offload=both",)]
    for other in ({"recompute": "none"}, {"offload": "activations"}, {"device": "cpu"}):
        assert not list(_far_inputs(laid.asked(**other), 80e9))


def test_there_is_nowhere_else_beside_a_cpu(eight: Path, tiny_path: PathOf) -> None:
    with pytest.raises(RecipeError, match="offload is 'both', and the model is on cpu"):
        lay(eight, knobs("lora", device="cpu", offload="both"))
    with pytest.raises(RecipeError, match="the model zoo runs this model's blocks"):
        lay(tiny_path("gpt2") / "config.json", knobs("lora", offload="activations"))
    assert lay(tiny_path("gpt2") / "config.json", knobs("lora", offload="optimizer")).lasting["optimizer"] == 0
