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
    """Return whether the server answers requests, and why not; 503 if it does not."""
    reason = service.unready_reason()
    return JSONResponse({"ready": not reason, "reason": reason}, 503 if reason else 200)


@router.get("/metrics")
async def metrics(service: Service) -> Response:
    """Return metrics in the text format of Prometheus."""
    content = service.metrics.render(service.engine.state(), is_ready=not service.unready_reason())
    return Response(content, media_type="text/plain; version=0.0.4")
