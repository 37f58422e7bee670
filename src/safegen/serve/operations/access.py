"""Who may call: the check of the host and the origin, of the token and of its rate limit."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from safegen.serve.config import ServerConfig, is_loopback
from safegen.serve.errors import RequestError, to_request_error
from safegen.serve.operations.body import send_error
from safegen.serve.operations.context import CONTEXT
from safegen.serve.operations.limits import RateLimitError
from safegen.serve.operations.tokens import Clients, read_authorization

PUBLIC_PATHS = ("/", "/health", "/ready")
"""Paths that need no token."""
PUBLIC_FOLDER = "/page/"
"""Start of the paths of the page's files, which need no token."""
STORED_IMAGES = "/v1/images/files/"
"""Start of the paths of images for clients: a name, too long to guess, is the token."""


class OriginMiddleware:
    """Refuses requests that a browser makes for another site.

    The host must be a name of this server; otherwise another site could give its own name the
    address of this server (DNS rebinding). The origin, if any, must be this server or permitted.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.config = app, config
        names = (config.host, *config.allowed_hosts)
        self.hosts = {name.strip("[]").rstrip(".").lower() for name in names}
        self.origins = {origin.rstrip("/").lower() for origin in config.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, or answer 403."""
        if scope["type"] == "http" and (reason := self._refuse(scope)):
            await send_error(RequestError(403, reason, code="forbidden"), scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refuse(self, scope: Scope) -> str:
        """Return why a request is refused; empty if it is not."""
        hosts, origins = (
            [v.decode("latin-1") for name, v in scope["headers"] if name == header]
            for header in (b"host", b"origin")
        )
        if len(hosts) > 1 or not all(map(self.is_own, hosts)):
            return "the host must be a name of this server. Add it to allowed_hosts"
        own = {f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")}
        for origin in origins:
            if origin.lower() not in own | self.origins:
                return "the origin must be this server. Add it to allowed_origins"
        return ""

    def is_own(self, host: str) -> bool:
        """Return whether a host, with or without a port, is a name of this server."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.hosts or is_loopback(name):
            return True
        if self.config.is_loopback:
            return False
        try:
            ip_address(name)
        except ValueError:
            return False
        return True  # no other site can own an address


class TokenMiddleware:
    """Refuses requests without a valid token with 401, those beyond its rate limit with 429."""

    def __init__(self, app: ASGIApp, clients: Clients | None) -> None:
        self.app, self.clients = app, clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app with the client's name in its state, or answer with an error."""
        if scope["type"] != "http" or self.clients is None or is_public(scope):
            await self.app(scope, receive, send)
            return
        token = read_authorization(scope["headers"])
        client = self.clients.find(token) if token is not None else None
        if client is None:
            await send_error(refuse_token(token), scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = client.name
        if (context := CONTEXT.get()) is not None:
            context.client = client
        try:
            if client.requests is not None:
                client.requests.take()
        except RateLimitError as error:
            await send_error(to_request_error(error), scope, receive, send)
            return
        await self.app(scope, receive, send)


def is_public(scope: Scope) -> bool:
    """Return whether a request needs no token: health, readiness, files of the page, and images."""
    path = scope["path"]
    public = path in PUBLIC_PATHS or path.startswith((PUBLIC_FOLDER, STORED_IMAGES))
    return public and scope["method"] in ("GET", "HEAD")


def refuse_token(token: str | None) -> RequestError:
    """Return the error of a request without a valid token."""
    return RequestError(
        401,
        "the token is unknown" if token else "a bearer token must be given",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
