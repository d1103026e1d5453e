"""AI feedback: prompts and a judge become a better model, without an answer that a person wrote or ranked.

Read top to bottom: the model answers each prompt twice, a judge says which answer is better and how sure it is, what it
has decided becomes a data file, and that is trained on: by an objective that learns from pairs, or by way of a reward
model and rollouts. Each stage leaves its files in the run: one that was killed goes on in the stage it was in. What has
become of the model is a run of its own, `policy/`, which every later verb takes for the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from luthier.core.errors import DataError, StoppedError
from luthier.core.events import Recorder, Several, plain
from luthier.core.knobs import validate
from luthier.core.waiting import Waits
from luthier.data.conversation import Asked, Row
from luthier.data.prepare import Reading, make_renderer
from luthier.data.sample import Sample
from luthier.model.speaker import PolicySampling, Speaker
from luthier.model.spoken import is_told
from luthier.recipes.bench import reading_of
from luthier.recipes.ending import SUMMARY
from luthier.recipes.feedback import judged as feedback
from luthier.recipes.finetune import RunResult, resume, start, told
from luthier.recipes.opening.opened import Opened, open_named
from luthier.recipes.opening.places import located
from luthier.recipes.opening.results import POLICY, started_in
from luthier.recipes.reinforcing.remote_base import base_elsewhere, require_engine
from luthier.recipes.reinforcing.tools import judge_named, require_judge, waits_of
from luthier.recipes.schemas.ai_feedback import AiFeedbackRecipe, policy_recipe, reward_recipe
from luthier.recipes.schemas.files import begin_run, dated, place_of, unfinished
from luthier.recipes.schemas.finetune import FinetuneRecipe
from luthier.rewards import Tools
from luthier.store.files import write_json
from luthier.store.report import write_report
from luthier.store.runs import RunDirectory, is_begun
from luthier.train.signals import StopRequest, stop_on_signals

REWARD: Final = "reward"
"""The run of the reward model, where there is one."""


@dataclass(frozen=True)
class FeedbackResult:
    """A run that has ended: what its judge decided, and the summary of the policy that was trained on it."""

    path: Path
    summary: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """The one line that `luthier train --json` ends with."""
        policy = RunResult(Path(self.summary["policy"]["run"]), self.summary["policy"]).line()
        return {**policy, "run": str(self.path), "policy": policy["run"], "feedback": self.summary["feedback"]}


def start_feedback(recipe: AiFeedbackRecipe, *, recorder: Recorder, overwrite: bool = False) -> FeedbackResult:
    """Run a recipe in a new run directory; one that this very recipe began and did not finish is gone on with."""
    with stop_on_signals() as stop:
        begun = None if overwrite else unfinished(recipe)
        if begun is not None:
            return _resume(begun, stop, recorder)
        RunDirectory.require_free(place_of(recipe), overwrite=overwrite)
        plan = plan_feedback(recipe)
        with begin_run(recipe, overwrite=overwrite) as run:
            run.write_plan(plan)
            return told(run, stop, lambda: _go(dated(recipe), run, stop, recorder))


def resume_feedback(run: RunDirectory, *, recorder: Recorder) -> FeedbackResult:
    """Go on with a run in the stage it was in."""
    with stop_on_signals() as stop:
        return _resume(run, stop, recorder)


def plan_feedback(recipe: AiFeedbackRecipe) -> dict[str, Any]:
    """What is going to happen, counted from the data; nothing is loaded. Raises what is wrong with data and judge."""
    require_judge(recipe.judge)
    engine = recipe.rollouts.engine
    speaker = recipe.speaker or recipe.model
    if engine.url:
        require_engine(engine)
        speaker += f" at {engine.url}" if recipe.speaker is None else ""
    prompts, pairs = len(feedback.prompts_of(recipe.data.train, _reading(recipe))), recipe.answers.pairs
    stages = ["answer", "judge", *(["train a reward model"] if recipe.by_rollouts else []), "train the policy"]
    return {
        "model": recipe.model, "judge": recipe.judge, "speaker": speaker, "stages": stages,
        "prompts": prompts, "pairs": prompts * pairs, "answers": 2 * prompts * pairs,
        "most_answer_tokens": 2 * prompts * pairs * recipe.answers.max_new_tokens,
        "judged_texts": 2 * prompts * pairs, "objective": recipe.objective.method_name(),
    }  # fmt: skip


def _resume(run: RunDirectory, stop: StopRequest, recorder: Recorder) -> FeedbackResult:
    with run.lock():
        if run.status().state == "finished":
            return FeedbackResult(run.folder, run.read_json(SUMMARY))
        recipe = located(validate(AiFeedbackRecipe, run.read_recipe()), started_in(run))
        return told(run, stop, lambda: _go(recipe, run, stop, recorder))


def _go(recipe: FinetuneRecipe, run: RunDirectory, stop: StopRequest, recorder: Recorder) -> FeedbackResult:
    """All stages; what is done already is read from the files of the run."""
    if not isinstance(recipe, AiFeedbackRecipe):
        raise TypeError(f"{type(recipe).__name__} has no judge")
    say = feedback.Teller(Several([run, recorder]))
    plan = run.read_json("plan.json")
    say(f"{plan['prompts']:,} prompts, {plan['pairs']:,} pairs of answers, judged by {recipe.judge} in both orders")
    bind = partial(_bound, recorder=Several([run, recorder]), stop=stop)
    answers = _answered(recipe, run, say, bind)
    verdicts = _judged(recipe, run, answers, say, bind)
    figures = feedback.Feedback(answers, verdicts, recipe.tie).write(run.folder)
    notices = feedback.lessons(figures)
    say(f"{figures['preferences']:,} preferences of {figures['pairs']:,} pairs; the first place is preferred by "
        f"{figures['position_bias']:+.3f}", *notices)  # fmt: skip
    require_enough(figures, run.folder / feedback.PREFERENCES)
    if recipe.by_rollouts:
        reward = _trained(reward_recipe(recipe, run.folder / feedback.PREFERENCES, run.folder / REWARD), run, recorder)
        notices += [f"reward model: {notice}" for notice in reward["notices"]]
    chosen = policy_recipe(recipe, run.folder / feedback.PREFERENCES, run.folder / POLICY, run.folder / REWARD)
    policy = _trained(chosen, run, recorder)
    summary = {"run": str(run.folder), "status": "finished", "feedback": figures, "policy": policy,
               "notices": [*notices, *policy["notices"]]}  # fmt: skip
    write_json(run.folder / SUMMARY, plain(summary))
    write_report(run.folder / POLICY, into=run.folder)
    run.write_status("finished", values=plain(policy))
    return FeedbackResult(run.folder, plain(summary))


# ------------------------------------------------------------------------------------------------------- the stages


def _bound(waits: Waits, *, recorder: Recorder, stop: StopRequest) -> None:
    """Have long waits told, and ended when the run is to stop."""
    waits.bind(recorder.record, lambda: stop.error() if stop else None)


def _answered(
    recipe: AiFeedbackRecipe, run: RunDirectory, say: feedback.Teller, bind: Callable[[Waits], None]
) -> list[feedback.Row]:
    """Both answers of each pair, sampled from the model, here or by an engine, or from who is to speak in its place."""
    reading = _reading(recipe)
    prompts = feedback.prompts_of(recipe.data.train, reading)
    path = run.folder / feedback.ANSWERS
    if feedback.is_whole(path, len(prompts) * recipe.answers.pairs):
        return feedback.rows_of(path)
    knobs = recipe.rollouts.engine
    elsewhere = bool(knobs.url) and recipe.speaker is None
    # Where an engine speaks, this model is what it is compared with.
    opened = open_named(recipe.speaker or recipe.model, precision=recipe.precision, device=recipe.device,
                        speaks=not elsewhere)  # fmt: skip
    if told := is_told(opened.model.notices):
        say(f"answers are made in {told.removeprefix('precision: ')}")
    if recipe.speaker is None:
        # As it will be trained: by the template of the recipe.
        renderer, _ = make_renderer(opened.tokenizer, reading, context_tokens=opened.model.context_tokens)
        opened = replace(opened, renderer=renderer, stop_ids=tuple(sorted({*opened.stop_ids, *renderer.stop_ids})))
    speaker: Speaker = opened.engine
    fit = _with_room(recipe, opened, prompts, say)
    rows = [row for row in fit for _ in range(recipe.answers.pairs)]
    if elsewhere:
        waits = Waits(f"the engine at {knobs.url}")
        bind(waits)
        asked = [row.content.asked for row in rows if isinstance(row.content, Asked)]
        texts = [opened.renderer.prompt_ids(one.messages, one.tools) for one in asked[:: recipe.answers.pairs][:8]]
        speaker = base_elsewhere(opened.model, knobs, texts, waits)

    def answer(first: int, last: int) -> list[feedback.Row]:
        asked = [(row, row.content.asked) for row in rows[first:last] if isinstance(row.content, Asked)]
        prompts = [opened.renderer.prompt_ids(one.messages, one.tools) for _, one in asked for _ in range(2)]
        sampling = PolicySampling(
            max_new_tokens=recipe.answers.max_new_tokens, temperature=recipe.answers.temperature,
            stop_ids=opened.stop_ids, seed=recipe.seed * 1_000_003 + first,
        )  # fmt: skip
        said = speaker.speak(prompts, sampling)
        return [
            {"row": row.number, "prompt": feedback.as_row(one.messages),
             "answers": [opened.text(each.tokens) for each in said[2 * at : 2 * at + 2]],
             "ended": [each.ended for each in said[2 * at : 2 * at + 2]]}
            for at, (row, one) in enumerate(asked)
        ]  # fmt: skip

    return feedback.in_groups(path, len(rows), recipe.answers.at_once, answer, say.counter("answered", len(rows)))


def _with_room(
    recipe: AiFeedbackRecipe, opened: Opened, prompts: Sequence[Row], say: feedback.Teller
) -> list[Row]:  # fmt: skip
    """The prompts that leave room for an answer. Before the first is answered: a run cannot go on past another one."""
    root, room = opened.model.active_root, opened.model.context_tokens

    def tokens(row: Row) -> int:
        asked = row.content.asked if isinstance(row.content, Asked) else None
        return 0 if asked is None else len(opened.renderer.prompt_ids(asked.messages, asked.tools))

    left = room if room is None or root is None else room - root.token_count
    fit = feedback.with_room(prompts, tokens, left, drop=recipe.data.over_length != "raise")
    if len(fit) < len(prompts):
        say(f"{len(prompts) - len(fit):,} of {len(prompts):,} prompts are left out: they leave no room for an answer")
    return fit


def _judged(
    recipe: AiFeedbackRecipe, run: RunDirectory, answers: list[feedback.Row], say: feedback.Teller,
    bind: Callable[[Waits], None],
) -> list[feedback.Row]:  # fmt: skip
    """What the judge says of each pair. It is loaded when the model that answered is gone."""
    path = run.folder / feedback.VERDICTS
    if feedback.is_whole(path, len(answers)):
        return feedback.rows_of(path)
    model = judge_named(recipe.judge, precision=recipe.precision, device=recipe.device)
    for waits in waits_of(model):
        bind(waits)
    tools = Tools(judge=model, seed=recipe.seed)

    def judge(first: int, last: int) -> list[feedback.Row]:
        group = [one for one in answers[first:last] if not feedback.alike(one)]
        samples = [Sample(prompt=feedback.as_messages(one["prompt"]), answer=one["answers"][0]) for one in group]
        found = recipe.verdict.compare(samples, [one["answers"][1] for one in group], tools)
        verdicts = iter(feedback.verdict_row(each) for each in found)
        return [{"same": True} if feedback.alike(one) else next(verdicts) for one in answers[first:last]]

    return feedback.in_groups(path, len(answers), recipe.answers.at_once, judge, say.counter("judged", len(answers)))


def _reading(recipe: AiFeedbackRecipe) -> Reading:
    """How the data are read while they are prompts."""
    return replace(reading_of(recipe), wanted=("asked",))


def _trained(recipe: FinetuneRecipe, run: RunDirectory, recorder: Recorder) -> Mapping[str, Any]:
    """A stage of training in a run of its own: begun, gone on with, or done already; its summary."""
    try:
        if is_begun(Path(str(recipe.run))):
            return resume(RunDirectory.open(Path(str(recipe.run))), recorder=recorder).summary
        return start(recipe, recorder=recorder).summary
    except StoppedError as stopped:
        raise StoppedError(stopped.received, do=f"luthier resume {run.folder}") from stopped


def require_enough(figures: Mapping[str, Any], path: Path) -> None:
    """Raise DataError where the judge decided too little to train on."""
    if len(feedback.rows_of(path)) < 2:
        raise DataError(
            f"{figures['preferences']} of {figures['pairs']} pairs became preferences ({figures['same_answer']} with "
            f"the same answer, {figures['ties']} ties, {figures['failed']} without a verdict)",
            allowed="at least 2", do=" ".join(feedback.lessons(figures)) or "take more prompts",
        )  # fmt: skip
