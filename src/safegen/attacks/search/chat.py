"""Client of a chat model behind the `POST {base_url}/chat/completions` protocol of OpenAI."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from safegen.core.errors import ConfigError, UserError, first_line
from safegen.core.text import is_control, one_line

MAX_REPLY = 1_000_000
"""Most bytes of a reply."""
RETRIED = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is repeated."""
PAUSE = 0.5
"""Seconds before the first repetition; each later pause is two times as long."""


class ChatError(UserError):
    """Chat endpoint that cannot be reached, or a reply that does not follow the protocol."""


class ChatClient:
    """Sends messages to one chat model. It connects to the host of its URL and to no other."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "",
        timeout: float = 60.0,
        retries: int = 2,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the URL and read the key; nothing is sent.

        Args:
            base_url: URL in front of `/chat/completions`, such as `http://localhost:8000/v1`.
            model: name of the model at the endpoint.
            api_key_env: environment variable with the API key; no key is sent if it is empty.
            timeout: seconds that a connection, or the whole reply after it, may take.
            retries: repetitions of a request that failed for a reason that may pass.
            options: more fields of the request, such as `temperature`.

        Raises:
            ConfigError: the URL is not accepted, or the variable is not set.
        """
        self.model, self.timeout, self.retries = model, timeout, retries
        self.options = dict(options or {})
        self._scheme, self._host, self._port, self._path = parse_base_url(base_url)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key_env:
            key = os.environ.get(api_key_env, "")
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"the environment variable {api_key_env} must hold the API key of "
                    f"{self._host}, got none that can be sent. Set it, or set api_key_env to ''."
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of the model's reply to messages with `role` and `content`.

        Raises:
            ChatError: the endpoint fails after all repetitions, or its reply has no text.
        """
        request = {"model": self.model, "messages": list(messages), **self.options}
        body = json.dumps(request).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                status, reply = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                failure = f"cannot be reached: {first_line(error)}"
                continue
            if status == 200:
                return self._read(reply)
            failure = f"answers with HTTP status {status}{_error_code(reply)}"
            if status not in RETRIED:
                break
        raise self._error(failure)

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Send one request and return the status and the body of the reply."""
        https = self._scheme == "https"
        connect = http.client.HTTPSConnection if https else http.client.HTTPConnection
        connection = connect(self._host, self._port, timeout=self.timeout)
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            return response.status, self._receive(response)
        finally:
            connection.close()

    def _receive(self, response: http.client.HTTPResponse) -> bytes:
        """Return the body of a reply, one byte more than allowed at most.

        Raises:
            TimeoutError: it takes too long; a reply that trickles in would never end otherwise.
        """
        end, body = time.monotonic() + self.timeout, b""
        while len(body) <= MAX_REPLY and (part := response.read1(MAX_REPLY + 1 - len(body))):
            body += part
            if time.monotonic() > end:
                raise TimeoutError("timed out")
        return body

    def _read(self, reply: bytes) -> str:
        """Return the text of a reply."""
        if len(reply) > MAX_REPLY:
            raise self._error(f"sends more than {MAX_REPLY} bytes")
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            raise self._error(f"sends a reply without choices{_error_code(reply)}") from None
        if not isinstance(content, str) or not content.strip():
            raise self._error("sends a choice without text")
        return content

    def _error(self, failure: str) -> ChatError:
        return ChatError(
            f"the chat endpoint at {self._host} {failure}. Check base_url, model and the API key."
        )


def parse_base_url(base_url: str) -> tuple[str, str, int | None, str]:
    """Return the scheme, host, port and path of the endpoint below a base URL.

    Raises:
        ConfigError: it is no http or https URL, has a user, query or fragment, or is http to a
            host that is not this machine.
    """
    rule = "base_url must be an http or https URL without user, query and fragment"
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    odd = any(is_control(c) or c.isspace() for c in base_url) or not base_url.isascii()
    if parts.scheme not in ("http", "https") or not host or odd or "@" in parts.netloc:
        raise ConfigError(f"{rule}, got {_without_user(base_url)!r}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{rule}, got {_without_user(base_url)!r}")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ConfigError(f"base_url must be https for other machines, got http for {host!r}")
    return parts.scheme, host, port, f"{parts.path.rstrip('/')}/chat/completions"


def parse_prompts(text: str, *, max_words: int) -> list[str]:
    """Return the prompts in a reply, one a line, without bullets, numbers, quotes and controls.

    Lines that are empty or have more than `max_words` words are left out, and so are repetitions.
    """
    prompts = []
    for line in text.splitlines():
        visible = "".join(" " if is_control(c) else c for c in line)
        bare = re.sub(r"^\s*(?:[-*•]+|\(?\d{1,3}[.):])\s+", "", visible).strip()
        bare = " ".join(bare.strip("\"'`“”‘’*").split())
        if bare and len(bare.split()) <= max_words and len(bare) <= 20 * max_words:
            prompts.append(bare)
    return list(dict.fromkeys(prompts))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _without_user(url: str) -> str:
    """Return a URL as one line without its user and password."""
    return one_line(re.sub(r"//[^/]*@", "//", url))[:200]


def _error_code(reply: bytes) -> str:
    """Return the error code in a reply, as ` (model_not_found)`; empty if there is none.

    Nothing else of a reply is shown: it may repeat the prompts.
    """
    try:
        error = json.loads(reply)["error"]
        codes = [error.get("code"), error.get("type")]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return ""
    names = [str(c) for c in codes if re.fullmatch(r"[a-z0-9_]{1,40}", str(c)) and c]
    return f" ({names[0]})" if names else ""
