"""The application: routes, gate, and the worker's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from smart_decoding import __version__
from smart_decoding.server import errors, openai_api
from smart_decoding.server.answering import STREAM_HEADERS
from smart_decoding.server.live import FILES, PAGE_HEADERS, TYPES, Live
from smart_decoding.server.middleware import Gate

if TYPE_CHECKING:
    from smart_decoding.server.metrics import Metrics
    from smart_decoding.server.worker import Worker

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(worker: Worker, metrics: Metrics, live: Live) -> FastAPI:
    """Return the ASGI application over a worker that has not been started yet."""
    settings = worker.settings
    app = FastAPI(
        title="SMART",
        version=__version__,
        lifespan=_lifespan(worker),
        docs_url=None,
        redoc_url=None,
    )
    app.state.texts = worker.texts
    errors.install(app)
    app.include_router(openai_api.router(worker))
    app.include_router(_state(worker, metrics))
    app.include_router(_live_page(worker, live), include_in_schema=False)
    app.add_middleware(Gate, settings=settings)
    if settings.allowed_origins:  # outside of the gate: browsers ask first, and without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "warning", "retry-after"],
        )
    return app


def _lifespan(worker: Worker) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    return lifespan


def _state(worker: Worker, metrics: Metrics) -> APIRouter:
    api = APIRouter()

    @api.get("/health")
    async def health() -> dict[str, str]:
        """Ready: the model is loaded and has answered once."""
        worker.ready()
        return {"status": "ok"}

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """Live: the engine loads or runs."""
        worker.check_alive()
        return {"status": "ok"}

    @api.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    @api.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(metrics), media_type=METRICS_TYPE)

    return api


def _live_page(worker: Worker, live: Live) -> APIRouter:
    api = APIRouter()

    @api.get("/")
    async def index() -> FileResponse:
        return await page("index.html")

    @api.get("/page/{name}")
    async def page(name: str) -> FileResponse:
        path = FILES.get(name)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type=TYPES[path.suffix], headers=PAGE_HEADERS)

    @api.get("/events")
    async def events(request: Request) -> StreamingResponse:
        client = request.state.client
        live.check_room(client)
        stream = live.events(worker, client, request.state.viewer)
        return StreamingResponse(stream, media_type="text/event-stream", headers=STREAM_HEADERS)

    return api
