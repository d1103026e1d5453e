"""What clients may ask for: the bodies of the routes that generate, parameter by parameter.

They refuse what they do not know. Parameters that programs send out of habit and that change nothing here are taken at
their neutral value only; another one is refused with what to do instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from luthier.core.errors import RecipeError

Number = Annotated[float, Field(allow_inf_nan=False)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Json = dict[str, Any]


class Body(BaseModel):
    """A body that refuses what it does not know and converts nothing silently."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Scaled(Body):
    """An adapter by its place in GET /lora-adapters, and its weight."""

    id: int = Field(ge=0, lt=2**31)
    scale: Number = Field(ge=-100, le=100)


class Structure(Body):
    """What the text must be: JSON of a schema, a match of a regular expression, or one of some texts."""

    json_: Json | str | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=4096)
    choice: list[Word] | None = Field(None, min_length=1, max_length=256)
    json_object: bool | None = None


class Drawn(Body):
    """How tokens are chosen, in OpenAI's words and in vLLM's."""

    model: str = Field(max_length=512)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 are off")
    min_p: Number | None = Field(None, ge=0, lt=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Word | list[Word] | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=64)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, lt=2**31)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, Number] | None = Field(None, max_length=1024)
    guided_json: Json | str | None = None
    guided_regex: str | None = Field(None, max_length=4096)
    guided_choice: list[Word] | None = Field(None, min_length=1, max_length=256)
    structured_outputs: Structure | None = None
    drafts: int | None = Field(
        None, ge=0, lt=2**31, description="tokens to look ahead, at most as the server was started; 0 is off"
    )
    lora: list[Scaled] | None = Field(None, max_length=16)
    user: str | None = Field(None, max_length=1024, description="taken and not used")

    @model_validator(mode="after")
    def _stops(self) -> Drawn:
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise RecipeError(f"stop has {len(self.stop)} texts", allowed="at most 16")
        return self


class Function(Body):
    """A function that is called: its name, and its arguments as JSON text."""

    name: Word
    arguments: str = "{}"


class Call(Body):
    """A call in a message of the assistant."""

    id: str = Field("", max_length=256)
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class TextPart(Body):
    """A part of a message. Only text is read: nothing is fetched for a request."""

    type: Literal["text"]
    text: str


class Said(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[Call] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=256)
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    function_call: None = None


class ToolFunction(Body):
    """A function on offer; `parameters` is a JSON schema."""

    name: Word
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool on offer."""

    type: Literal["function"]
    function: ToolFunction


class Named(Body):
    """A function by name."""

    name: Word


class ToolChoice(Body):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: Named


class Schema(Body):
    """A JSON schema with its name."""

    name: Word = "answer"
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise RecipeError("response_format has no schema", allowed="type json_schema with json_schema.schema")
        return self


class ChatBody(Drawn):
    """POST /v1/chat/completions."""

    messages: list[Said] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false keeps the first call of an answer")
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, description="taken and not used")
    service_tier: Literal["auto", "default"] | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer; the newer name goes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


Prompt = str | list[Token] | list[str] | list[list[Token]]


class CompletionBody(Drawn):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: None = None
    best_of: int | None = Field(None, ge=1, le=16)
    return_token_ids: bool | None = Field(None, description="the ids of prompt and answer beside the text")
    return_tokens_as_token_ids: bool | None = Field(None, description="token_id:ID in logprobs, every token of them")
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = Field(
        "raw_logprobs", description="of the model, or of what is drawn from: after temperature, with nothing cut off"
    )
    suffix: None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, 16 as OpenAI has it."""
        return 16 if self.max_tokens is None else self.max_tokens


INSTEAD = {
    "suffix": "put the text around the gap into the prompt as the model's own markers say",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this server reads and says text",
    "prediction": "leave it out; the answer is the same",
    "web_search_options": "offer a tool of your own",
    "reasoning_effort": "put it into the system message if the model knows such words",
    "verbosity": "ask for it in the system message",
    "use_beam_search": "use best_of, or luthier's own generate",
    "guided_grammar": "use guided_regex or guided_json",
    "prompt_logprobs": "use echo with logprobs",
    "dimensions": "cut the vectors yourself; the model was not trained for fewer",
    "image_url": "this server reads text",
    "chat_template": "templates come with the model, never with a request",
    "store": "keep the answers yourself",
    "service_tier": "leave it out",
    "modalities": "leave it out: answers are text",
}
"""What to do where a known parameter cannot be had."""
