"""Routes of the A1111 interface."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])
