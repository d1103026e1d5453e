"""A script for OpenAI's client trains here: upload, fine-tune, follow, and ask the result by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from luthier.core import catalog
from luthier.core.errors import RecipeError
from luthier.core.knobs import validate
from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import open_named
from luthier.recipes.schemas.reinforce import ReinforceRecipe
from luthier.server import fine_tuning, jobs, tuning_methods
from luthier.server.fine_tuning import JobBody
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from luthier.server.tuning_methods import ways
from tests.children import forked_child
from tests.server.fakes import TOKEN, Running, running


def rows(count: int, answer: str = "arr") -> bytes:
    made = [{"messages": [{"role": "user", "content": f"What is {n} + 1?"},
                          {"role": "assistant", "content": f"{answer} {n + 1}"}]} for n in range(count)]  # fmt: skip
    return "\n".join(map(json.dumps, made)).encode()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def tuning(state: Path) -> Iterator[Running]:
    settings = Settings(token=TOKEN, port=0, state=state)
    own = open_named("seedling", precision="float32")
    with running(serve_opened(own, settings, base="seedling", tokens=4096)) as listening:
        yield listening


@pytest.fixture(scope="module")
def client(tuning: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tuning.url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as made:
        yield made


def over(client: OpenAI, name: str, seconds: float = 400) -> Any:
    latest = time.monotonic() + seconds
    while time.monotonic() < latest:
        job = client.fine_tuning.jobs.retrieve(name)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"{name} is {job.status}")


def test_a_method_of_the_api_is_an_entry_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a hyperparameter does not reach the recipe, or a method is offered that the trainer lacks."""
    there = ("sft",)
    monkeypatch.setattr(tuning_methods.catalog, "names", lambda _family: there)

    def body(**method: Any) -> JobBody:
        return JobBody.model_validate({"model": "m", "training_file": "f", "method": method or None})

    def added(**method: Any) -> dict[str, Any]:
        asked = body(**method)
        way, hyper = asked.way()
        return way.recipe(hyper, asked.method, ("m", "folder/of/m"))

    assert added() == {"objective": {"method": "sft"}} and list(ways()) == ["supervised"]
    for kind in ("dpo", "reinforcement", "ppo"):
        with pytest.raises(RecipeError, match="supervised"):
            body(type=kind).way()
    there = ("sft", "dpo")
    asked: dict[str, Any] = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2, "batch_size": 4}}}
    assert added(**asked) == {"objective": {"method": "dpo", "beta": 0.3}, "batch": {"rows": 4}}
    assert body(**asked).way()[1].n_epochs == 2
    assert added(type="dpo") == {"objective": {"method": "dpo"}}, "auto is luthier's own default"
    with pytest.raises(RecipeError, match="method has supervised"):
        body(type="dpo", supervised={}).way()


CHECK: dict[str, Any] = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{sample.output_text}}", "reference": "{{item.reference_answer}}",
}  # fmt: skip


def graded(grader: dict[str, Any], **hyper: Any) -> dict[str, Any]:
    return {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyper}}


def recipe_of_method(method: dict[str, Any]) -> ReinforceRecipe:
    asked = JobBody.model_validate({"model": "m", "training_file": "f", "method": method})
    way, hyper = asked.way()
    more = way.recipe(hyper, asked.method, ("m", "folder/of/m"))
    return validate(ReinforceRecipe, {"model": "m", "data": {"train": "f"}, **more})


