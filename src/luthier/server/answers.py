"""What the routes answer, for the description of the API. Routes build plain values; these are their shapes."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel


class Problem(BaseModel):
    """What is wrong: a sentence that says what to do, OpenAI's type, the parameter, and a code that never changes."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(BaseModel):
    """An error."""

    error: Problem


class Usage(BaseModel):
    """Tokens that were read and said."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class CalledFunction(BaseModel):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCalled(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCalled] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(BaseModel):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogProbs(BaseModel):
    """Log-probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: TextLogProbs | None
    finish_reason: Literal["stop", "length"]
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    """A completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served; an adapter has a parent. `max_model_len` is how many tokens it takes, as with vLLM."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """A text as tokens."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    """Tokens as a text."""

    prompt: str


class Health(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ok", "draining", "failed"]


class Told(BaseModel):
    """That something was done."""

    message: str


class ScaledAdapter(BaseModel):
    """An adapter and its weight in requests for the base."""

    id: int
    path: str
    scale: float


class Vector(BaseModel):
    """The vector of a text: numbers, or their little-endian bytes in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Vectors(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: Usage


class StoredFile(BaseModel):
    """A file that was uploaded or made."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(BaseModel):
    """Files."""

    object: Literal["list"]
    data: list[StoredFile]
    has_more: bool


class Deleted(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"]
    deleted: bool


class TuningJob(BaseModel):
    """A fine-tune."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    training_file: str
    validation_file: str | None
    trained_tokens: int | None
    error: dict[str, Any] | None
    hyperparameters: dict[str, Any]
    result_files: list[str]
    seed: int
    organization_id: str
    metadata: dict[str, str] | None
    method: dict[str, Any]


class JobList(BaseModel):
    """Fine-tunes, the newest first."""

    object: Literal["list"]
    data: list[TuningJob]
    has_more: bool


class TuningEvent(BaseModel):
    """Something that happened in a fine-tune."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventList(BaseModel):
    """Events, the newest first."""

    object: Literal["list"]
    data: list[TuningEvent]
    has_more: bool


class TuningCheckpoint(BaseModel):
    """A state that was saved."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class CheckpointList(BaseModel):
    """Saved states, the newest first."""

    object: Literal["list"]
    data: list[TuningCheckpoint]
    has_more: bool


ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": Refusal, "description": "It cannot be done as asked; the message says why and what to do"},
    403: {"model": Refusal, "description": "A page of another origin, or a place that is not open"},
    404: {"model": Refusal, "description": "No such model, adapter, file or job"},
    429: {"model": Refusal, "description": "Too many requests are under way"},
    500: {"model": Refusal, "description": "The engine broke off"},
}
"""What every route may answer besides; the guard's answers are added to all of them."""
