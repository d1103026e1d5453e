"""What a plan says of what it cannot plan, or of what `train` would refuse or tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import luthier as luthier_verbs
from luthier.core.errors import RecipeError
from luthier.model.editing.attachment import Attachment
from luthier.model.files.sources import resolve_source
from luthier.model.language_model import LanguageModel
from luthier.recipes.planning import fits, inference
from luthier.recipes.planning.asked import asked
from luthier.recipes.planning.fits import advice
from luthier.recipes.planning.plan import PlanKnobs, lay
from luthier.recipes.sizing.zoo_memory import Counted
from tests.arithmetic.published import config as published
from tests.cli.commands import luthier

PathOf = Callable[[str], Path]


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """The config of an 8B model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published("Llama-3.1-8B") | {"max_position_embeddings": 131072}), encoding="utf-8")
    return path


def knobs(method: str, memory: float, **more: Any) -> PlanKnobs:
    return asked(method, ["device=cuda"], memory).model_copy(update=more)


def test_a_model_in_the_place_of_a_recipe_is_told_as_one(tiny_path: PathOf, tmp_path: Path) -> None:
    """Breaks when a config is read as a recipe with keys that nobody knows."""
    model = tiny_path("llama")
    for place in (model, model / "config.json"):
        luthier("plan", place).must(2, f"{place} is a model, and no recipe; luthier plan --model-config {place}")
    (tmp_path / "recipe.json").write_text("{", "utf-8")
    assert "is a model" not in luthier("plan", tmp_path / "recipe.json").must(2).err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: domain_adaptation\nmodel: seedling\n", "trains in stages"),
        ("recipe: ai_feedback\nmodel: seedling\ndata: rows.jsonl\njudge: seedling\n", "that are judged first"),
        ("model: seedling\nadapters: {a: {data: rows.jsonl}}\n", "trains several adapters"),
    ],
)
def test_a_recipe_of_more_than_a_run_is_not_planned_as_one(tmp_path: Path, text: str, said: str) -> None:
    """Breaks when the plan of one stage, or a complaint about keys that are right, stands for all of it."""
    (file := tmp_path / "recipe.yaml").write_text(text, "utf-8")
    luthier("plan", file).must(2, said, f"luthier train {file} --dry-run")


def test_a_plan_says_what_the_run_would(tmp_path: Path, recipe: Path) -> None:
    """Breaks when rows are cut, or a key is read as another, and only `train` says so."""
    (file := tmp_path / "recipe.yaml").write_text(recipe.read_text("utf-8") + "max_seq_length: 16\n", "utf-8")
    sets = ("--set", "data.over_length=truncate")
    planned = luthier("train", file, "--dry-run", "--json", *sets).must(0).json["plan"]
    dry, cut = planned["notices"], planned["data"]["rendered"]
    said = luthier("plan", file, *sets).must(0).out
    assert cut["truncated"] and f"rows       {cut['truncated']} truncated, 0 dropped" in said
    assert "note       " in said and "max_seq_length is read as data.max_tokens" in said
    assert all(f"note       {notice}" in said for notice in dry)
    assert luthier("plan", file, "--json", *sets).must(0).json["notices"][1:] == dry


def test_texts_that_a_model_has_no_positions_for_are_told(eight: Path) -> None:
    """Breaks when a plan promises what `train` refuses."""
    words = ("plan", "--model-config", eight, "--device", "cuda", "--sequence", 131_073)
    told = "rows of 131,073 tokens are longer than the model's 131,072 positions: luthier train refuses them"
    assert told in luthier(*words).must(0).out and luthier(*words, "--json").must(0).json["notices"] == [told]
    assert luthier(*words[:-1], 131_072, "--json").must(0).json["notices"] == []
    answering = ("plan", "--model-config", eight, "--inference", "--context")
    assert "texts of 131,073 tokens are longer" in luthier(*answering, 131_073).must(0).out
    assert "note" not in luthier(*answering, 131_072).must(0).out


def test_a_rate_alone_makes_no_time_and_that_is_said(eight: Path) -> None:
    """Breaks when one of two options that need each other is read by nobody."""
    words = ("plan", "--model-config", eight, "--inference", "--tflops", 400)
    assert "unknown: name the rates of the device with --tflops and --bandwidth" in luthier(*words).must(0).out
    assert "time       at least" in luthier(*words, "--bandwidth", 3350).must(0).out
    slow = luthier("plan", "--model-config", eight, "--device", "cuda", "--tflops", 0.01).must(0).out
    assert "at least 53 min 30 s" in slow and "e+" not in slow


def test_devices_that_are_there_are_all_asked_to_divide(eight: Path) -> None:
    """Breaks when somebody with eight devices is advised to use fewer."""
    for count, advised in ((1, 4), (8, 8)):
        found = advice(eight, lay(eight, knobs("full", 80e9, batch=1, devices=count)))
        assert [f"devices={advised}", "sharding=fsdp"] in [each["set"] for each in found]



