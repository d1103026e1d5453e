"""`recipe: reinforce`: a run of rollouts from the command to its proof, cut short and resumed; and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.show import print_summary
from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.recipes.lessons import lessons
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.recipes.schemas.kinds import kind_of_recipe
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.train.stepper import Stepper, StepReport
from tests.cli.commands import events, luthier

STEPS = 6
RECIPE = """
recipe: reinforce
model: {model}
data: {{train: {data}}}
reward:
  - {{method: format, tags: [], pattern: '[a-z ]+', weight: 0.5}}
  - {{method: length, most_tokens: 6, buffer_tokens: 4, name: short}}
rollouts: {{prompts: 3, answers: 4, max_new_tokens: 6}}
objective: {{method: ppo, passes: 2, temperature: 1.2}}
budget: {{steps: 6}}
evaluation: {{fraction: 0.3, every: 3, prompts: 1}}
checkpoint: {{every: 1}}
precision: float32
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A recipe with a few prompts."""
    folder = tmp_path_factory.mktemp("asked")
    rows = [{"prompt": f"What colour has thing {number}?", "answer": "red"} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=llama, data=folder / "prompts.jsonl"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, asked: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    luthier("train", asked, "--run", folder, "--json").must(0)
    return folder


def told(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of some kinds, without times."""
    return [
        {key: value for key, value in event.items() if "seconds" not in key and key != "time"}
        for event in events(folder) if event["kind"] in kinds
    ]  # fmt: skip


def test_a_run_is_proved_by_the_rewards_of_its_reloaded_answers(unbroken: Path) -> None:
    """Breaks when the result is proved by nothing, or what is held out is not what was rewarded."""
    summary = json.loads((unbroken / "summary.json").read_text("utf-8"))
    assert summary["status"] == "finished" and summary["steps"] == STEPS
    assert summary["proof"]["reloaded_loss"] == pytest.approx(summary["loss"]["best"])
    before, after = summary["metrics"]["reward"]
    held = told(unbroken, "evaluation")
    assert held[0]["reward"] == before == -held[0]["loss"] and after == max(one["reward"] for one in held[1:])
    rollouts = told(unbroken, "rollout")
    assert [one["step"] for one in rollouts] == [1, 3, 5] and [one["version"] for one in rollouts] == [0, 2, 4]
    assert {"format", "short"} <= set(rollouts[0]["parts"]) and rollouts[0]["answers"] == 12
    steps = told(unbroken, "step")
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-4) and steps[0]["mismatch_most"] < 0.1
    report = (unbroken / "report.html").read_text("utf-8")
    assert "Reward: format" in report and "<h2>Reward</h2>" in report


