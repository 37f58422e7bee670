"""What belongs to the request that is being answered: its id, its client and its log fields."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from safegen.serve.messages import StackInfo
from safegen.serve.operations.tokens import Client


@dataclass
class RequestContext:
    """State of one request; the middleware sets it, and every task of the request has it."""

    id: str
    """Request id."""
    client: Client | None = None
    """Client by its token; None without tokens."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's line in the log."""


CONTEXT: ContextVar[RequestContext | None] = ContextVar("request_context", default=None)
"""The request that is being answered; None outside of one."""


def add_log_fields(**fields: Any) -> None:
    """Add fields to the line that the log gets of the current request."""
    if (context := CONTEXT.get()) is not None:
        context.fields |= fields


def select_stacks(stacks: Mapping[str, StackInfo]) -> Mapping[str, StackInfo]:
    """Return the stacks that the current client may use, its default one first."""
    context = CONTEXT.get()
    if context is None or context.client is None or context.client.stacks is None:
        return stacks
    return {name: stacks[name] for name in context.client.stacks if name in stacks}


def take_images(count: int) -> None:
    """Count images of the current client.

    Raises:
        ConfigError: there are more than its limit permits in a minute.
        RateLimitError: it has reached its limit.
    """
    context = CONTEXT.get()
    if context is not None and context.client is not None and context.client.images is not None:
        context.client.images.take(count)
