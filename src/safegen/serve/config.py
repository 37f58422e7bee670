"""Settings of the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from safegen.core.documents import read_toml, validate
from safegen.core.errors import FileError
from safegen.core.files import exists
from safegen.core.generation import GuidanceScale
from safegen.core.registry import MODELS
from safegen.core.settings import (
    MAX_COUNT,
    MAX_SIDE,
    MAX_STEPS,
    MAX_THREADS,
    BaseSettings,
    Digest,
    Name,
    raises_config_error,
)

Timeout = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
"""Time in seconds after which something is given up."""
Origin = Annotated[str, Field(pattern=r"^https?://[^/?#@\s*]+$")]
"""Scheme, host and port of a site, as browsers send them."""
UpstreamKind = Literal["openai", "a1111"]
"""Interface of the other server."""
EngineKind = Literal["local", "ray"]
"""Where the stacks run: in worker processes of this machine, or in a Ray cluster."""
UpstreamField = Literal[
    "guidance_scale", "negative_prompt", "num_inference_steps", "response_format", "seed"
]
"""Field of a request in the OpenAI interface that some servers do not know."""


class UpstreamConfig(BaseSettings):
    """Settings of the image server behind a proxy."""

    url: str = Field(max_length=2000)
    """Address of the other server, without the path of its interface."""
    kind: UpstreamKind = "openai"
    """Interface of the other server."""
    model: str | None = None
    """Model to ask the other server for. Default: its own."""
    token_file: Path | None = None
    """File with the bearer token for the other server; USER:PASSWORD for A1111's --api-auth."""
    ca_file: Path | None = None
    """PEM file with the certificates to trust for https. Default: those of the system."""
    timeout: Timeout = 120.0
    """Seconds that the other server may take for a request."""
    allowed_hosts: tuple[Name, ...] = ()
    """Hosts besides that of `url` from which images may be fetched, if answers have addresses.
    Loopback is one of them if `url` is on loopback."""
    omit: tuple[UpstreamField, ...] = ()
    """Fields that the other server does not know. They are not sent."""
    max_connections: int = Field(default=16, ge=1, le=1024)
    """Most requests to the other server at a time."""
    max_response_bytes: int = Field(default=64 * 2**20, ge=1024, le=2**30)
    """Most bytes of an answer, and of an image that is fetched."""
    max_side: int = Field(default=2048, ge=8, le=MAX_SIDE)
    """Most pixels of a side of an image of the other server."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url):
            raise ValueError(
                "must start with http:// or https://, and have no user, query or fragment, "
                f"got {url!r}"
            )
        return url


class RequestLimits(BaseSettings):
    """Limits of one request. A request beyond one of them is refused."""

    images: int = Field(default=10, ge=1, le=100)
    """Most images."""
    steps: int = Field(default=100, ge=1, le=MAX_STEPS)
    """Most denoising steps."""
    side: int = Field(default=1024, ge=8, le=MAX_SIDE)
    """Most pixels of a side."""
    prompt_chars: int = Field(default=4000, ge=1, le=1_000_000)
    """Most characters of a prompt and of a negative prompt."""
    body_bytes: int = Field(default=16 * 2**20, ge=1024, le=2**30)
    """Most bytes of a request's body."""
    total_body_bytes: int = Field(default=256 * 2**20, ge=1024, le=2**40)
    """Most bytes of the bodies of all requests at a time; further requests get 503."""
    json_values: int = Field(default=200_000, ge=1000, le=10_000_000)
    """Most values of a JSON body, counted by its commas and brackets: each takes far more memory
    than its bytes."""
    header_bytes: int = Field(default=16 * 2**10, ge=1024, le=2**20)
    """Most bytes of a request's headers."""
    read_seconds: Timeout = 30.0
    """Most seconds for the headers of a request, and for its body."""
    write_seconds: Timeout = 30.0
    """Most seconds that a client may take for a part of a response, 256 KiB."""
    moderation_inputs: int = Field(default=32, ge=1, le=10_000)
    """Most texts and images of a moderation."""
    stored_image_bytes: int = Field(default=256 * 2**20, ge=1, le=2**40)
    """Most bytes of the images in memory for clients that fetch them by address."""
    stored_image_seconds: Timeout = 600.0
    """Seconds for which such an image can be fetched."""
    connections: int = Field(default=256, ge=1, le=100_000)
    """Most requests at a time; further ones get 503. There are twice as many open connections
    at most."""


