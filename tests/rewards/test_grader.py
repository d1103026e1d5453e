"""Graders of OpenAI's API: each type, its templates, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import pytest

from luthier.core.chosen import choose
from luthier.core.errors import DataError, RecipeError
from luthier.model.scorer import Begun, Likely, NoRoom, Said
from luthier.rewards import Reward, Score, Tools
from luthier.rewards.grader import Grader
from luthier.sandbox.program import Outcome, Returned, Status
from tests.rewards.samples import failure, sample, sandbox_tools, score
from tests.rewards.test_compiles import Broken

CHECK = {"type": "string_check", "name": "same", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
         "operation": "eq"}  # fmt: skip
SIMILAR = {"type": "text_similarity", "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
           "evaluation_metric": "fuzzy_match"}  # fmt: skip
KNOBS: dict[str, Any] = {"grader": CHECK}
GOOD, BAD = sample("Paris", answer="Paris"), sample("Rome", answer="Paris")


class Model:
    """A judge that says what it is told to, and remembers what it was asked."""

    def __init__(self, *answers: str, likely: Sequence[float] = ()) -> None:
        self.answers, self.odds, self.asked = answers, likely, list[Begun]()

    def go_on(self, asked: Sequence[Begun], *, most_tokens: int, temperature: float, seed: int) -> list[Said]:
        self.asked += asked
        self.how = (most_tokens, temperature, seed)
        return [Said(self.answers[at % len(self.answers)]) for at in range(len(asked))]

    def likely(self, asked: Sequence[Begun], continuations: Sequence[str]) -> list[list[Likely]]:
        return [[Likely(odds) for odds in self.odds] for _ in asked]


@pytest.mark.parametrize(
    ("operation", "said", "known", "value"),
    [
        ("eq", "Paris", "Paris", 1.0), ("eq", "paris", "Paris", 0.0), ("ne", "Rome", "Paris", 1.0),
        ("ne", "Paris", "Paris", 0.0), ("like", "In Paris.", "Paris", 1.0), ("like", "In paris.", "Paris", 0.0),
        ("ilike", "In paris.", "Paris", 1.0), ("ilike", "Par", "Paris", 0.0),
    ],
)  # fmt: skip
def test_string_check(operation: str, said: str, known: str, value: float) -> None:
    assert score(Grader(grader={**CHECK, "operation": operation}), sample(said, answer=known)).value == value


def test_text_similarity_and_its_threshold() -> None:
    near = sample("Pariz", answer="Paris")
    assert score(Grader(grader=SIMILAR), near).value == pytest.approx(0.8)
    for threshold, passed in ((0.7, 1.0), (0.9, 0.0)):
        assert score(Grader(grader={**SIMILAR, "pass_threshold": threshold}), near).parts == {"passed": passed}
    for metric in ("gleu", "rouge_1", "rouge_5", "rouge_l"):
        long = sample("a b c d e f", answer="a b c d e f")
        assert score(Grader(grader={**SIMILAR, "evaluation_metric": metric}), long).value == 1.0


def test_bleu_is_that_of_sacrebleu() -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    bleu = Grader(grader={**SIMILAR, "evaluation_metric": "bleu"})
    assert score(bleu, sample("a b c d e", answer="a b c d e")).value == pytest.approx(1.0)
    assert score(bleu, sample("x", answer="a b c d e")).value < 0.1


@pytest.mark.parametrize(
    ("template", "said", "value"),
    [
        ("{{sample.output_text}}", "x", "x"),
        ("<{{item.answer}}|{{ item.nested.deep[1] }}|{{item.nested.deep}}>", "x", "<{{item.secret}}|2|[1, 2]>"),
        ("{{sample.output_json.a.b}}", '{"a": {"b": 3}}', "3"),
        ("{{sample.choices[0].message.content}}", "x", "x"),
        ("{{sample.output_text}}", "{{item.secret}}", "{{item.secret}}"),
        ("{{sample.output_text}}", "<think>no</think>yes", "yes"),
    ],
)
def test_templates_are_filled_in_once_and_strictly(template: str, said: str, value: str) -> None:
    """Breaks when an answer can write a template that is filled in too, and so read what it must not."""
    row = {"answer": "{{item.secret}}", "secret": "s", "nested": {"deep": [1, 2]}}
    grader = {**CHECK, "input": template, "reference": "{{item.expected}}"}
    assert score(Grader(grader=grader), sample(said, **row, expected=value)).value == 1.0


def test_the_prompt_is_told_under_its_usual_name() -> None:
    """Breaks when a grader that shows the judge what was asked finds no such column."""
    grader = Grader(grader={**CHECK, "input": "{{item.prompt}}", "reference": "What is asked?"})
    assert grader.columns == () and score(grader, sample("x")).value == 1.0
    assert score(Grader(grader={**CHECK, "input": "{{item.prompt}}"}), sample("x", prompt="p", answer="p")).value == 1.0


def test_a_template_with_a_name_that_is_not_there() -> None:
    """Breaks when an unknown column is empty, or an answer that is no JSON ends the run."""
    with pytest.raises(DataError, match="other"):
        score(Grader(grader={**CHECK, "input": "{{item.other}}"}), GOOD)
    assert score(Grader(grader={**CHECK, "input": "{{sample.output_json.a}}"}), GOOD).value == 0.0
    for wrong in ("{{answer}}", "{{item.answer | upper}}", "{{item.__class__()}}", "{{}}", "{{ item }}"):
        with pytest.raises((RecipeError, ValueError), match="template"):
            Grader(grader={**CHECK, "input": wrong})


@pytest.mark.parametrize(
    ("said", "value"),
    [('{"steps": [], "result": 0.7}', 0.7), ("I think it is 0.25", 0.25), ("Score: 1.", 1.0), ("0.5/1: so, 0", 0.0)],
)
def test_score_model(said: str, value: float) -> None:
    grader = {"type": "score_model", "model": "gpt", "range": [0, 1], "input": [
        {"role": "developer", "content": "Judge."},
        {"role": "user", "content": {"type": "input_text", "text": "{{sample.output_text}} for {{item.answer}}?"}},
    ], "sampling_params": {"temperature": 0.5, "seed": 3}}  # fmt: skip
    model = Model(said)
    assert score(Grader(grader=grader), GOOD, Tools(judge=model)).value == value
    assert [message.role for message in model.asked[0].messages] == ["system", "user"]
    assert model.asked[0].messages[1].content == "Paris for Paris?" and model.how == (1024, 0.5, 3)


@pytest.mark.parametrize("said", ["", "good", '{"result": 7}', "-1", "nan"])
def test_a_score_that_cannot_be_read_is_an_error_and_no_zero(said: str) -> None:
    grader = {"type": "score_model", "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
    assert failure(Grader(grader=grader), GOOD, Tools(judge=Model(said))).again


@pytest.mark.parametrize("more", [{"type": "score_model"}, {"type": "label_model", "labels": ["good"],
                                                            "passing_labels": ["good"]}])  # fmt: skip
def test_a_question_that_the_model_has_no_room_for_is_no_grade(more: dict[str, Any]) -> None:
    lack = NoRoom("J", "fewer than 297")
    model = Mock(go_on=lambda asked, **_: [lack for _ in asked], likely=lambda asked, _: [lack for _ in asked])
    grader = {**more, "input": [{"role": "user", "content": "{{sample.output_text}}"}]}
    told = failure(Grader(grader=grader), GOOD, Tools(judge=model))
    assert "the judge J has no room for the question; fewer than 297" in str(told) and not told.again


def test_label_model_takes_the_likeliest_label() -> None:
    grader = {"type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"],
              "input": [{"role": "user", "content": "{{sample.output_text}}"}]}  # fmt: skip
    for odds, value in (((-0.1, -2.0), 1.0), ((-2.0, -0.1), 0.0)):
        found = score(Grader(grader=grader), GOOD, Tools(judge=Model(likely=odds)))
        assert found.value == value and found.parts == {"label/good": value, "label/bad": 1.0 - value}


@pytest.mark.parametrize(
    ("formula", "value"),
    [("same", 1.0), ("0.5 * same + 0.5 * near", 0.9), ("near ^ 2", 0.64), ("-near + max(same, near, 2)", 1.2),
     ("min(same, near) / 2", 0.4), ("sqrt(near * near) + floor(near) + ceil(near) + abs(-1)", 2.8),
     ("exp(0) + log(1)", 1.0)],
)  # fmt: skip
def test_multi_computes_with_the_others(formula: str, value: float) -> None:
    near = {**SIMILAR, "input": "Pariz"}
    multi = {"type": "multi", "graders": {"same": CHECK, "near": near}, "calculate_output": formula}
    found = score(Grader(grader=multi), GOOD)
    assert found.value == pytest.approx(value) and found.parts == pytest.approx({"same": 1.0, "near": 0.8})


def test_a_formula_that_has_no_value_is_an_error_and_no_zero() -> None:
    """Breaks when a division by zero is 0, and when a part that failed is left out of the sum."""
    multi = {"type": "multi", "graders": {"same": CHECK}, "calculate_output": "1 / same"}
    assert score(Grader(grader=multi), GOOD).value == 1.0
    assert not failure(Grader(grader=multi), BAD).again
    asked = {"type": "score_model", "input": [{"role": "user", "content": "?"}]}
    multi = {"type": "multi", "graders": {"same": CHECK, "asked": asked}, "calculate_output": "same + asked"}
    assert failure(Grader(grader=multi), GOOD, Tools(judge=Model("good"))).again
    assert Grader(grader=multi).needs == {"judge"}


@pytest.mark.parametrize(
    ("grader", "part"),
    [
        ({"type": "endpoint"}, "endpoint"),
        ({**CHECK, "operation": "regex"}, "regex"),
        ({**SIMILAR, "evaluation_metric": "meteor"}, "meteor"),
        ({**SIMILAR, "evaluation_metric": "cosine"}, "cosine"),
        ({**CHECK, "weight": 2}, "weight"),
        ({"type": "string_check", "operation": "eq", "input": "a"}, "reference"),
        ({"type": "score_model", "input": [], "sampling_params": {"top_p": 0.5}}, "top_p"),
        ({"type": "label_model", "input": [], "labels": ["a"], "passing_labels": ["b"]}, "passing_labels"),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "__import__('os')"}, "import"),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a.__class__"}, "class"),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "b"}, "graders a"),
        ({"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a +"}, "calculate_output"),
        ({"type": "multi", "graders": {"a": {"type": "x"}}, "calculate_output": "a"}, "graders.a"),
    ],
)
def test_what_is_not_done_to_the_letter_is_refused(grader: dict[str, Any], part: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=part):
        Grader(grader=grader)


ASKS: dict[str, Any] = {"input": [{"role": "user", "content": "x"}]}
SCORES: dict[str, Any] = {"type": "score_model", **ASKS}
LABELS: dict[str, Any] = {"type": "label_model", **ASKS, "labels": ["a"], "passing_labels": ["a"]}
MULTI: dict[str, Any] = {"type": "multi", "graders": {"a": CHECK}, "calculate_output": "a"}


@pytest.mark.parametrize(
    ("grader", "received", "allowed"),
    [
        ({"type": ["x"]}, "grader.type is ['x']", "string_check, text_similarity"),
        ({"type": None}, "grader.type is None", "string_check, text_similarity"),
        ({**CHECK, "operation": ["eq"]}, "grader.operation is ['eq']", "eq, ne, like, ilike"),
        ({**SIMILAR, "evaluation_metric": {}}, "grader.evaluation_metric is {}", "fuzzy_match"),
        ({**CHECK, "input": 5}, "grader.input is 5", "a text"),
        ({**CHECK, "input": [5]}, "grader.input is [5]", "a text"),
        ({**CHECK, "reference": None}, "grader.reference is None", "a text"),
        ({**CHECK, "input": "a {{sample.output_text"}, "opens '{{sample.output_text'", "{{sample.output_text}}"),
        ({**CHECK, "input": "{{item.a}} {{ item.b }"}, "opens '{{ item.b }'", "{{item.COLUMN}}"),
        ({**CHECK, "pass_threshold": "x"}, "grader.pass_threshold is 'x'", "a number"),
        ({**CHECK, "pass_threshold": True}, "grader.pass_threshold is True", "a number"),
        ({**CHECK, "pass_threshold": 10**400}, "grader.pass_threshold is 1", "a number"),
        ({**CHECK, "name": 5}, "grader.name is 5", "a text"),
        ({**SCORES, "input": 5}, "grader.input is 5", "a list of 1 or more"),
        ({**SCORES, "input": "x"}, "grader.input is 'x'", "a list of 1 or more"),
        ({**SCORES, "input": []}, "grader.input is []", "a list of 1 or more"),
        ({**SCORES, "input": [5]}, "grader.input[0] is 5", "an object"),
        ({**SCORES, "input": [{"role": "boss", "content": "x"}]}, "grader.input[0].role is 'boss'", "developer"),
        ({**SCORES, "input": [{"role": ["user"], "content": "x"}]}, "grader.input[0].role is ['user']", "developer"),
        ({**SCORES, "input": [{"role": "user"}]}, "grader.input[0].content is None", "a text"),
        ({**SCORES, "input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content is None",
         "a text"),
        ({**SCORES, "input": [{"role": "user", "content": "{{x}}"}]}, "the template says {{x}}", "{{item.COLUMN}}"),
        ({**SCORES, "sampling_params": 5}, "grader.sampling_params is 5", "an object"),
        ({**SCORES, "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature is 'hot'", "a number"),
        ({**SCORES, "sampling_params": {"temperature": -1}}, "sampling_params.temperature is -1", "0 or more"),
        ({**SCORES, "sampling_params": {"seed": [1]}}, "sampling_params.seed is [1]", "a whole number"),
        ({**SCORES, "sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens is 0", "1 or more"),
        ({**SCORES, "range": 5}, "grader.range is 5", "[LEAST, MOST]"),
        ({**SCORES, "range": "x"}, "grader.range is 'x'", "[LEAST, MOST]"),
        ({**SCORES, "range": "xy"}, "grader.range is 'xy'", "[LEAST, MOST]"),
        ({**SCORES, "range": [1]}, "grader.range is [1]", "[LEAST, MOST]"),
        ({**SCORES, "range": [0, "1"]}, "grader.range[1] is '1'", "a number"),
        ({**SCORES, "range": [1, 0]}, "grader.range is [1, 0]", "the least first"),
        ({**LABELS, "labels": 5}, "grader.labels is 5", "a list of 1 or more"),
        ({**LABELS, "labels": []}, "grader.labels is []", "a list of 1 or more"),
        ({**LABELS, "labels": [{"x": 1}]}, "grader.labels[0] is {'x': 1}", "a text"),
        ({**LABELS, "labels": [""]}, "grader.labels[0] is ''", "not empty"),
        ({**LABELS, "passing_labels": 5}, "grader.passing_labels is 5", "a list of 1 or more"),
        ({**LABELS, "passing_labels": []}, "grader.passing_labels is []", "a list of 1 or more"),
        ({"type": "python", "source": 5}, "grader.source is 5", "a text"),
        ({"type": "python", "source": "def grade(:"}, "grader.source is no Python: line 1", "grade(sample, item)"),
        ({"type": "python", "source": " "}, "grader.source is ' '", "not empty"),
        ({**MULTI, "graders": ["a"]}, "grader.graders is ['a']", "an object with 1 or more keys"),
        ({**MULTI, "graders": {}}, "grader.graders is {}", "an object with 1 or more keys"),
        ({**MULTI, "graders": {"a": 5}}, "grader.graders.a is 5", "an object"),
        ({**MULTI, "graders": {"a": {**CHECK, "input": 5}}}, "grader.graders.a.input is 5", "a text"),
        ({**MULTI, "calculate_output": 5}, "grader.calculate_output is 5", "a text"),
        ({**MULTI, "calculate_output": "1 / 0 + b"}, "'b' is not known", "the graders a"),
        ({**MULTI, "calculate_output": "max(a)"}, "'max(a)' is not known", "the graders a"),
        ({**MULTI, "calculate_output": "abs(a, a)"}, "'abs(a, a)' is not known", "the graders a"),
        ({**MULTI, "calculate_output": "a\0"}, "grader.calculate_output is", "the graders a"),
        ({**MULTI, "calculate_output": "(" * 999 + "a" + ")" * 999}, "grader.calculate_output is", "the graders a"),
    ],
)  # fmt: skip
def test_json_of_the_wrong_kind_is_refused_by_its_key(grader: dict[str, Any], received: str, allowed: str) -> None:
    """Breaks when a wrong type is a traceback, or is told only when answers were sampled."""
    with pytest.raises(RecipeError) as failure:
        choose("rewards", Reward, {"method": "grader", "grader": grader})
    text = failure.value.told()
    assert received in text and allowed in text.partition(received)[2], text


def test_what_a_grader_leaves_out_as_null_is_left_out() -> None:
    """Breaks when graders that a program has written, with null for each key without a value, are refused."""
    empty = dict.fromkeys(("name", "model", "image_tag", "range", "pass_threshold"))
    how = {"temperature": None, "seed": None, "max_tokens": None, "top_p": None}
    model = Model("0.5")
    made = Grader(grader={**SCORES, **empty, "sampling_params": how})
    assert score(made, GOOD, Tools(judge=model, seed=4)).value == 0.5 and made.bounds == (0.0, 1.0)
    assert model.how == (1024, 0.0, 4)


def test_a_grader_comes_from_a_file(tmp_path: Any) -> None:
    (tmp_path / "grader.json").write_text(json.dumps(CHECK))
    made = Grader(file=f"{tmp_path}/grader.json")
    assert score(made, GOOD).value == 1.0 and made.columns == ("answer",)
    for knobs in ({}, {"file": "nowhere.json"}, {"file": f"{tmp_path}/grader.json", "grader": CHECK}):
        with pytest.raises((RecipeError, ValueError), match=r"grader|file"):
            Grader(**knobs)


def test_a_model_that_is_not_there_is_told() -> None:
    grader = {"type": "score_model", "input": [{"role": "user", "content": "?"}]}
    with pytest.raises(RecipeError, match="judge"):
        Grader(grader=grader).score([GOOD], Tools())
    assert isinstance(score(Grader(grader=CHECK), GOOD, Tools()), Score)


PYTHON = {"type": "python", "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['most']"}


def test_a_python_grader_runs_in_the_sandbox_on_sample_and_item() -> None:
    assert Grader(grader=PYTHON).needs == {"sandbox"}
    assert score(Grader(grader=PYTHON), sample("Paris", most=10), sandbox_tools()).value == 0.5
    multi = {"type": "multi", "graders": {"same": CHECK, "long": PYTHON}, "calculate_output": "same + long"}
    assert score(Grader(grader=multi), sample("Paris", answer="Paris", most=10), sandbox_tools()).value == 1.5


@pytest.mark.parametrize(
    "source", ["def grade(sample, item):\n    return item['none']", "def grade(sample, item):\n    return 'good'",
               "x = 1", "def grade(sample, item):\n    return True", "def grade(sample, item):\n    return 10 ** 5000",
               "import os\ndef grade(sample, item):\n    os._exit(0)"]
)  # fmt: skip
def test_a_python_grader_that_fails_has_not_graded(source: str) -> None:
    """Breaks when a grader's own error becomes 0."""
    assert not failure(Grader(grader={**PYTHON, "source": source}), GOOD, sandbox_tools()).again


