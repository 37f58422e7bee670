"""Routes for operators: health, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from safegen.serve.http import Service

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Return that the process runs."""
    return {"status": "ok"}


@router.get("/ready")
async def readiness(service: Service) -> JSONResponse:
    """Return whether the server answers requests, and what does not work; 503 if it does not."""
    unready = service.unready_reason()
    reason = unready or service.engine.state().reason  # such as that of a server behind a proxy
    return JSONResponse({"ready": not unready, "reason": reason}, 503 if unready else 200)


@router.get("/metrics")
async def metrics(service: Service) -> Response:
    """Return metrics in the text format of Prometheus."""
    content = service.metrics.render(service.engine.state(), is_ready=not service.unready_reason())
    return Response(content, media_type="text/plain; version=0.0.4")
