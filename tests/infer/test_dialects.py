"""What engines are asked in their own words, and what of their answers is believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from luthier.core.errors import RecipeError
from luthier.infer.dialects import DIALECTS, Dialect, dialect_named
from luthier.infer.told import Told
from luthier.infer.wire import RemoteError, Wire
from luthier.model.speaker import Sampling
from tests.engines import Answer, Foreign, foreign

PROMPT = np.array([5, 6, 7], np.int32)


def completions(tokens: list[Any], numbers: list[Any], ended: str = "length", tops: Any = None) -> Any:
    told = {"tokens": [f"token_id:{each}" for each in tokens], "token_logprobs": numbers, "top_logprobs": tops}
    return {"choices": [{"text": "", "logprobs": told, "finish_reason": ended}]}


def generated(tokens: list[int], numbers: list[Any], ended: str = "length", which: str = "output") -> Any:
    pairs = [[number, token, None] for number, token in zip(numbers, tokens, strict=True)]
    return {"meta_info": {f"{which}_token_logprobs": pairs, "finish_reason": {"type": ended}}}


def completed(tokens: list[int], numbers: list[Any], ended: str = "limit") -> Any:
    told = [{"id": token, "logprob": number, "top_logprobs": []} for token, number in zip(tokens, numbers, strict=True)]
    return {"completion_probabilities": told, "stop_type": ended}


def engine(kind: str, answer: Any, status: int = 200) -> Foreign:
    def script(path: str, _body: Any) -> Answer:
        if path == "/v1/models":
            return 200, {"data": [{"id": "b", "parent": None}, {"id": "a", "parent": "b"}]}
        if path == "/lora-adapters":
            return 200, [{"id": 0, "path": "dir/x.gguf", "scale": 1.0}, {"id": 1, "path": "C:\\d\\a.gguf", "scale": 0}]
        return status, answer

    return Foreign(kind, {}, script=script)


def asked(kind: str, answer: Any, call: Any, status: int = 200) -> tuple[Any, Any]:
    """What a call gives, and the body of the last request."""
    with foreign(engine(kind, answer, status)) as made:
        return call(dialect_named(kind, Wire(made.url))), made.asked[-1][2]


SAMPLING = Sampling(max_new_tokens=3, temperature=1.0, top_k=4, top_p=0.9, seed=7, stop_ids=(9,), likeliest=2,
                    logit_bias=((3, -1.5),), stop=("x",), repetition_penalty=1.5)  # fmt: skip


def test_vllm_is_asked_in_its_words() -> None:
    answer = completions([1, 2, 3], [-0.5, -1, -2.25], tops=[{"token_id:4": -0.1}, None, {"token_id:5": -3}])
    said, body = asked("vllm", answer, lambda one: one.speak(PROMPT, SAMPLING, "a"))
    assert said.tokens.tolist() == [1, 2, 3] and said.log_probs == [-0.5, -1, -2.25] and said.ended == "length"
    assert said.likeliest == (((4, -0.1),), (), ((5, -3.0),))
    assert body == {
        "model": "a", "prompt": [5, 6, 7], "max_tokens": 3, "min_tokens": 0, "temperature": 1.0, "top_k": 4,
        "top_p": 0.9, "min_p": 0.0, "seed": 7, "stop_token_ids": [9], "ignore_eos": True, "logprobs": 2,
        "logit_bias": {"3": -1.5}, "stop": ["x"], "repetition_penalty": 1.5, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "return_tokens_as_token_ids": True, "return_token_ids": True,
    }  # fmt: skip
    plain, body = asked("vllm", completions([1], [-1.0]), lambda one: one.speak(PROMPT, Sampling(max_new_tokens=1), ""))
    # What is left out is filled in by what lies beside the engine's model.
    assert body["model"] == "b" and body["top_k"] == -1 and body["top_p"] == 1.0 and plain.likeliest == ()
    scores, body = asked("vllm", completions([5, 6, 7], [None, -1.0, -2.0]), lambda one: one.score(PROMPT, "a"))
    assert scores == [-1.0, -2.0] and body["echo"] and body["max_tokens"] == 0


def test_sglang_is_asked_in_its_words() -> None:
    said, body = asked("sglang", generated([1, 9], [-0.5, -1.0], "stop"), lambda one: one.speak(PROMPT, SAMPLING, "a"))
    assert said.tokens.tolist() == [1, 9] and said.ended == "stop"
    assert body["input_ids"] == [5, 6, 7] and body["lora_path"] == "a" and body["return_logprob"] is True
    assert body["top_logprobs_num"] == 2 and body["sampling_params"]["ignore_eos"] is False
    assert body["sampling_params"]["stop_token_ids"] == [9] and body["sampling_params"]["max_new_tokens"] == 3
    scores, body = asked("sglang", generated([5, 6, 7], [None, -1.0, -2.0], which="input"),
                         lambda one: one.score(PROMPT, ""))  # fmt: skip
    assert scores == [-1.0, -2.0] and "lora_path" not in body and body["logprob_start_len"] == 0
    with pytest.raises(RecipeError, match="temperature is 0.7"):
        asked("sglang", {}, lambda one: one.speak(PROMPT, Sampling(temperature=0.7), "a"))


def test_llama_cpp_is_asked_in_its_words() -> None:
    answer = completed([1, 2], [-0.5, -1.0], "eos")
    said, body = asked("llama.cpp", answer, lambda one: one.speak(PROMPT, SAMPLING, "a"))
    assert said.tokens.tolist() == [1, 2] and said.ended == "stop"
    assert body["prompt"] == [5, 6, 7] and body["n_predict"] == 3 and body["post_sampling_probs"] is False
    assert body["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}], "all off but one"
    assert body["repeat_penalty"] == 1.5 and body["n_probs"] == 2 and body["logit_bias"] == [[3, -1.5]]
    _, body = asked("llama.cpp", completed([1], [-1.0], "eos"), lambda one: one.speak(PROMPT, Sampling(), ""))
    assert [each["scale"] for each in body["lora"]] == [0, 0] and body["n_probs"] == 1 and body["top_k"] == -1
    with foreign(engine("llama.cpp", {})) as made:
        one = dialect_named("llama.cpp", Wire(made.url))
        assert one.models() == {"": None, "x": "", "a": ""}
        assert one.load("a", "/there") is None
        for call, told in ((lambda: one.load("z", "p"), "started with x, a, and not with 'z'"),
                           (lambda: one.use("z"), "no adapter 'z'"), (lambda: one.unload("a"), "cannot let go"),
                           (lambda: one.score(PROMPT, "a"), "scores its own only"),
                           (lambda: one.speak(PROMPT, Sampling(min_new_tokens=1), "a"), "min_new_tokens")):  # fmt: skip
            with pytest.raises((RemoteError, RecipeError), match=told):
                call()


def test_an_answer_ends_at_the_first_stop_token() -> None:
    """llama.cpp knows no stop tokens, so what comes after one is cut off here; a minimum is respected."""
    many = Told([9, 1, 9, 2], [-1.0] * 4, "length")
    said = many.spoken("x", Sampling(max_new_tokens=4, stop_ids=(9,), min_new_tokens=1))
    assert said.tokens.tolist() == [9, 1, 9] and said.ended == "stop" and len(said.log_probs) == 3
    assert many.spoken("x", Sampling(max_new_tokens=4)).ended == "length"


SPEAKING = Sampling(max_new_tokens=3)


@pytest.mark.parametrize(
    "answer",
    [
        completions([1, 2, 3, 4], [-1.0] * 4), completions([1, 2], [-1.0] * 2), completions([], [], "stop"),
        completions([1, 2, 3], [-1.0] * 2), completions([1, 2, 3], [-1.0, None, -1.0]),
        completions([1, 2, 3], [-1.0, 0.5, -1.0]), completions([1, 2, 3], ["-1", "-1", "-1"]),
        completions([1, "x", 3], [-1.0] * 3), {"choices": []}, {"choices": [{"logprobs": None}]}, {}, [], "text", None,
        {"choices": [{"logprobs": {"tokens": None, "token_logprobs": None}, "finish_reason": "stop"}]},
    ],
)  # fmt: skip
def test_an_engine_that_lies_is_not_believed(answer: Any) -> None:
    with pytest.raises(RemoteError):
        asked("vllm", answer, lambda one: one.speak(PROMPT, SPEAKING, "a"))


@pytest.mark.parametrize("tokens", [[5, 6], [5, 6, 8], [2, 5, 6, 7]])
def test_scores_of_another_text_are_not_believed(tokens: list[int]) -> None:
    numbers = [None, *[-1.0] * (len(tokens) - 1)]
    for kind, answer in (("vllm", completions(tokens, numbers)), ("sglang", generated(tokens, numbers, which="input"))):
        with pytest.raises(RemoteError, match="3 tokens"):
            asked(kind, answer, lambda one: one.score(PROMPT, "a"))


@pytest.mark.parametrize("kind", ["sglang", "llama.cpp"])
@pytest.mark.parametrize("answer", [{}, [], "text", {"meta_info": None}, {"meta_info": {"output_token_logprobs": 3}},
                                    {"completion_probabilities": 3, "stop_type": "eos"}])  # fmt: skip
def test_an_answer_of_another_engine_is_told(kind: str, answer: Any) -> None:
    with pytest.raises(RemoteError, match="--engine"):
        asked(kind, answer, lambda one: one.speak(PROMPT, Sampling(), "a"))


@pytest.mark.parametrize("kind", list(DIALECTS))
def test_who_asks_for_a_token_and_who_fails(kind: str) -> None:
    def calls(one: Dialect) -> Any:
        return one.speak(PROMPT, Sampling(), "a")

    with pytest.raises(RemoteError, match="LUTHIER_ENGINE_TOKEN"):
        asked(kind, {"error": "Unauthorized"}, calls, status=401)
    with pytest.raises(RemoteError, match=r"answered 500: out of memory"):
        asked(kind, {"error": {"message": "out of memory"}}, calls, status=500)
    other = Foreign(kind, {}, script=lambda _path, _body: (200, {"x": 1}))
    with foreign(other) as made, pytest.raises(RemoteError, match="--engine"):
        dialect_named(kind, Wire(made.url)).models()


@pytest.mark.parametrize(
    ("kind", "status", "answer", "told"),
    [("vllm", 404, {"detail": "Not Found"}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
     ("vllm", 400, {"error": {"message": "rank 64 is greater than max_lora_rank 16"}}, "rank 64 .*--max-lora-rank"),
     ("vllm", 401, {"error": "Unauthorized"}, "LUTHIER_ENGINE_TOKEN"),
     ("sglang", 400, {"success": False, "error_message": "LoRA is not enabled."}, "not enabled.*--enable-lora"),
     ("sglang", 200, {"success": False, "error_message": "bad"}, "bad"),
     ("sglang", 401, {}, "LUTHIER_ENGINE_TOKEN"),
     ("vllm", 403, {"detail": "not there"}, "not there.*--path")],
)  # fmt: skip
def test_who_takes_no_adapter_says_what_to_start_it_with(kind: str, status: int, answer: Any, told: str) -> None:
    with pytest.raises(RemoteError, match=told):
        asked(kind, answer, lambda one: one.load("a", "/there"), status)
    with pytest.raises(RemoteError):
        asked(kind, answer, lambda one: one.unload("a"), 500)


def test_adapters_are_loaded_by_name_and_path() -> None:
    for kind, path in (("vllm", "/v1/load_lora_adapter"), ("sglang", "/load_lora_adapter")):
        _, body = asked(kind, {"success": True}, lambda one: one.load("n", "/there"))
        assert body == {"lora_name": "n", "lora_path": "/there"}, path


def test_an_engine_that_is_none() -> None:
    with pytest.raises(RecipeError, match="did you mean vllm"):
        dialect_named("vlm", Wire("http://127.0.0.1"))
