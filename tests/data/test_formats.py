"""Formats: each shape means the conversation it says, is detected, and names its mistakes with path and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import (
    WORDS,
    Choices,
    Content,
    Conversation,
    Labelled,
    Meaning,
    Message,
    Tagged,
    Text,
    ToolCall,
)
from luthier.data.formats import detect, formats, mapped, named
from luthier.data.formats._fields import FieldError
from luthier.data.reading.rows import SourceFile
from tests.data.taken import take

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
CALL = {"name": "add", "arguments": {"a": 1}}
EXCHANGE = (Message("user", "Hi"), Message("assistant", "Hello!"))


def meaning(row: dict[str, Any], *wanted: Meaning) -> Content:
    """What a row means, by the format that is detected for it."""
    return detect([row], wanted=wanted or WORDS).format.read(row, "rows.jsonl:1:1")


def messages(row: dict[str, Any]) -> tuple[Message, ...]:
    content = meaning(row)
    assert isinstance(content, Conversation)
    return content.messages


def test_the_folder_is_the_registry_in_order_of_specificity() -> None:
    names = [format.name for format in formats()]
    assert names == [
        "preference_openai", "preference_sharegpt", "preference_hh", "preference", "messages", "ranking",
        "judged_chat", "judged", "sharegpt", "alpaca", "choices", "prompt_completion", "question_answer", "tagged",
        "labelled", "text", "asked",
    ]  # fmt: skip
    assert len({format.specificity for format in formats()}) == len(names)


@pytest.mark.parametrize("format", formats(), ids=lambda format: format.name)
def test_every_format_reads_its_own_example_and_no_other_takes_it(format: Any) -> None:
    row = json.loads(format.example)
    found = detect([row] * 3, wanted=WORDS if format.meaning in WORDS else [format.meaning])
    assert found.format is format
    assert set(format.columns(row)) == set(row)
    format.read(row, "x:1:1")


EXCHANGES: list[dict[str, Any]] = [
    {"messages": [HI, HELLO]},
    {"messages": json.dumps([HI, HELLO])},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, HELLO]},
    {"messages": [HI, {**HELLO, "tool_calls": None, "name": None, "weight": None}], "tools": None},
    {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
        "system": "",
        "tools": "",
    },
    {"conversations": [HI, HELLO]},
    {"instruction": "Hi", "input": "", "output": "Hello!"},
    {"instruction": "", "input": "Hi", "output": "Hello!", "history": [], "system": None},
    {"instruction": "Hi", "context": "", "response": "Hello!"},
    {"prompt": "Hi", "completion": "Hello!"},
    {"prompt": [HI], "completion": [HELLO]},
    {"prompt": [HI], "response": HELLO},
    *(
        {question: "Hi", answer: "Hello!"}
        for question, answer in [
            ("question", "answer"),
            ("Question", "Answer"),
            ("question", "response"),
            ("input", "output"),
            ("query", "response"),
            ("source", "target"),
            ("mr", "ref"),
        ]
    ),
]


@pytest.mark.parametrize("row", EXCHANGES, ids=lambda row: json.dumps(row)[:60])
def test_one_exchange_in_every_shape(row: dict[str, Any]) -> None:
    assert messages(row) == EXCHANGE


def test_roles_weights_and_names() -> None:
    assert messages(
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "", "name": "Ann"},
                {"role": "assistant", "content": "A", "weight": 0},
                {"role": "assistant", "content": "B", "weight": 0.5},
                {"role": "assistant", "content": "C", "train": False},
                {"role": "assistant", "content": "D", "loss": True},
                {"role": "function", "content": "E"},
            ]
        }
    ) == (
        Message("system", "Be brief."),
        Message("user", "", name="Ann"),
        Message("assistant", "A", 0.0),
        Message("assistant", "B", 0.5),
        Message("assistant", "C", 0.0),
        Message("assistant", "D", 1.0),
        Message("tool", "E"),
    )


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_of_messages(arguments: object, content: object) -> None:
    function = {"name": "add", "arguments": arguments}
    turn = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "7", "type": "function", "function": function}],
    }
    assert messages({"messages": [HI, turn]})[1] == Message("assistant", "", None, (ToolCall("add", {"a": 1}, "7"),))
    legacy = {"role": "assistant", "content": content, "function_call": function}
    assert messages({"messages": [HI, legacy]})[1] == Message("assistant", "", None, (ToolCall("add", {"a": 1}),))


def test_tools_and_calls_of_sharegpt() -> None:
    schema = {"name": "add", "parameters": {"type": "object"}}
    turns = [
        {"from": "human", "value": "Add."},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": json.dumps([CALL, {"name": "stop", "arguments": "{}"}])},
        {"from": "gpt", "value": "Done."},
    ]
    for tools in ([schema], json.dumps([schema]), [{"type": "function", "function": schema}]):
        content = meaning({"conversations": turns, "system": "Be brief.", "tools": tools})
        assert isinstance(content, Conversation)
        assert content.tools == ({"type": "function", "function": schema},)
        assert content.messages == (
            Message("system", "Be brief."),
            Message("user", "Add."),
            Message("assistant", "", None, (ToolCall("add", {"a": 1}),)),
            Message("tool", "2"),
            Message("assistant", "", None, (ToolCall("add", {"a": 1}), ToolCall("stop", {}))),
            Message("assistant", "Done."),
        )


def test_alpaca_joins_input_and_history() -> None:
    row = {"instruction": "Sum up.", "input": "A text", "output": "T", "history": [["a", "b"]], "system": "S"}
    assert [(turn.role, turn.content) for turn in messages(row)] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Sum up.\n\nA text"),
        ("assistant", "T"),
    ]


def test_text_keeps_every_character() -> None:
    assert meaning({"text": " a\r\n"}) == Text(" a\r\n")
    assert meaning({"content": "a", "id": 3}) == Text("a")


def test_a_mapping_overrides_detection() -> None:
    row = {"text": "T", "ask": "Hi", "say": "Hello!", "rule": "S"}
    assert mapped({"text": "ask"}).read(row, "x") == Text("Hi")
    assert mapped({"prompt": "ask", "answer": "say"}).read(row, "x") == Conversation(EXCHANGE)
    whole = mapped({"prompt": "ask", "answer": "say", "system": "rule"}).read(row, "x")
    assert whole == Conversation((Message("system", "S"), *EXCHANGE))
    pair = {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello!"}}
    assert mapped({"prompt": "conversations", "answer": "chosen"}).read(pair, "x") == Conversation(EXCHANGE)
    with pytest.raises(DataError, match='the column "asks" is missing; did you mean ask'):
        mapped({"text": "asks"}).read(row, "x")


@pytest.mark.parametrize("columns", [{}, {"answer": "a"}, {"text": "a", "prompt": "b"}, {"promt": "a"}, {"text": 3},
        {"label": "a"}, {"text": "a", "pair": "b"}, {"words": "a"}, {"prompt": "a", "choices": "b"}])
def test_a_mapping_that_makes_no_sense_is_a_recipe_error(columns: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\.columns"):
        mapped(columns)


def test_a_format_by_name() -> None:
    assert named("alpaca").name == "alpaca"
    with pytest.raises(RecipeError, match="did you mean alpaca"):
        named("alpacca")


def test_detection_survives_bad_rows_and_prefers_the_specific() -> None:
    good = {"messages": [HI, HELLO], "text": "t", "id": 1}
    found = detect([good, good, {"oops": 1}])
    assert found.format.name == "messages"
    assert found.why == "2 of the first 3 rows have messages; not used: id, text"


def test_an_unknown_shape_shows_the_closest() -> None:
    with pytest.raises(DataError) as caught:
        detect([{"quesiton": "a", "anwser": "b"}], where="rows.jsonl")
    text = str(caught.value)
    assert text.startswith("rows.jsonl: no known format has the columns anwser, quesiton")
    assert text.index("question_answer: {") < text.index("data.columns")
    assert text.index("data.columns") < text.index("--column prompt=COLUMN")
    assert text.count("\n  ") == 3


def test_preference_pairs_are_not_read_as_one_answer() -> None:
    for extra in ({"messages": [HI]}, {"prompt": "a", "completion": "b"}, {"text": "t"}):
        with pytest.raises(DataError, match="preference pairs"):
            detect([{**extra, "chosen": "a", "rejected": "b"}])


def chat(*turns: object) -> dict[str, object]:
    return {"messages": [HI, HELLO, *turns]}


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    (
        chat({"role": "asistant", "content": "x"}),
        '"role": "asis',
        'messages[2].role is "asistant"; expected system | user | assistant | tool; did you mean assistant?',
    ),
    (chat({"role": "user", "content": 3}), '"content": 3', "messages[2].content is a number; expected a string"),
    (chat({"role": "user", "content": None}), '"content": null', "messages[2].content is null"),
    (chat({"role": "assistant", "content": " "}), '"content": " "', "the answer is empty (messages[2].content)"),
    (chat({"role": "assistant", "content": None}), '"content": null', "messages[2].content is null"),
    (chat({"role": 3}), '"role": 3', "messages[2].role is a number"),
    (chat({"content": "x"}), '{"content": "x"', "messages[2] has no role"),
    (chat({"role": "user"}), '{"role": "user"}', "messages[2].content is null"),
    (chat("x"), '"x"', "messages[2] is a string; expected a message object"),
    (chat({**HELLO, "weight": "1"}), '"weight"', 'messages[2].weight is "1"'),
    (chat({**HELLO, "weight": -1}), '"weight"', "messages[2].weight is negative"),
    (chat({**HELLO, "weight": True}), '"weight"', "messages[2].weight is true or false"),
    (chat({**HELLO, "reasoning_content": "r"}), '"reasoning', "a message has no place for"),
    (chat({**HELLO, "tool_calls": {}}), '"tool_calls"', "messages[2].tool_calls is an object; expected a list"),
    (chat({**HI, "tool_calls": [CALL]}), '{"role": "user", "content": "Hi", "tool', "calls a tool as user"),
    (
        chat({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}),
        '{"function"',
        "messages[2].tool_calls[0].arguments is no JSON: broken JSON at \"a\" (there at 1:2)",
    ),
    (
        chat({"role": "user", "content": [{"type": "image_url"}]}),
        '"type": "image_url"',
        'messages[2].content[0].type is "image_url"; expected "text"',
    ),
    ({"messages": []}, '"messages"', "messages is an empty list"),
    ({"messages": {"a": 1}}, '"messages"', "messages is an object; expected a list of messages"),
    ({"messages": [HI]}, '"messages"', "messages has no assistant message"),
    ({**chat(), "tools": [3]}, "3]", "tools[0] is a number; expected a tool object"),
    ({**chat(), "tools": "[{"}, '"tools"', "tools is no JSON"),
    (
        {"conversations": [{"from": "humn", "value": "x"}]},
        '"from"',
        'conversations[0].from is "humn"; expected human | gpt | system | function_call | observation | tool; '
        "did you mean human?",
    ),
    ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, '"value"', "conversations[0].value is no JSON"),
    ({"conversations": [{"from": "function_call", "value": '"f"'}]}, '"value"', "conversations[0].value is a string"),
    ({"instruction": "a", "input": 3, "output": "b"}, '"input"', "input is a number"),
    ({"instruction": "a", "output": None}, '"output"', "output is null"),
    ({"instruction": " ", "input": "", "output": "b"}, '"instruction"', "the prompt is empty"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, '["x"]', "history[0] is 1 values"),
    ({"prompt": "a", "completion": ""}, '"completion"', "the answer is empty (completion)"),
    ({"prompt": "a", "completion": [HI]}, '"completion"', "completion ends with a user message"),
    ({"question": "a", "answer": "\n"}, '"answer"', "the answer is empty (answer)"),
    ({"question": ["a"], "answer": "b"}, '"question"', "question is a list; expected a string"),
    ({"text": ""}, '"text"', "the text is empty"),
    ({"text": 1.5}, '"text"', "text is a number"),
]


@pytest.mark.parametrize(("row", "at", "words"), BAD_ROWS, ids=[words[:50] for _, _, words in BAD_ROWS])
def test_a_bad_row_names_path_and_column(tmp_path: Path, row: dict[str, Any], at: str, words: str) -> None:
    line = json.dumps(row)
    good = detect([row]).format.example
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n{line}\n")
    report = take(SourceFile(path))
    (error,) = report.rejects
    assert words in str(error)
    assert error.where == f"{path}:2:{line.rindex(at) + 1}"
    with pytest.raises(FieldError):
        meaning(row)


ROWS: list[tuple[dict[str, Any], Meaning, Content]] = [
    ({"text": "T", "label": "good"}, "labelled", Labelled("T", "good")),
    ({"Text": "T", "Label": 3, "id": 7}, "labelled", Labelled("T", "3")),
    ({"sentence": "T", "category": True}, "labelled", Labelled("T", "true")),
    ({"content": "T", "class": " a b "}, "labelled", Labelled("T", "a b")),
    ({"sentence1": "S", "sentence2": "T", "label": -1}, "labelled", Labelled("S", "-1", "T")),
    ({"premise": "S", "hypothesis": "T", "label": 0}, "labelled", Labelled("S", "0", "T")),
    ({"question": "S", "sentence": "T", "label": 0}, "labelled", Labelled("S", "0", "T")),
    ({"question1": "S", "question2": "T", "label": False}, "labelled", Labelled("S", "false", "T")),
    ({"text": "S", "pair": "T", "label": "x"}, "labelled", Labelled("S", "x", "T")),
    ({"tokens": ["a", "b"], "ner_tags": [0, 3]}, "tagged", Tagged(("a", "b"), ("0", "3"))),
    ({"words": '["a", "b"]', "labels": '["X", "O"]'}, "tagged", Tagged(("a", "b"), ("X", "O"))),
    ({"tokens": ["a"], "pos_tags": [1], "ner_tags": [2]}, "tagged", Tagged(("a",), ("2",))),
    ({"question": "Q", "choices": ["x", "y"], "answer": 1}, "choices", Choices("Q", ("x", "y"), 1)),
    ({"prompt": "Q", "options": ["x", "y"], "answer": "a"}, "choices", Choices("Q", ("x", "y"), 0)),
    ({"ctx": "Q", "endings": ["x", "y"], "label": "1"}, "choices", Choices("Q", ("x", "y"), 1)),
    ({"question": "Q", "choices": ["B", "A"], "answer": "A"}, "choices", Choices("Q", ("B", "A"), 1)),
    ({"question": "Q", "choices": ["2", "1"], "answer": "1"}, "choices", Choices("Q", ("2", "1"), 1)),
    ({"question": "Q", "choices": ["2", "1"], "answer": 1}, "choices", Choices("Q", ("2", "1"), 1)),
    (
        {"question": "Q", "choices": {"text": ["x", "y"], "label": ["C", "A"]}, "answerKey": "A"},
        "choices",
        Choices("Q", ("x", "y"), 1),
    ),
]


@pytest.mark.parametrize(("row", "wanted", "content"), ROWS, ids=[json.dumps(row)[:60] for row, _, _ in ROWS])
def test_rows_with_classes_and_choices(row: dict[str, Any], wanted: Meaning, content: Content) -> None:
    assert meaning(row, wanted) == content


def test_the_same_rows_are_what_is_wanted_of_them() -> None:
    row = {"text": "T", "label": "good"}
    assert meaning(row) == Text("T")
    assert meaning(row, "labelled", "tagged", "text") == Labelled("T", "good")
    assert meaning({"text": "T"}, "labelled", "text") == Text("T")
    exam = {"question": "Q", "choices": ["x", "y"], "answer": "y"}
    assert meaning(exam) == Conversation((Message("user", "Q"), Message("assistant", "y")))
    assert meaning(exam, "conversation", "labelled", "choices") == Choices("Q", ("x", "y"), 1)


def test_rows_that_mean_something_else_are_named() -> None:
    with pytest.raises(DataError, match=r"read as messages \(chat messages\)(?s:.*)labelled: \{.*\n  text: \{"):
        meaning({"messages": [HI, HELLO]}, "labelled", "text")
    with pytest.raises(DataError, match="read as tagged"):
        meaning({"tokens": ["a"], "tags": ["b"]})
    with pytest.raises(DataError, match="no known format"):
        meaning({"a": 1}, "labelled")


def test_a_format_that_is_named_must_be_wanted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(DataError, match="read as labelled"):
        take(SourceFile(path, format="labelled"))
    with pytest.raises(DataError, match="read as columns"):
        take(SourceFile(path, columns={"text": "text", "label": "label"}))
    (row,) = take(SourceFile(path, columns={"text": "text", "label": "label"}, wanted=("labelled",))).rows
    assert row.content == Labelled("a", "b")


def test_classes_and_choices_by_mapping() -> None:
    row = {"a": "A", "b": "B", "c": 3, "d": ["x", "y"], "e": ["B", "C"]}
    assert mapped({"text": "a", "label": "c"}).read(row, "x") == Labelled("A", "3")
    assert mapped({"label": "c", "pair": "b", "text": "a"}).read(row, "x") == Labelled("A", "3", "B")
    assert mapped({"words": "d", "tags": "e"}).read(row, "x") == Tagged(("x", "y"), ("B", "C"))
    assert mapped({"prompt": "a", "choices": "e", "answer": "b"}).read(row, "x") == Choices("A", ("B", "C"), 0)


BAD_CLASSES: list[tuple[dict[str, Any], Meaning, str, str]] = [
    ({"text": "a", "label": None}, "labelled", '"label"', "label is null; expected the name of a class"),
    ({"text": "a", "label": 0.5}, "labelled", '"label"', "label is 0.5; expected the name of a class"),
    ({"text": "a", "label": " "}, "labelled", '"label"', "label is empty"),
    ({"text": " ", "label": 1}, "labelled", '"text"', "the text is empty (text)"),
    ({"sentence1": "a", "sentence2": "", "label": 1}, "labelled", '"sentence2"', "the text is empty (sentence2)"),
    ({"tokens": "a b", "tags": ["x"]}, "tagged", '"tokens"', "tokens is a string; expected a list of words"),
    ({"tokens": [], "tags": []}, "tagged", '"tokens"', "tokens is an empty list"),
    ({"tokens": ["a", "b"], "tags": ["x"]}, "tagged", '"tags"', "tokens holds 2 words, but tags 1"),
    ({"tokens": ["a", ""], "tags": ["x", "y"]}, "tagged", '""', "a word is empty (tokens[1])"),
    ({"tokens": ["a", "b"], "tags": ["x", None]}, "tagged", "null", "tags[1] is null"),
    ({"question": "q", "choices": ["x"], "answer": 0}, "choices", '"choices"', "choices holds 1 answers"),
    ({"question": "q", "choices": ["x", "y"], "answer": 2}, "choices", '"answer"', "answer is 2; expected a place"),
    ({"question": "q", "choices": ["x", "y"], "answer": -1}, "choices", '"answer"', "answer is -1"),
    ({"question": "q", "choices": ["x", "y"], "answer": "C"}, "choices", '"answer"', 'answer is "C"; expected one'),
    ({"question": "q", "choices": ["x", "y"], "answer": None}, "choices", '"answer"', "answer is null"),
    ({"question": "q", "choices": ["x", "x"], "answer": 0}, "choices", '"choices"', "stands in choices more than once"),
    (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"},
        "choices",
        '"choices"',
        "choices has 2 texts, but 1 labels",
    ),
]


@pytest.mark.parametrize(("row", "wanted", "at", "words"), BAD_CLASSES, ids=[each[3][:50] for each in BAD_CLASSES])
def test_a_bad_class_or_choice_names_path_and_column(
    tmp_path: Path, row: dict[str, Any], wanted: Meaning, at: str, words: str
) -> None:
    line = json.dumps(row)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n")
    (error,) = take(SourceFile(path, wanted=(wanted,))).rejects
    assert words in str(error)
    assert error.where == f"{path}:1:{line.rindex(at) + 1}"


def test_a_row_of_another_shape_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"qestion": "a", "answer": "b"}\n')
    (error,) = take(SourceFile(path)).rejects
    assert str(error) == f'{path}:2:1: the column "question" is missing; did you mean qestion?'


def test_a_bad_cell_of_a_table_has_its_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("mr,ref\na,b\nccc,\n")
    (error,) = take(SourceFile(path)).rejects
    assert str(error).startswith(f"{path}:3:5: the answer is empty (ref)")


def test_a_row_keeps_number_address_and_a_file_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}\n')
    report = take(SourceFile(path))
    assert [(row.number, row.where) for row in report.rows] == [(0, f"{path}:1:1"), (2, f"{path}:4:1")]
    assert (report.files[0].format, report.files[0].why) == ("text", "3 of the first 3 rows have text")
    with pytest.raises(RecipeError, match="both format and columns"):
        take(SourceFile(path, format="text", columns={"text": "text"}))
