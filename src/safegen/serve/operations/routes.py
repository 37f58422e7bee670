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
    """Return whether the server answers requests; 503 if it does not."""
    state = service.engine.state()
    status = 200 if state.is_ready else 503
    return JSONResponse({"ready": state.is_ready, "reason": state.reason}, status)


@router.get("/metrics")
async def metrics(service: Service) -> Response:
    """Return metrics in the text format of Prometheus."""
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")