def test_a_grader_and_its_hyperparameters_become_a_recipe_of_rollouts() -> None:
    """Breaks when a parameter of the API is taken and changes nothing, or one that nothing is made of is taken."""
    recipe = recipe_of_method(graded(CHECK, batch_size=4, compute_multiplier=2, eval_interval=7, eval_samples=9))
    assert (recipe.rollouts.prompts, recipe.rollouts.answers) == (4, 16)
    assert (recipe.evaluation.every, recipe.evaluation.max_rows) == (7, 9)
    assert recipe.reward.columns == ("reference_answer",) and recipe.judge is None
    assert recipe_of_method(graded(CHECK)).rollouts.answers == 8, "auto is luthier's own default"
    asks = {"type": "score_model", "name": "s", "model": "m", "input": [{"role": "user", "content": "{{item.x}}"}]}
    assert recipe_of_method(graded(asks)).judge == "folder/of/m"
    with pytest.raises(RecipeError, match="model is 'gpt-4o'"):
        recipe_of_method(graded({**asks, "model": "gpt-4o"}))
    with pytest.raises(RecipeError, match="operation"):
        recipe_of_method(graded({**CHECK, "operation": "near"}))
    with pytest.raises(RecipeError, match="reinforcement is missing"):
        recipe_of_method({"type": "reinforcement"})
    for odd in ({"reasoning_effort": "high"}, {"beta": 0.1}, {"compute_multiplier": 0}):
        with pytest.raises(ValueError, match=next(iter(odd))):
            recipe_of_method(graded(CHECK, **odd))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_graded_answers_are_learned_from(client: OpenAI) -> None:
    """Breaks when a script for OpenAI's reinforcement fine-tuning does not train here, or says nothing of rewards."""
    asked = [{"messages": [{"role": "user", "content": f"What is {n} + 1?"}], "reference_answer": str(n + 1)}
             for n in range(8)]  # fmt: skip
    content = "\n".join(map(json.dumps, asked)).encode()
    file = client.files.create(file=("asked.jsonl", content), purpose="fine-tune")
    similar: Any = {**CHECK, "type": "text_similarity", "evaluation_metric": "fuzzy_match"}
    del similar["operation"]
    method: Any = graded(similar, n_epochs=1, batch_size=4, compute_multiplier=0.5)
    given: Any = {"model": "seedling", "training_file": file.id, "validation_file": file.id, "method": method}
    job = over(client, client.fine_tuning.jobs.create(**given).id)
    assert job.status == "succeeded", job.error
    assert job.method and job.method.type == "reinforcement" and job.method.reinforcement
    assert job.method.reinforcement.grader.name == "same" and job.fine_tuned_model
    told = [each.data for each in client.fine_tuning.jobs.list_events(job.id, limit=100).data if each.type == "metrics"]
    assert sum("train_mean_reward" in each for each in told) == 2
    assert any("valid_mean_reward" in each for each in told)
    table = client.files.content(job.result_files[0]).read().decode().splitlines()
    assert table[0].endswith("train_mean_reward,valid_mean_reward")
    unknown = {"model": "seedling", "training_file": file.id, "method": graded(CHECK, temperature=1.0)}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.post("/fine_tuning/jobs", body=unknown, cast_to=object)


def test_files_come_and_go(client: OpenAI) -> None:
    made = client.files.create(file=("rows.jsonl", rows(3)), purpose="fine-tune")
    assert made.filename == "rows.jsonl" and made.bytes == len(rows(3)) and made.status == "processed"
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == rows(3)
    assert made.id in [each.id for each in client.files.list()]
    assert client.files.delete(made.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"[1]", b'{"a": 1}\nx', b"\xff\xfe{}", b"[" * 100_000])
def test_what_is_no_jsonl_is_refused_with_its_line(client: OpenAI, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("rows.jsonl", content), purpose="fine-tune")


def test_a_name_of_a_file_is_no_path(client: OpenAI, state: Path) -> None:
    made = client.files.create(file=("../../../evil.jsonl", rows(1)), purpose="fine-tune")
    assert not list(state.parent.glob("**/evil*"))
    client.files.delete(made.id)
    for name in ("..", "../jobs", "file-../../x", "file-" + "0" * 24, "%2e%2e", "file-" + "g" * 24):
        with pytest.raises(openai.APIStatusError) as caught:
            client.get(f"/files/{name}/content", cast_to=object)
        assert caught.value.status_code == 404


