"""The small routes: models, tokens, health and numbers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field

from luthier.core.errors import DataError
from luthier.server.answers import ERRORS, Detokenized, Health, ModelCard, ModelList, Tokens
from luthier.server.asking import message_of
from luthier.server.bodies import Body, Said, Token, Tool
from luthier.server.errors import NotServedError
from luthier.server.serving import Serving


class TokenizeBody(Body):
    """POST /tokenize: a text, or a conversation through the chat template."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Said] | None = Field(None, min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(None, max_length=128)
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=512)
    tokens: list[Token]


def routes(serving: Serving) -> APIRouter:
    """The small routes."""
    router = APIRouter()

    @router.get("/health", response_model=Health, tags=["server"], responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether the server takes requests; it needs no token and tells nothing else."""
        worker = serving.worker
        status = "failed" if worker.dead else "draining" if worker.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @router.get("/metrics", response_class=PlainTextResponse, tags=["server"])
    async def metrics() -> Response:
        """Numbers in Prometheus' text form."""
        text = serving.metrics.text(serving.worker.counts, open_now=serving.worker.open)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @router.get("/v1/models", response_model=ModelList, tags=["models"], responses=ERRORS)
    async def list_models() -> Response:
        """The base, and each adapter with its parent."""
        return JSONResponse({"object": "list", "data": [_card(serving, name) for name in serving.names.all]})

    @router.get("/v1/models/{model:path}", response_model=ModelCard, tags=["models"], responses=ERRORS)
    async def retrieve_model(model: Annotated[str, Path(max_length=512)]) -> Response:
        """One model."""
        if model not in serving.names.all:
            serving.names.engine_name(model, None)
            raise NotServedError(f"{model!r:.80} is a mix", allowed=", ".join(serving.names.all[:20]))
        return JSONResponse(_card(serving, model))

    @router.post("/tokenize", response_model=Tokens, tags=["tokens"], responses=ERRORS)
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a text, or of what a conversation becomes."""
        return JSONResponse(await serving.in_words(lambda: _tokens(serving, body)))

    @router.post("/detokenize", response_model=Detokenized, tags=["tokens"], responses=ERRORS)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of tokens, control tokens included."""
        size = serving.tokenizer.vocabulary_size
        if body.tokens and max(body.tokens) >= size:
            raise DataError(f"the token {max(body.tokens)}", allowed=f"tokens below {size}")
        return JSONResponse({"prompt": await serving.in_words(lambda: serving.tokenizer.decode(body.tokens))})

    return router


def _card(serving: Serving, name: str) -> dict[str, object]:
    names = serving.names
    own = names.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": own.created if own is not None else names.created,
        "owned_by": "luthier",
        "root": names.base if own is None else name,
        "parent": None if own is None else names.base,
        "max_model_len": serving.opened.model.context_tokens,
    }


def _tokens(serving: Serving, body: TokenizeBody) -> dict[str, object]:
    tokenizer = serving.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise DataError("prompt or messages", allowed="one of the two")
    if body.messages is not None:
        messages = [message_of(index, said) for index, said in enumerate(body.messages)]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        ids = serving.opened.renderer.prompt_ids(messages, tools).tolist()
    else:
        ids = tokenizer.encode(body.prompt or "")[0].tolist()
        if body.add_special_tokens and tokenizer.adds_bos and tokenizer.bos_id is not None:
            ids = [tokenizer.bos_id, *ids]
    texts = [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
    limit = serving.opened.model.context_tokens
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}
