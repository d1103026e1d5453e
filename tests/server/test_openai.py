"""The official client's calls against the seedling and the real engine."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from openai import OpenAI

from luthier.model.speaker import Sampling
from luthier.recipes.opening.opened import Opened, open_named
from luthier.server.opening import serve_opened
from luthier.server.settings import Settings
from tests.server.fakes import TOKEN, FakeEngine, Running, fake_serving, running

ASKED: list[Any] = [{"role": "user", "content": "What is 7 + 5?"}]


def spoken(opened: Opened, prompt: Any, **more: Any) -> tuple[str, list[float]]:
    """What the engine itself says."""
    [answer] = opened.engine.speak([prompt], Sampling(stop_ids=opened.stop_ids, **more))
    return opened.text(answer.tokens), answer.log_probs


def test_a_chat_is_what_the_engine_says(client: OpenAI, opened: Opened) -> None:
    for text in ("What is 7 + 5?", "Write as JSON: the cat is 3 years old", "Name a colour."):
        made = client.chat.completions.create(
            model="seedling", messages=[{"role": "user", "content": text}], temperature=0, max_tokens=24, logprobs=True,
            top_logprobs=3,
        )  # fmt: skip
        said, log_probs = spoken(opened, opened.prompt(text), max_new_tokens=24)
        [choice] = made.choices
        assert choice.message.content == said and choice.finish_reason in ("stop", "length")
        assert choice.logprobs is not None and choice.logprobs.content is not None
        found = [each.logprob for each in choice.logprobs.content]
        assert found == pytest.approx(log_probs[: len(found)], abs=1e-4)
        assert all(len(each.top_logprobs) == 3 for each in choice.logprobs.content)
        assert "".join(each.token for each in choice.logprobs.content) == said
        assert made.usage is not None and made.usage.prompt_tokens == len(opened.prompt(text))
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_a_stream_says_the_same_in_pieces(client: OpenAI) -> None:
    more: dict[str, Any] = {"model": "seedling", "messages": ASKED, "seed": 5, "max_tokens": 30, "n": 3}
    whole = client.chat.completions.create(**more)
    texts, reasons, usage = ["", "", ""], ["", "", ""], None
    with client.chat.completions.create(**more, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1, "choices draw apart"
    assert usage is not None and whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    again = client.chat.completions.create(**more)
    assert [choice.message.content for choice in again.choices] == texts, "a seed repeats"


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    more: dict[str, Any] = {"model": "seedling", "prompt": "The ship", "temperature": 0, "max_tokens": 40}
    text = client.completions.create(**more).choices[0].text
    stop = text[5:8]
    made = client.completions.create(**more, stop=[stop]).choices[0]
    assert made.text == text[: text.index(stop)] and made.finish_reason == "stop"


def test_a_given_form_is_kept(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}, "size": {"type": "integer"}},
              "required": ["colour", "size"], "additionalProperties": False}  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    for seed in range(3):
        made = client.chat.completions.create(
            model="seedling", messages=ASKED, response_format=form, seed=seed, max_tokens=60
        )
        if made.choices[0].finish_reason == "stop":
            said = json.loads(made.choices[0].message.content or "")
            assert set(said) == {"colour", "size"} and said["colour"] in ("red", "blue")
    chosen = client.chat.completions.create(
        model="seedling", messages=ASKED, extra_body={"guided_choice": ["twelve", "thirteen"]}
    )
    assert chosen.choices[0].message.content in ("twelve", "thirteen")
    made = client.chat.completions.create(
        model="seedling", messages=ASKED, extra_body={"structured_outputs": {"regex": "[0-9]{3}-[a-c]"}}
    )
    assert len(made.choices[0].message.content or "") == 5


def test_a_tool_that_has_to_be_called_is_called(client: OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
        "additionalProperties": False}}}]  # fmt: skip
    made = client.chat.completions.create(
        model="seedling", messages=ASKED, tools=tools, tool_choice="required", temperature=0, max_tokens=80
    )
    [choice] = made.choices
    if choice.finish_reason != "length":
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        [call] = choice.message.tool_calls
        assert call.type == "function" and call.function.name == "add"
        assert set(json.loads(call.function.arguments)) == {"a", "b"}
        answered: Any = [*ASKED, choice.message.model_dump(exclude_none=True),
                         {"role": "tool", "tool_call_id": call.id, "content": "12"}]  # fmt: skip
        more = client.chat.completions.create(model="seedling", messages=answered, tools=tools, max_tokens=5)
        assert more.choices[0].message.role == "assistant"


def test_tokens_are_told_as_ids_where_that_is_asked_for(client: OpenAI, opened: Opened) -> None:
    """Breaks when a program that trains on what was said gets texts for tokens, or not all of them."""
    prompt = opened.prompt("The ship left", raw=True).tolist()
    stop = opened.engine.speak([np.array(prompt, np.int32)], Sampling(max_new_tokens=4))[0].tokens.tolist()
    more: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [stop[3]],
                            "ignore_eos": True}  # fmt: skip
    made = client.completions.create(
        model="seedling", prompt=prompt, echo=True, logprobs=2, max_tokens=9, temperature=0, extra_body=more
    )
    choice: Any = made.choices[0]
    end = stop.index(stop[3]) + 1
    told = choice.logprobs.tokens
    # The token that ended it is told too, though nothing of it can be read.
    assert told == [f"token_id:{each}" for each in [*prompt, *stop[:end]]] and choice.finish_reason == "stop"
    assert choice.prompt_token_ids == prompt and choice.token_ids == stop[:end]
    assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.token_logprobs) == len(told)
    assert all(token in top for token, top in zip(told[1:], choice.logprobs.top_logprobs[1:], strict=True))
    stream: Any = client.completions.create(
        model="seedling", prompt=prompt, max_tokens=5, temperature=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    chunks = [chunk.choices[0] for chunk in stream]
    assert [each.prompt_token_ids for each in chunks] == [prompt, *[None] * (len(chunks) - 1)]
    assert [token for each in chunks for token in each.token_ids][:4] == stop
    assert not {"token_ids", "prompt_token_ids"} & set(
        client.completions.create(model="seedling", prompt=prompt, max_tokens=1).choices[0].model_dump()
    )


@torch.no_grad()
def test_prompts_are_scored_as_the_model_scores_them(client: OpenAI, opened: Opened) -> None:
    text = "The ship left the harbour at dawn."
    prompt = opened.prompt(text, raw=True)
    logits = opened.model.module(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0]
    following = torch.from_numpy(prompt[1:].astype(np.int64))[:, None]
    wanted = torch.log_softmax(logits.float(), -1)[:-1].gather(1, following)[:, 0]
    made = client.completions.create(model="seedling", prompt=prompt.tolist(), echo=True, logprobs=1, max_tokens=0)
    scores = made.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None and scores.tokens is not None
    assert scores.token_logprobs[0] is None and made.choices[0].text == opened.tokenizer.decode(prompt)
    assert scores.token_logprobs[1:] == pytest.approx(wanted.tolist(), abs=1e-4)
    more: dict[str, Any] = {"prompt": text, "echo": True, "logprobs": 0, "max_tokens": 1, "temperature": 0}
    as_text = client.completions.create(model="seedling", **more)
    told = as_text.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert as_text.choices[0].text.startswith(text)
    assert "".join(told.tokens) == as_text.choices[0].text
    rest = [as_text.choices[0].text[at:] for at in told.text_offset]
    assert all(text.startswith(token) for text, token in zip(rest, told.tokens, strict=True))
    assert told.token_logprobs is not None and told.token_logprobs[:-1] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_harness_that_scores_prompts_finds_each_where_it_looks_for_it(client: OpenAI, opened: Opened) -> None:
    """Breaks when a stop token that follows a prompt is left out, so that the last token of the prompt is taken for it.

    The request, and the places that are read, are those of lm-evaluation-harness (local-completions).
    """
    prompts = [[5, 9, 30, 12, 40], opened.prompt("The ship left", raw=True).tolist()]
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    made = client.completions.create(model="seedling", prompt=prompts, **asked)
    assert made.choices[0].finish_reason == "stop"
    for choice, prompt in zip(sorted(made.choices, key=lambda each: each.index), prompts, strict=True):
        told = choice.logprobs
        assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
        scores, tops = told.token_logprobs[1:-1], told.top_logprobs[1:-1]
        ids = torch.tensor([prompt])
        with torch.no_grad():
            wanted = torch.log_softmax(opened.model.module(input_ids=ids).logits[0].float(), -1)[:-1]
        assert scores == pytest.approx(wanted.gather(1, ids[0, 1:, None])[:, 0].tolist(), abs=1e-4)
        greedy = [score == max(top.values()) for score, top in zip(scores, tops, strict=True)]
        assert greedy == (wanted.argmax(-1) == ids[0, 1:]).tolist()


def test_a_seed_gives_the_same_text_in_any_company(tmp_path: Path, client: OpenAI) -> None:
    """Breaks when company changes the last bits of what a seed draws by; in bfloat16 most texts would be others. Or
    when a fingerprint is another from answer to answer, or the same for other weights."""
    settings = Settings(token=TOKEN, port=0, state=tmp_path / "state")
    serving = serve_opened(open_named("seedling", precision="bfloat16"), settings, base="seedling", tokens=16_384)

    def said(client: OpenAI, seed: int) -> tuple[str, list[float]]:
        [choice] = client.completions.create(
            model="seedling", prompt="Once upon a time " * (1 + seed), seed=seed, max_tokens=30, logprobs=0
        ).choices
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        return choice.text, choice.logprobs.token_logprobs

    def other(client: OpenAI, place: int) -> str:
        made = client.completions.create(model="seedling", prompt="The ship " * (1 + place), max_tokens=40)
        return made.choices[0].text

    with (
        running(serving) as listening, ThreadPoolExecutor(48) as pool,
        OpenAI(base_url=f"{listening.url}/v1", api_key=TOKEN, max_retries=0, timeout=60) as ours,
    ):  # fmt: skip
        asked: dict[str, Any] = {"model": "seedling", "prompt": "A", "max_tokens": 2}
        mine = ours.completions.create(**asked).system_fingerprint
        alone = [said(ours, seed) for seed in range(8)]
        company = [pool.submit(other, ours, place) for place in range(40)]
        assert list(pool.map(partial(said, ours), range(8))) == alone
        assert all(each.result() for each in company)
        streamed = {chunk.system_fingerprint for chunk in ours.completions.create(**asked, stream=True)}
        talk = ours.chat.completions.create(model="seedling", messages=ASKED, max_tokens=2).system_fingerprint
    assert mine is not None and mine.startswith("fp_") and streamed == {mine} and talk == mine
    other_precision = client.completions.create(**asked).system_fingerprint
    assert other_precision is not None and other_precision != mine


def test_several_prompts_come_in_their_order_and_stream_side_by_side(client: OpenAI) -> None:
    prompts = ["The ship", "One, two,", "My name is", "In the morning"]
    more: dict[str, Any] = {"model": "seedling", "temperature": 0, "max_tokens": 12}
    each = [client.completions.create(prompt=prompt, **more).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, n=2, seed=1, **more)
    assert [choice.text for choice in together.choices] == [text for text in each for _ in range(2)]
    assert [choice.index for choice in together.choices] == list(range(8))
    texts = [""] * 4
    with client.completions.create(prompt=prompts, stream=True, **more) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == each
    best = client.completions.create(model="seedling", prompt="The ship", n=2, best_of=6, seed=3, max_tokens=8)
    assert len(best.choices) == 2


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "unknown_parameter", "did you mean temperature"),
    ({"functions": []}, "unsupported_parameter", "use tools"),
    ({"temperature": "hot"}, "invalid_parameter", "temperature"),
    ({"temperature": -1}, "invalid_parameter", "temperature"),
    ({"n": 17}, "invalid_parameter", "n"),
    ({"stop": 5}, "invalid_parameter", "stop: Input should be a valid string; or Input should be a valid list"),
    ({"stop": ["a", 5]}, "invalid_parameter", "stop: Input should be a valid string; or 1: Input"),
    ({"max_tokens": 0}, "recipe", "max_tokens is 0; at least 1"),
    ({"min_tokens": 9, "max_tokens": 8}, "recipe", "min_tokens is 9; 0 to 8"),
    ({"guided_json": {"$ref": "#"}}, "recipe", "cannot be followed"),
    ({"max_tokens": 100_000}, "recipe", "4096"),
    ({"logit_bias": {"99999999": 1}}, "recipe", "logit_bias"),
    ({"model": "seedlin"}, "not-served", "did you mean seedling"),
    ({"response_format": {"type": "json_schema"}}, "invalid_parameter", "schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "recipe", "one of"),
    ({"guided_regex": "("}, "recipe", "regular expression"),
    ({"lora": [{"id": 3, "scale": 1}]}, "not-served", "id 3"),
    ({"top_logprobs": 2}, "recipe", "logprobs"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]},
     "invalid_parameter", "messages"),
    ({"messages": []}, "invalid_parameter", "messages"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "data", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "code", "words"), REFUSED, ids=[f"{next(iter(m))}-{code}" for m, code, _ in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, more: dict[str, Any], code: str, words: str) -> None:
    body = {"model": "seedling", "messages": ASKED, **more}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.status_code in (400, 404)
    assert caught.value.code == code and words in str(caught.value.message), caught.value.message
    assert len(str(caught.value.message)) < 500


def test_parameters_beside_the_body_are_refused_by_name_too(server: Running) -> None:
    """Breaks when a slip in a query or a form is taken for nothing."""
    with server.client() as plain:
        for path in ("/v1/models?limt=1", "/v1/files?limt=1", "/metrics?a=1", "/v1/fine_tuning/jobs?limt=1"):
            error = plain.get(path).json()["error"]
            assert error["code"] == "unknown_parameter" and error["param"] in ("limt", "a"), path
        assert "did you mean limit" in plain.get("/v1/files?limt=1").json()["error"]["message"]
        form = {"purpose": "fine-tune", "expires": "1"}
        made = plain.post("/v1/files", data=form, files={"file": ("a.jsonl", b'{"text": "a"}')})
        assert made.status_code == 400 and made.json()["error"]["param"] == "expires"
        assert not plain.get("/v1/files").json()["data"]


def test_paths_of_the_api_stay_in_messages(server: Running) -> None:
    """Breaks when what hides our folders eats what a client is to call."""
    with server.client() as plain:
        gone = plain.get("/v1/files/file-" + "0" * 24).json()["error"]["message"]
    assert "GET /v1/files lists them" in gone


def test_more_than_can_wait_is_told_to_come_back(opened: Opened) -> None:
    """Breaks when a full server queues on, or says no without saying when."""
    engine = FakeEngine(lambda _: range(200), pause=0.005)
    body = {"model": "seedling", "prompt": "a", "max_tokens": 200, "n": 4}
    with running(fake_serving(opened, engine, rows=8, waiting=8)) as full, ThreadPoolExecutor(8) as pool:
        ask = partial(httpx2.post, f"{full.url}/v1/completions", json=body, headers=full.headers, timeout=60)
        found = list(pool.map(lambda _: ask(), range(8)))
    refused = [each for each in found if each.status_code == 429]
    assert refused and {each.status_code for each in found} == {200, 429}
    assert all(each.headers["retry-after"] == "1" and each.json()["error"]["code"] == "busy" for each in refused)


def test_models_tokens_and_numbers(client: OpenAI, server: Running, opened: Opened) -> None:
    assert [model.id for model in client.models.list()] == ["seedling"]
    assert client.models.retrieve("seedling").owned_by == "luthier"
    more = {"ignore_eos": True}
    client.completions.create(model="seedling", prompt=["The ship"] * 12, max_tokens=10, extra_body=more)
    with server.client() as plain:
        tokens = plain.post("/tokenize", json={"prompt": "The ship", "return_token_strs": True}).json()
        assert tokens["tokens"] == opened.prompt("The ship", raw=True).tolist()
        assert plain.post("/detokenize", json={"tokens": tokens["tokens"][1:]}).json() == {"prompt": "The ship"}
        asked = plain.post("/tokenize", json={"messages": ASKED}).json()["tokens"]
        assert asked == opened.prompt("What is 7 + 5?").tolist()
        text = plain.get("/metrics").text
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers["luthier_tokens_said_total"]) > 100 and float(numbers["luthier_running"]) == 0
    assert float(numbers["luthier_pages_held"]) == 0 and float(numbers["luthier_open"]) == 0
    assert float(numbers["luthier_cache_bytes_held"]) == 0 < float(numbers["luthier_cache_bytes"])
    assert float(numbers["luthier_time_to_first_token_seconds_count"]) > 10
