"""The command that publishes models and corpora."""
# No `from __future__ import annotations`: typer reads the annotations.

from pathlib import Path
from typing import Annotated

import typer


def push(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="MODEL_OR_CORPUS", help="A finished model's folder, or that of a corpus.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="The repository on the hub, such as owner/name.")],
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run", metavar="DIR", help="Write what would be uploaded to this new folder; upload nothing."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; one that is public already is refused.")
    ] = False,
) -> None:
    """Upload a model or a corpus to the model hub with its card, and refuse files that do not belong to it.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from guardreasoner_vl.cli.options import refuse_options
    from guardreasoner_vl.pipeline import publish

    if dry_run is None:
        typer.echo(publish.push(folder, repo_id, private))
        return
    refuse_options(context, ("private",), "has no effect with --dry-run, which uploads nothing: leave it out")
    published = publish.dry_run(folder, repo_id, dry_run)
    typer.echo(
        f"{len(published.files) + 1:,} files of a {published.kind}, {published.bytes / 1e6:,.2f} MB in {dry_run}"
    )


COMMANDS = (push,)
