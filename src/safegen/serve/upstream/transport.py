"""HTTP connection to the other server: which addresses are contacted, limits, and its errors."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Any

import httpx2

from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError, SafegenError
from safegen.core.text import cut_text, one_line
from safegen.serve.config import UpstreamConfig, is_loopback
from safegen.serve.engine.base import QueueFullError, UpstreamError
from safegen.serve.messages import Stage
from safegen.serve.operations.body import count_values
from safegen.serve.operations.tokens import warn_if_public

CONNECT_SECONDS = 10.0
"""Most seconds until a connection is open."""
KEEP_ALIVE_SECONDS = 2.0
"""Seconds for which an unused connection stays open; uvicorn closes its own after 5."""
MAX_ERROR_BYTES = 2**16
"""Most bytes that are read of an error."""
MAX_PORT = 65_535
MAX_VALUES = 200_000
"""Most values of an answer, each of which takes far more memory than its bytes."""
MAX_TOKEN_BYTES = 2**12
MAX_RETRY_SECONDS = 3600
BLOCK_CODES = frozenset({"moderation_blocked", "content_policy_violation", "content_filter"})
"""Codes by which servers of the OpenAI interface report a block."""
REFUSED_STATUSES = frozenset({400, 413, 422})
"""Statuses of a request that is itself wrong. Other 4xx are faults of the setup."""


class UpstreamBusyError(QueueFullError):
    """The other server takes no more requests for now."""

    def __init__(self, retry_after: int) -> None:
        """Build the message.

        Args:
            retry_after: seconds after which a place is likely.
        """
        text = "the other server has too many requests. Try again later."
        SafegenError.__init__(self, text)
        self.retry_after = retry_after


class UpstreamBlockError(Exception):
    """The other server blocked the prompt or its image."""

    def __init__(self, stage: Stage) -> None:
        """Store the stage at which it blocked."""
        super().__init__(f"blocked by the other server at the {stage}")
        self.stage = stage


class UpstreamClient:
    """Connections to the other server. Redirects, cookies and proxies are not used."""

    def __init__(self, config: UpstreamConfig) -> None:
        """Check the address and read the token.

        Raises:
            UserError: the address or the token file cannot be used.
        """
        self.config = config
        try:
            self.url = httpx2.URL(config.url.rstrip("/").removesuffix("/v1"))
        except httpx2.InvalidURL as error:
            raise ConfigError(f"url must be an address, got {config.url!r}: {error}") from error
        if (self.url.port or 1) > MAX_PORT:
            raise ConfigError(f"the port of url must be <= {MAX_PORT}, got {self.url.port}")
        self._authorization = _read_authorization(config)
        self._slots = asyncio.Semaphore(config.max_connections)
        self._http = httpx2.AsyncClient(
            headers={"accept": "application/json", "accept-encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            verify=_tls_context(config.ca_file),
            timeout=httpx2.Timeout(config.timeout, connect=min(CONNECT_SECONDS, config.timeout)),
            limits=httpx2.Limits(
                max_connections=config.max_connections + 1,  # one for the probe
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def post(
        self,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        form: Mapping[str, str] | None = None,
        files: Mapping[str, tuple[str, bytes, str]] | None = None,
    ) -> dict[str, Any]:
        """Return the JSON object that the other server answers with.

        Args:
            path: path below the server's address.
            body: body as JSON.
            form: fields of a form, in place of `body`.
            files: files of the form: name, bytes and media type.

        Raises:
            ConfigError: the other server refuses the request.
            UpstreamBlockError: it blocks the prompt or its image.
            UpstreamBusyError: it has too many requests.
            UpstreamError: anything else than a JSON object.
        """
        options: dict[str, Any] = {"json": body} if body is not None else {}
        if form is not None:
            options = {"data": form, "files": files}
        async with self._respond("POST", self._join(path), **options) as response:
            if response.status_code != 200:
                raise await _read_error(response)
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise UpstreamError("the other server answered with something else than JSON")
            data = await _read(response, self.config.max_response_bytes)
        return await asyncio.to_thread(_parse, data)

    async def fetch(self, url: str) -> bytes:
        """Return the bytes of an image that an answer names by its address.

        Raises:
            UpstreamError: the address is of a host that must not be contacted, or there is no
                file of an accepted size.
        """
        async with self._respond("GET", self.check_url(url)) as response:
            if response.status_code != 200:
                raise UpstreamError(f"an image of the other server: status {response.status_code}")
            return await _read(response, self.config.max_response_bytes)

    def check_url(self, text: str) -> httpx2.URL:
        """Return the address of an image, absolute, if it may be contacted.

        That is one of the other server itself, of `allowed_hosts`, or on loopback where the other
        server is on loopback too.

        Raises:
            UpstreamError: it may not.
        """
        try:
            url = self.url.join(text)
        except (httpx2.InvalidURL, ValueError, TypeError) as error:
            raise UpstreamError("the other server answered with an invalid address") from error
        hosts = {self.url.host, *(host.lower() for host in self.config.allowed_hosts)}
        is_local = is_loopback(self.url.host) and is_loopback(url.host)
        schemes = ("https",) if self.url.scheme == "https" else ("http", "https")
        if url.scheme not in schemes or url.userinfo:
            raise UpstreamError(
                f"the address of an image must be {' or '.join(schemes)}, without a login"
            )
        if (url.port or 1) > MAX_PORT:
            raise UpstreamError(f"the port of an image must be <= {MAX_PORT}, got {url.port}")
        if url.host not in hosts and not is_local:
            raise UpstreamError(
                f"the host of an image must be in allowed_hosts, got {cut_text(url.host, 60)!r}"
            )
        return url

    async def probe(self, path: str) -> str:
        """Return why the other server cannot be used now; empty if it answers."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                request = self._request("GET", self._join(path))
                response = await self._http.send(request, stream=True)
                await response.aclose()
        except (httpx2.HTTPError, TimeoutError, OSError):
            return "the other server cannot be reached"
        if response.status_code in (401, 403):
            return f"the other server refuses the token (status {response.status_code})"
        if response.status_code >= 500:
            return f"the other server answers with status {response.status_code}"
        return ""

    def _join(self, path: str) -> httpx2.URL:
        return httpx2.URL(f"{str(self.url).rstrip('/')}{path}")

    def _request(self, method: str, url: httpx2.URL, **options: Any) -> httpx2.Request:
        """Return a request; only the other server itself gets the token."""
        own = (self.url.scheme, self.url.host, self.url.port)
        if self._authorization and (url.scheme, url.host, url.port) == own:
            options["headers"] = {"authorization": self._authorization}
        return self._http.build_request(method, url, **options)

    @asynccontextmanager
    async def _respond(
        self, method: str, url: httpx2.URL, **options: Any
    ) -> AsyncIterator[httpx2.Response]:
        """Yield a response before its body is read, and close it at the end.

        Raises:
            UpstreamError: there is none within `timeout`, body included, or the connection failed.
        """
        seconds = self.config.timeout
        try:
            async with self._slots, asyncio.timeout(seconds):  # a wait for a slot is not its fault
                request = self._request(method, url, **options)
                response = await self._http.send(request, stream=True)
                try:
                    yield response
                finally:
                    await response.aclose()
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise UpstreamError(
                f"the other server gave no answer within {seconds:g} seconds", is_timeout=True
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
            raise UpstreamError(
                f"the connection to the other server failed: {type(error).__name__}"
            ) from error


async def _read(response: httpx2.Response, limit: int) -> bytes:
    """Return the body of a response.

    Raises:
        UpstreamError: it has more bytes, or is compressed.
    """
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise UpstreamError("the other server answered with a compressed body")
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise UpstreamError(f"the other server answered with more than {limit} bytes")
    return bytes(data)


def _parse(data: bytes) -> dict[str, Any]:
    if count_values(data) > MAX_VALUES:
        raise UpstreamError(f"the other server answered with more than {MAX_VALUES} values")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UpstreamError("the other server answered with invalid JSON") from error
    if not isinstance(content, dict):
        raise UpstreamError("the other server answered with another JSON value than an object")
    return content


async def _read_error(response: httpx2.Response) -> Exception:
    """Return what an answer without images means."""
    status = response.status_code
    if status == 429:
        return UpstreamBusyError(_retry_after(response.headers.get("retry-after", "")))
    if not 400 <= status < 500:
        return UpstreamError(f"the other server answered with status {status}")
    try:
        content = _parse(await _read(response, MAX_ERROR_BYTES))
    except UpstreamError:
        content = {}
    error = content.get("error")
    error = error if isinstance(error, dict) else {}
    if status in (400, 403) and error.get("code") in BLOCK_CODES:
        details = error.get("moderation_details")
        stage = details.get("moderation_stage") if isinstance(details, dict) else None
        return UpstreamBlockError("output" if stage == "output" else "input")
    message = _message(error.get("message") or content.get("detail") or content.get("error"))
    if status in REFUSED_STATUSES:
        return ConfigError(f"the other server refused the request{message}")
    return UpstreamError(f"the other server answered with status {status}{message}")


def _message(value: object) -> str:
    """Return what an error says, cut, in one line without control characters."""
    if isinstance(value, list) and value and isinstance(value[0], dict):  # pydantic's, in FastAPI
        value = value[0].get("msg")
    return f": {cut_text(one_line(value[:2000]))}" if isinstance(value, str) and value else ""


def _retry_after(value: str) -> int:
    """Return the seconds of a Retry-After header; 5 for a date or nonsense."""
    seconds = int(value) if value.isascii() and value.isdigit() and len(value) < 8 else 5
    return min(max(seconds, 1), MAX_RETRY_SECONDS)


def _tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return the context that verifies certificates: by those of a file, or of the system.

    Raises:
        FileError: the file has none.
    """
    if ca_file is None:
        return httpx2.create_ssl_context(trust_env=False)
    try:
        text = read_bytes(ca_file).decode("ascii")
        return ssl.create_default_context(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise FileError(f"{ca_file} must have certificates in PEM, got none") from error


def _read_authorization(config: UpstreamConfig) -> str:
    """Return the header `Authorization` for the other server; empty without a token."""
    if config.token_file is None:
        return ""
    data = read_bytes(config.token_file, limit=MAX_TOKEN_BYTES).strip()
    warn_if_public(config.token_file)
    text = data.decode("ascii", "replace")
    if not text or not text.isprintable() or " " in text or not text.isascii():
        raise FileError(
            f"{config.token_file} must have one token in printable ASCII characters. "
            "Write it there, and nothing else."
        )
    if config.kind == "a1111" and ":" in text:  # of --api-auth
        return f"Basic {base64.b64encode(data).decode()}"
    return f"Bearer {text}"
