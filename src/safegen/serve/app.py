"""The FastAPI app: routes of every interface over one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from safegen._version import __version__
from safegen.serve.a1111.routes import router as a1111
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import Engine
from safegen.serve.errors import add_handlers
from safegen.serve.openai.routes import router as openai
from safegen.serve.openai.store import ImageStore
from safegen.serve.operations.audit import AuditLog
from safegen.serve.operations.metrics import Metrics
from safegen.serve.operations.middleware import add_middleware
from safegen.serve.operations.routes import router as operations
from safegen.serve.operations.tokens import read_clients
from safegen.serve.page.routes import router as page
from safegen.serve.provenance import load_signer
from safegen.serve.service import ImageService


def build_app(config: ServerConfig, engine: Engine, *, metrics: Metrics | None = None) -> FastAPI:
    """Return the app of a server. Its lifespan starts the engine and stops it.

    Args:
        config: settings of the server.
        engine: what makes the images, not started.
        metrics: metrics that the engine counts its batches in.

    Raises:
        UserError: the audit log, the token file or the certificate cannot be used, or is missing.
    """
    clients, signer = read_clients(config), load_signer(config)
    audit = AuditLog(config.audit_log, log_prompts=config.log_prompts)
    service = ImageService(engine, config, audit, metrics or Metrics(), clients, signer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="safegen",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    limits = config.limits
    app.state.image_store = ImageStore(limits.stored_image_bytes, limits.stored_image_seconds)
    for router in (operations, openai, a1111, page):
        app.include_router(router)
    add_handlers(app)
    add_middleware(app, config, service)
    return app