class ClientConfig(BaseSettings):
    """Settings of one client, a table of the token file."""

    token: str | None = None
    """Bearer token, of 16 characters or more."""
    token_sha256: Digest | None = None
    """SHA-256 of the bearer token in hexadecimal digits, in place of the token."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Most requests per minute. Default: no limit."""
    images_per_minute: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Most images per minute. Default: no limit."""
    stacks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Stacks that the client may use, its default one first. Default: all."""


class RayConfig(BaseSettings):
    """Settings of the engine `ray`: where and how many replicas of each stack run."""

    address: str | None = None
    """Address of a Ray cluster. Default: one on this machine, which ends with the server."""
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    """Most replicas per stack; more than `workers` turns autoscaling on. Default: `workers`."""
    target_ongoing_requests: float = Field(default=8.0, gt=0, le=100_000, allow_inf_nan=False)
    """Requests per replica that autoscaling aims at."""
    num_cpus: float = Field(default=1.0, ge=0, le=1024, allow_inf_nan=False)
    """CPUs that Ray reserves per replica."""
    num_gpus: float = Field(default=0.0, ge=0, le=1024, allow_inf_nan=False)
    """GPUs that Ray reserves per replica."""


@raises_config_error
class ServerConfig(BaseSettings):
    """Settings of the server, as in its TOML file."""

    stacks: tuple[str, ...] = ()
    """Stacks to serve: recipes, models, or MODEL+PATCH. The first one is the default."""
    upstream: UpstreamConfig | None = None
    """Image server to guard, in place of stacks."""
    guards: tuple[str, ...] = ()
    """Guards to add to every stack, or to the other server: NAME or NAME-PRESET."""
    concept: str | None = None
    """Concept that supplies the guards' phrases and judge, and names the category of blocks."""
    allow_base: bool = False
    """Also serve models without patches, LoRAs and guards."""
    self_test: bool = True
    """Before serving, check that the guards catch prompts of the concept."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8484, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    token_file: Path | None = None
    """TOML file with bearer tokens, one table per client. Required on other hosts than loopback."""
    allowed_origins: tuple[Origin, ...] = ()
    """Origins of other sites with scripts that may call the server (CORS)."""
    allowed_hosts: tuple[Name, ...] = ()
    """Names besides `host` and loopback under which clients may call the server."""
    public_url: Origin | None = None
    """Scheme, host and port that clients reach, such as a TLS proxy's; for addresses of images.
    Default: `http` and the host of the request."""

    engine: EngineKind = "local"
    """What runs the stacks: worker processes of this machine, or replicas in a Ray cluster."""
    ray: RayConfig = RayConfig()
    """Settings of the engine `ray`."""
    workers: int = Field(default=1, ge=1, le=256)
    """Worker processes or replicas per stack, each with a copy of the model."""
    device: str = "auto"
    """Torch device of the workers."""
    dtype: str = "fp32"
    """Type of the weights: fp32, bf16 or fp16."""
    threads: int | None = Field(default=None, ge=1, le=MAX_THREADS)
    """CPU threads per worker. Default: an equal share of the cores."""
    allow_pickle: bool = False
    """Also load pickled weights, which can run code."""
    max_batch_size: int = Field(default=8, ge=1, le=256)
    """Most images per batch."""
    batch_window: float = Field(default=0.01, ge=0, le=10, allow_inf_nan=False)
    """Seconds that an idle worker waits for more requests of the same settings."""
    max_queue: int = Field(default=64, ge=1, le=100_000)
    """Most requests that wait; further ones get 429."""
    request_timeout: Timeout = 300.0
    """Seconds from the arrival of a request to its answer."""
    worker_timeout: Timeout = 120.0
    """Seconds without a sign of life after which a worker is killed and replaced."""
    start_timeout: Timeout = 900.0
    """Seconds that a worker may take to load its stack."""
    drain_timeout: Timeout = 30.0
    """Seconds for the accepted requests when the server is stopped."""
    num_inference_steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Denoising steps of requests that name none."""
    guidance_scale: GuidanceScale = 5.0
    """Guidance scale of requests that name none."""
    true_cfg_scale: GuidanceScale = 1.0
    """Scale of classifier-free guidance on FLUX; 1 turns it off, and with it negative prompts."""
    limits: RequestLimits = RequestLimits()
    """Limits of one request."""

    audit_log: Path | None = None
    """File to which one JSON line per request is appended before its answer is sent."""
    log_prompts: bool = False
    """Write prompts to the logs in place of their hashes."""
    c2pa_certificate: Path | None = None
    """PEM file with the certificate chain that signs C2PA manifests. Needs the extra c2pa."""
    c2pa_key: Path | None = None
    """PEM file with the private key of the certificate."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.stacks) == (self.upstream is not None):
            raise ValueError("stacks or an upstream must be given, and not both")
        if self.upstream is not None and not self.guards:
            raise ValueError(
                "guards must be given with an upstream, which is unguarded without them. "
                "For example: --guard judge-filter --concept skulls"
            )
        if self.upstream is not None and self._is_own(self.upstream.url):
            raise ValueError(
                f"upstream.url must be another server than this one, got {self.upstream.url!r}. "
                "Choose another port for this one with --port"
            )
        if self.engine == "ray" and self.upstream is not None:
            raise ValueError("stacks must be given with the engine 'ray', got an upstream")
        if self.ray.max_replicas is not None and self.ray.max_replicas < self.workers:
            raise ValueError(f"max_replicas must be >= workers, got {self.ray.max_replicas}")
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("c2pa_certificate and c2pa_key must be given together")
        return self

    def _is_own(self, url: str) -> bool:
        """Return whether an address is that of this server, as far as its text tells."""
        address = urlsplit(url)
        host = address.hostname or ""
        is_open = self.host in ("0.0.0.0", "::")  # noqa: S104  # it binds nothing
        is_here = is_loopback(host) and (self.is_loopback or is_open)
        return address.port == self.port and (is_here or host == self.host)

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, as a name or an address."""
    from ipaddress import ip_address

    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_config(path: Path) -> ServerConfig:
    """Return the settings in a TOML file, with paths relative to it.

    Raises:
        FileError: the file is missing or invalid.
    """
    if not exists(path, file=True):
        raise FileError(f"the server file {str(path)!r} does not exist")
    config, folder = validate(ServerConfig, read_toml(path), str(path)), path.parent
    names = ("token_file", "audit_log", "c2pa_certificate", "c2pa_key")
    paths = {n: folder / value for n in names if (value := getattr(config, n)) is not None}
    stacks = tuple(_resolve_stack(stack, folder) for stack in config.stacks)
    concept = config.concept
    if concept is not None and concept.endswith(".toml"):
        concept = str(folder / concept)
    upstream = config.upstream
    if upstream is not None:
        files = {n: v for n in ("token_file", "ca_file") if (v := getattr(upstream, n)) is not None}
        upstream = upstream.model_copy(update={n: folder / v for n, v in files.items()})
    update = {**paths, "stacks": stacks, "concept": concept, "upstream": upstream}
    return config.model_copy(update=update)


def _resolve_stack(spec: str, folder: Path) -> str:
    """Return a stack with the files that it names in a folder; names of models stay."""
    if spec.endswith(".toml"):
        return str(folder / spec)
    name, separator, parts = spec.rpartition("=")
    files = [
        str(folder / part) if part not in MODELS and exists(folder / part) else part
        for part in parts.split("+")
    ]
    return f"{name}{separator}{'+'.join(files)}"
