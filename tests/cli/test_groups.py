"""A group of options is a dataclass for the command, and single options for whoever types the command."""
# No `from __future__ import annotations`: typer reads the annotations.

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from guardreasoner_vl.cli.groups import grouped, option_names


@dataclass(frozen=True)
class ServerOptions:
    url: Annotated[str, typer.Option(help="The address.")]
    retries: Annotated[int, typer.Option(min=0, help="The tries.")] = 3


def app_of(calls: list[tuple[str, ServerOptions, bool]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @grouped
    def ping(
        context: typer.Context,
        name: Annotated[str, typer.Argument()] = "all",
        *,
        server: ServerOptions,
        loud: Annotated[bool, typer.Option("--loud")] = False,
    ) -> None:
        """Ask a server."""
        assert set(context.params) == {"name", "url", "retries", "loud"}
        calls.append((name, server, loud))

    return app


def test_the_command_gets_the_group_with_its_defaults() -> None:
    calls: list[tuple[str, ServerOptions, bool]] = []
    app = app_of(calls)
    assert CliRunner().invoke(app, ["--url", "http://x"]).exit_code == 0
    assert CliRunner().invoke(app, ["one", "--url", "http://y", "--retries", "0", "--loud"]).exit_code == 0
    assert calls == [("all", ServerOptions("http://x"), False), ("one", ServerOptions("http://y", 0), True)]


def test_an_option_of_a_group_is_checked_and_may_be_required() -> None:
    calls: list[tuple[str, ServerOptions, bool]] = []
    assert CliRunner().invoke(app_of(calls), []).exit_code == 2
    assert CliRunner().invoke(app_of(calls), ["--url", "x", "--retries", "-1"]).exit_code == 2
    assert calls == []


def test_help_shows_the_options_where_the_group_stands() -> None:
    shown = CliRunner().invoke(app_of([]), ["--help"], terminal_width=100).output
    assert "Ask a server." in shown
    assert "--server" not in shown
    assert shown.index("--url") < shown.index("--retries") < shown.index("--loud")


def test_the_names_of_the_options() -> None:
    assert option_names(ServerOptions, ServerOptions) == ("url", "retries") * 2
