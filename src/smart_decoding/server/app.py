"""The application: routes, gate, and the worker's life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from smart_decoding import __version__
from smart_decoding.server import errors, openai_api
from smart_decoding.server.errors import ApiError
from smart_decoding.server.live import CSP, PAGE, Live
from smart_decoding.server.metrics import CONTENT_TYPE, Metrics
from smart_decoding.server.middleware import Gate
from smart_decoding.server.settings import ServerSettings
from smart_decoding.server.worker import Worker


def create_app(worker: Worker, settings: ServerSettings, metrics: Metrics, live: Live) -> FastAPI:
    """The ASGI application over a worker that has not been started yet."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="SMART", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    errors.install(app)
    app.include_router(openai_api.router(worker, settings))

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Live: the engine loads or runs."""
        if not worker.alive:
            raise ApiError(
                503, "the engine has stopped; the server's log says why", "engine_stopped"
            )
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        """Ready: the model is loaded, its costs are known, and it has answered once."""
        worker.ready()
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> JSONResponse:
        return JSONResponse({"version": __version__})

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": CSP})

    @app.get("/events", include_in_schema=False)
    async def events() -> StreamingResponse:
        live.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            live.events(worker), media_type="text/event-stream", headers=headers
        )

    app.add_middleware(Gate, settings=settings)
    return app
