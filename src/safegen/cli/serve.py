"""The `serve` command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safegen.cli.console import echo, echo_status
from safegen.cli.options import Pickle
from safegen.core.errors import ConfigError, MissingExtraError
from safegen.core.settings import MAX_THREADS


def serve(
    stack: Annotated[
        list[str] | None,
        typer.Option(help="Recipe, model or MODEL+PATCH to serve. Repeatable; first = default."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with all settings of the server.")
    ] = None,
    upstream: Annotated[
        str | None, typer.Option(help="URL of an image server to guard, instead of --stack.")
    ] = None,
    upstream_kind: Annotated[
        Literal["openai", "a1111"] | None,
        typer.Option(help="Interface of that server [default: openai]"),
    ] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="Guard to add: NAME or NAME-PRESET. Repeatable.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Concept that supplies the guards' phrases and judge.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one [default: 8484]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes per stack [default: 1]")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"] | None,
        typer.Option(help="Worker processes, or replicas in a Ray cluster [default: local]"),
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Write the YAML file with which Ray Serve runs --config, and end."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="TOML file with bearer tokens, one table per client.")
    ] = None,
    audit_log: Annotated[
        Path | None, typer.Option(help="File to append one JSON line per request to.")
    ] = None,
    allow_base: Annotated[
        bool, typer.Option("--allow-base", help="Also serve models without patches and guards.")
    ] = False,
    new_token: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print a new token and its table for NAME, and exit."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Torch device: cpu, cuda ... [default: auto]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weight type: fp32, bf16 or fp16 [default: fp32]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_THREADS, help="CPU threads per worker [default: a share]"),
    ] = None,
    allow_pickle: Pickle = False,
) -> None:
    """Serve stacks over HTTP, or guard another image server: OpenAI and A1111 interfaces, a page.

    What a guard blocks is answered with 400. Where a guard or a judge fails, no image leaves.
    """
    with _needs_extra():
        from safegen.serve.config import ServerConfig, read_config
        from safegen.serve.server import run_server
    if new_token is not None:
        _print_token(new_token)
        return
    values: dict[str, Any] = {
        "stacks": stack,
        "guards": guard,
        "concept": concept,
        "host": host,
        "port": port,
        "workers": workers,
        "engine": engine,
        "token_file": token_file,
        "audit_log": audit_log,
        "allow_base": allow_base or None,
        "threads": threads,
        "device": device,
        "dtype": dtype,
        "allow_pickle": allow_pickle or None,
        "upstream": {"url": upstream} if upstream else None,
    }
    if upstream_kind and not upstream:
        raise ConfigError("--upstream-kind must have --upstream, got none. Give its URL")
    if upstream_kind:
        values["upstream"]["kind"] = upstream_kind
    given = {name: value for name, value in values.items() if value is not None}
    if write_config is not None:
        _write_config(config, write_config, given)
        return
    if config is None and not (stack or upstream):
        raise ConfigError(
            "--stack, --upstream or --config must be given. "
            "For example: --stack mini --guard judge-filter --concept skulls"
        )
    settings = dict(read_config(config)) if config else {}
    if upstream and settings.get("upstream") is not None:
        given["upstream"] = dict(settings["upstream"]) | given["upstream"]
    server_config = ServerConfig(**(settings | given))
    what = ", ".join(server_config.stacks) or "guards"
    echo_status(f"loading {what}: the address follows once the guards have passed a self-test")
    raise typer.Exit(run_server(server_config, on_ready=_print_address))


def _print_address(address: str) -> None:
    """Print where the server listens."""
    echo_status(
        f"safegen serves on {address} (page: {address}/, interface: {address}/openapi.json)"
    )


def _print_token(name: str) -> None:
    """Print a new token, and the table of the token file that stores its hash."""
    from safegen.serve.operations.tokens import make_token

    token, table = make_token(name)
    echo_status("The client's token, which is not stored:")
    echo(token)
    echo_status("Add to the token file:")
    for line in table.splitlines():
        echo(line)


def _write_config(config: Path | None, out: Path, given: Mapping[str, Any]) -> None:
    """Write the Ray Serve file of a server file."""
    if config is None or given:
        raise ConfigError(
            "--write-config must have --config and no other option, which Ray would not see. "
            "Write all settings into that file."
        )
    from safegen.serve.ray.server import write_ray_config

    write_ray_config(config, out)
    echo(f"{out}: start it with `serve run {out}`")


@contextmanager
def _needs_extra() -> Iterator[None]:
    """Name the extra if one of its libraries is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("safegen"):
            raise
        raise MissingExtraError("safegen serve", str(error.name), "serve") from error
