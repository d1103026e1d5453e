"""`recipe: ai_feedback`: from prompts to a policy by a judge, cut short in each stage, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError, GateError, RecipeError
from luthier.core.knobs import validate
from luthier.infer.wire import UnavailableError
from luthier.recipes.feedback import ai_feedback
from luthier.recipes.feedback import judged as feedback
from luthier.recipes.opening.opened import open_named
from luthier.recipes.opening.results import of_policy
from luthier.recipes.progress import Silent
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe, policy_recipe, reward_recipe
from luthier.rewards import RewardError
from luthier.rewards.judge import Comparison, Judge
from luthier.store.runs import RunDirectory
from luthier.train.stepper import Stepper
from tests import forests
from tests.cli.commands import events, luthier
from tests.engines import Foreign, foreign

RECIPE: dict[str, Any] = {
    "recipe": "ai_feedback",
    "answers": {"max_new_tokens": 6, "temperature": 1.5, "at_once": 4},
    "verdict": {"rationale": True, "most_tokens": 4, "least_mass": 1e-9},
    "tie": 0.0,
    "budget": {"steps": 3},
    "batch": {"rows": 4},
    "evaluation": {"fraction": 0.3, "every": 2, "prompts": 1},
    "checkpoint": {"every": 1},
    "precision": "float32",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A recipe with a few prompts, judged by the model itself."""
    folder = tmp_path_factory.mktemp("feedback")
    rows = [{"prompt": f"What colour has thing {number}?"} for number in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {**RECIPE, "model": str(llama), "judge": str(llama), "data": {"train": str(folder / "prompts.jsonl")}}
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module", autouse=True)
def _judged_by_length() -> Any:
    """A tiny model judges nothing, so its verdicts are planted: the longer answer, and a little the first place."""

    def compare(self: Judge, samples: Any, others: Any, tools: Any) -> list[Any]:
        assert tools.judge is not None
        found = []
        for sample, other in zip(samples, others, strict=True):
            lean = 0.3 if len(sample.said) > len(other) else -0.3
            found.append(Comparison(0.6 + lean, 0.4 + lean, ("long is good", ""), 0.9))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "compare", compare)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, asked: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    said = luthier("train", asked, "--run", folder)
    said.must(0)
    assert "10 prompts, 10 pairs of answers" in said.err and "the judge prefers the first place by +0.100" in said.out
    return folder


def test_answers_are_judged_and_become_data_that_is_trained_on(unbroken: Path) -> None:
    """Breaks when the policy is trained on other rows than those that were judged, or a soft label is made hard."""
    answers, verdicts = (feedback.rows_of(unbroken / name) for name in (feedback.ANSWERS, feedback.VERDICTS))
    rows = feedback.rows_of(unbroken / feedback.PREFERENCES)
    summary = json.loads((unbroken / "summary.json").read_text("utf-8"))
    figures = summary["feedback"]
    assert len(answers) == len(verdicts) == figures["pairs"] == 10
    assert figures["preferences"] == len(rows) == 10 - figures["same_answer"]
    assert figures["position_bias"] == pytest.approx(0.1) and figures["decided_by_place"] == 0
    for row in rows:
        assert len(row["chosen"]) >= len(row["rejected"]) and row["probability"] == pytest.approx(0.8)
        assert row["rationale"] == "long is good" and row["prompt"] == f"What colour has thing {row['row']}?"
    policy = RunDirectory.open(unbroken / "policy")
    written = policy.read_recipe()
    assert written["data"]["train"] == str(unbroken / feedback.PREFERENCES)
    assert written["objective"]["scores"] == "probability" and written["evaluation"]["together"] == "prompts"
    assert summary["policy"]["status"] == "finished" and "accuracy" in summary["policy"]["metrics"]
    assert of_policy(RunDirectory.open(unbroken)).folder == policy.folder
    assert RunDirectory.open(unbroken).status().state == "finished"


