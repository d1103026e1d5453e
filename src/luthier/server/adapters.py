"""Adapters at run time, in two dialects: vLLM's load and unload, llama.cpp's list with weights."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field

from luthier.core.errors import RecipeError
from luthier.server.answers import ERRORS, ScaledAdapter
from luthier.server.bodies import Body, Scaled, Word
from luthier.server.errors import NotServedError
from luthier.server.names import Names, Pool
from luthier.server.serving import Serving


class LoadBody(Body):
    """POST /v1/load_lora_adapter. `lora_path` is a folder below the one of --adapters, in PEFT's format."""

    lora_name: Word
    lora_path: str = Field(min_length=1, max_length=1024)
    load_inplace: bool = False


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Word
    lora_int_id: int | None = None


def routes(serving: Serving) -> APIRouter:
    """The routes of adapters."""
    router = APIRouter(tags=["adapters"])
    names = serving.names

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def load_lora_adapter(body: LoadBody) -> Response:
        """Serve an adapter under a name. It is read when it is first asked for."""
        pool = _pool(names)
        folder = names.place(body.lora_path)
        names.require_free(body.lora_name, inplace=body.load_inplace)
        known = body.lora_name in names.adapters
        await serving.worker.do(lambda: pool.register(body.lora_name, folder, anew=known))
        names.add(body.lora_name, body.lora_name, folder=body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def unload_lora_adapter(body: UnloadBody) -> Response:
        """Let a name stand for nothing; requests under way go on."""
        pool = _pool(names)
        own = names.adapters.get(body.lora_name)
        if own is None or own.engine != own.name:
            raise NotServedError(f"no adapter that was loaded is called {body.lora_name!r:.80}",
                                 do="GET /v1/models lists what is served")  # fmt: skip
        del names.adapters[body.lora_name]
        await serving.worker.do(lambda: pool.unregister(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/lora-adapters", response_model=list[ScaledAdapter], responses=ERRORS)
    async def list_lora_adapters() -> Response:
        """The adapters with their weights in requests for the base."""
        return JSONResponse(_scales(names))

    @router.post("/lora-adapters", response_model=list[ScaledAdapter], responses=ERRORS)
    async def scale_lora_adapters(body: list[Scaled]) -> Response:
        """Set these weights; an adapter that is not named gets none."""
        names.rescale(body)
        return JSONResponse(_scales(names))

    return router


def _pool(names: Names) -> Pool:
    if names.pool is None:
        raise RecipeError(f"{names.base} runs without adapters that come and go",
                          allowed="decoders whose attention luthier drives")  # fmt: skip
    return names.pool


def _scales(names: Names) -> list[dict[str, object]]:
    return [{"id": place, "path": one.folder or one.name, "scale": one.scale}
            for place, one in enumerate(names.adapters.values())]  # fmt: skip