def test_blocks_that_cannot_be_made_again_are_told_by_the_key_of_a_recipe(recipe: Path, eight: Path) -> None:
    """Breaks when a name of the library's for a kind of value is told as a key."""
    said = "recompute: -1 is not allowed: input should be 'auto', 'none' or 'all', or greater than or equal to 0"
    told = luthier("plan", recipe, "--set", "batch.recompute=-1").must(2, f"--set: batch.{said}").err
    assert "literal" not in told and told.count("batch.recompute") == 1
    luthier("plan", "--model-config", eight, "--set", "recompute=-1").must(2, f"--set: {said}")


def test_a_number_without_a_unit_is_not_taken_for_bytes(eight: Path) -> None:
    """Breaks when 24 GB that somebody has are planned for as 24 bytes."""
    for more in ((), ("--inference",)):
        words = ("plan", "--model-config", eight, *more, "--memory")
        luthier(*words, 24).must(2, "a size of '24', which has no unit", "write 24GB")
        given = () if more else ("--device", "cuda")
        assert luthier(*words, 24_000_000_000, *given, "--json").must(0).json["memory"]["available"] == 24_000_000_000
    with pytest.raises(RecipeError, match="write 24GB"):
        luthier_verbs.plan_inference(eight, memory=24)
    assert luthier_verbs.plan_inference(eight, memory=24e9).memory["available"] == 24_000_000_000


def test_a_rank_that_has_no_more_to_say_is_told_as_train_tells_it(recipe: Path, eight: Path) -> None:
    """Breaks when ten times the memory is planned, or taken, for directions that a matrix does not have."""
    sets = ("--set", "adapter.rank=5000", "--set", "adapter.targets=[q, v]")
    said = "adapter: a rank of 5,000 at model.layers.0.self_attn.v_proj (and at 63 other sites): one above 1,024, the "
    words = ("plan", "--model-config", eight, "--device", "cuda", "--json")
    (notice,) = luthier(*words, *sets).must(0).json["notices"]
    assert notice.startswith(said)
    few = ("--set", "adapter.rank=1024", "--set", "adapter.targets=[q, v]")
    assert luthier(*words, *few).must(0).json["notices"] == []
    (dora,) = luthier(*words, "--method", "dora", *sets).must(0).json["notices"]
    assert dora == notice
    over = ("--set", "adapter.rank=33", "--set", "adapter.rank_pattern={layers.0.self_attn.q_proj: 2}")
    dry = luthier("train", recipe, "--dry-run", "--json", *over).must(0).json["plan"]["notices"]
    told = [each for each in dry if each.startswith("adapter: a rank of 33 at")]
    assert len(told) == 1 and "layers.0.self_attn.q_proj" not in told[0]
    assert told[0] in luthier("plan", recipe, "--json", *over).must(0).json["notices"]


def test_a_model_is_planned_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eight: Path) -> None:
    """Breaks when what `model` in a recipe may say is taken for a path, or somebody is asked for a file."""
    folder = resolve_source("seedling")
    for more in ((), ("--inference",)):
        named, placed = (luthier("plan", "--model-config", name, *more, "--json").must(0).json["parameters"]
                         for name in ("seedling", folder))  # fmt: skip
        assert named == placed
    asked: list[tuple[str, str]] = []

    def in_cache(source: str, name: str) -> Path | None:
        asked.append((source, name))
        return eight if source == "owner/name" else None

    monkeypatch.setattr(inference, "in_cache", in_cache)
    found = luthier("plan", "--model-config", "owner/name", "--inference", "--json").must(0).json
    assert found["parameters"]["total"] == 8_030_261_248 and asked == [("owner/name", "config.json")]
    luthier("plan", "--model-config", "owner/none").must(
        2, "there is no owner/none", "seedling", "a hub id whose files are here already", "download that file"
    )
    luthier("plan", "--model-config", tmp_path / "x").must(2, f"there is no {tmp_path / 'x'}")
    luthier("plan", "--model-config", "seedlng").must(2, "there is no seedlng", "did you mean seedling?")


def test_a_run_that_cannot_be_is_not_planned(recipe: Path, tmp_path: Path) -> None:
    """Breaks when a plan is made for a place that `train` refuses."""
    (taken := tmp_path / "taken").write_text("mine", "utf-8")
    for place in (taken, taken / "below"):
        for words in (("plan", recipe), ("train", recipe, "--dry-run"), ("train", recipe)):
            luthier(*words, "--set", f"run={place}").must(77, f"{place} is no folder")
    assert taken.read_text("utf-8") == "mine"