def test_a_reward_of_nothing_has_no_minus(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when a held-out reward of 0, whose loss is minus that, is shown as -0.0000."""
    summary = json.loads((unbroken / "summary.json").read_text("utf-8"))
    summary["loss"] |= {"eval_first": 0.0, "eval": 0.00001}
    summary["metrics"] = {"reward": [-0.0, -0.00001]}
    print_summary(summary)
    said = capsys.readouterr().out
    assert "held-out reward 0.0000 -> 0.0000 (best" in said and "reward 0.000 -> 0.000\n" in said


def test_a_group_of_one_is_refused_where_answers_are_compared() -> None:
    """Breaks when a run of which nobody can learn anything begins."""
    asked: dict[str, Any] = {"recipe": "reinforce", "model": "seedling", "data": "p.jsonl", "reward": "numeric",
                             "rollouts": {"answers": 1}}  # fmt: skip
    with pytest.raises(RecipeError, match=r"rollouts\.answers is 1.*take the objective ppo"):
        validate(ReinforceRecipe, {**asked, "objective": "grpo"})
    assert validate(ReinforceRecipe, {**asked, "objective": "ppo"}).rollouts.answers == 1


def test_held_out_answers_that_nobody_can_score_end_the_run_with_the_reason(asked: Path, tmp_path: Path) -> None:
    """Breaks when a run goes on without a measure, ends with advice about learning rates, or loses what it learned."""
    (tmp_path / "worth.py").write_text(
        "def f(prompts, completions, completion_ids, **more):\n    if len(completions) == 1 or more['seen'][0]:\n"
        "        raise KeyError('no such row')\n    return [float(sum(ids) % 5) for ids in completion_ids]\n"
    )
    for name, seen in (("learned", False), ("held", True)):
        rows = [{"prompt": f"What colour has thing {number}?", "seen": seen} for number in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sets = [f"reward={{method: function, path: '{tmp_path / 'worth.py'}:f'}}", "objective={method: grpo}",
            f"data.train={tmp_path / 'learned.jsonl'}", f"data.evaluation={tmp_path / 'held.jsonl'}"]  # fmt: skip
    words = [word for each in sets for word in ("--set", each)]
    done = luthier("train", asked, "--run", tmp_path / "run", *words).must(2)
    assert "held-out answers could be scored: " in done.err and "KeyError: 'no such row'" in done.err
    assert "worth.py, line 3" in done.err and "mend the reward" in done.err


def set_to(values: list[str]) -> list[str]:
    """Keys of a recipe with their values, as words of a command."""
    return [word for each in values for word in ("--set", each)]


SPY = (
    "import json\n\n\n"
    "def spy(prompts, completions, completion_ids, **more):\n"
    "    with open({log!r}, 'a') as log:\n"
    "        for pair in zip(prompts, completions):\n            log.write(json.dumps(pair) + chr(10))\n"
    "    return [float(sum(ids) % 5) for ids in completion_ids]\n"
)


def spied(asked: Path, folder: Path, rows: list[dict[str, Any]], form: str) -> list[Any]:
    """What a function got in a run on these rows, held-out ones among them: prompts with completions."""
    folder.mkdir()
    (folder / "spy.py").write_text(SPY.format(log=str(folder / "log.jsonl")))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = f"reward={{method: function, path: '{folder}/spy.py:spy', form: {form}}}"
    luthier("train", asked, "--run", folder / "run", "--set", reward, "--set", f"data.train={folder / 'rows.jsonl'}",
            "--set", "budget.steps=2").must(0)  # fmt: skip
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_a_function_gets_what_trl_would_give_it(asked: Path, tmp_path: Path) -> None:
    """Breaks when a run gives a function messages for a prompt that is a text, or the other way round."""
    texts = [f"What colour has thing {number}?" for number in range(6)]
    plain = spied(asked, tmp_path / "plain", [{"prompt": text, "system": "Be short."} for text in texts], "auto")
    assert all(prompt in texts and isinstance(said, str) for prompt, said in plain), plain
    assert len({len(said) for _, said in plain}) > 1
    chats = [[{"role": "user", "content": text}] for text in texts]
    talks = spied(asked, tmp_path / "talks", [{"prompt": chat} for chat in chats], "auto")
    assert all(prompt in chats and said[0]["role"] == "assistant" for prompt, said in talks), talks
    forced = spied(asked, tmp_path / "forced", [{"prompt": text} for text in texts], "messages")
    assert all(prompt in chats and [*said[0]] == ["role", "content"] for prompt, said in forced), forced


def test_a_checkpoint_is_not_the_best_by_other_rows(asked: Path, tmp_path: Path) -> None:
    """Breaks when a mean over the rows that could be scored beats one over all, or nobody says which were left out."""
    (tmp_path / "worth.py").write_text(
        "from pathlib import Path\nlog = Path(__file__).with_name('calls')\n"
        "held = [[1, 1], [2, 2], [None, 9], [2, 2]]\n\n\n"
        "def worth(completion_ids, held_out=None, **more):\n    if not held_out or not held_out[0]:\n"
        "        return [float(sum(ids) % 5) for ids in completion_ids]\n"
        "    calls = len(log.read_text()) if log.exists() else 0\n    log.write_text('x' * (calls + 1))\n"
        "    return held[calls]\n"
    )
    for name, count, held in (("learned", 6, False), ("held", 2, True)):
        rows = [{"prompt": f"What {name} thing is {number}?", "held_out": held} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sets = [f"reward={{method: function, path: '{tmp_path / 'worth.py'}:worth'}}",
            f"data.train={tmp_path / 'learned.jsonl'}", f"data.evaluation={tmp_path / 'held.jsonl'}"]  # fmt: skip
    run = tmp_path / "run"
    done = luthier("train", asked, "--run", run, *set_to(sets)).must(0)
    assert "held-out reward 1.0000 -> 2.0000 (best at step 3)" in done.out
    first, second, third = told(run, "evaluation")
    assert "not_scored" not in first and "not_scored" not in second
    assert third["not_scored"] == 1 and third["failures"] == {"the reward gave None": 1}
    assert third["reward"] == 9.0 and third["not_compared_with"] == 3
    assert (
        "step 6: held-out reward 9.0000 over 1 of 2 prompts; 1 could not be scored (the reward gave None), so it is "
        "not compared with that of step 3, which was scored on others, and step 3 stays the best" in done.err
    )
    assert "note    in 1 of 3 evaluations 1 held-out answers could not be scored, 1 of them because" in done.out


def test_a_step_without_a_gradient_names_the_rewards(asked: Path, tmp_path: Path) -> None:
    """Breaks when somebody whose rewards are all alike is sent to look at rows and at what the adapter trains."""
    sets = ["objective={method: grpo}", "evaluation.fraction=0", "budget.steps=2",
            "reward={method: length, most_tokens: 900, buffer_tokens: 4}", "rollouts.redraws=2"]  # fmt: skip
    done = luthier("train", asked, "--run", tmp_path / "run", *set_to(sets))
    done.must(78, "parameters are exactly what they were at the start")
    [told] = [line for line in done.err.splitlines() if line.startswith("warning: the gradient is exactly zero")]
    assert "in each group of this step all answers were worth the same" in told and "rollouts.redraws" in told
    assert "luthier data show" not in done.err
    assert "), 6 groups drawn again in 2 attempts  loss 0.0000" in done.err


def test_a_run_ends_with_what_its_rollouts_have_taught(asked: Path, tmp_path: Path) -> None:
    """Breaks when a run in which half of the answers failed ends as if all were well, or nobody can find out why."""
    (tmp_path / "odd.py").write_text(
        "def odd(completion_ids, **more):\n    for ids in completion_ids:\n"
        "        if len(completion_ids) == 1 and sum(ids) % 3 == 0:\n            raise ValueError('odd')\n"
        "        if len(completion_ids) > 1:\n            raise OSError('busy')\n"
        "    return [float(sum(ids) % 5) for ids in completion_ids]\n"
    )
    run = tmp_path / "run"
    sets = [f"reward={{method: function, path: '{tmp_path / 'odd.py'}:odd'}}", "rollouts.max_new_tokens=3",
            "evaluation.fraction=0"]  # fmt: skip
    done = luthier("train", asked, "--run", run, *set_to(sets)).must(0)
    notes = [line for line in done.out.splitlines() if line.startswith("note    ")]
    rollouts = told(run, "rollout")
    failed, answers = (sum(each[name] for each in rollouts) for name in ("failed", "answers"))
    assert 0 < failed < answers
    reason = f"{tmp_path / 'odd.py'}:odd raised ValueError: odd (odd.py, line 4)"
    assert {name for each in rollouts for name in each["failures"]} == {reason}
    assert sum(each["failures"].get(reason, 0) for each in rollouts) == failed
    assert notes[0] == (
        f"note    {failed} of {answers} answers could not be scored and were left out, {failed} of them because of "
        f"this: {reason}"
    )
    assert any("were cut off at rollouts.max_new_tokens" in note for note in notes), notes
    shown = luthier("run", "show", run).must(0).out.splitlines()
    assert [line for line in shown if line in notes] == notes


@pytest.mark.parametrize("side", ["train", "evaluation"])
def test_a_row_that_no_answer_can_be_scored_by_is_told_before_anything_is_trained(
    asked: Path, tmp_path: Path, side: str
) -> None:
    """Breaks when a run dies at the step that draws the row, and at each resume, or held-out rows are not looked at."""
    cells = ["1", "2", "3", "four", "5", "six"]
    for name, answers in (("good", "123456"), ("bad", cells)):
        rows = [json.dumps({"prompt": f"What is {at}?", "answer": cell}) + "\n" for at, cell in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    other = "evaluation" if side == "train" else "train"
    sets = [f"data.{side}={tmp_path}/bad.jsonl", f"data.{other}={tmp_path}/good.jsonl", "evaluation.max_rows=1",
            "evaluation.fraction=0", "reward={method: numeric}"]  # fmt: skip
    run = tmp_path / "run"
    for command in (["plan", asked], ["train", asked, "--run", run, "--dry-run"], ["train", asked, "--run", run]):
        told = luthier(*command, *set_to(sets))
        told.must(65, "2 of 12 rows cannot be scored by the reward numeric")
        told.must(65, "bad.jsonl:4:1: answer is 'four'", "bad.jsonl:6:1: answer is 'six'")
    assert not run.exists()


def test_its_rewards_come_out_again_from_its_files(unbroken: Path, asked: Path, tmp_path: Path) -> None:
    """Breaks when eval refuses a run of rollouts, or scores other answers than the run did."""
    found = luthier("eval", unbroken, "--json").must(0).json
    held = told(unbroken, "evaluation")
    best = max(one["reward"] for one in held)
    assert found["base"]["reward"] == held[0]["reward"] and found["tuned"]["reward"] == pytest.approx(best)
    assert {"format", "short", "answer_tokens"} <= set(found["tuned"])
    assert found["not_scored"] == {"base": 0, "tuned": 0}
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "What is it?"}\n{"prompt": "Which one?"}\n', encoding="utf-8")
    said = luthier("eval", unbroken, "--data", other).must(0).out
    assert said.startswith("prompts 2, answered greedily") and "short" in said


def test_killed_in_the_middle_of_a_replay_it_comes_to_the_same_bits(
    asked: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a resumed run samples again what it had sampled, or forgets the notes of its replay."""
    plain, count = Stepper.optim_step, 0

    def dies(self: Stepper, *, factor: float = 1.0) -> StepReport:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("the power is gone")
        return plain(self, factor=factor)

    monkeypatch.setattr(Stepper, "optim_step", dies)
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        luthier("train", asked, "--run", folder)
    monkeypatch.setattr(Stepper, "optim_step", plain)
    luthier("resume", folder, "--json").must(0)
    assert told(folder, "step", "rollout", "evaluation") == told(unbroken, "step", "rollout", "evaluation")
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/state.safetensors", "samples.jsonl"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def recipe_with(**more: Any) -> dict[str, Any]:
    return {"recipe": "reinforce", "model": "seedling", "data": "x.jsonl", "reward": {"method": "numeric"}, **more}


def test_what_does_not_go_together_is_said_before_anything_is_loaded() -> None:
    """Breaks when a run begins that has nothing to learn from."""
    recipe = validate(ReinforceRecipe, recipe_with(reward=[{"method": "format", "json_object": True}, "numeric"]))
    assert recipe.reward.method_name() == "ladder" and recipe.learner.passes == 1
    assert kind_of_recipe(recipe_with()) is ReinforceRecipe and kind_of_recipe({}) is FinetuneRecipe
    with pytest.raises(RecipeError, match="objective sft learns from rows"):
        validate(ReinforceRecipe, recipe_with(objective={"method": "sft"}))
    with pytest.raises(RecipeError, match="a recipe: reinforce"):
        validate(FinetuneRecipe, {"model": "seedling", "data": "x.jsonl", "objective": {"method": "grpo"}})
    # A reward that is alike for all would draw again for ever.
    with pytest.raises(RecipeError, match=r"redraws.*32"):
        validate(ReinforceRecipe, recipe_with(rollouts={"redraws": 33}))
    with pytest.raises(RecipeError, match="minibatches is 9"):
        validate(ReinforceRecipe, recipe_with(objective={"method": "grpo", "minibatches": 9}))


def rollout(step: int, **more: Any) -> dict[str, Any]:
    """A rollout where all is well."""
    well = {
        "step": step, "groups": 10, "alike": 1, "always_best": [], "never": [], "answers": 80, "failed": 0, "cut": 0,
        "reward": 0.5, "reward_std": 0.1, "entropy": 1.0, "length": 20.0,
    }  # fmt: skip
    return {**well, **more}


def test_lessons_are_said_where_there_are_any() -> None:
    """Breaks when a run that learns nothing says nothing, or a healthy one is scolded."""
    assert lessons([rollout(step) for step in range(8)], []) == []
    assert lessons([], []) == []
    [said] = lessons([rollout(1, alike=7, always_best=[1, 2], never=[3])], [])
    assert said.startswith("70 % of groups got identical rewards") and "2 prompts are always solved" in said
    # Where no answer to any prompt was worth more than another, none is "solved".
    nothing = [rollout(step, alike=10, reward=0.0, reward_std=0.0, always_best=[1, 2]) for step in range(2)]
    [said] = lessons(nothing, [])
    assert said.startswith("every answer got the same reward, 0.000") and "solved" not in said
    course = [rollout(step, reward=step / 8, entropy=1 / (step + 1), length=10.0 * (step + 1)) for step in range(8)]
    said_of = " ".join(lessons(course, [{"reward": 0.6}, {"reward": 0.2}]))
    for part in ("something is exploited", "answers have become one", "answers went from 15 to 75 tokens"):
        assert part in said_of
    assert lessons([rollout(1, failed=3)], [])[0] == "3 of 80 answers could not be scored and were left out"
    reasons = [{"no number": 1, "too long": 2}, {"no number": 3}]
    [said] = lessons([rollout(step, failed=3, failures=why) for step, why in enumerate(reasons)], [])
    assert said.endswith("6 of 160 answers could not be scored and were left out, 4 of them because of this: no number")
    assert "cut off" in lessons([rollout(1, cut=40)], [])[0]


def test_texts_beside_rollouts_need_a_number_of_steps() -> None:
    """Breaks when a run of two kinds of rows ends by the epochs of one of them."""
    values = {
        "recipe": "reinforce", "model": "seedling", "data": "rows.jsonl",
        "reward": {"method": "length", "most_tokens": 5, "buffer_tokens": 4},
        "objective": {"method": "mixture", "said": "language_model", "compared": "ppo"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match="two kinds of rows"):
        validate(ReinforceRecipe, values)
    made = validate(ReinforceRecipe, {**values, "budget": {"steps": 5}})
    assert made.learner.passes == 4
    with pytest.raises(RecipeError, match="needs rollouts"):
        validate(FinetuneRecipe, {key: value for key, value in values.items() if key not in ("recipe", "reward")})