@pytest.mark.timeout(600)
def test_a_fine_tune_is_at_once_a_model(
    client: OpenAI, tuning: Running, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"checkpoint": {"every": 16}}
    monkeypatch.setattr(fine_tuning, "recipe_of", lambda *asked, of=fine_tuning.recipe_of: of(*asked) | often)
    file = client.files.create(file=("rows.jsonl", rows(48)), purpose="fine-tune")
    held_out = client.files.create(file=("more.jsonl", rows(6)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="seedling", training_file=file.id, validation_file=held_out.id, suffix="pirate", seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 8, "batch_size": 8, "learning_rate_multiplier": 10}}},
    )  # fmt: skip
    assert job.status in ("queued", "running") and job.fine_tuned_model is None
    assert [each.id for each in client.fine_tuning.jobs.list()] == [job.id]
    done = over(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model and done.fine_tuned_model.startswith("ft:seedling:pirate:")
    assert done.trained_tokens and done.trained_tokens > 48
    asked: Any = [{"role": "user", "content": "What is 3 + 1?"}]
    made = client.chat.completions.create(model=done.fine_tuned_model, messages=asked, temperature=0, max_tokens=8)
    assert (made.choices[0].message.content or "").startswith("arr")
    base = client.chat.completions.create(model="seedling", messages=asked, temperature=0, max_tokens=8)
    assert not (base.choices[0].message.content or "").startswith("arr")
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    assert done.fine_tuned_model in events[0].message and events[-1].message.startswith("Created fine-tuning job")
    assert sum(each.type == "metrics" for each in events) >= 48
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [each.step_number for each in checkpoints] == [48, 32, 16]
    assert all(each.metrics.train_loss is not None for each in checkpoints)
    names = {each.step_number: each.fine_tuned_model_checkpoint for each in checkpoints}
    assert list(names.values()).count(done.fine_tuned_model) == 1 and len(set(names.values())) == 3
    for step, name in names.items():
        made = client.chat.completions.create(model=name, messages=asked, temperature=0, max_tokens=8)
        place = state / "jobs" / job.id / (f"step-{step}" if name != done.fine_tuned_model else "run/adapter")
        alone = open_named("seedling", adapter=str(place), precision="float32")
        sampling = Sampling(max_new_tokens=8, stop_ids=alone.stop_ids)
        [expected] = alone.engine.speak([alone.prompt("What is 3 + 1?")], sampling)
        assert made.choices[0].message.content == alone.text(expected.tokens)
    table = client.files.content(done.result_files[0]).read().decode().splitlines()
    assert table[0].startswith("step,train_loss") and len(table) >= 49
    card = client.models.retrieve(done.fine_tuned_model)
    assert card.model_dump()["parent"] == "seedling"
    again = serve_opened(open_named("seedling", precision="float32"), Settings(token=TOKEN, port=0, state=state),
                         base="seedling", tokens=2048)  # fmt: skip
    assert set(names.values()) <= set(again.names.all), "a server that comes up again serves it too"
    again.close()


@pytest.mark.timeout(600)
def test_a_job_can_be_cancelled_and_the_next_one_runs(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test above has the trainer that users get; these two would spend most of their time on imports.
    monkeypatch.setattr(jobs, "start_child", forked_child)
    file = client.files.create(file=("rows.jsonl", rows(16)), purpose="fine-tune")
    long = client.fine_tuning.jobs.create(model="seedling", training_file=file.id, hyperparameters={"n_epochs": 1000})
    waiting = client.fine_tuning.jobs.create(model="seedling", training_file=file.id)
    latest = time.monotonic() + 60
    while not any(each.type == "metrics" for each in client.fine_tuning.jobs.list_events(long.id).data):
        assert time.monotonic() < latest
        time.sleep(0.2)
    assert client.fine_tuning.jobs.retrieve(waiting.id).status == "queued"
    assert client.fine_tuning.jobs.pause(waiting.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="is paused"):
        client.fine_tuning.jobs.pause(waiting.id)
    assert client.fine_tuning.jobs.resume(waiting.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(long.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is over"):
        client.fine_tuning.jobs.cancel(long.id)
    small = client.fine_tuning.jobs.create(model="seedling", training_file=file.id, hyperparameters={"n_epochs": 1})
    assert over(client, small.id).status == "succeeded"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_rested_ends_as_one_that_did_not(client: OpenAI, tuning: Running) -> None:
    """Breaks when a pause loses a step, repeats one, or changes what follows."""
    file = client.files.create(file=("rows.jsonl", rows(32)), purpose="fine-tune")
    asked: Any = {"model": "seedling", "training_file": file.id, "seed": 5,
                  "hyperparameters": {"n_epochs": 10, "batch_size": 8}}  # fmt: skip

    def losses(name: str) -> list[tuple[int, float]]:
        events = client.fine_tuning.jobs.list_events(name, limit=1000).data[::-1]
        told: list[Any] = [each.data for each in events if each.type == "metrics"]
        return [(each["step"], each["train_loss"]) for each in told]

    job = client.fine_tuning.jobs.create(**asked)
    latest = time.monotonic() + 120
    while len(losses(job.id)) < 5:
        assert time.monotonic() < latest
        time.sleep(0.05)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    while tuning.serving.jobs._child is not None:
        time.sleep(0.05)
    before = losses(job.id)
    assert 5 <= len(before) < 40
    client.fine_tuning.jobs.resume(job.id)
    assert over(client, job.id).status == "succeeded"
    whole = client.fine_tuning.jobs.create(**asked)
    assert over(client, whole.id).status == "succeeded"
    assert losses(job.id) == losses(whole.id) and losses(job.id)[: len(before)] == before


@pytest.mark.slow
@pytest.mark.skipif("dpo" not in catalog.names("objectives"), reason="the trainer has no objective for pairs")
@pytest.mark.timeout(600)
def test_pairs_are_learned_from(client: OpenAI) -> None:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pairs = [{"input": {"messages": said("user", f"What is {n} + 1?")},
              "preferred_output": said("assistant", f"arr {n + 1}"),
              "non_preferred_output": said("assistant", f"well {n + 1}")} for n in range(12)]  # fmt: skip
    content = "\n".join(map(json.dumps, pairs)).encode()
    file = client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
    job = over(client, client.fine_tuning.jobs.create(model="seedling", training_file=file.id, method=method).id)
    assert job.status == "succeeded", job.error
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.2
    told = [each.data for each in client.fine_tuning.jobs.list_events(job.id, limit=100).data if each.type == "metrics"]
    # Before anything is learned, both answers are as likely as under the reference: a coin.
    assert told[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.timeout(600)
def test_what_cannot_be_trained_says_why(client: OpenAI) -> None:
    bad = client.files.create(file=("rows.jsonl", b'{"x": 1}\n{"x": 2}'), purpose="fine-tune")
    job = over(client, client.fine_tuning.jobs.create(model="seedling", training_file=bad.id).id)
    assert job.status == "failed" and job.error and job.error.code == "data" and "x" in job.error.message
    for more in ({"model": "gpt-4o"}, {"training_file": "file-" + "0" * 24}, {"method": {"type": "reinforcement"}},
                 {"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}}},
                 {"method": {"type": "dpo", "supervised": {}}}, {"suffix": "../x"},
                 {"hyperparameters": {"n_epochs": 0}}):  # fmt: skip
        body = {"model": "seedling", "training_file": bad.id, **more}
        with pytest.raises(openai.APIStatusError) as caught:
            client.post("/fine_tuning/jobs", body=body, cast_to=object)
        assert caught.value.status_code in (400, 404)