@pytest.mark.parametrize("text", [
    "recipe: merge\nmodels: [seedling, seedling]\nmethod: linear\n",
    "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\ndtype: float32\n",
])  # fmt: skip
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_merge_is_told_as_what_trains_nothing(tmp_path: Path, text: str, command: str) -> None:
    """Breaks when the keys of a merge are called unknown, one after the other."""
    (file := tmp_path / "merge.yaml").write_text(text, "utf-8")
    told = luthier(command, file).must(2, "a recipe of a merge, which trains nothing").err
    assert f"luthier merge {file} --dry-run" in told and f"luthier merge {file} --out DIR" in told
    assert "unknown" not in told and str(file) in told.partition("a recipe")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: fintune\nmodel: a\n", ("recipe: 'fintune'", "domain_adaptation; and merge", "did you mean finetune")),
        ("recipe: [finetune]\nmodel: seedling\n", ("recipe: ['finetune']", "domain_adaptation; and merge")),
        ("recipe: several\nmodel: seedling\n", ("recipe: several, and no adapters",)),
    ],
)
def test_a_recipe_of_no_known_kind_is_told_by_the_kinds_there_are(
    tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    """Breaks when the only kind that is named is the one that the rest was taken for."""
    (file := tmp_path / "recipe.yaml").write_text(text, "utf-8")
    for command in ("plan", "train"):
        luthier(command, file).must(2, f"{file}:1:1: ", *said)


def test_a_search_that_ends_at_its_bound_says_so(eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when the most that was tried is told as the most that fits."""
    monkeypatch.setattr(fits, "MOST_ROWS", 4)
    words = ("plan", "--model-config", eight, "--device", "cuda", "--sequence", 64, "--memory")
    found = luthier(*words, "80GB", "--json").must(0).json["largest"]
    assert found["batch"] == 4 and found["at_least"] == ["batch"]
    said = luthier(*words, "80GB").must(0).out
    assert "largest    at least 4 rows of 64 tokens at once, or one row of " in said and "row of at least" not in said
    config = {**json.loads(eight.read_text("utf-8")), "max_position_embeddings": None}
    (endless := tmp_path / "endless.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(inference, "MOST_TOKENS", 1000)
    words = ("plan", "--model-config", endless, "--inference", "--context", 10, "--memory", "24GB")
    assert "or 1 of at least 1,000" in luthier(*words).must(0).out
    assert luthier(*words, "--json").must(0).json["largest"]["at_least"] == ["context"]


def test_a_model_that_nobody_can_make_is_refused_for_answering_too(eight: Path) -> None:
    """Breaks when answering is planned with heads of a size that the model's own code refuses."""
    eight.write_text(json.dumps({**json.loads(eight.read_text("utf-8")), "num_attention_heads": 33}), "utf-8")
    luthier("plan", "--model-config", eight).must(74, "hidden size (4096) is not a multiple")
    said = ("hidden_size: 4096 and num_attention_heads: 33", "a hidden_size that is a multiple of num_attention_heads")
    luthier("plan", "--model-config", eight, "--inference").must(2, *said)


def test_what_an_adapter_keeps_beside_blocks_of_the_zoo_is_counted_once(
    tiny_path: PathOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when advice counts the same passes again each time that an adapter comes back, which takes seconds."""
    counted: list[int] = []
    plain = Counted.of

    def of(model: LanguageModel, attachment: Attachment) -> Counted:
        counted.append(attachment.parameter_count)
        return plain(model, attachment)

    monkeypatch.setattr(Counted, "of", of)
    config = tiny_path("gpt2") / "config.json"
    found = {each["change"]: each["total"] for each in advice(config, lay(config, knobs("lora", 1e5)))}
    assert {"rank 4", "weights in NF4"} <= set(found) and len(counted) == len(set(counted)) == 2
    for change, sets in (("rank 4", ["adapter.rank=4"]), ("weights in NF4", ["quantizer.method=nf4"])):
        anew = lay(config, asked("lora", ["device=cuda", *sets], 1e5))
        assert anew.needed(1, 2048, 1e5)["total"] == found[change]


@pytest.mark.parametrize(
    ("text", "what"),
    [("recipe: domain_adaptation\nmodel: a\nstages: []\n", "stages"),
     ("model: a\nadapters: {a: {}}\n", "several adapters")],
)  # fmt: skip
def test_who_reads_one_run_says_so_of_several(tmp_path: Path, text: str, what: str) -> None:
    """Breaks when the keys of such a recipe are called unknown by a command that cannot do with it."""
    (file := tmp_path / "recipe.yaml").write_text(text, "utf-8")
    (rows := tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', "utf-8")
    said = f"a recipe of {what}, which is no single run; luthier train {file}"
    told = luthier("reward", file, rows).must(2, said).err
    assert "unknown" not in told
