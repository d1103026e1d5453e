"""POST /v1/embeddings: the vector of a text, of an encoder.

Idea: the last layer's states of a text, pooled as the model's folder says in the files of sentence-transformers
(mean, first token or largest), brought to length 1 where it says so. A folder that says nothing gets the mean at length
1, as OpenAI's vectors have it. Texts of a request are read together, the longest beside each other.
Source: Reimers and Gurevych, arXiv 1908.10084.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from luthier.core.errors import DataError, RecipeError
from luthier.data.tokenizer import Tokenizer
from luthier.model.language_model import LanguageModel
from luthier.server.answers import ERRORS, Vectors
from luthier.server.bodies import Body, Token
from luthier.server.pooling import Pooling
from luthier.server.serving import Serving

AT_ONCE = 8192
"""Places that are read at once, padding included."""


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    model: str = Field(max_length=512)
    input: str | list[Token] | list[str] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = "float"
    user: str | None = Field(None, max_length=1024, description="taken and not used")


@torch.no_grad()
def vectors_of(model: LanguageModel, pooling: Pooling, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The vector of each row of tokens, whatever is read beside it."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    made: dict[int, list[float]] = {}
    batch: list[int] = []
    for place, index in enumerate(order):
        batch.append(index)
        following = order[place + 1] if place + 1 < len(order) else None
        if following is None or (len(batch) + 1) * len(texts[following]) > AT_ONCE:
            width = max(len(texts[each]) for each in batch)
            ids = torch.tensor([[*texts[each], *[0] * (width - len(texts[each]))] for each in batch])
            mask = torch.tensor([[1] * len(texts[each]) + [0] * (width - len(texts[each])) for each in batch])
            ids, mask = ids.to(model.device), mask.to(model.device)
            states = model.module.base_model(input_ids=ids, attention_mask=mask)[0]
            made.update(zip(batch, pooling(states.float(), mask).tolist(), strict=True))
            batch = []
    return [made[index] for index in range(len(texts))]


def routes(serving: Serving) -> APIRouter:
    """The route of vectors."""
    router = APIRouter(tags=["vectors"])

    @router.post("/v1/embeddings", response_model=Vectors, responses=ERRORS)
    async def create_embedding(body: EmbeddingsBody) -> Response:
        """The vectors of texts."""
        serving.names.engine_name(body.model)
        pooling = serving.pooling
        if pooling is None:
            raise RecipeError(f"{serving.names.base} is a decoder and was not trained for vectors",
                              do="serve an encoder, such as sentence-transformers/all-MiniLM-L6-v2")  # fmt: skip
        rows = await serving.in_words(lambda: _rows(serving, body, pooling))
        found = await serving.worker.do(lambda: vectors_of(serving.opened.model, pooling, rows))
        plain: list[Any] = [_base64(each) for each in found] if body.encoding_format == "base64" else found
        count = sum(map(len, rows))
        return JSONResponse({
            "object": "list",
            "data": [{"object": "embedding", "index": at, "embedding": each} for at, each in enumerate(plain)],
            "model": body.model,
            "usage": {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count},
        })  # fmt: skip

    return router


def _rows(serving: Serving, body: EmbeddingsBody, pooling: Pooling) -> list[list[int]]:
    """The tokens of each text, with the marks that the tokenizer puts around it."""
    given, tokenizer = body.input, serving.tokenizer
    lists: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not 0 < len(lists) <= serving.settings.limits.prompts:
        raise RecipeError(f"input has {len(lists)} texts", allowed=f"1 to {serving.settings.limits.prompts}")
    return [_row(tokenizer, one, serving.opened.model, pooling, at) for at, one in enumerate(lists)]


def _row(tokenizer: Tokenizer, given: str | list[int], model: LanguageModel, pooling: Pooling, at: int) -> list[int]:
    ids = tokenizer.raw(given)["input_ids"] if isinstance(given, str) else given
    if pooling.longest is not None and len(ids) > pooling.longest and isinstance(given, str):
        # The last mark stays, as where the model was trained.
        ids = [*ids[: pooling.longest - 1], ids[-1]]
    first = model.executor.entry.first_position
    room = None if model.context_tokens is None else model.context_tokens - first
    if not ids or (room is not None and len(ids) > room):
        raise DataError(f"text {at} has {len(ids)} tokens", allowed=f"1 to {room}")
    if max(ids) >= tokenizer.vocabulary_size:
        raise DataError(f"text {at} has the token {max(ids)}", allowed=f"tokens below {tokenizer.vocabulary_size}")
    return list(ids)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(torch.tensor(vector, dtype=torch.float32).numpy().astype("<f4").tobytes()).decode()
