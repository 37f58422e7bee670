"""Routes of the playground."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["page"])
