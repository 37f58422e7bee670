"""Bearer tokens of the clients, from a TOML file with one table per client."""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import stat
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from safegen.core.documents import read_toml, validate
from safegen.core.errors import ConfigError, FileError, SafegenWarning, UnknownNameError
from safegen.serve.config import ClientConfig, ServerConfig
from safegen.serve.operations.limits import TokenBucket

MIN_TOKEN = 16
"""Fewest characters of a token."""
CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
NAME_RULE = "must have 1 to 64 letters, digits, - and _"
Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Client:
    """Client of the server, known by its token."""

    name: str
    digest: bytes
    """SHA-256 of its token."""
    stacks: tuple[str, ...] | None = None
    """Stacks that it may use, its default one first; None for all."""
    requests: TokenBucket | None = None
    """Limit of its requests."""
    images: TokenBucket | None = None
    """Limit of its images."""


class Clients:
    """All clients of a server."""

    def __init__(self, clients: Sequence[Client]) -> None:
        """Store the clients.

        Raises:
            ConfigError: two of them have one token.
        """
        self.clients = tuple(clients)
        if len({client.digest for client in clients}) < len(clients):
            raise ConfigError("tokens must be different, got one of two clients")

    def find(self, token: str) -> Client | None:
        """Return the client of a token; None if it has none.

        It compares with every client, so that the time says nothing about the tokens.
        """
        digest, found = hash_token(token), None
        for client in self.clients:
            if hmac.compare_digest(digest, client.digest):
                found = client
        return found

    def check_stacks(self, known: Iterable[str]) -> None:
        """Check that the clients' stacks exist.

        Raises:
            UnknownNameError: one does not.
        """
        known = set(known)
        for client in self.clients:
            for name in set(client.stacks or ()) - known:
                raise UnknownNameError("stack", name, known, f"Client {client.name!r} names it.")


def warn_if_public(path: Path) -> None:
    """Give a warning if everybody can read a file with a secret."""
    if path.stat().st_mode & stat.S_IROTH:
        warnings.warn(
            f"{str(path)!r} can be read by every user. Run: chmod o= {path}",
            SafegenWarning,
            stacklevel=3,
        )


def read_token_file(path: Path) -> Clients:
    """Return the clients of a token file. A file that everybody can read gives a warning.

    Raises:
        FileError: the file is missing or invalid. The message quotes no token.
    """
    tables = read_toml(path)
    if not tables:
        raise FileError(f"{str(path)!r} must have a table per client, got none")
    warn_if_public(path)
    try:
        return Clients([_read_client(path, name, table) for name, table in tables.items()])
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from error


def _read_client(path: Path, name: str, table: object) -> Client:
    where = f"{path} [{name}]"
    if not isinstance(table, dict):
        raise FileError(f"{str(path)!r} must have a table per client, got the key {name!r}")
    if not CLIENT_NAME.fullmatch(name):
        raise FileError(f"{where}: a client's name {NAME_RULE}")
    token, hashed = table.get("token"), table.get("token_sha256")
    if (token is None) == (hashed is None):
        raise FileError(f"{where}: token or token_sha256 must be given, and not both")
    if hashed is None and not is_token(token):
        raise FileError(
            f"{where}: token must have {MIN_TOKEN} or more printable ASCII characters, no spaces. "
            f"Make one with: safegen serve --new-token {name}"
        )
    config = validate(ClientConfig, table, where)
    digest = bytes.fromhex(config.token_sha256 or "") or hash_token(config.token or "")
    limits = config.requests_per_minute, config.images_per_minute
    requests, images = (
        TokenBucket(noun, limit) if limit else None
        for noun, limit in zip(("requests", "images"), limits, strict=True)
    )
    return Client(name, digest, config.stacks, requests, images)


def is_token(value: object) -> bool:
    """Return whether a value is a token that every client can send in a header."""
    if not isinstance(value, str) or len(value) < MIN_TOKEN:
        return False
    return value.isascii() and value.isprintable() and " " not in value


def read_clients(config: ServerConfig) -> Clients | None:
    """Return the clients of a server; None if everybody on this machine may use it.

    Raises:
        ConfigError: other machines could connect without a token.
        FileError: the token file is missing or invalid.
    """
    if config.token_file is not None:
        return read_token_file(config.token_file)
    if not config.is_loopback:
        raise ConfigError(
            f"token_file must be given with host {config.host!r}, since other machines can connect."
            " Make a token with: safegen serve --new-token NAME"
        )
    return None


def make_token(name: str) -> tuple[str, str]:
    """Return a random token, and the table of the token file that stores its hash.

    Raises:
        ConfigError: the name cannot be that of a client.
    """
    if not CLIENT_NAME.fullmatch(name):
        raise ConfigError(f"a client's name {NAME_RULE}, got {name!r}")
    token = secrets.token_urlsafe(32)
    return token, f'[{name}]\ntoken_sha256 = "{hash_token(token).hex()}"\n'


def read_authorization(headers: Headers) -> str | None:
    """Return the token in the headers of a request: `Bearer TOKEN`, or the password of `Basic`.

    None if there is no such header, or more than one.
    """
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, value = values[0].decode("latin-1").strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() == "basic":
        try:
            text = base64.b64decode(value, validate=True).decode()
        except ValueError:
            return None
        return text.partition(":")[2] or None
    return None


def hash_token(token: str) -> bytes:
    """Return the SHA-256 of a token."""
    return sha256(token.encode("utf-8", "surrogatepass")).digest()
