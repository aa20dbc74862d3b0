"""The command that runs the service."""
# No `from __future__ import annotations`: typer reads the annotations. Whatever else a command needs is
# imported inside it, so that --help stays instant.

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from guardreasoner_vl.choices import Mode
from guardreasoner_vl.cli.errors import OK
from guardreasoner_vl.cli.options import ModelOption, UrlOption
from guardreasoner_vl.cli.terminal import be_quiet
from guardreasoner_vl.errors import MissingExtraError


def serve(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings as YAML; GUARDREASONER_* variables override them.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="The address to listen on; one that other machines can reach requires keys."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="The port to listen on, by default 8800.")] = None,
    model: ModelOption = None,
    base_url: UrlOption = None,
    mode: Annotated[Mode | None, typer.Option("--mode", help="The mode of the default guard.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings, secrets masked, and exit.")
    ] = False,
) -> None:
    """Serve the guard over HTTP, with a web page to try it."""
    be_quiet()
    try:
        from guardreasoner_vl.service.config import DEFAULT, as_plain, load_config
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error
    guard = {name: value for name, value in (("model", model), ("base_url", base_url), ("mode", mode)) if value}
    overrides: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if guard:
        overrides["guards"] = {DEFAULT: guard}
    read = partial(load_config, config, **overrides)
    settings = read()
    if print_config:
        import yaml

        typer.echo(yaml.safe_dump(dict(as_plain(settings)), sort_keys=False), nl=False)
        raise typer.Exit(OK)
    try:
        from guardreasoner_vl.service.server import serve as run
    except ImportError as error:
        raise MissingExtraError(error.name or "uvicorn", "serve") from error
    run(settings, reload=read)


COMMANDS = (serve,)