def test_a_broken_sandbox_is_no_grade() -> None:
    broken = Broken([Outcome(Status.BROKEN, reason="no zygote")]).tools()
    assert failure(Grader(grader=PYTHON), sample("Paris", most=10), broken).again
    ended = Broken([Outcome(Status.ENDED, returned=(Returned(0.25),))]).tools()
    assert score(Grader(grader=PYTHON), sample("Paris", most=10), ended).value == 0.25


# As OpenAI's guides write them: a score with how it is sampled, a program with a package, several together.
SCORED = {
    "type": "score_model", "name": "my_score_model", "model": "o4-mini-2025-04-16", "pass_threshold": 0.5,
    "input": [
        {"role": "developer", "content": "Grade the answer from 0 to 1."},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "Reference: {{ item.answer }}."},
            {"type": "input_text", "text": "Answer: {{ sample.output_text }}"}]},
    ],
    "range": [0, 1],
    "sampling_params": {"max_completions_tokens": 32768, "top_p": 1, "reasoning_effort": "medium", "seed": 42},
}  # fmt: skip
FUZZY = {
    "type": "python", "name": "fuzzy", "image_tag": "2025-05-08",
    "source": "import numpy as np\nfrom typing import Any\n\ndef grade(sample: dict[str, Any], item: dict[str, Any])"
              " -> float:\n    said = np.asarray([float(each) for each in sample['output_text'].split(',')])\n"
              "    return float(np.mean(said == np.asarray(item['answer'])))\n",
}  # fmt: skip


def test_graders_of_the_guides_are_taken_as_they_are() -> None:
    """Breaks when a key that changes nothing here is refused, a text in pieces is lost, or numpy is not there."""
    model = Model('{"result": 0.5}')
    assert score(Grader(grader=SCORED), GOOD, Tools(judge=model)).value == 0.5
    system, asked = model.asked[0].messages
    assert system.role == "system" and asked.content == "Reference: Paris.\nAnswer: Paris"
    some = sample("1, 2, 4", answer=[1, 2, 3])
    assert score(Grader(grader=FUZZY), some, sandbox_tools()).value == pytest.approx(2 / 3)
    both = {"type": "multi", "graders": {"a": {**CHECK, "input": "{{ sample.output_json.name }}"}, "b": SIMILAR},
            "calculate_output": "0.5 * a + max(b, 0) ^ 2 * 0.5"}  # fmt: skip
    named = sample('{"name": "Paris"}', answer="Paris")
    assert 0.5 < score(Grader(grader=both), named).value < 1.0
    with pytest.raises(RecipeError, match="top_p"):
        score({"method": "grader", "grader": {**SCORED, "sampling_params": {"top_p": 0.5}}}, GOOD)