def test_later_verbs_take_the_run_for_its_policy(unbroken: Path) -> None:
    """Breaks when what was trained cannot be used by the name of the run."""
    luthier("generate", unbroken, "--prompt", "What colour?", "--max-new-tokens", 3).must(0)
    found = luthier("eval", unbroken, "--json").must(0).json
    assert "accuracy" in found["tuned"] and found["run"] == str(unbroken / "policy")
    assert luthier("resume", unbroken, "--json").must(0).json["feedback"]["pairs"] == 10
    luthier("eval", unbroken, "--verify").must(0)


@pytest.mark.parametrize("stage", ["answer", "judge", pytest.param("train", marks=pytest.mark.slow)])
def test_killed_in_any_stage_it_comes_to_the_same_bits(
    stage: str, asked: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a resumed run asks or judges again what was done, or loses rows at the border of a group."""

    def dying(plain: Callable[..., Any], after: int) -> Callable[..., Any]:
        calls = 0

        def dies(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise RuntimeError("the power is gone")
            return plain(*given, **named)

        return dies

    where = {"answer": (feedback, "as_row", 6), "judge": (Judge, "compare", 1), "train": (Stepper, "optim_step", 1)}
    owner, name, after = where[stage]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying(getattr(owner, name), after))
        with pytest.raises(RuntimeError, match="power"):
            luthier("train", asked, "--run", folder)
    # The same command goes on; so would `luthier resume`.
    luthier("train", asked, "--run", folder, "--json").must(0)
    for file in (feedback.ANSWERS, feedback.VERDICTS, feedback.PREFERENCES, "policy/adapter/adapter_model.safetensors"):
        assert (folder / file).read_bytes() == (unbroken / file).read_bytes(), file


def test_the_plan_is_told_before_anything_is_asked(asked: Path) -> None:
    """Breaks when nobody can see beforehand how much is asked of whom."""
    plan = luthier("train", asked, "--dry-run", "--json").must(0).json["plan"]
    assert plan["answers"] == plan["judged_texts"] == 20 and plan["most_answer_tokens"] == 120
    assert plan["stages"] == ["answer", "judge", "train the policy"]
    assert "10 pairs, each in both orders" in luthier("train", asked, "--dry-run").must(0).out


def test_by_a_reward_model_and_rollouts(asked: Path, tmp_path: Path) -> None:
    """Breaks when preferences do not become the reward of the rollouts."""
    folder = tmp_path / "run"
    more = ("objective={method: ppo}", "reward_budget.steps=2", "budget.steps=1", "evaluation.every=0",
            "rollouts={prompts: 2, answers: 2, max_new_tokens: 4}", "reward={method: learned, most: 3}")  # fmt: skip
    sets = [part for one in more for part in ("--set", one)]
    luthier("train", asked, *sets, "--run", folder, "--json").must(0)
    assert RunDirectory.open(folder / "reward").read_recipe()["objective"]["method"] == "reward_model"
    written = RunDirectory.open(folder / "policy").read_recipe()
    assert written["reward_model"] == str(folder / "reward") and written["objective"]["method"] == "ppo"
    assert {"reward", "raw"} <= set(json.loads((folder / "summary.json").read_text("utf-8"))["policy"]["metrics"])
    luthier("generate", folder, "--prompt", "What colour?", "--max-new-tokens", 3).must(0)
    assert any(event["kind"] == "rollout" for event in events(folder / "policy"))


def recipe_of(**more: Any) -> AiFeedbackRecipe:
    values = {"recipe": "ai_feedback", "model": "m", "judge": "j", "data": {"train": "x.jsonl"}, **more}
    return validate(AiFeedbackRecipe, values)


def test_what_does_not_go_together_is_said_before_anything_is_loaded() -> None:
    """Breaks when a run begins whose preferences nobody can learn from."""
    assert recipe_of().objective.as_recipe()["scores"] == "probability"
    assert recipe_of(objective={"method": "dpo", "scores": "unused"}).objective.as_recipe()["scores"] == "unused"
    assert recipe_of(objective="simpo").objective.method_name() == "simpo"
    for objective in ("sft", "kto", "reward_model"):
        with pytest.raises(RecipeError, match="makes no policy of preferences"):
            recipe_of(objective=objective)
    with pytest.raises(RecipeError, match="verdict.scale is 'rating'"):
        recipe_of(verdict={"scale": "rating"})
    with pytest.raises(RecipeError, match="does not use the reward model"):
        recipe_of(objective="ppo", reward={"method": "length"})
    with pytest.raises(RecipeError, match="judge"):
        validate(AiFeedbackRecipe, {"recipe": "ai_feedback", "model": "m", "data": "x.jsonl"})


def test_stages_take_from_the_recipe_what_is_theirs(tmp_path: Path) -> None:
    """Breaks when held-out preferences reach the rollouts, or one stage's budget another's."""
    recipe = recipe_of(
        objective={"method": "ppo"}, reward_budget={"steps": 7}, budget={"steps": 5},
        data={"train": "x.jsonl", "evaluation": "pairs.jsonl"}, seed=3,
    )  # fmt: skip
    reward = reward_recipe(recipe, tmp_path / "p.jsonl", tmp_path / "reward")
    policy = policy_recipe(recipe, tmp_path / "p.jsonl", tmp_path / "policy", tmp_path / "reward")
    assert (reward.budget.steps, policy.budget.steps, reward.seed, policy.seed) == (7, 5, 3, 3)
    assert reward.data.evaluation == "pairs.jsonl" and policy.data.evaluation is None
    assert reward.data.train == str(tmp_path / "p.jsonl") and policy.data.train == "x.jsonl"


def pair(row: int, one: str, two: str, verdict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"row": row, "prompt": f"p{row}", "answers": [one, two], "ended": ["stop", "length"]}, verdict


def said(first: float, second: float) -> dict[str, Any]:
    return feedback.verdict_row(Comparison(first, second, ("because", "since"), 0.5))


def test_what_the_judge_did_not_decide_is_counted_and_told(tmp_path: Path) -> None:
    """Breaks when a tie, a failure or a pair of one answer is trained on, or is lost without a word."""
    rows = [
        pair(0, "a", "b", said(0.9, 0.7)), pair(1, "a", "b", said(0.2, 0.1)), pair(2, "a", "b", said(0.51, 0.5)),
        pair(3, "a", " a", {"same": True}), pair(4, "a", "b", {"failed": "cut off"}), pair(5, "a", "b", said(0.9, 0.3)),
    ]  # fmt: skip
    judged = feedback.Feedback([one for one, _ in rows], [two for _, two in rows], tie=0.02)
    figures = judged.write(tmp_path)
    kept = [figures[key] for key in ("pairs", "preferences", "same_answer", "ties", "failed", "cut_off")]
    assert kept == [6, 3, 1, 1, 1, 6]
    assert figures["position_bias"] == pytest.approx((0.1 + 0.05 + 0.005 + 0.3) / 4)
    assert figures["decided_by_place"] == pytest.approx(1 / 4)
    one, two, three = judged.preferences()
    assert (one["chosen"], one["probability"]) == ("a", pytest.approx(0.8))
    assert (two["chosen"], two["probability"], two["shown_first"]) == ("b", pytest.approx(0.85), pytest.approx(0.9))
    assert three["chosen"] == "a" and [row["row"] for row in (one, two, three)] == [0, 1, 5]
    assert any("1 x cut off" in sentence for sentence in feedback.lessons(figures))
    lack = RewardError("the judge J has no room for the question", allowed="fewer tokens", do="a longer context")
    rows[3] = pair(3, "a", "b", feedback.verdict_row(lack))
    figures = feedback.Feedback([one for one, _ in rows], [two for _, two in rows], tie=0.02).figures()
    assert figures["failures"] == {"the judge J has no room for the question": 1, "cut off": 1}
    assert any("1 x cut off; a longer context" in sentence for sentence in feedback.lessons(figures))
    # What a person has changed stays.
    (tmp_path / feedback.PREFERENCES).write_text("changed\n", encoding="utf-8")
    judged.write(tmp_path)
    assert (tmp_path / feedback.PREFERENCES).read_text(encoding="utf-8") == "changed\n"
    nothing = feedback.Feedback([rows[2][0]] * 2, [rows[2][1]] * 2, tie=0.02).figures()
    with pytest.raises(DataError, match="0 of 2 pairs became preferences"):
        ai_feedback.require_enough(nothing, tmp_path / "nothing.jsonl")


def test_rows_are_made_in_fixed_groups_whatever_was_there(tmp_path: Path) -> None:
    """Breaks when a torn group is gone on with in its middle."""
    path, asked = tmp_path / "rows.jsonl", []

    def make(first: int, last: int) -> list[dict[str, Any]]:
        asked.append((first, last))
        return [{"n": number} for number in range(first, last)]

    path.write_text('{"n":0}\n{"n":1}\n{"n":2}\n{"n":', encoding="utf-8")
    rows = feedback.in_groups(path, 5, 2, make, lambda done: None)
    assert asked == [(2, 4), (4, 5)] and [row["n"] for row in rows] == [0, 1, 2, 3, 4] == [
        row["n"] for row in feedback.rows_of(path)
    ]
    assert feedback.in_groups(path, 5, 2, make, lambda done: None) == rows and len(asked) == 2


def test_pairs_are_sampled_by_an_engine(asked: Path, llama: Path, tmp_path: Path) -> None:
    """Breaks when pairs come from another base than the one that is trained, are not those that this process would
    resume with, or an engine that goes away costs the pairs that are there."""
    base = open_named(str(llama), precision="float32")
    with foreign(Foreign("vllm", {"": base})) as engine:
        values = json.loads(asked.read_text("utf-8"))
        knobs = {"url": engine.url, "patience": 0.0, "at_once": 1}
        recipe = validate(AiFeedbackRecipe, {**values, "rollouts": {"engine": knobs}})
        plan = ai_feedback.plan_feedback(recipe)
        assert plan["speaker"] == f"{llama} at {engine.url}"
        run = RunDirectory(tmp_path, run_id="x", created="")
        say = feedback.Teller(Silent())
        whole = ai_feedback._answered(recipe, run, say, lambda waits: None)
        bodies = [body for path, _, body in engine.asked if path == "/v1/completions" and not body.get("echo")]
        assert len(whole) == 10 and {body["model"] for body in bodies} == {"base"} and not engine.loaded
        assert [body["temperature"] for body in bodies].count(1.5) == 20
        (tmp_path / feedback.ANSWERS).unlink()
        left = iter(range(len(engine.asked) * 2 // 3))

        def dies(path: str, body: Any) -> tuple[int, Any]:
            return engine.answer(path, body) if next(left, None) is not None else (503, {"error": "no engine"})

        engine.script = dies
        with pytest.raises(UnavailableError, match="no engine"):
            ai_feedback._answered(recipe, run, say, lambda waits: None)
        kept = feedback.rows_of(tmp_path / feedback.ANSWERS)
        assert kept and kept == whole[: len(kept)]
        engine.script = None
        assert ai_feedback._answered(recipe, run, say, lambda waits: None) == whole
        other = open_named(str(llama), precision="float32")
        forests.shake(other.model.module.parameters(), seed=3, std=0.02)
        engine.models[""] = other
        (tmp_path / feedback.ANSWERS).unlink()
        with pytest.raises(GateError, match="does not compute the base as we do"):
            ai_feedback._answered(recipe, run, say, lambda waits: None)


@pytest.mark.parametrize(("keys", "speaks"), [
    ({}, True), ({"speaker": "seedling"}, True), ({"rollouts": {"engine": {"url": "http://127.0.0.1:9"}}}, False),
], ids=["the model", "another", "an engine"])  # fmt: skip
def test_who_speaks_is_opened_to_speak(
    keys: dict[str, Any], speaks: bool, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when answers are made in the precision of training where another is faster, or when an engine's are
    compared with a model in any other."""
    class WantedError(Exception):
        """The model is wanted."""

    def wanted(name: str, **knobs: Any) -> Any:
        raise WantedError(name, knobs["precision"], knobs["speaks"])

    monkeypatch.setattr(ai_feedback, "open_named", wanted)
    values = {**json.loads(asked.read_text("utf-8")), "precision": "auto", **keys}
    recipe, run = validate(AiFeedbackRecipe, values), RunDirectory(tmp_path, run_id="x", created="")
    with pytest.raises(WantedError) as found:
        ai_feedback._answered(recipe, run, feedback.Teller(Silent()), lambda waits: None)
    assert found.value.args == (keys.get("speaker", recipe.model), "auto", speaks)


@pytest.mark.parametrize(("keys", "told"), [
    ({"rollouts": {"prompts": 3}}, "rollouts.prompts is set, and nobody would read it"),
    ({"rollouts": {"engine": {"url": "http://127.0.0.1:9", "adapters": "x"}}}, "rollouts.engine.adapters is set"),
    ({"rollouts": {"engine": {"url": "http://127.0.0.1:9"}}, "speaker": "runs/other"},
     "rollouts.engine.url is set, .* answers are those of speaker"),
    ({"reward_budget": {"steps": 3}}, "reward_budget.steps is set"),
    ({"reward": {"method": "learned", "most": 5}}, "reward is set"),
    ({"rollouts": {"engine": {"url": "http://127.0.0.1:9"}}, "objective": {"method": "ppo"}}, "adapters is empty"),
])  # fmt: skip
def test_what_no_stage_would_read_is_refused_by_name(keys: dict[str, Any], told: str, asked: Path) -> None:
    values = {**json.loads(asked.read_text("utf-8")), **keys}
    with pytest.raises(RecipeError, match=told):
        validate(AiFeedbackRecipe, values)


def test_an_engine_that_goes_away_stops_the_run(
    asked: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when what was asked of an engine or a judge that went away ends a run as if it were broken."""

    def gone(*_: Any, **__: Any) -> Any:
        raise UnavailableError("the engine is gone")

    monkeypatch.setattr(ai_feedback, "_answered", gone)
    said = luthier("train", asked, "--run", tmp_path / "run").must(75, "the engine is gone; what was done is saved")
    assert f"luthier resume {tmp_path / 'run'}" in said.err
    assert RunDirectory.open(tmp_path / "run").status().state == "stopped"


@pytest.mark.parametrize(("over_length", "code"), [("raise", 65), ("drop", 0)])
def test_prompts_without_room_for_an_answer_are_told_before_one_is_answered(
    over_length: str, code: int, asked: Path, tmp_path: Path
) -> None:
    """Breaks when such a prompt ends a run in the middle, where no resume helps, or is not counted."""
    rows = [{"prompt": "What colour?"}, {"prompt": "word " * 400}, {"prompt": "What else?"}, {"prompt": "long " * 500}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = json.loads(asked.read_text("utf-8"))
    values["data"] = {"train": str(tmp_path / "prompts.jsonl"), "over_length": over_length}
    values["answers"] = {**values["answers"], "pairs": 3}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    said = luthier("train", tmp_path / "recipe.yaml", "--run", tmp_path / "run")
    said.must(code)
    answers = feedback.rows_of(tmp_path / "run" / feedback.ANSWERS)
    if code:
        assert not answers and "2 of 4 prompts leave no room for an answer" in said.err
        assert "prompts.jsonl:2" in said.err and "prompts.jsonl:4" in said.err
        assert "set data.over_length to drop" in said.err
        return
    assert [row["row"] for row in answers] == [0, 0, 0, 2, 2, 2] and "2 of 4 prompts are left out" in said.err
