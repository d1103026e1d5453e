"""From what a client asks to what the engine is asked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.core.errors import DataError, RecipeError
from luthier.data.conversation import Message, Role, ToolCall
from luthier.data.forest import Ints
from luthier.infer.grammars import Grammars
from luthier.infer.guides import Guide
from luthier.infer.request import Request
from luthier.model.speaker import PolicySampling, Sampling
from luthier.server.bodies import ChatBody, CompletionBody, Drawn, Said, Structure, Tool, ToolChoice
from luthier.server.serving import Serving

MakeGuide = Callable[[], Guide]


async def chat_request(serving: Serving, body: ChatBody) -> Request:
    """The request of a conversation."""
    serving.require_speech()
    if body.top_logprobs and not body.logprobs:
        raise RecipeError(f"top_logprobs is {body.top_logprobs} and logprobs is off", do="set logprobs to true")
    adapter = serving.names.engine_name(body.model, body.lora)
    messages = [message_of(index, said) for index, said in enumerate(body.messages)]
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools or []]
    prompt = await serving.in_words(lambda: serving.opened.renderer.prompt_ids(messages, tools))
    guide = await serving.in_words(lambda: _chat_guide(serving.grammars, body, prompt)) if _bound(body) else None
    likeliest = (body.top_logprobs or 0) if body.logprobs else 0
    sampling = sampling_of(serving, body, len(prompt), limit=body.limit, likeliest=likeliest)
    return Request(prompt=prompt, sampling=sampling, adapter=adapter, choices=body.n or 1, guide=guide,
                   drafts=_drafts(serving, body), batch_invariant=body.seed is not None)  # fmt: skip


async def completion_requests(serving: Serving, body: CompletionBody) -> list[Request]:
    """The requests of one prompt or of several."""
    serving.require_speech()
    if body.stream and (body.best_of or 1) > 1:
        raise RecipeError(f"best_of is {body.best_of} and stream is on", allowed="best_of without stream")
    adapter = serving.names.engine_name(body.model, body.lora)
    # Ids are looked at here: to go to another thread and back costs as much as the rest of a request.
    texts = isinstance(body.prompt, str) or any(isinstance(one, str) for one in body.prompt[:1])
    prompts = await serving.in_words(lambda: _prompts(serving, body)) if texts else _prompts(serving, body)
    count = max(body.n or 1, body.best_of or 1)
    if len(prompts) * count > serving.settings.limits.prompts:
        raise RecipeError(f"{len(prompts)} prompts with {count} answers each",
                          allowed=f"{serving.settings.limits.prompts} answers together")  # fmt: skip
    requests = []
    for prompt in prompts:
        sampling = sampling_of(serving, body, len(prompt), limit=max(1, body.limit or 0), likeliest=body.logprobs or 0,
                               of_prompt=bool(body.echo and body.logprobs is not None))  # fmt: skip
        if body.logprobs_mode == "processed_logprobs":
            sampling = PolicySampling(**vars(sampling))
        guide = None
        if _is_given_form(body):
            guide = await serving.in_words(lambda prompt=prompt: _guide(serving.grammars, body, prompt))  # type: ignore[misc]
        requests.append(Request(prompt=prompt, sampling=sampling, adapter=adapter, choices=body.n or 1,
                                best_of=body.best_of or 0, guide=guide, drafts=_drafts(serving, body),
                                batch_invariant=body.seed is not None))  # fmt: skip
    return requests


def sampling_of(
    serving: Serving, body: Drawn, prompt: int, *, limit: int | None, likeliest: int, of_prompt: bool = False
) -> Sampling:
    """How the tokens of an answer to `prompt` tokens are chosen."""
    most = serving.settings.limits.new_tokens
    if limit is not None and limit > most:
        raise RecipeError(f"max_tokens is {limit}", allowed=f"at most {most}",
                          do="ask for less, or start the server with more: --max-new-tokens")  # fmt: skip
    if limit is None:
        limit = most if serving.room is None else max(1, min(most, serving.room - prompt))
    if limit < 1 or body.min_tokens > limit:
        name, given, allowed = ("max_tokens", limit, "at least 1") if limit < 1 else (
            "min_tokens", body.min_tokens, f"0 to {limit}, the most that the answer may have")  # fmt: skip
        raise RecipeError(f"{name} is {given}", allowed=allowed)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    known = () if body.ignore_eos else serving.opened.stop_ids
    return Sampling(
        max_new_tokens=limit,
        min_new_tokens=body.min_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body, serving.tokenizer.vocabulary_size),
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed % 2**32,
        stop_ids=(*known, *(body.stop_token_ids or ())),
        stop=tuple(stops),
        likeliest=likeliest,
        prompt_log_probs=of_prompt,
    )


def _drafts(serving: Serving, body: Drawn) -> int:
    """How many tokens are looked ahead."""
    asked = serving.drafts if body.drafts is None else body.drafts
    if asked > serving.drafts:
        raise RecipeError(f"drafts is {asked}", allowed=f"at most {serving.drafts}",
                          do="ask for fewer, or start the server with more: --drafts")  # fmt: skip
    return asked


def message_of(index: int, said: Said) -> Message:
    """A message of a conversation as templates get it."""
    roles: dict[str, Role] = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant",
                              "tool": "tool"}  # fmt: skip
    content = "".join(part.text for part in said.content) if isinstance(said.content, list) else said.content or ""
    calls = []
    for call in said.tool_calls or []:
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise DataError(f"the arguments of {call.function.name!r:.80} are {call.function.arguments!r:.80}",
                            allowed="a JSON object", where=f"messages.{index}.tool_calls")  # fmt: skip
        calls.append(ToolCall(call.function.name, arguments, call.id))
    return Message(roles[said.role], content, tool_calls=tuple(calls), name=said.name or "")


def forced_tools(body: ChatBody) -> list[Tool]:
    """The tools of which one has to be called; none where the model may say what it wants."""
    tools = body.tools or []
    if isinstance(body.tool_choice, ToolChoice):
        named = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
        if not named:
            raise RecipeError(f"tool_choice names {body.tool_choice.function.name!r:.80}", allowed="one of the tools")
        return named
    if body.tool_choice == "required" and not tools:
        raise RecipeError("tool_choice is required and there are no tools", allowed="tools beside it")
    return tools if body.tool_choice == "required" else []


def _prompts(serving: Serving, body: CompletionBody) -> list[Ints]:
    given = body.prompt
    if isinstance(given, str):
        return [serving.opened.prompt(given, raw=True)]
    if len(given) > serving.settings.limits.prompts and not isinstance(given[0], int):
        raise RecipeError(f"{len(given)} prompts", allowed=f"at most {serving.settings.limits.prompts}")
    if not given:
        raise RecipeError("prompt is an empty list", allowed="a text, token ids, or a list of either")
    lists: list[Any] = [given] if isinstance(given[0], int) else list(given)
    return [serving.opened.prompt(one, raw=True) if isinstance(one, str) else _ids(serving, one) for one in lists]


def _ids(serving: Serving, tokens: Sequence[int]) -> Ints:
    if tokens and max(tokens) >= serving.tokenizer.vocabulary_size:
        raise DataError(f"the prompt has the token {max(tokens)}",
                        allowed=f"tokens below {serving.tokenizer.vocabulary_size}")  # fmt: skip
    return np.array(tokens, np.int32)


def _biases(body: Drawn, vocabulary: int) -> tuple[tuple[int, float], ...]:
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
            raise RecipeError(f"logit_bias names the token {token!r:.40}", allowed=f"numbers below {vocabulary}")
        if not -100 <= bias <= 100:
            raise RecipeError(f"logit_bias has {bias} for the token {token}", allowed="-100 to 100")
    return tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())


def _is_given_form(body: Drawn) -> bool:
    asked = (body.guided_json, body.guided_regex, body.guided_choice, body.structured_outputs)
    return any(one is not None for one in asked)


def _bound(body: ChatBody) -> bool:
    return _is_given_form(body) or body.response_format is not None or body.tool_choice not in (None, "none", "auto")


def _chat_guide(grammars: Grammars, body: ChatBody, prompt: Ints) -> MakeGuide | None:
    found = _guide(grammars, body, prompt)
    form, tools = body.response_format, forced_tools(body)
    others = [one for one in (found, tools or None, form if form and form.type != "text" else None) if one is not None]
    if len(others) > 1:
        raise RecipeError(f"{len(others)} forms were asked for at once", allowed="one of response_format, tool_choice, "
                          "guided_json, guided_regex, guided_choice and structured_outputs")  # fmt: skip
    if tools:
        return grammars.json_schema({"anyOf": [_call_schema(tool) for tool in tools]})
    if form is None or form.type == "text":
        return found
    if form.type == "json_object" or form.json_schema is None:
        return grammars.json_object()
    return grammars.json_schema(form.json_schema.schema_ or {})


def _call_schema(tool: Tool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": tool.function.parameters or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _guide(grammars: Grammars, body: Drawn, prompt: Ints) -> MakeGuide | None:
    given = body.structured_outputs or Structure()
    asked = {
        "json": body.guided_json if body.guided_json is not None else given.json_,
        "regex": body.guided_regex if body.guided_regex is not None else given.regex,
        "choice": body.guided_choice if body.guided_choice is not None else given.choice,
        "json_object": given.json_object or None,
    }
    wanted = {name: value for name, value in asked.items() if value is not None}
    if len(wanted) > 1:
        raise RecipeError(f"the text is to be {' and '.join(wanted)}", allowed="one of them")
    for name, value in wanted.items():
        if name == "json":
            return grammars.json_schema(_schema(value))
        if name == "regex":
            return grammars.regex(str(value))
        if name == "choice" and isinstance(value, list):
            return grammars.choices([str(one) for one in value], after=prompt)
        return grammars.json_object()
    return None


def _schema(given: object) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as failure:
            raise RecipeError(f"the schema {given!r:.80} is no JSON: {failure}") from None
    if not isinstance(given, dict):
        raise RecipeError(f"the schema is {given!r:.80}", allowed="a JSON object")
    return given
