"""/v1/files: upload, list, look at, read and delete data files."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse

from luthier.server.answers import ERRORS, Deleted, FileList, StoredFile
from luthier.server.errors import unknown
from luthier.server.serving import Serving
from luthier.server.store import require_rows

Id = Annotated[str, Path(max_length=64)]
Most = Annotated[int, Query(ge=1, le=10_000)]


def routes(serving: Serving) -> APIRouter:
    """The routes of files."""
    router = APIRouter(tags=["files"])
    files = serving.files

    @router.post("/v1/files", response_model=StoredFile, responses=ERRORS)
    async def create_file(
        request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[Literal["fine-tune"], Form()]
    ) -> Response:
        """Upload a JSONL file, in any of luthier's data formats."""
        for name in await request.form():
            if name not in ("file", "purpose"):
                raise unknown("body", name, ("file", "purpose"))
        content = await file.read()
        await asyncio.to_thread(require_rows, content)
        made = await asyncio.to_thread(files.add, file.filename or "file.jsonl", content, purpose=purpose)
        return JSONResponse(made.as_plain())

    @router.get("/v1/files", response_model=FileList, responses=ERRORS)
    async def list_files(
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        limit: Most = 10_000,
        after: Annotated[str | None, Query(max_length=64)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The files, the newest first."""
        found = await asyncio.to_thread(files.all)
        found = [each for each in found if purpose is None or each.purpose == purpose]
        found = found if order == "desc" else found[::-1]
        names = [each.id for each in found]
        start = names.index(after) + 1 if after in names else 0
        page = found[start : start + limit]
        return JSONResponse({"object": "list", "data": [each.as_plain() for each in page],
                             "has_more": start + limit < len(found)})  # fmt: skip

    @router.get("/v1/files/{file_id}", response_model=StoredFile, responses=ERRORS)
    async def retrieve_file(file_id: Id) -> Response:
        """What is known of a file."""
        return JSONResponse(files.get(file_id).as_plain())

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse, responses={
        **ERRORS, 200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    })  # fmt: skip
    async def retrieve_file_content(file_id: Id) -> Response:
        """What a file holds."""
        return FileResponse(files.path(file_id), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}", response_model=Deleted, responses=ERRORS)
    async def delete_file(file_id: Id) -> Response:
        """Forget a file."""
        files.get(file_id)
        await asyncio.to_thread(files.remove, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router
